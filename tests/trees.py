"""Where two trees of plain values and tensors differ."""

from __future__ import annotations

from typing import Any

import torch


def tree_differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Places at which two trees are not the same to the bit, each with what is different there. The order of keys does
    not count, and a list is like a tuple."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return [] if _same_tensors(left, right) else [f"{where}: another tensor"]
    if isinstance(left, dict) and isinstance(right, dict):
        found = [f"{where}.{key}: only in one" for key in sorted(map(str, left.keys() ^ right.keys()))]
        return found + [
            line
            for key in left.keys() & right.keys()
            for line in tree_differences(left[key], right[key], f"{where}.{key}")
        ]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{where}: {len(left)} and {len(right)} of them"]
        return [
            line
            for i, pair in enumerate(zip(left, right, strict=True))
            for line in tree_differences(*pair, f"{where}[{i}]")
        ]
    return [] if left == right else [f"{where}: {str(left)[:60]!r} and {str(right)[:60]!r}"]


def _same_tensors(left: Any, right: Any) -> bool:
    both = isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return both and left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
