from hf_exports import code_cache, export, tokenizer_dir

__all__ = ["code_cache", "export", "tokenizer_dir"]
