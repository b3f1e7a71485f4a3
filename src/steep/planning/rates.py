"""What whole steps reach on a card, by kind of work: a share of what bare work was measured to reach there, or of what
its maker says that it can. The shares are those of one H200, and other cards are taken to reach the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from steep.model.machine import Card
from steep.model.placement import HIDDEN
from steep.ops.fp8_groups import Fp8Products
from steep.planning.calibration import Measured
from steep.planning.step_work import StepWork, Work

LAUNCHED = 5.8e-3  # seconds of the host for a layer in both directions: as the 1B and 3B of benchmarks/results took
TILE = 0.8  # of that for each tile beyond the first: one run of an 8B in four tiles, whose steps took 0.50 to 0.77 s
# Copies beat computing again as long as a tenth of them at most is not hidden (docs/decisions.md, section 45).
_EXPOSED = 0.1


@dataclass(frozen=True)
class _Shares:
    products: float
    fp8: float
    attention: float
    moved: float
    link: float


# Fitted to the steps of 7B and 8B models in benchmarks/results, but for the link's, which is a copy's: 55 of 64 GB/s.
OF_PUBLISHED = _Shares(products=0.63, fp8=0.385, attention=0.45, moved=0.9, link=0.86)
# Bare work on that card at the clocks of work that goes on: products at 675 TFLOP/s, 1282 in e4m3, copies at 4.27 TB/s.
# Steps reach 0.63 * 989 = 623 and 0.385 * 1979 = 762 of them: rows are put into e4m3 in the same time. Attention by
# itself takes as long as in a step (385 TFLOP/s in documents of 2,048 tokens, 493 of 16,384), and moving does: the
# second-level cache gives back what kernels lose to a copy.
OF_MEASURED = _Shares(products=0.92, fp8=0.6, attention=1.0, moved=1.0, link=1.0)

# TFLOP/s in 16 bits with sums in fp32, and in e4m3 (None: no units for it); GB/s of memory, and of the link each way.
_PUBLISHED: dict[str, tuple[float, float | None, float, float]] = {
    "T4": (65, None, 320, 16),
    "3060": (25.5, None, 360, 32),
    "3090": (71, None, 936, 32),
    "4080": (97.5, 195, 717, 32),
    "4090": (165, 330, 1008, 32),
    "5090": (209, 419, 1792, 64),
    "A10": (125, None, 600, 32),
    "A6000": (155, None, 768, 32),
    "L4": (121, 242, 300, 32),
    "L40S": (362, 733, 864, 32),
    "PRO-6000": (504, 1008, 1792, 64),
    "A100-40": (312, None, 1555, 32),
    "A100-80": (312, None, 2039, 32),
    "H100": (989, 1979, 3350, 64),
    "H200": (989, 1979, 4800, 64),
    "B200": (2250, 4500, 8000, 64),
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
class Rates:
    """What whole steps reach.

    Attributes:
        products, fp8, attention: operations a second; no products in e4m3: None.
        moved: bytes a second that kernels beside the products read and write.
        link: bytes a second each way between the card and host memory.
        measured: what was measured of the card; None: the rates are estimated from its maker's figures.
        has_bf16: these are of bf16 too: a card without units for it emulates it, at about a tenth of the speed.
    """

    products: float
    fp8: float | None
    attention: float
    moved: float
    link: float
    measured: Measured | None = None
    has_bf16: bool = True

    def seconds(self, work: Work) -> float:
        """Of what is computed, were it launched in time and nothing waited for."""
        in_fp8 = 0.0
        if work.fp8:
            assert self.fp8 is not None, "products in fp8 on a card without units for them"
            in_fp8 = work.fp8 / self.fp8
        return work.products / self.products + in_fp8 + work.attention / self.attention + work.moved / self.moved

    def seconds_of_step(self, work: StepWork, launched: int, tiles: int = 1) -> float:
        """With the copies that nothing hides.

        Args:
            launched: layers that the host launches: of all micro-batches.
            tiles: that each computes.
        """
        waits = (each.count * max(each.nbytes / self.link - self.seconds(each.behind), 0.0) for each in work.transfers)
        return max(self.seconds(work) + sum(waits), seconds_of_launches(launched, tiles))

    def hidden_from(self, products: Fp8Products) -> float:
        """Operations of a layer's forward pass for each byte copied to the host meanwhile, from which on it is hidden.

        Args:
            products: which of them are in fp8.
        """
        forward = self.fp8 if products == "both" and self.fp8 is not None else self.products
        return (1 - _EXPOSED) * forward / self.link


def seconds_of_launches(launched: int, tiles: int) -> float:
    """Of the host, as `Rates.seconds_of_step` has them: no card makes a step shorter."""
    return LAUNCHED * launched * (1 + TILE * (tiles - 1))


def rates_of(card: Card | None, measured: Measured | None = None) -> Rates | None:
    """None: nothing is known of it."""
    if measured is not None:
        share, link = OF_MEASURED, min(measured.to_host, measured.from_host)
        products, fp8, attention = measured.products, measured.fp8, measured.attention
        moved = measured.copied
        if attention is None:  # as a step's is to its products by the makers' figures
            attention = products * share.products / OF_PUBLISHED.products * OF_PUBLISHED.attention / share.attention
    else:
        name = None if card is None else _NAMED.get(card.name) if card.is_here else card.name
        if name is None:
            return None
        share, (tera, tera_in_fp8, giga, giga_of_link) = OF_PUBLISHED, _PUBLISHED[name]
        products, fp8 = tera * 1e12, None if tera_in_fp8 is None else tera_in_fp8 * 1e12
        attention, moved, link = products, giga * 1e9, giga_of_link * 1e9
    return Rates(
        share.products * products,
        None if fp8 is None else share.fp8 * fp8,
        share.attention * attention,
        share.moved * moved,
        share.link * link,
        measured,
        card is None or card.has_bf16,
    )


def hidden_from(rates: Rates | None, products: Fp8Products) -> float:
    """`Rates.hidden_from`; of a card that nothing is known of, the figure of an H200."""
    return HIDDEN if rates is None else rates.hidden_from(products)
