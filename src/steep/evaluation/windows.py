"""Which tokens are read and which are scored: documents cut into overlapping windows, windows packed into rows.

    document   t0 t1 t2 t3 t4 t5 t6 t7 t8 t9            max_length 6, stride 3
    window 1   t0[t1 t2 t3 t4 t5]                       [ ] scored
    window 2            t3 t4 t5[t6 t7 t8]
    window 3                     t6 t7 t8[t9]

Each token but the first is scored exactly once. After the first window a scored token has read at least
`max_length - stride` tokens before it, so a long document costs `max_length / stride` times its length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """Tokens that are read together.

    Attributes:
        tokens: int32 [W], a view of the document.
        first_scored: index in `tokens` of the first scored one, at least 1; all after it are scored too.
    """

    tokens: NDArray[np.int32]
    first_scored: int


def windows(tokens: NDArray[np.int32], max_length: int, stride: int) -> Iterator[Window]:
    """Cut one document of T tokens: `ceil((T - max_length) / stride) + 1` windows, or one if it fits.

    Args:
        tokens: int32 [T]; with T < 2 there is nothing to score and no window.
        max_length: tokens a window at most, at least 2.
        stride: tokens that each later window scores, from 1 to `max_length - 1`.
    """
    if len(tokens) < 2:
        return
    yield Window(tokens[:max_length], first_scored=1)
    scored_until, start = max_length, 0
    while scored_until < len(tokens):
        start += stride
        yield Window(tokens[start : start + max_length], first_scored=scored_until - start)
        scored_until += stride


@dataclass
class Row:
    """Windows that share one row of a batch."""

    windows: list[Window] = field(default_factory=list)
    length: int = 0

    def add(self, window: Window) -> None:
        self.windows.append(window)
        self.length += len(window.tokens)


def pack(all_windows: Iterable[Window], max_length: int) -> list[Row]:
    """Put windows end to end into few rows of `max_length` tokens: longest first, each where the least room is left."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), ascending
    for window in sorted(all_windows, key=lambda window: -len(window.tokens)):
        slot = bisect_left(room, (len(window.tokens), 0))
        if slot == len(room):
            number = len(rows)
            rows.append(Row())
        else:
            _, number = room.pop(slot)
        rows[number].add(window)
        insort(room, (max_length - rows[number].length, number))
    return rows


def apart(rows: Iterable[Row]) -> list[Row]:
    """The windows of `rows` in a row each, longest first, so that those of a batch are of like length."""
    alone = (Row([window], len(window.tokens)) for row in rows for window in row.windows)
    return sorted(alone, key=lambda row: -row.length)


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model, on its device.

    Attributes:
        input_ids: int64 [B, L], L the longest row's length. What follows a shorter row is token 0.
        position_ids: int64 [B, L], from 0 in each window and in the filling: this alone keeps windows apart.
        scored: int64 [N], where in the flattened [B * L] the model predicts a scored token.
        targets: int64 [N], those tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        """Lay rows out side by side."""
        length = max(row.length for row in rows)
        input_ids = np.zeros((len(rows), length), dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        scored: list[NDArray[np.int64]] = []
        for number, row in enumerate(rows):
            start = 0
            for window in row.windows:
                end = start + len(window.tokens)
                input_ids[number, start:end] = window.tokens
                position_ids[number, start:end] = np.arange(end - start)
                # The hidden state at i predicts the token at i + 1.
                scored.append(number * length + np.arange(start + window.first_scored - 1, end - 1))
                start = end
            position_ids[number, start:] = np.arange(length - start)
        where = np.concatenate(scored)
        arrays = (input_ids, position_ids, where, input_ids.reshape(-1)[where + 1])
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def as_one_row(self) -> Batch:
        """The same tokens as a single sequence [1, B * L]; the flattened positions don't change."""
        return Batch(self.input_ids.reshape(1, -1), self.position_ids.reshape(1, -1), self.scored, self.targets)
