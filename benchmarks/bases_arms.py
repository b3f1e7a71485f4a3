"""The arms of `benchmarks.bases`, what they have in common, and the languages that are scored."""

from __future__ import annotations

import dataclasses

# Fields of the run file's section `model`.
ARMS: dict[str, dict[str, str]] = {
    "nf4": {"base": "nf4"},
    "fp8-none": {"base": "fp8", "fp8_products": "none"},
    "fp8-backward": {"base": "fp8", "fp8_products": "backward"},
    "fp8-both": {"base": "fp8", "fp8_products": "both"},
    "bf16": {"base": "bf16"},
}
DOMAINS = {"ko": "Korean", "en": "English"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What all arms have in common; only lines of one work are compared.

    Attributes:
        model: the folder's name.
        learning_rate: of the adapters.
        heldout_tokens: scored of each language at the most.
        gpu: the card's name, or "none".
    """

    model: str
    steps: int
    batch: int
    seq: int
    r: int
    learning_rate: float
    heldout_tokens: int
    gpu: str
