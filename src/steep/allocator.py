"""How torch reserves the memory of a GPU."""

from __future__ import annotations

import os

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow() -> None:
    """Let what torch reserves grow in place, where nobody has set its allocator: of blocks of fixed sizes more is lost
    to gaps. Comes before torch is imported, which reads it."""
    if not any(name in os.environ for name in _NAMES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
