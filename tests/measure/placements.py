"""What a teacher answers with windows in all layers but a few: chosen ones, every n-th, drawn ones; nothing trained.

python tests/measure/placements.py --model TEACHER --data TEXT --choice choice.json ... [--random 3] [--every 4]
    [--lengths 512 1024] [--prompts 32] [--kinds passkey multi_key recall] [--student RUN] [--dtype bfloat16]

--student: the mixers of a run of stage 1 alone in the place of windows, as `python -m radlads_jax.choose` has them. A
line for each placement and length: share of right answers (teacher-forced) with its 95% interval, the answers' NLL
with its standard error, KL on text. The prompts are others than those of the choice (another seed).
"""

import argparse
import json
import pathlib

import numpy as np

from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation import layer_choice
from radlads_jax.evaluation.intervals import wilson
from radlads_jax.evaluation.layer_choice import Sizes
from radlads_jax.evaluation.swaps import Rows, Student, Swaps, prompt_rows, text_rows
from radlads_jax.models.window import WindowOptions
from radlads_jax.system import storage

SEED = 1000


def placements(layers: int, chosen: dict[str, list[int]], every: int, random: int, count: int) -> dict[str, list[int]]:
    """Kept layers by name; the drawn ones are as many as `count`."""
    rng = np.random.default_rng(SEED)
    drawn = {f"drawn {i + 1}": sorted(rng.permutation(layers)[:count].tolist()) for i in range(random)}
    named = {
        "all (the teacher)": list(range(layers)),
        "none": [],
        f"every {every}th": list(range(layers))[every - 1 :: every],
    }
    return chosen | named | drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--choice", type=pathlib.Path, nargs="+", default=[], help="each by its file's path")
    parser.add_argument("--student")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="names of placements; default: all")
    parser.add_argument("--random", type=int, default=3)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--count", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=list(layer_choice.KINDS))
    args = parser.parse_args()
    model = load_model(args.model, dtype=args.dtype)
    chosen = {str(path): json.loads(path.read_text())["layers"] for path in args.choice}
    layers = model.cfg.num_layers
    named = placements(layers, chosen, args.every, args.random, max(map(len, chosen.values()), default=args.count))
    if args.student:
        loaded = load_model(args.student, dtype=args.dtype)
        student = Student(loaded.cfg, loaded.params)
    else:
        student = layer_choice.windows(model.cfg, model.params, WindowOptions())
    for length in args.lengths:
        sizes = Sizes(args.prompts, args.texts, length, args.batch, SEED)
        texts, num_texts = text_rows(
            [layer_choice.text_batch(model.tokenizer, sizes, storage.as_path(args.data))],
            args.texts,
            args.batch,
            length,
        )
        prompts, num_prompts = prompt_rows(layer_choice.prompts(model.tokenizer, sizes, args.kinds), args.batch, length)
        swaps = Swaps(model.cfg, model.params, Rows(texts, prompts, num_texts, num_prompts), student)
        for name in args.only or named:
            measured, _ = swaps.flipped(~np.isin(np.arange(layers), named[name]), ())
            of_kind = [line(kind, measured, i * args.prompts, args.prompts) for i, kind in enumerate(args.kinds)]
            kl = f"KL {measured.kl.mean():.3f} ({measured.kl.std(ddof=1) / len(measured.kl) ** 0.5:.3f})"
            print(f"{length} {name} {named[name]}: {'; '.join(of_kind)}; {kl}", flush=True)


def line(kind: str, measured, first: int, count: int) -> str:
    """One kind of prompt: right answers with their interval, NLL with its standard error."""
    nll, right = (values[first : first + count] for values in (measured.nll, measured.right))
    low, high = wilson(float(right.mean()), count)
    error = nll.std(ddof=1) / count**0.5
    return f"{kind} {right.mean():.0%} ({low:.0%} to {high:.0%}), NLL {nll.mean():.3f} ({error:.3f})"


if __name__ == "__main__":
    main()
