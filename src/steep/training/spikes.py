"""Finds the step whose loss, or gradient norm, is far above those before it.

Both are held against the steps that were applied, at most `window` back, by a robust z-score: x − median over
1.4826 · MAD, which a few outliers do not move. Only upwards: a loss that falls is what training is for. The norm is
compared by its logarithm, since it scatters by a factor. A loss of few rows has two heights where the text has two
kinds; a step of the rarer kind would always be an outlier. So a spike also stands clear of all that the window holds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

_GAUSSIAN = 1.4826  # MAD → standard deviation
# The least standard deviation that is believed: a run whose loss stands still is not to alarm at its rounding.
_LEAST_LOSS, _LEAST_RELATIVE, _LEAST_LOG_NORM = 1e-3, 1e-3, 0.02  # nats, of the loss, of the norm's logarithm
_LEAST_NORM = 1e-30
_LEAST_HISTORY = 8


@dataclass(frozen=True)
class Spike:
    """One finding.

    Attributes:
        kind: ``spike in loss`` or ``spike in gradient norm``.
        value, median: of this step, and of the window; nats a target, or the norm before clipping.
        z: how many robust standard deviations lie between them (of the norm's logarithm).
    """

    kind: str
    value: float
    median: float
    z: float


class SpikeDetector:
    """Remembers the last applied steps and judges the next one.

    Args:
        threshold: a spike is at least so many robust standard deviations above the median, and half as many above the
            highest of the window.
        window: steps that are remembered. Nothing is judged before a quarter of it is known, and never before 8 steps.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self.threshold = threshold
        self._enough = max(window // 4, _LEAST_HISTORY)
        self._losses: deque[float] = deque(maxlen=window)
        self._log_norms: deque[float] = deque(maxlen=window)

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """What stands out in a step, the loss before the norm; None if nothing does. Both values are finite."""
        if len(self._losses) < self._enough:
            return None
        least = _LEAST_LOSS + _LEAST_RELATIVE * abs(float(np.median(self._losses)))
        found = self._outlier(self._losses, loss, least)
        if found is not None:
            return Spike("spike in loss", loss, *found)
        found = self._outlier(self._log_norms, _log(grad_norm), _LEAST_LOG_NORM)
        if found is not None:
            return Spike("spike in gradient norm", grad_norm, math.exp(found[0]), found[1])
        return None

    def _outlier(self, window: deque[float], value: float, least: float) -> tuple[float, float] | None:
        """Median and z-score of a value that stands out."""
        known = np.array(window)
        median = float(np.median(known))
        deviation = max(_GAUSSIAN * float(np.median(np.abs(known - median))), least)
        z = (value - median) / deviation
        above_all = (value - float(known.max())) / deviation
        return (median, z) if z >= self.threshold and above_all >= self.threshold / 2 else None

    def remember(self, loss: float, grad_norm: float) -> None:
        """Take a step that was applied into the window."""
        self._losses.append(loss)
        self._log_norms.append(_log(grad_norm))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self._losses), "log_norms": list(self._log_norms)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; where the window is shorter now, from its end."""
        for window, values in ((self._losses, state["losses"]), (self._log_norms, state["log_norms"])):
            window.clear()
            window.extend(values)


def _log(norm: float) -> float:
    return math.log(max(norm, _LEAST_NORM))
