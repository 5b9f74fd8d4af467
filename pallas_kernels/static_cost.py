"""What a kernel costs on an accelerator that is not there: compiles for it and prints the compiler's own figures.

python -m pallas_kernels.static_cost wkv7 --topology v6e:2x2 --B 1 --T 8192 --H 16 --K 128
python -m pallas_kernels.static_cost wkv7 --target sm_90 --B 1 --T 8192 --H 16 --K 128
python -m pallas_kernels.static_cost linear_loss --topology v5e:2x2 --tokens 2048 --vocab 152064 --width 896

A topology needs the `tpu` extra (libtpu has the compiler), a target the `cuda` extra; neither needs the hardware.
"""

import argparse

_OPERATIONS = ("wkv7", "wkv6", "gdn", "linear_loss")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("operation", choices=_OPERATIONS)
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="a TPU slice: v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1")
    where.add_argument("--target", help="a GPU's compute capability: sm_80, sm_90, sm_100")
    made.add_argument("--B", type=int, default=1)
    made.add_argument("--T", type=int, default=8192)
    made.add_argument("--H", type=int, default=16)
    made.add_argument("--K", type=int, default=128, help="channels of a head's keys and values")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="decays are float32 always")
    made.add_argument("--chunk-size", type=int, default=None)
    made.add_argument("--implementation", nargs="+", default=["pallas_tpu", "chunked"], help="on TPU")
    made.add_argument("--tokens", type=int, default=2048, help="of linear_loss, as --vocab and --width")
    made.add_argument("--vocab", type=int, default=152064)
    made.add_argument("--width", type=int, default=896)
    return made


def _check_place(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a chip that is not known, or has nothing of the operation."""
    if arguments.topology is not None:
        from pallas_kernels.measure import static_cost_tpu

        static_cost_tpu.chip_of(arguments.topology)
        return
    if arguments.operation == "linear_loss":
        raise ValueError("static_cost got linear_loss with --target, expected --topology: it has no GPU kernel.")
    from pallas_kernels.measure import static_cost_gpu

    static_cost_gpu.capability_of(arguments.target)


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    try:
        _check_place(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.operation == "linear_loss":
        from pallas_kernels.measure import static_cost_loss

        static_cost_loss.report(arguments.topology, arguments.tokens, arguments.vocab, arguments.width)
        return
    if arguments.target is not None:
        from pallas_kernels.measure import static_cost_gpu

        sizes = (arguments.B, arguments.T, arguments.H, arguments.K)
        static_cost_gpu.main(arguments.operation, arguments.target, *sizes, dtype=arguments.dtype)
        return
    from pallas_kernels.measure import static_cost_tpu

    shape = static_cost_tpu.Shape(arguments.B, arguments.T, arguments.H, arguments.K, arguments.dtype)
    static_cost_tpu.report(
        arguments.operation, arguments.topology, shape, arguments.implementation, arguments.chunk_size
    )


if __name__ == "__main__":
    main()
