"""What an error says of the machine, whatever was being done: memory that ran out and where, a card that failed."""

from __future__ import annotations

import errno

import torch

# torch raises OutOfMemoryError for its own memory on the card, and RuntimeErrors for what libraries take there.
_ON_THE_CARD = (
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_ON_THE_HOST = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    f"Cannot allocate memory ({errno.ENOMEM})",  # torch, where it maps a file
)
# One text for two: page-locked memory of the host, and what CUDA itself keeps on the card (some hundred MiB).
_BY_CUDA = ("CUDA error: out of memory", "cudaErrorMemoryAllocation")
_CUDA_KEEPS = 2**30
_OF_THE_CARD = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "CUDA driver error")
PINNED = "page-locked host"


def is_the_machines(error: BaseException) -> bool:
    """Whether memory ran out or a card failed: no file and no setting is at fault then."""
    if place_that_ran_out(error) is not None or isinstance(error, torch.cuda.CudaError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_THE_CARD)


def place_that_ran_out(error: BaseException) -> str | None:
    """``GPU``, ``host`` or ``page-locked host`` where the error says that memory ran out there; else None."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _ON_THE_CARD):
        return "GPU"
    if isinstance(error, torch.cuda.CudaError) and "out of memory" in text:
        return PINNED  # steep asks the runtime itself for nothing but locked pages
    if any(part in text for part in _BY_CUDA):
        return PINNED if "pin memory thread" in text or _card_has_room() else "GPU"
    if isinstance(error, MemoryError) or any(part in text for part in _ON_THE_HOST):
        return "host"
    return "host" if isinstance(error, OSError) and error.errno == errno.ENOMEM else None


def _card_has_room() -> bool:
    """Whether the card could still give what CUDA itself keeps there."""
    if not torch.cuda.is_available():
        return False
    try:
        return torch.cuda.mem_get_info()[0] > _CUDA_KEEPS
    except RuntimeError:  # not even the context fits
        return False
