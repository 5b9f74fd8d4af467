"""Porting and export: Hugging Face directories of safetensors to our parameter tree, and back."""

from radlads_jax.models.tensors import param_shapes
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.hub import check_tokenizer, load_tokenizer, resolve_model_dir
from radlads_jax.porting.load import load_params
from radlads_jax.porting.names import disk_tensors
from radlads_jax.porting.save import save_params

__all__ = [
    "check_tokenizer",
    "disk_tensors",
    "hf_config_from_model",
    "load_params",
    "load_tokenizer",
    "model_config_from_hf",
    "param_shapes",
    "read_config",
    "resolve_model_dir",
    "save_params",
]
