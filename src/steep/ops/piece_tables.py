"""Tables of the AdamW kernel for pieces of tensors whose moments come to the card in slots (`steep.ops.host_states`).

Where a piece begins, how long it is and where its moments stand in a slot is the same at each step: that is worked out
once. What changes, the addresses of weights and gradients, keys and settings, is a few numbers a tensor, and those of
all pieces of a call go to the card in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steep.ops.adamw8bit import BLOCK, Update, tables
from steep.ops.pinned import upload

Kind = tuple[torch.dtype, torch.dtype, bool, bool, bool, bool]  # of a launch: see its arguments


@dataclass(frozen=True)
class InSlot:
    """A piece that is in a slot.

    Attributes:
        number: of its tensor among those that are updated.
        elements: which of the tensor.
        state: their states on the card, flat: moments, of codes their scales, and what masters have beside weights.
    """

    number: int
    elements: slice
    state: Sequence[torch.Tensor]


@dataclass(frozen=True)
class PieceLaunch:
    """Pieces of one batch and of one kind, up to the one call that is left."""

    kind: Kind
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def run(self, maps: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor | None) -> None:
        """On the current device and stream."""
        from steep.kernels import adamw8bit as kernel

        parameter, gradient, coded, aligned, rows, masters = self.kind
        kernel.launch(
            *self.tables, maps, factor,
            parameter=parameter, gradient=gradient, coded=coded, aligned=aligned, rows=rows, masters=masters,
        )  # fmt: skip


class Owners:
    """The row of each chunk, int64 on the device, as memory of the stream that is current when it is first asked for.
    The layers of a model have the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, chunks: tuple[int, ...]) -> torch.Tensor:
        """Where the rows have so many chunks."""
        if chunks not in self._known:
            self._known[chunks] = upload(torch.from_numpy(np.repeat(np.arange(len(chunks)), chunks)), self.device)
        return self._known[chunks]


class PieceTables:
    """Of batches of pieces, each batch in a slot.

    Args:
        kinds: of each tensor, by `kinds_of`.
        owners: of the tensors' device.
    """

    def __init__(self, batches: Sequence[Sequence[InSlot]], kinds: Sequence[Kind], owners: Owners) -> None:
        from steep.kernels import adamw8bit as kernel

        assert kernel.BLOCK == BLOCK
        self.kinds, self._device = list(kinds), owners.device
        self._key = kernel.ADDRESSES.index("key")
        pieces: list[InSlot] = []
        rows: list[tuple[int, ...]] = []
        self._launches: list[list[tuple[Kind, int, torch.Tensor]]] = []  # of each batch; number of pieces, and owners
        for batch in batches:
            of_kind: dict[Kind, list[InSlot]] = {}
            for piece in batch:
                of_kind.setdefault(kinds[piece.number], []).append(piece)
            launches: list[tuple[Kind, int, torch.Tensor]] = []
            for kind, members in of_kind.items():
                chunks = [-(-_numel(piece) // kernel.CHUNK) for piece in members]
                firsts = [0, *np.cumsum(chunks[:-1]).tolist()]
                rows += map(_fixed, members, firsts, chunks, [kind] * len(members))
                pieces += members
                launches.append((kind, len(members), owners.of(tuple(chunks))))
            self._launches.append(launches)
        self._counts = [count for launches in self._launches for _, count, _ in launches]
        self._fixed = np.array(rows, np.int64)
        self._tensors = np.array([piece.number for piece in pieces])
        self._blocks = np.array([piece.elements.start // BLOCK for piece in pieces])

    def launches(self, updates: Sequence[Update]) -> list[list[PieceLaunch]]:
        """Of each batch; the tables are memory of the current stream.

        Args:
            updates: of the tensors, which are of the same kinds as before.
        """
        addresses = np.array([_changing(update) for update in updates], np.int64)[self._tensors]
        addresses += self._fixed
        addresses[:, self._key] ^= self._blocks  # see `steep.ops.host_states.part`
        settings = np.array([update.settings for update in updates])[self._tensors]
        parts = zip(*(table.split(self._counts) for table in tables(addresses, settings, self._device)), strict=True)
        return [
            [PieceLaunch(kind, (*next(parts), owners)) for kind, _, owners in launches] for launches in self._launches
        ]


def kinds_of(updates: Sequence[Update]) -> list[Kind]:
    """Slots and pieces begin at multiples of more bytes than the kernel asks for: what tensors begin at decides."""
    from steep.kernels.adamw8bit import ALIGNMENT

    return [
        (
            update.parameter.dtype, update.gradient.dtype, update.scales is not None,
            (update.parameter.data_ptr() | update.gradient.data_ptr()) % ALIGNMENT == 0, update.rows is not None,
            update.low is not None,
        )
        for update in updates
    ]  # fmt: skip


def _numel(piece: InSlot) -> int:
    return piece.elements.stop - piece.elements.start


def _fixed(piece: InSlot, first_chunk: int, chunks: int, kind: Kind) -> tuple[int, ...]:
    """A row as `kernel.ADDRESSES` names its columns, where the tensor's own are zero."""
    (parameter, gradient, *_, by_rows, has_masters), start = kind, piece.elements.start
    states = [one.data_ptr() for one in piece.state]
    low = states.pop() if has_masters else 0
    return (
        start * parameter.itemsize, 0 if by_rows else start * gradient.itemsize,
        *((*states, 0, 0)[:4]), _numel(piece), first_chunk, 0, 0, 0, start, chunks, low,
    )  # fmt: skip


def _changing(update: Update) -> tuple[int, ...]:
    """What is added to that."""
    parameter, gradient, rows = update.parameter, update.gradient, update.rows
    assert parameter.is_contiguous() and gradient.is_contiguous()
    places, width = (0, 0) if rows is None else (rows.data_ptr(), gradient.shape[1])
    return (
        parameter.data_ptr(), gradient.data_ptr(), 0, 0, 0, 0, 0, 0, update.key, places, width, update.first, 0, 0
    )  # fmt: skip
