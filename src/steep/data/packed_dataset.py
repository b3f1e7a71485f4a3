"""The rows that a trainer sees: tensors, put together from the mapped token files when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from steep.data.mixing import Mixture
from steep.data.rows import Pieces
from steep.data.sampler import FILLER
from steep.data.tokens import TokenizedSource

IGNORE = -100


class PackedDataset(Dataset[dict[str, Any]]):
    """Rows of `max_length` tokens, put together from the mapped token files when they are asked for.

    Attributes:
        sources: where the tokens are.
        max_length: tokens in a row.
        pad_id: what fills a row behind its last piece.
        source: unsigned [pieces], index of the source of each piece.
        document: int32 [pieces], index of the document in that source.
        start: int32 [pieces], the first token of the piece in the document.
        length: unsigned [pieces], tokens.
        row_first: int32 [rows + 1], the first piece of each row.
    """

    def __init__(
        self, sources: Sequence[TokenizedSource], mixture: Mixture, pieces: Pieces, max_length: int, pad_id: int
    ) -> None:
        self.sources = sources
        self.max_length = max_length
        self.pad_id = pad_id
        self.source = mixture.source[pieces.item]
        self.document = mixture.document[pieces.item]
        self.start = pieces.start
        self.length = pieces.length
        self.row_first = pieces.row_first

    def __len__(self) -> int:
        return len(self.row_first) - 1

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """Places of each row that are not padding: int64 [rows]."""
        return np.add.reduceat(self.length, self.row_first[:-1], dtype=np.int64)

    @cached_property
    def whole_rows(self) -> float:
        """Share of the rows that are one document, without padding."""
        return float(np.mean((np.diff(self.row_first) == 1) & (self.row_tokens == self.max_length)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Returns:
            int64 tensors `input_ids`, `labels` and `position_ids` [max_length], and the number `row`. Labels are not
            shifted: -100 at the first token of each piece and in the padding, else the token itself. Positions start
            at 0 in each piece and in the padding, which so counts as a document of its own. The row `FILLER` is all
            padding.

        Raises:
            IndexError: no such row.
        """
        if index != FILLER and not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        input_ids = np.full(self.max_length, self.pad_id, np.int64)
        labels = np.full(self.max_length, IGNORE, np.int64)
        position_ids = np.empty(self.max_length, np.int64)
        place = 0
        pieces = () if index == FILLER else range(int(self.row_first[index]), int(self.row_first[index + 1]))
        for piece in pieces:
            first, length = int(self.start[piece]), int(self.length[piece])
            end = place + length
            source = self.sources[int(self.source[piece])]
            input_ids[place:end] = source.tokens(int(self.document[piece]), first, first + length)
            labels[place + 1 : end] = input_ids[place + 1 : end]
            position_ids[place:end] = np.arange(length)
            place = end
        position_ids[place:] = np.arange(self.max_length - place)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "row": index,
        }


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of rows: tensors [rows, max_length], the rows' numbers `row`, int64 [rows], and `document_lengths`, the
    tokens of each document, row after row, int64.

    The latter two are arrays, which stay on the CPU: reading them back from a GPU would wait for all that it has to do.
    """
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "row"}
    starts = np.flatnonzero(tensors["position_ids"].numpy() == 0)
    lengths = np.diff(starts, append=tensors["position_ids"].numel())
    return {**tensors, "row": np.array([row["row"] for row in rows], np.int64), "document_lengths": lengths}
