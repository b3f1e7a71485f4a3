"""The frozen weight of a linear layer as it is stored, and how it becomes a matrix that products can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class BaseWeight(Protocol):
    """A frozen weight [out_features, in_features] in some storage."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        ...

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out` [out_features, in_features], in its dtype, rounded once. The rows of `out` may be
        apart (columns of a wider buffer)."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A weight in 16 or 32 bit.

    Attributes:
        weight: [out_features, in_features].
    """

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def write(self, out: torch.Tensor) -> None:
        out.copy_(self.weight)
