"""The memory of the card that a plan may fill."""

from __future__ import annotations

import torch

from steep.schema import VRAM

SHARE = 0.9  # of the card: allocations of odd sizes leave gaps
_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def vram_budget(vram: str) -> int | None:
    """Bytes that `training.vram` stands for, on the card that is used where it depends on that; None without one.

    ``auto`` leaves out what others hold on the card now. An amount can be planned for without a card.
    """
    number, unit = (SHARE * 100, "%") if vram == "auto" else as_amount(vram)
    if unit != "%":
        return round(number * _UNITS[unit])
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved() if vram == "auto" else 0
    return max(round(number / 100 * total) - others, 0)


def as_amount(vram: str) -> tuple[float, str]:
    """Number and unit, in lower case, of what the schema let pass."""
    found = VRAM.fullmatch(vram.strip())
    assert found is not None, vram
    return float(found["number"]), found["unit"].lower()
