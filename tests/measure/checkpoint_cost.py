"""What the checksums of a checkpoint cost, beside writing and reading it, as ratios of medians in one run.

python tests/measure/checkpoint_cost.py [--megabytes 400] [--repeats 5] [--directory DIR]
"""

import argparse
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import array_sums


def seconds(run: Callable[[], object]) -> float:
    begun = time.monotonic()
    run()
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="What the checksums of a checkpoint cost.")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=pathlib.Path)
    args = parser.parse_args()
    arrays, width = 8, 1024
    rows = args.megabytes * 10**6 // (4 * width * arrays)
    state = {f"w{i}": jax.random.normal(jax.random.key(i), (rows, width), jnp.float32) for i in range(arrays)}
    root = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=args.directory))
    times: dict[str, list[float]] = {"sums": [], "save": [], "restore": []}
    array_sums(state)
    for step in range(1, args.repeats + 1):
        with Checkpoints(root, keep=1) as checkpoints:
            times["sums"].append(seconds(lambda: array_sums(state)))
            write = {"data_state": {}, "meta": {}, "wait": True}
            times["save"].append(seconds(lambda s=step, c=checkpoints, w=write: c.save(s, state, **w)))
            times["restore"].append(seconds(lambda s=step, c=checkpoints: c.restore(s, state)))
    shutil.rmtree(root)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{args.megabytes} MB: checksums take {middle['sums'] / middle['save']:.3f} of a save", end=" and ")
    print(f"{middle['sums'] / middle['restore']:.3f} of a restore, both of which contain them once")


if __name__ == "__main__":
    main()
