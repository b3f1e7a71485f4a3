"""An fp32 value as a bf16 weight and 16 bits beside it: to the bit, and the weight is the nearest one."""

from __future__ import annotations

import math

import torch

from steep.ops import master_weights

LOWS = (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF)  # of fp32's bits: carries begin at 0x8000


def every_upper(lower: int) -> torch.Tensor:
    """fp32 values with all upper halves there are."""
    return (torch.arange(2**16) * 2**16 + lower).to(torch.int64).sub(2**32 * (torch.arange(2**16) >= 2**15)).int()


def test_a_value_is_its_two_parts() -> None:
    """Zeros and infinities of both signs, subnormal numbers, the largest; a NaN stays one in both."""
    for lower in LOWS:
        bits = every_upper(lower)
        assert bits.unique().numel() == 2**16
        values = bits.clone().view(torch.float32)
        weights, low = master_weights.split(values)
        assert (weights.dtype, low.dtype) == (torch.bfloat16, torch.int16)
        back, nan = master_weights.join(weights, low), values.isnan()
        assert torch.equal(back.view(torch.int32)[~nan], bits[~nan]), hex(lower)
        assert torch.equal(weights.isnan(), nan) and torch.equal(back.isnan(), nan), hex(lower)
        assert torch.equal(values.view(torch.int32), bits)  # they are read alone


def test_the_weight_is_the_nearest() -> None:
    """As torch rounds, but for ties, which go away from zero; beyond bf16's range it is infinite."""
    for lower in LOWS:
        values = every_upper(lower).view(torch.float32)
        values = values[~values.isnan()]
        weights, _ = master_weights.split(values)
        if lower != 0x8000:
            assert torch.equal(weights, values.bfloat16()), hex(lower)
        else:
            assert (weights.float().abs() > values.abs()).all()
            assert ((weights != values.bfloat16()).sum() - len(values) / 2).abs() <= 2
    weights, low = master_weights.split(torch.tensor([3.4e38, -3.4e38]))
    assert weights.tolist() == [math.inf, -math.inf]
    assert torch.equal(master_weights.join(weights, low), torch.tensor([3.4e38, -3.4e38]))


def test_a_master_begins_as_the_weight() -> None:
    weights = every_upper(0).view(torch.float32).bfloat16()
    values = master_weights.join(weights, torch.zeros(2**16, dtype=torch.int16))
    there = ~weights.isnan()
    assert torch.equal(values[there], weights.float()[there])
