"""Quantised weights as bitsandbytes makes them, for the tests of ops."""

from __future__ import annotations

from functools import cache

import torch
from bitsandbytes import functional

from steep.ops.int8 import Int8Weight
from steep.ops.nf4 import Nf4Weight


def nf4(
    weight: torch.Tensor, double: bool = True, block_size: int = 64, device: str = "cpu"
) -> tuple[Nf4Weight, torch.Tensor]:
    """`weight` in NF4 on `device`, and what bitsandbytes makes of it on a CPU, in fp32.

    It is given one long row: where a row ends inside a block, bitsandbytes' CPU kernel (0.50.2, AVX512) takes the wrong
    absmax from the second row on.
    """
    row = weight.float().cpu().reshape(1, -1)
    codes, state = functional.quantize_4bit(row, blocksize=block_size, compress_statistics=double, quant_type="nf4")
    assert state.code is not None
    parts = {}
    if double:
        assert state.offset is not None and state.state2 is not None
        parts = {"code_book": state.state2.code, "nested_absmax": state.state2.absmax, "offset": state.offset}
    stored = Nf4Weight(
        codes=codes.to(device),
        absmax=state.absmax.to(device),
        table=state.code.to(device),
        shape=(weight.shape[0], weight.shape[1]),
        block_size=block_size,
        **{name: part.to(device) for name, part in parts.items()},
    )
    return stored, functional.dequantize_4bit(codes, state).view(weight.shape).to(device)


@cache
def nf4_on_gpu(shape: tuple[int, int], double: bool = True) -> tuple[Nf4Weight, torch.Tensor]:
    """A random weight, kept for the next test: a CPU takes seconds to quantise one of a real size."""
    return nf4(torch.randn(shape), double, device="cuda")


def int8(weight: torch.Tensor, device: str = "cpu") -> tuple[Int8Weight, torch.Tensor]:
    """`weight` in 8 bit on `device`, and what bitsandbytes makes of it on a CPU, in fp32."""
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    dense = functional.int8_vectorwise_dequant(codes, absmax)
    return Int8Weight(codes.to(device), absmax.to(device)), dense.to(device)
