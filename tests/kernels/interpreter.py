"""Triton's interpreter, made right where it is silently wrong in bf16.

The interpreter keeps bf16 as its bits in uint16. `tl.dot` (triton 3.6 and 3.7) multiplies those bits as if they were
numbers, and a cast from fp32 to bf16 cuts the low bits off where a GPU rounds to the nearest even. The tests of kernels
stand on a dot that casts up to fp32 first, as tensor cores do, and on a cast that rounds as the GPU's. Arithmetic on
bf16 itself stays wrong there: kernels cast up before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def upcast(handle: Any) -> np.ndarray:
    """The values of a tensor of the interpreter in fp32, if they are in 16 bit; else as they are."""
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32) if handle.dtype.scalar == tl.float16 else handle.data


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the bf16 that is nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def repair(patch: pytest.MonkeyPatch) -> None:
    """Set both on the interpreter, until `patch` is undone."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if 8 in (a.dtype.scalar.primitive_bitwidth, b.dtype.scalar.primitive_bitwidth):
            return dot(self, a, b, d, *precision)
        return TensorHandle(np.matmul(upcast(a), upcast(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
