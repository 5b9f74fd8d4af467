"""Porting and export: Hugging Face directories of safetensors to our parameter tree, and back."""
