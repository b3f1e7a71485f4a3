"""A mean over seeds with its 95 % interval by Student's t."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Student's t, two-sided 95 %, for 1 to 20 degrees of freedom; beyond, the last: a little too wide.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with the half of its 95 % interval; None where one value gives none."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        if n == 1:
            return cls(float(values[0]), None, 1)
        half = T_95[min(n - 1, len(T_95)) - 1] * float(np.std(values, ddof=1)) / n**0.5
        return cls(float(np.mean(values)), half, n)

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def clear(self) -> bool:
        """Whether there is an interval, and it does not hold zero."""
        return self.half is not None and (self.high < 0 or self.low > 0)

    def text(self, sign: str = "") -> str:
        half = "" if self.half is None else f" ± {self.half:.4f}"
        return f"{self.mean:{sign}.4f}{half} (n = {self.n})"
