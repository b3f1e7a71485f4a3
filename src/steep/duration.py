"""How long a fused step takes on a card, from what it has to compute and what the card's maker says that it can.

How much of that is reached was measured on an H200 (benchmarks/results; its steps are met within 15 %), and other cards
are taken to reach the same shares. Layers that are over sooner than the host can launch them take the host's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steep.model.machine import Card
from steep.step_work import StepWork

# Shares of the published rates that whole steps of an 8B reach, power limit and all; bare products reach 0.79 and 0.77.
PRODUCTS, ATTENTION, MOVED = 0.63, 0.45, 0.9
FP8 = 0.36  # rows are put into e4m3 in the same time; from one run of 0.254 s
LAUNCHED = 5.8e-3  # seconds of the host for a layer in both directions


@dataclass(frozen=True)
class Speed:
    """A card's published rates: dense products in 16 bits with sums in fp32, and in e4m3, in operations a second (None:
    it has no units for them), and bytes a second."""

    products: float
    fp8: float | None
    bandwidth: float


# TFLOP/s in 16 bits, and in e4m3, and GB/s.
_PUBLISHED: dict[str, tuple[float, float | None, float]] = {
    "T4": (65, None, 320),
    "3060": (25.5, None, 360),
    "3090": (71, None, 936),
    "4080": (97.5, 195, 717),
    "4090": (165, 330, 1008),
    "5090": (209, 419, 1792),
    "A10": (125, None, 600),
    "A6000": (155, None, 768),
    "L4": (121, 242, 300),
    "L40S": (362, 733, 864),
    "PRO-6000": (504, 1008, 1792),
    "A100-40": (312, None, 1555),
    "A100-80": (312, None, 2039),
    "H100": (989, 1979, 3350),
    "H200": (989, 1979, 4800),
    "B200": (2250, 4500, 8000),
}
# As the makers' drivers name those that are the cards of that list, and no slower variant (PCIe, laptops).
_NAMED = {
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 3060": "3060",
    "NVIDIA GeForce RTX 3090": "3090",
    "NVIDIA GeForce RTX 4080": "4080",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA GeForce RTX 5090": "5090",
    "NVIDIA A10": "A10",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}


@dataclass(frozen=True)
class Duration:
    """What training is predicted to take; without evaluation, checkpoints and loading.

    Attributes:
        step: seconds.
        tokens: a second.
        hours: of all steps.
    """

    step: float
    tokens: float
    hours: float

    def as_dict(self) -> dict[str, Any]:
        """In `plan.json`."""
        return {"seconds_per_step": self.step, "tokens_per_second": self.tokens, "hours": self.hours}


def speed_of(card: Card) -> Speed | None:
    """None: nothing is known of it."""
    name = _NAMED.get(card.name) if card.is_here else card.name
    if name is None:
        return None
    products, fp8, bandwidth = _PUBLISHED[name]
    return Speed(products * 1e12, None if fp8 is None else fp8 * 1e12, bandwidth * 1e9)


def seconds(work: StepWork, speed: Speed, launched: int) -> float:
    """Of a step.

    Args:
        launched: layers that the host launches: of all micro-batches.
    """
    in_fp8 = 0.0
    if work.fp8:
        assert speed.fp8 is not None, "products in fp8 on a card without units for them"
        in_fp8 = work.fp8 / (FP8 * speed.fp8)
    computed = work.products / (PRODUCTS * speed.products) + work.attention / (ATTENTION * speed.products) + in_fp8
    return max(computed + work.moved / (MOVED * speed.bandwidth), LAUNCHED * launched)
