"""When two codes of a moment are as good as the same, for tests that hold the 8-bit AdamW to bitsandbytes'."""

from __future__ import annotations

import torch
from bitsandbytes import functional


def assert_same_codes(
    ours: torch.Tensor, theirs: torch.Tensor, moment: int, steps: int = 1, most: float = 1e-2
) -> None:
    """After as many `steps` from equal ones, at most the share `most` a step are not equal.

    These are neighbours (a tie), or their values within 5e-5 of the scale: on a CPU bitsandbytes finds a code in a
    table of 2^16 equal steps, which is the nearest one but for values near zero. After more steps than one, what a tie
    decided lives on: their values are within one of the largest bins.
    """
    code_map = functional.create_dynamic_map(signed=moment == 1)
    ours, theirs = ours.cpu().long(), theirs.cpu().long()
    assert (ours != theirs).float().mean() <= most * steps
    apart = (code_map[ours] - code_map[theirs]).abs()
    assert ((apart <= (5e-5 if steps == 1 else 0.02)) | ((ours - theirs).abs() <= 1)).all()
