"""Where the documents of a batch lie: all its tokens stand in one dimension, one document behind the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch

from steep.ops.pinned import upload

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Packing:
    """The documents of one batch, in the order of its tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1] on the device of the batch: where each document begins, and the end.
        lengths: tokens of each document, on the host.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> Packing:
        """Documents of these lengths.

        Raises:
            ValueError: there is no document, or one without a token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents need at least one token each, and these have {list(lengths)}")
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(upload(ends, torch.device(device)), tuple(lengths))

    @classmethod
    def from_positions(cls, position_ids: torch.Tensor) -> Packing:
        """Documents start where the position is 0. The positions are read on the host: one transfer, if they are not
        there already.

        Args:
            position_ids: integers [rows, tokens of a row].

        Raises:
            ValueError: a row does not begin with 0, or positions do not count up by 1 inside a document.
        """
        if position_ids.dim() != 2 or not position_ids.numel():
            raise ValueError(f"position ids are [rows, tokens], and these have the shape {list(position_ids.shape)}")
        positions = position_ids.cpu()
        starts = positions == 0
        goes_on = torch.zeros_like(starts)
        goes_on[:, 1:] = positions.diff(dim=1) == 1
        if wrong := (~(starts | goes_on)).nonzero().tolist():
            row, column = wrong[0]
            raise ValueError(
                f"position ids start at 0 with each document and count up by 1 inside it: row {row} has "
                f"{int(positions[row, column])} at token {column}"
            )
        begins = [*starts.flatten().nonzero().flatten().tolist(), positions.numel()]
        return cls.from_lengths([stop - start for start, stop in pairwise(begins)], position_ids.device)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def uniform(self) -> int | None:
        """The length of every document where all are equally long: the batch is then dense, [documents, length]."""
        return self.max_length if min(self.lengths) == self.max_length else None

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The tokens of each document."""
        return tuple(slice(start, stop) for start, stop in pairwise([0, *accumulate(self.lengths)]))

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for this packing: all layers of a step share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
