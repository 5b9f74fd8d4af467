"""Triton's interpreter in the place of a GPU: kernels run on the CPU, and round as tensor cores do."""

from typing import Any

import jax
import numpy as np

from pallas_kernels.shared import triton_call


class Pointer:
    """As much of a torch tensor as Triton's interpreter asks for, between guards that nobody may touch or use."""

    GUARD = 1 << 12

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.dtype = str(np.dtype(dtype))
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        # All ones: NaN in every float type, and no segment's id.
        self.memory = np.full(size + 2 * self.GUARD, 0xFF, np.uint8)
        self.array = self.memory[self.GUARD : self.GUARD + size].view(dtype).reshape(shape)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def check(self) -> None:
        assert (self.memory[: self.GUARD] == 0xFF).all() and (self.memory[-self.GUARD :] == 0xFF).all()

    # The interpreter would copy a GPU's memory to the host and back; this memory is there already.
    def untyped_storage(self) -> "Pointer":
        return self

    def cpu(self) -> "Pointer":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "Pointer":
        return self

    def nothing(self, *_: Any) -> None:
        return None

    set_ = storage_offset = size = stride = copy_ = nothing


def interpret(launch: triton_call.Launch) -> Any:
    """Runs a kernel by Triton's interpreter, in a callback."""

    def run(*arrays: jax.Array) -> tuple[np.ndarray, ...]:
        pointers = [Pointer(x.shape, x.dtype) for x in (*arrays, *launch.outputs)]
        for pointer, array in zip(pointers, arrays, strict=False):
            pointer.array[...] = np.asarray(array)
        launch.kernel[launch.grid](*pointers, **launch.settings)
        for pointer in pointers:
            pointer.check()
        return tuple(pointer.array for pointer in pointers[len(arrays) :])

    return jax.pure_callback(run, tuple(launch.outputs), *launch.inputs)


def round_as_tensor_cores_do() -> None:
    """Teaches the interpreter bfloat16, which it truncates and multiplies as integers, and tf32, which it lacks."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter

    handle, types_of = interpreter.TensorHandle, interpreter._get_np_dtype

    def cast(self: Any, source: Any, target: Any) -> Any:
        data = source.data.view(ml_dtypes.bfloat16) if source.dtype.scalar == tl.bfloat16 else source.data
        if target.scalar == tl.bfloat16:
            return handle(data.astype(ml_dtypes.bfloat16).view(np.uint16), target.scalar)
        return handle(data.astype(types_of(target)), target.scalar)

    def tf32(x: np.ndarray) -> np.ndarray:
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def dot(self: Any, a: Any, b: Any, total: Any, precision: Any, _: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            x, y = (operand.data.view(ml_dtypes.bfloat16).astype(np.float32) for operand in (a, b))
            product = x @ y
        else:
            x, y = a.data, b.data
            product = tf32(x) @ tf32(y)
            if "x3" in str(precision).lower():
                product = product + (tf32(x) @ tf32(y - tf32(y)) + tf32(x - tf32(x)) @ tf32(y))
        return handle(product + total.data, total.dtype.scalar)

    builder = interpreter.InterpreterBuilder
    builder.create_fp_trunc = builder.create_fp_ext = cast
    builder.create_dot = dot
