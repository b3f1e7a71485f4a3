"""Whether the kernels of the fused forward run on this machine."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from steep.kernels import OLDEST_CARD, OLDEST_FP8_CARD

LACKS_FP8_UNITS = "the card has no fp8 units: those of compute capability 8.9 and newer have"


def why_not_here() -> str | None:
    """Why they do not; None: they do, or there is no card, where plain torch computes the same."""
    if not torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "its kernels are for NVIDIA's cards"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CARD:
        oldest, here = (".".join(map(str, each)) for each in (OLDEST_CARD, capability))
        return f"its kernels need compute capability {oldest}, and the card has {here}"
    return None if find_spec("triton") else "triton is not installed"


def has_fp8_units(device: torch.device) -> bool:
    """Whether products in e4m3 run on that device by itself: Ada (compute capability 8.9), Hopper, Blackwell."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_FP8_CARD


def lacks_fp8_units() -> bool:
    """Whether there is a card, and it has none. Without a card plain torch computes the same."""
    return torch.cuda.is_available() and not has_fp8_units(torch.device("cuda", torch.cuda.current_device()))
