"""Our logits beside transformers' for a pretrained teacher or an export, float32 and bfloat16, on a text file's head.

    python tests/measure/parity_beside_torch.py TEACHER_DIR [TEACHER_DIR ...] --text FILE [--tokens 512]
    python tests/measure/parity_beside_torch.py RUN_DIR/export --trust_remote_code --text FILE

Prints the relative RMS to transformers' float32 logits, ours and for bfloat16 transformers' own; with several
directories of the same weights (as llama and as qwen2, say) also that between our logits of the first and of each.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from radlads_jax.models import bind
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params


def our_logits(directory: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    cfg = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype=dtype)
    params = load_params(directory, cfg, dtype=dtype)

    @jax.jit
    def run(params, tokens):
        decoder = bind(cfg, params)
        return decoder.logits(decoder.hidden(tokens)[0])

    return np.asarray(run(params, jnp.asarray(tokens)), np.float32)


def their_logits(directory: Path, tokens: np.ndarray, dtype: str, **options: bool) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), **options)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.float().numpy()


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm((got - expected).astype(np.float64)) / np.linalg.norm(expected.astype(np.float64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--trust_remote_code", action="store_true", help="run the torch code in an export")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8", errors="replace")[: args.tokens * 20]
    # Not AutoTokenizer: for a qwen2 directory it would apply Qwen's own splitting rule.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(args.models[0] / "tokenizer.json"))
    tokens = np.array([tokenizer(text)["input_ids"][: args.tokens]], np.int32)
    first = None
    for directory in args.models:
        expected = their_logits(directory, tokens, "float32", trust_remote_code=args.trust_remote_code)
        ours = our_logits(directory, tokens, "float32")
        first = ours if first is None else first
        print(f"{directory}, {tokens.size} tokens")
        print(f"  float32   ours {relative_rms(ours, expected):.2e}")
        rounded = relative_rms(our_logits(directory, tokens, "bfloat16"), expected)
        other = their_logits(directory, tokens, "bfloat16", trust_remote_code=args.trust_remote_code)
        theirs = relative_rms(other, expected)
        print(f"  bfloat16  ours {rounded:.2e}, transformers {theirs:.2e}")
        print(f"  float32   ours to ours of {args.models[0].name} {relative_rms(ours, first):.2e}", flush=True)


if __name__ == "__main__":
    main()
