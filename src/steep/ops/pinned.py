"""Host memory that a GPU copies from and to while both compute on: page-locked, at its exact size.

torch's own page-locked tensors are rounded up to a power of two bytes each.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("steep")
_said: set[str] = set()  # once is enough of hundreds of tensors


def pinned_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, otherwise: str) -> torch.Tensor:
    """Zeros on the host for copies from and to `device`; unlocked and freed with the last view. For a CPU plain memory.

    Where the system locks none, the memory is used as it is. Copies then take longer, and the host waits for them.

    Args:
        otherwise: what that means for the run, for a line that says so.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" or size == 0:
        return torch.zeros(*shape, dtype=dtype)
    # Whole pages of its own: a page is locked once only. No child process has them, since writing to a page that is
    # shared with one gives the writer another page, and the GPU would go on with the old one.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    block = np.frombuffer(pages, np.uint8)
    _lock(block, device, otherwise)
    return torch.from_numpy(block).view(dtype).view(*shape)


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a few numbers that the host does not wait for: from memory that is not page-locked, it waits for all
    that is queued. torch takes the locked memory back when the copy is done. For a CPU the tensor itself."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _lock(block: np.ndarray, device: torch.device, otherwise: str) -> None:
    runtime: Any = torch.cuda.cudart()
    address = block.ctypes.data
    try:
        torch.cuda.check_error(runtime.cudaHostRegister(address, block.nbytes, 0))
    except RuntimeError as error:
        if otherwise not in _said:
            logger.warning(
                "%.1f MiB of host memory cannot be page-locked (%s): %s", block.nbytes / 2**20, error, otherwise
            )
        _said.add(otherwise)
        _take_error_back(device)
        return
    # torch holds the array as long as a tensor needs it, and an array calls this before it lets go of its pages (a
    # map of pages would call it afterwards).
    weakref.finalize(block, _unlock, runtime, address, device).atexit = False


def _unlock(runtime: Any, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # whoever dropped it may have left a copy under way
    runtime.cudaHostUnregister(address)


def _take_error_back(device: torch.device) -> None:
    """CUDA keeps the error of a call that failed and reports it with the next kernel too: this one, not training's."""
    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        logger.debug("reported once more: %s", error)
