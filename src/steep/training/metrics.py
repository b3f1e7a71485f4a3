"""What is measured between two log lines: loss, tokens, time, rates, memory."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch

from steep.training.groups import KINDS


def peak_memory_bytes() -> int:
    """Peak memory so far: allocated on the GPU where there is one, else the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
    """Sums since the last log line, and over the whole run.

    Attributes:
        tokens: tokens of the steps so far in the run that were applied, padding not counted.
        rates: learning rate of each group at the last step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.rates: dict[str, float] = {}
        self._computed = 0  # tokens since the last log line, of steps that were not applied too
        self._losses: list[float] = []
        self._loss_sum, self._loss_steps = 0.0, 0
        self.restart()

    def restart(self) -> None:
        """Start the clock anew, so that a pause does not count as training time."""
        self._computed, self._started = 0, time.perf_counter()

    def add_tokens(self, tokens: int, *, applied: bool) -> None:
        """Count one step's tokens: what is not applied took its time, and is no training."""
        self._computed += tokens
        if applied:
            self.tokens += tokens

    def add_loss(self, loss: float) -> None:
        """Count one step's loss; one that is not finite takes no part in any mean."""
        if math.isfinite(loss):
            self._losses.append(loss)
            self._loss_sum += loss
            self._loss_steps += 1

    @property
    def mean_loss(self) -> float:
        """Mean of the finite losses of all steps so far; NaN where there is none."""
        return self._loss_sum / self._loss_steps if self._loss_steps else math.nan

    def close(self) -> dict[str, float]:
        """The window's metrics; begins the next window. `loss` is NaN where no step of the window had a finite one."""
        seconds = time.perf_counter() - self._started
        main = next((self.rates[kind] for kind in KINDS if kind != "embeddings" and kind in self.rates), math.nan)
        metrics = {
            "loss": sum(self._losses) / len(self._losses) if self._losses else math.nan,
            "learning_rate": self.rates.get("embeddings", math.nan) if math.isnan(main) else main,
            "embedding_learning_rate": self.rates.get("embeddings", math.nan),
            **{f"learning_rate_{kind}": rate for kind, rate in self.rates.items()},
            "tokens": self.tokens,
            "tokens_per_second": self._computed / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._losses.clear()
        self.restart()
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"tokens": self.tokens, "losses": list(self._losses), "sum": self._loss_sum, "steps": self._loss_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.tokens, self._losses = state["tokens"], list(state["losses"])
        self._loss_sum, self._loss_steps = state["sum"], state["steps"]
