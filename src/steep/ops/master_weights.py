"""An fp32 value in two parts: the nearest bf16, which is the weight, and what 16 bits say beside it.

bf16 is the upper half of fp32's bits. The weight is that half rounded to the nearest; what is left is the distance
from it in units of fp32's last bit, within [-2^15, 2^15), so an int16. Both together are the fp32 value, to the bit: a
master of a bf16 weight takes 2 bytes beside it, and not 4.

A tie goes away from zero: to the even neighbour, as torch rounds it, the distance could be 2^15, one too many. Beyond
bf16's range the weight is infinite, and the master is not. A NaN loses its payload, or the carry would make some of
them -0.
"""

from __future__ import annotations

import torch

NAN = 0x7FC00000  # the bits of one whose lower half is zero


def join(weights: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 values of bf16 `weights` and int16 `low`, of the same shape."""
    return (weights.float().view(torch.int32) + low).view(torch.float32)


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 weights and int16 parts of fp32 `values`, of the same shape."""
    bits = values.view(torch.int32).masked_fill(values.isnan(), NAN)
    upper = bits + 0x8000 & ~0xFFFF
    return upper.view(torch.float32).bfloat16(), (bits - upper).to(torch.int16)
