"""Times the recurrences and losses of this machine's backend, every implementation in one run, and prints ratios.

python -m pallas_kernels.bench [wkv7 wkv6 gdn] [--shape B,T,H,K ...] [--repeats N] [--chunk-size C]
python -m pallas_kernels.bench linear_loss [--tokens 2048] [--vocab 152064] [--width 896] [--repeats N]
"""

import argparse

from pallas_kernels.measure import bench, loss_forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", default=list(bench.OPERATIONS), metavar="operation")
    parser.add_argument("--tokens", type=int, default=loss_forms.Size.tokens, help="of linear_loss, as the two below")
    parser.add_argument("--vocab", type=int, default=loss_forms.Size.vocab)
    parser.add_argument("--width", type=int, default=loss_forms.Size.width)
    parser.add_argument("--shape", action="append", help="B,T,H,K; again for another")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=None)
    arguments = parser.parse_args()
    if "linear_loss" in arguments.operations:
        sizes = loss_forms.Size(arguments.tokens, arguments.vocab, arguments.width)
        bench.compare_losses(sizes, arguments.repeats)
    for operation in (name for name in arguments.operations if name != "linear_loss"):
        for shape in arguments.shape or bench.SHAPES:
            batch, length, heads, size = (int(n) for n in shape.split(","))
            bench.compare(operation, (batch, length, heads, size), arguments.repeats, arguments.chunk_size)


if __name__ == "__main__":
    main()
