"""Triton's interpreter, made right where it is silently wrong in bf16 and e4m3.

The interpreter keeps bf16 as its bits in uint16. `tl.dot` (triton 3.6 and 3.7) multiplies those bits as if they were
numbers, and a cast from fp32 to bf16 cuts the low bits off where a GPU rounds to the nearest even. The tests of kernels
stand on a dot that casts up to fp32 first, as tensor cores do, and on a cast that rounds as the GPU's. Arithmetic on
bf16 itself stays wrong there: kernels cast up before it.

A cast from fp32 to e4m3 rounds ties away from zero there, cuts the numbers below 2^-6 off, and makes other numbers of
large ones, where a GPU rounds to the nearest even, and to the largest what is above it. Cast up, the undefined is 480.

It also does much for nothing, which is left out: two thirds of its time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import pytest


def upcast(handle: Any) -> np.ndarray:
    """The values of a tensor of the interpreter in fp32, if they are in bf16, fp16 or e4m3; else as they are."""
    import triton.language as tl

    if handle.dtype.scalar == tl.float8e4nv:
        return from_e4m3(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32) if handle.dtype.scalar == tl.float16 else handle.data


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the bf16 that is nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_to_e4m3(values: np.ndarray) -> np.ndarray:
    """The codes of the e4m3 that is nearest, ties to even, and at most 448; a NaN stays one."""
    magnitude = np.minimum(np.abs(values), np.float32(448))
    exponent = np.frexp(np.maximum(magnitude, np.float32(2**-6)))[1] - 1  # below 2^-6 numbers are as far apart as above
    steps = np.rint(np.ldexp(magnitude, 3 - exponent))  # 8 a power of two
    codes = np.where(np.isnan(values), 0x7F, steps + 8 * (exponent + 6)).astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << 7)


def from_e4m3(codes: np.ndarray) -> np.ndarray:
    """Their values in fp32."""
    exponent, steps = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    values = np.ldexp(np.where(exponent > 0, steps + 8, steps), np.maximum(exponent, 1) - 10).astype(np.float32)
    values = np.where(codes & 0x7F == 0x7F, np.float32(np.nan), values)
    return np.where(codes >> 7 == 1, -values, values)


def repair(patch: pytest.MonkeyPatch) -> None:
    """Set all on the interpreter, until `patch` is undone."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        eight_bit = [each.dtype.scalar for each in (a, b) if each.dtype.scalar.primitive_bitwidth == 8]
        if any(each != tl.float8e4nv for each in eight_bit):
            return dot(self, a, b, d, *precision)
        return TensorHandle(np.matmul(upcast(a), upcast(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.float8e4nv):
            return TensorHandle(round_to_e4m3(src.data), tl.float8e4nv)
        if types == (tl.float8e4nv, tl.float32):
            return TensorHandle(from_e4m3(src.data), tl.float32)
        return convert(self, src, dst_type, rounding)

    patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Leave out what changes no result, until `patch` is undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    # It works out whether each sum of integers overflows, and asserts it only under `debug`.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))

    # It makes a table of all types to look one up.
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def get_np_dtype(kind: Any) -> np.dtype:
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else of_scalar(kind)

    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)

    # It sets its functions into triton.language anew for each call from one kernel to another, where they stand.
    patch_language, stands = interpreter._patch_lang, set[str]()

    @functools.cache
    def languages(kernel: Any) -> frozenset[str]:
        modules = (value for value in kernel.__globals__.values() if inspect.ismodule(value))
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def patch_once(kernel: Any) -> Any:
        own = languages(kernel)
        if own <= stands:
            return interpreter._LangPatchScope()
        scope = patch_language(kernel)
        stands.update(own)
        restore = scope.restore

        def leave() -> None:
            restore()
            stands.difference_update(own)

        scope.restore = leave
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_once)
