"""How torch reserves the memory of a GPU."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let what torch reserves grow in place, where nobody has set its allocator: of blocks of fixed sizes more is lost
    to gaps. Comes before torch is imported, which reads it.

    Args:
        environment: this process's, or that of one to be started.
    """
    if not any(name in environment for name in _NAMES):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
