"""Which piece of which document stands where in which row: the packing index.

A row has `max_length` places. Documents stand in them end to end; one that does not fit is split, and the next piece
starts with the last token of the piece before, because that token has to be seen to predict the one after it. So a
piece of n tokens has n - 1 targets, and every token of a document except its first is a target in exactly one piece.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_PART = 1 << 16  # lengths that are Python integers at a time, of 40 bytes each


@dataclass(frozen=True)
class Pieces:
    """Pieces in the order of the rows.

    Attributes:
        item: int32 [pieces], the index of the document in the list that was packed.
        start: int32 [pieces], the piece's first token in that document.
        length: unsigned [pieces], tokens, in as few bytes as hold a row's.
        row_first: int32 [rows + 1], the first piece of each row, and the number of pieces.
    """

    item: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_first: np.ndarray


def pack_sequential(lengths: np.ndarray, max_length: int) -> Pieces:
    """Fill row after row in the order given; only the last row, and a last place too small for a target, are padded.

    Args:
        lengths: int32 or int64 [documents], tokens, each at least 1.
        max_length: places in a row, at least 2.
    """
    # A plain loop into arrays of machine integers: about a microsecond a piece, and no index in Python's own ints.
    small = np.min_scalar_type(max_length)
    item, start, length, row_first = array("i"), array("i"), array(small.char), array("i", [0])
    space = max_length
    for index, total in enumerate(_integers(lengths)):
        position = 0
        while True:
            left = total - position
            if space < 2 and left > space:
                # No place, or one, in which a piece would have no target.
                row_first.append(len(item))
                space = max_length
            taken = min(space, left)
            item.append(index)
            start.append(position)
            length.append(taken)
            space -= taken
            if taken == left:
                break
            position += taken - 1
    row_first.append(len(item))
    return Pieces(
        np.frombuffer(item, np.int32),
        np.frombuffer(start, np.int32),
        np.frombuffer(length, small),
        np.frombuffer(row_first, np.int32),
    )


def pack_best_fit(lengths: np.ndarray, max_length: int) -> Pieces:
    """Split only documents longer than a row, and place each piece where the least room is left over.

    Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). Full rows come first.

    Args:
        lengths: int32 or int64 [documents], tokens, each at least 1.
        max_length: places in a row, at least 2.
    """
    lengths = lengths.astype(np.int32, copy=False)
    full = np.maximum(-(-(lengths - 1) // (max_length - 1)) - 1, 0)  # full rows of each document before its last piece
    num_full = int(full.sum())
    last_length = lengths - full * (max_length - 1)
    order = np.argsort(-last_length, kind="stable").astype(np.int32)
    row = np.empty(num_full + len(lengths), np.int32)
    row[:num_full] = np.arange(num_full)
    row[num_full:] = _best_fit_rows(last_length[order], max_length)
    row[num_full:] += num_full
    by_row = np.argsort(row, kind="stable").astype(np.int32)
    row_first = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int32)
    del row

    index = np.arange(len(lengths), dtype=np.int32)
    item = np.concatenate([np.repeat(index, full), order])[by_row]
    number = np.arange(num_full, dtype=np.int32) - np.repeat(np.cumsum(full, dtype=np.int32) - full, full)
    start = np.concatenate([number * (max_length - 1), (full * (max_length - 1))[order]])[by_row]
    length = np.full(num_full + len(lengths), max_length, np.min_scalar_type(max_length))
    length[num_full:] = last_length[order]
    return Pieces(item, start, length[by_row], row_first)


def _integers(lengths: np.ndarray) -> Iterator[int]:
    """The lengths as Python's own integers, a part at a time."""
    for first in range(0, len(lengths), _PART):
        yield from lengths[first : first + _PART].tolist()


def _best_fit_rows(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The row of each piece, int32; `lengths` falls. Bit c of `open_sizes` says that a row with c free places is open.

    The smallest sufficient size is the lowest set bit after a shift: a few machine words at a time, which beat a
    segment tree written in Python.
    """
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]
    open_sizes = 0
    num_rows = 0
    result = array("i")
    for length in _integers(lengths):
        fitting = open_sizes >> length
        if fitting:
            size = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[size].pop()
            if not open_rows[size]:
                open_sizes ^= 1 << size
        else:
            size, row = max_length, num_rows
            num_rows += 1
        left = size - length
        if left:
            open_rows[left].append(row)
            open_sizes |= 1 << left
        result.append(row)
    return np.frombuffer(result, np.int32)
