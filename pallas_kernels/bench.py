"""Times the recurrences and losses of this machine's backend, every implementation in one run, and prints ratios.

python -m pallas_kernels.bench [wkv7 wkv6 gdn] [--shape B,T,H,K ...] [--repeats N] [--chunk-size C]
python -m pallas_kernels.bench linear_loss [--tokens 2048] [--vocab 152064] [--width 896] [--repeats N]
"""

import argparse

from pallas_kernels.measure import bench, loss_forms


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected B,T,H,K such as {bench.SHAPES[0]}")
    batch, length, heads, size = map(int, sizes)
    return batch, length, heads, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=list(bench.OPERATIONS), metavar="operation")
    parser.add_argument("--tokens", type=int, default=loss_forms.Size.tokens, help="of linear_loss, as the two below")
    parser.add_argument("--vocab", type=int, default=loss_forms.Size.vocab)
    parser.add_argument("--width", type=int, default=loss_forms.Size.width)
    parser.add_argument("--shape", action="append", type=_shape, help="B,T,H,K; again for another")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=None)
    arguments = parser.parse_args()
    known = [*bench.OPERATIONS, "linear_loss"]
    # By argparse's own choices none at all would be refused too.
    if unknown := [name for name in arguments.operations if name not in known]:
        parser.error(f"got {', '.join(unknown)}, expected some of {', '.join(known)}, or none for all recurrences")
    if "linear_loss" in arguments.operations:
        sizes = loss_forms.Size(arguments.tokens, arguments.vocab, arguments.width)
        bench.compare_losses(sizes, arguments.repeats)
    for operation in (name for name in arguments.operations if name != "linear_loss"):
        for shape in arguments.shape or map(_shape, bench.SHAPES):
            bench.compare(operation, shape, arguments.repeats, arguments.chunk_size)


if __name__ == "__main__":
    main()
