"""What an evaluation says about one domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class DomainScore:
    """The loss of one domain's documents at one step of training.

    Bits per byte can be compared between tokenizers and languages; loss and perplexity only between models that
    share a tokenizer. A model that gives NaN has NaN here.

    Attributes:
        step: optimizer steps done.
        domain: the domain's name.
        loss: mean negative log-likelihood, nats a scored token.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: all nats / ln 2 / `bytes`.
        tokens: scored tokens, which is every token but the first of each document.
        bytes: UTF-8 bytes of the scored documents' text.
        documents: scored documents.
    """

    step: int
    domain: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int

    @classmethod
    def from_nats(cls, nats: float, *, step: int, domain: str, tokens: int, num_bytes: int, documents: int) -> Self:
        """The score of `documents` documents whose scored tokens cost `nats` in all."""
        loss = nats / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return cls(step, domain, loss, perplexity, nats / math.log(2) / num_bytes, tokens, num_bytes, documents)

    def as_dict(self) -> dict[str, object]:
        """The fields by name. NaN and infinity become None: JSON has neither."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """What `as_dict` gave, read back; further keys are passed over and None is NaN again."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            values[field.name] = math.nan if row[field.name] is None else row[field.name]
        if row["perplexity"] is None and row["loss"] is not None:
            values["perplexity"] = math.inf  # a finite loss whose exp is not
        return cls(**values)


def scored_otherwise(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What whoever holds the last scores of `evaluation.jsonl` against the first should know: they are of another
    arithmetic, where a resumed run changed its products; None: they are not, or that is not recorded."""
    if not rows or any("fp8_products" not in row for row in (rows[0], rows[-1])):
        return None
    first, last = (row["fp8_products"] == "both" for row in (rows[0], rows[-1]))  # scores have no backward pass
    if first == last:
        return None
    how = ("with products in fp8", "without") if first else ("without products in fp8", "with them")
    return (
        f"The first scores were taken {how[0]} and the last {how[1]}: part of the difference is their rounding. "
        "steep eval scores base and result alike."
    )
