"""Finds the step whose loss, or gradient norm, is far above those before it.

Both are held against the last `window` steps by a robust z-score: x − median over 1.4826 · MAD, which a few outliers do
not move. Only upwards: a loss that falls is what training is for. The norm is compared by its logarithm, since it
scatters by a factor.

A spike is meant to be a bad row, and not a kind of text whose every step stands out as much. The two differ in how
often they come. So what stood out is remembered beside the window, by how far it did: what is as far out as five others
of the last four windows comes from a kind of text that recurs, and is no spike any more. What comes more seldom stays
one. Steps in a row count once there, and many of them are spikes again: that is no kind of text but a run that
diverges.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_GAUSSIAN = 1.4826  # MAD → standard deviation
# The least standard deviation that is believed: a run whose loss stands still is not to alarm at its rounding.
_LEAST_LOSS, _LEAST_RELATIVE, _LEAST_LOG_NORM = 1e-3, 1e-3, 0.02  # nats, of the loss, of the norm's logarithm
_LEAST_NORM = 1e-30
_LEAST_HISTORY = 8
A_KIND, _LATELY = 5, 4  # so many alike within so many windows are a kind of text
_ALIKE = 0.4  # two are alike whose distances from the median differ by so much of it, or by half the threshold
_OUTLIERS = 64  # that are remembered, however long ago they were
_MOST_IN_A_ROW = 8  # of a kind of text that comes now and then


@dataclass(frozen=True)
class Spike:
    """One finding.

    Attributes:
        kind: ``spike in loss`` or ``spike in gradient norm``.
        value, median: of this step, and of the window; nats a target, or the norm before clipping.
        z: how many robust standard deviations lie between them (of the norm's logarithm).
        alike, lately: how often the same was seen before, and in the last four windows; steps in a row counted once,
            and this row not.
        was_known: whether one of those before was of a kind of text already.
        in_a_row: steps that have stood out one after the other, with this one.
    """

    kind: str
    value: float
    median: float
    z: float
    alike: int
    lately: int
    was_known: bool
    in_a_row: int

    @property
    def recurs(self) -> bool:
        """Whether it is of a kind of text that comes often enough to matter: then it is no spike."""
        return self.lately >= A_KIND and self.in_a_row <= _MOST_IN_A_ROW

    @property
    def recurs_first(self) -> bool:
        """Whether this is the one from which on that is known."""
        return self.recurs and not self.was_known and self.in_a_row == 1


class SpikeDetector:
    """Remembers the last steps and judges the next one.

    Args:
        threshold: a spike is at least so many robust standard deviations above the median, and half as many above the
            highest of the window that is not so far out itself.
        window: steps that are remembered. Nothing is judged before a quarter of it is known, and never before 8 steps.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self._enough = max(window // 4, _LEAST_HISTORY)
        settings = (threshold, window, self._enough)
        self._losses = _Series("spike in loss", *settings, _LEAST_LOSS, _LEAST_RELATIVE)
        self._log_norms = _Series("spike in gradient norm", *settings, _LEAST_LOG_NORM, 0.0)

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """What stands out in a step, the loss before the norm, a spike before what recurs; None if nothing does.

        Both values are finite.
        """
        if len(self._losses.window) < self._enough:
            return None
        found: list[Spike] = []
        if spike := self._losses.outlier(loss):
            found.append(spike)
        if spike := self._log_norms.outlier(_log(grad_norm)):
            found.append(replace(spike, value=grad_norm, median=math.exp(spike.median)))
        return min(found, key=lambda spike: spike.recurs, default=None)

    def remember(self, loss: float, grad_norm: float) -> None:
        """Take in a step, whatever became of it: else what is not applied would stand out for ever."""
        self._losses.add(loss)
        self._log_norms.add(_log(grad_norm))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": self._losses.state(), "log_norms": self._log_norms.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; where the window is shorter now, from its end."""
        self._losses.load_state(state["losses"])
        self._log_norms.load_state(state["log_norms"])


class _Series:
    """The last values of one quantity, and how far those that stood out were above the median of their time."""

    def __init__(
        self, kind: str, threshold: float, window: int, enough: int, least: float, least_relative: float
    ) -> None:
        self._kind = kind
        self._threshold, self._enough, self._least, self._least_relative = threshold, enough, least, least_relative
        self._lately = _LATELY * window
        self.window: deque[float] = deque(maxlen=window)
        self._excesses: deque[tuple[int, float]] = deque(maxlen=_OUTLIERS)  # with the step
        self._in_a_row = self._steps = 0
        self._known: tuple[np.ndarray, float, float] | None = None  # of this window; a step asks for it twice

    def outlier(self, value: float) -> Spike | None:
        """The value as an outlier, if it is one and clear of what is none."""
        known, median, deviation = self._usual()
        excess, far = value - median, self._threshold * deviation
        usual = known[known - median < far]  # one outlier does not hide a lower one
        if excess < far or value - float(usual.max()) < far / 2:
            return None
        near = max(far / 2, _ALIKE * excess)
        before = list(self._excesses)[: -1 if self._in_a_row else None]  # the last one is of this row
        alike = [step for step, other in before if abs(other - excess) <= near]
        lately = sum(self._steps - step <= self._lately for step in alike)
        # Each of those before had its own before it.
        was_known = any(step - first <= self._lately for first, step in zip(alike, alike[A_KIND:], strict=False))
        return Spike(self._kind, value, median, excess / deviation, len(alike), lately, was_known, self._in_a_row + 1)

    def add(self, value: float) -> None:
        if len(self.window) >= self._enough:
            _, median, deviation = self._usual()
            if value - median < self._threshold * deviation:
                self._in_a_row = 0
            else:
                if self._in_a_row == 0:
                    self._excesses.append((self._steps, value - median))
                self._in_a_row += 1
        self.window.append(value)
        self._steps += 1
        self._known = None

    def _usual(self) -> tuple[np.ndarray, float, float]:
        """The window, its median and its standard deviation, the latter robust."""
        if self._known is None:
            known = np.array(self.window)
            median = _median(known)
            least = self._least + self._least_relative * abs(median)
            self._known = known, median, max(_GAUSSIAN * _median(np.abs(known - median)), least)
        return self._known

    def state(self) -> dict[str, Any]:
        excesses = [list(pair) for pair in self._excesses]
        return {
            "window": list(self.window), "excesses": excesses, "in_a_row": self._in_a_row, "steps": self._steps
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        self.window.clear()
        self.window.extend(state["window"])
        self._excesses.clear()
        self._excesses.extend((step, excess) for step, excess in state["excesses"])
        self._in_a_row, self._steps = state["in_a_row"], state["steps"]
        self._known = None


def _median(values: np.ndarray) -> float:
    """As `numpy.median`, to the bit, in a sixth of its time for as few."""
    ordered, half = np.sort(values), len(values) // 2
    return float(ordered[half]) if len(values) % 2 else float(ordered[half - 1] + ordered[half]) / 2


def _log(norm: float) -> float:
    return math.log(max(norm, _LEAST_NORM))
