"""How long training is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steep import ranks
from steep.planning.computation import Sizes
from steep.planning.rates import Rates, seconds_of_launches
from steep.planning.step_work import mean_document, step_work
from steep.schema import RunConfig
from steep.settings import rows_per_step


@dataclass(frozen=True)
class Duration:
    """What training is predicted to take; without evaluation, checkpoints and loading.

    Attributes:
        step: seconds.
        tokens: a second.
        hours: of all steps.
        is_of_host: the host takes longer to launch a step than the card to compute it.
        rates: that it follows from.
    """

    step: float
    tokens: float
    hours: float
    is_of_host: bool
    rates: Rates

    def as_dict(self) -> dict[str, Any]:
        """In `plan.json`."""
        measured = self.rates.measured
        return {
            "seconds_per_step": self.step,
            "tokens_per_second": self.tokens,
            "hours": self.hours,
            "is_of_host": self.is_of_host,
            "measured": measured.as_dict() if measured is not None else None,
        }


@dataclass(frozen=True)
class Pace:
    """How fast steps of a run are on a card, over its text.

    Attributes:
        document: mean length of the document that a token is in.
    """

    config: RunConfig
    rates: Rates
    document: float

    @classmethod
    def of(cls, config: RunConfig, rates: Rates | None, lengths: Any) -> Pace | None:
        """None: nothing is known of the card, or processes share a step, whose exchange is not counted.

        Args:
            lengths: of the documents in the rows.
        """
        if rates is None or ranks.world_size() > 1:
            return None
        return cls(config, rates, mean_document(lengths))

    def seconds(self, sizes: Sizes) -> float | None:
        """Of a step; None: it is not fused, in bf16 that the card emulates, or in fp32 on one that was not measured."""
        step, choices = sizes.step, sizes.choices
        levels = choices.levels
        if step is None or levels is None or (step.compute == "bf16" and not self.rates.has_bf16):
            return None
        if step.compute == "fp32" and self.rates.measured is None:
            return None
        work = step_work(
            step,
            levels,
            micro_batches=step.micro_batches,
            document=self.document,
            places=choices.places,
            way=choices.loss_way,
        )
        return self.rates.seconds_of_step(work, *_launched(sizes))

    def duration(self, sizes: Sizes, steps: int) -> Duration | None:
        """Of all steps."""
        of_step = self.seconds(sizes)
        if of_step is None:
            return None
        tokens = rows_per_step(self.config) * self.config.data.max_length
        is_of_host = of_step == seconds_of_launches(*_launched(sizes))
        return Duration(of_step, tokens / of_step, steps * of_step / 3600, is_of_host, self.rates)


def _launched(sizes: Sizes) -> tuple[int, int]:
    """Layers of a fused step, of all micro-batches, and the tiles that each computes."""
    step, choices = sizes.step, sizes.choices
    assert step is not None and choices.levels is not None
    tiles = 1 if choices.tile is None else -(-step.tokens // choices.tile)
    return step.micro_batches * len(choices.levels), tiles
