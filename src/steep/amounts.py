"""Amounts as people read them: the one way in which plans, notes, errors and the page of a run show bytes and times."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """1536 → ``1.5 KiB``."""
    for unit, decimals in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2)):
        if count < 1024 or unit == "GiB":
            return f"{count:.{decimals}f} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """8040 → ``2.2 h``."""
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.2g} h" if seconds < 99.5 * 3600 else f"{seconds / 3600:,.0f} h"
