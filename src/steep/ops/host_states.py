"""AdamW updates whose moments live in host memory: they come to the card in pieces, and go back updated.

Three slots on the card and three streams: while one piece is updated, the next comes up and the one before goes down.
Events alone order them, and the host waits for none. A piece gets the bits that it has in an update of the whole: no
block is cut, and what rounds a weight is a function of the tensor's key and the number of the block, which differ in
bits of their own (`part`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat

import torch

from steep.ops.adamw8bit import BLOCK, Update, adamw8bit
from steep.ops.backend import uses_kernels
from steep.ops.piece_tables import InSlot, Owners, PieceLaunch, PieceTables, kinds_of
from steep.ops.pinned import pinned_zeros

PIECE = 2**23  # elements with 8-bit moments that are updated at once; a power of two, see `part`
SLOTS = 3
KEPT = 2**14  # pieces whose batches are kept: many a model's, and no end where each step updates other tensors
_ALIGNMENT = 64  # bytes
_OTHERWISE = "each step waits for the moments of the optimizer"


def state_bytes(numel: int, coded: bool = True, master: bool = False) -> int:
    """What the states of a tensor take in host memory, or of a piece on the card: moments and scales, and what its
    master has beside the weight."""
    return _places(numel, coded, master)[1]


def staging_bytes() -> int:
    """What the slots take on the card."""
    return SLOTS * state_bytes(PIECE)


@lru_cache(maxsize=256)  # many tensors, few sizes
def _places(numel: int, coded: bool, master: bool) -> tuple[list[slice], int]:
    """Where states stand in a block of bytes, and its size."""
    sizes = [numel, numel, *[4 * -(-numel // BLOCK)] * 2] if coded else [4 * numel] * 2
    sizes += [2 * numel] * master
    places: list[slice] = []
    end = 0
    for size in sizes:
        places.append(slice(end, end + size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _views(block: torch.Tensor, numel: int, coded: bool, master: bool) -> tuple[torch.Tensor, ...]:
    """The states in a block, flat."""
    places, _ = _places(numel, coded, master)
    dtypes = [torch.uint8] * 2 + [torch.float32] * 2 if coded else [torch.float32] * 2
    dtypes += [torch.int16] * master
    return tuple(block[place].view(dtype) for place, dtype in zip(places, dtypes, strict=True))


class HostState:
    """What an update of one tensor reads and writes beside it, in page-locked memory.

    Args:
        states: on a CPU; copied. m and v, uint8 codes or fp32, N elements each; of codes their scales, fp32
            [ceil(N / 256)] each; and, of a bf16 tensor with a master, the int16 beside it, N elements.
        block: uint8, the memory that they get.

    Attributes:
        tensors: the same in the block, in their shapes.
        coded, master: whether there are scales, and a master.
    """

    def __init__(self, states: Sequence[torch.Tensor], block: torch.Tensor) -> None:
        self.numel, self.coded, self.master = _layout(states)
        self._block = block
        views = _views(block, self.numel, self.coded, self.master)
        self.tensors = tuple(view.view(one.shape).copy_(one) for view, one in zip(views, states, strict=True))
        self._written: torch.cuda.Event | None = None

    def pieces(self) -> Iterator[slice]:
        """The elements of each piece, as many as a slot holds; their number is a power of two, see `part`."""
        step = PIECE
        while state_bytes(step, self.coded, self.master) > state_bytes(PIECE):
            step //= 2
        return (slice(start, min(start + step, self.numel)) for start in range(0, self.numel, step))

    def copies(self, piece: slice, slot: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each range of bytes here, and its place in a slot whose layout is that of a block of the piece's size."""
        numel = piece.stop - piece.start
        if numel == self.numel:
            yield self._block, slot[: self._block.numel()]
            return
        places, _ = _places(numel, self.coded, self.master)
        for tensor, place in zip(self.tensors, places, strict=True):
            first = piece.start // BLOCK if tensor.numel() < self.numel else piece.start
            begin = first * tensor.element_size()
            yield tensor.view(-1).view(torch.uint8)[begin : begin + place.stop - place.start], slot[place]


def _layout(states: Sequence[torch.Tensor]) -> tuple[int, bool, bool]:
    """The number of elements, whether moments are codes, and whether there is a master."""
    return states[0].numel(), states[0].dtype == torch.uint8, states[-1].dtype == torch.int16


def host_states(given: Sequence[Sequence[torch.Tensor]], device: torch.device) -> list[HostState]:
    """The states of tensors on `device` that are updated together, from those on a CPU. They share a block of memory,
    and stand there one behind the other: what is one copy need not be many."""
    sizes = [state_bytes(*_layout(states)) for states in given]
    block = pinned_zeros((sum(sizes),), torch.uint8, device, _OTHERWISE)
    return [HostState(states, part) for states, part in zip(given, block.split(sizes), strict=True)]


def part(update: Update, piece: slice, state: Sequence[torch.Tensor]) -> Update:
    """The update of elements `piece` of a tensor; `state` are their states, in the order of `HostState`.

    The noise of block b of the tensor is that of b ^ key. Pieces begin at multiples of a power of two of blocks, and
    have no more: so b of the tensor is `first` ^ (b of the piece), and the piece's key is key ^ `first`.
    """
    parameter, gradient = update.parameter, update.gradient
    if piece.stop - piece.start < parameter.numel():
        parameter = parameter.view(-1)[piece]
        gradient = gradient if update.rows is not None else gradient.view(-1)[piece]
    return Update(
        parameter, gradient, (state[0], state[1]), None if update.scales is None else (state[2], state[3]),
        update.step, update.lr, update.betas, update.eps, update.weight_decay,
        update.key ^ piece.start // BLOCK, update.rows, update.first + piece.start,
        None if update.low is None else state[-1],
    )  # fmt: skip


def _end_of(stream: torch.cuda.Stream, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
    """Of what is queued there so far; `event` is one whose last record nobody is to wait for any more."""
    event = event or torch.cuda.Event()
    event.record(stream)
    return event


class _Lane:
    """A stream of its own, or on a CPU none: there each thing is done when the next begins."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None

    def take(self) -> None:
        """Let what follows be queued here: within `_own_streams`."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def record(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event | None:
        """All that is queued so far: see `_end_of`."""
        return None if self._stream is None else _end_of(self._stream, event)

    def wait(self, event: torch.cuda.Event | None) -> None:
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def follow(self, other: _Lane) -> None:
        """Wait for all that is queued on the other one so far."""
        other._event = other.record(other._event)  # a wait is for the record before it: one event does for all
        self.wait(other._event)

    def keep(self, tensor: torch.Tensor) -> None:
        """Its memory is not used again before what is queued here when it is freed."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


@contextmanager
def _own_streams(device: torch.device) -> Iterator[None]:
    """Within, lanes may be taken: setting a stream takes the host less than a context for each."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            yield
        finally:
            torch.cuda.set_stream(before)


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor.

    Attributes:
        number: of the tensor among those that are updated.
    """

    number: int
    state: HostState
    elements: slice

    @property
    def bytes(self) -> int:
        return state_bytes(self.numel, self.state.coded, self.state.master)

    @property
    def numel(self) -> int:
        return self.elements.stop - self.elements.start


@dataclass
class _InSlot:
    """A batch in one of the slots.

    Attributes:
        copies: ranges of host memory, and their places on the card.
        pieces: with their states on the card.
        written: the end of the last copies to the host from here.
    """

    copies: list[tuple[torch.Tensor, torch.Tensor]]
    pieces: list[InSlot]
    written: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Batch:
    """What fills a slot.

    Attributes:
        in_slots: as it stands in each that it has been in.
    """

    pieces: list[_Piece]
    in_slots: dict[int, _InSlot] = field(default_factory=dict)

    def in_slot(self, index: int, slot: torch.Tensor) -> _InSlot:
        if index not in self.in_slots:
            sizes = [piece.bytes for piece in self.pieces]
            places = slot[: sum(sizes)].split(sizes)
            pairs = [
                pair
                for piece, place in zip(self.pieces, places, strict=True)
                for pair in piece.state.copies(piece.elements, place)
            ]
            pieces = [
                InSlot(
                    piece.number,
                    piece.elements,
                    _views(place, piece.numel, piece.state.coded, piece.state.master),
                )
                for piece, place in zip(self.pieces, places, strict=True)
            ]
            self.in_slots[index] = _InSlot(_joined(pairs), pieces)
        return self.in_slots[index]


def _joined(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Neighbours on the host that are neighbours on the card are one range of bytes."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in pairs:
        if found and all(map(_follows, pair, found[-1])):
            host, card = (
                before.as_strided((before.numel() + one.numel(),), (1,))
                for before, one in zip(found[-1], pair, strict=True)
            )
            found[-1] = host, card
        else:
            found.append(pair)
    return found


def _follows(one: torch.Tensor, before: torch.Tensor) -> bool:
    """Of bytes: in the same memory, right behind."""
    same = one.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    return same and one.data_ptr() == before.data_ptr() + before.numel()


def _batches(states: Iterable[HostState]) -> Iterator[_Batch]:
    """Pieces in order, as many at a time as a slot holds."""
    batch: list[_Piece] = []
    size = 0
    for number, state in enumerate(states):
        for elements in state.pieces():
            piece = _Piece(number, state, elements)
            if batch and size + piece.bytes > state_bytes(PIECE):
                yield _Batch(batch)
                batch, size = [], 0
            batch.append(piece)
            size += piece.bytes
    if batch:
        yield _Batch(batch)


@dataclass(frozen=True)
class _Batches:
    """Of the same tensors, call after call.

    Attributes:
        tables: of the pieces, by the slot that the first batch is in.
    """

    of: list[_Batch]
    tables: dict[int, PieceTables] = field(default_factory=dict)

    @property
    def pieces(self) -> int:
        return sum(len(batch.pieces) for batch in self.of)


class Staging:
    """The slots and streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._compute, self._down = (_Lane(device) for _ in range(3))
        self._slots = [torch.empty(state_bytes(PIECE), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._free: list[torch.cuda.Event | None] = [self._so_far()] * SLOTS  # of what had that memory before
        for slot in self._slots:
            for lane in (self._up, self._compute, self._down):
                lane.keep(slot)
        self._next = 0
        self._owners = Owners(device)
        self._batches: dict[tuple[int, ...], _Batches] = {}  # by the states that they are of, the oldest first

    def run(
        self,
        updates: Sequence[tuple[Update, HostState]],
        maps: tuple[torch.Tensor, torch.Tensor],
        factor: torch.Tensor | None = None,
    ) -> torch.cuda.Event | None:
        """Queue the update of every tensor, behind what the current stream has queued so far.

        Args:
            updates: whose moments, scales and master are those of the state beside each.
            maps, factor: as in `adamw8bit`.

        Returns:
            What to wait for before a parameter is read, or the memory of a gradient or of the factor used again.
        """
        self._compute.wait(self._so_far())
        batches, whole = self._batches_of([state for _, state in updates]), [update for update, _ in updates]
        with _own_streams(self._device):
            launches: Iterable[list[PieceLaunch] | None] = repeat(None)
            if whole and uses_kernels(whole[0].parameter):
                launches = self._launches(batches, whole)
            for batch, of_batch in zip(batches.of, launches, strict=False):
                self._run(batch, whole, of_batch, maps, factor)
        return self._compute.record()

    def forget(self, states: Iterable[HostState]) -> None:
        """Let go of states that are updated no more; the host waits for what is under way."""
        self.synchronize()
        gone = set(map(id, states))
        self._batches = {names: batches for names, batches in self._batches.items() if gone.isdisjoint(names)}

    def synchronize(self) -> None:
        """Let the host wait until all that is updated is in its memory."""
        self._down.synchronize()

    def _so_far(self) -> torch.cuda.Event | None:
        return _end_of(torch.cuda.current_stream(self._device)) if self._device.type == "cuda" else None

    def _batches_of(self, states: Sequence[HostState]) -> _Batches:
        """They hold the states, each of which has a piece, so that no other has the name of one."""
        names = tuple(map(id, states))
        if names not in self._batches:
            new = _Batches(list(_batches(states)))
            while self._batches and new.pieces + sum(each.pieces for each in self._batches.values()) > KEPT:
                self._batches.pop(next(iter(self._batches)))
            self._batches[names] = new
        return self._batches[names]

    def _launches(self, batches: _Batches, updates: Sequence[Update]) -> list[list[PieceLaunch]]:
        self._compute.take()  # so that tables are memory of this stream
        first, kinds = self._next, kinds_of(updates)
        found = batches.tables.get(first)
        if found is None or found.kinds != kinds:
            slots = [(first + number) % SLOTS for number in range(len(batches.of))]
            there = [batch.in_slot(slot, self._slots[slot]) for batch, slot in zip(batches.of, slots, strict=True)]
            found = batches.tables[first] = PieceTables([each.pieces for each in there], kinds, self._owners)
        return found.launches(updates)

    def _run(
        self,
        batch: _Batch,
        updates: Sequence[Update],
        launches: Sequence[PieceLaunch] | None,
        maps: tuple[torch.Tensor, torch.Tensor],
        factor: torch.Tensor | None,
    ) -> None:
        """Without launches by the reference."""
        index = self._next
        self._next = (index + 1) % SLOTS
        there = batch.in_slot(index, self._slots[index])
        self._up.wait(self._free[index])
        # Further pieces of a tensor are none of what was written since.
        for written in {piece.state._written for piece in batch.pieces if piece.elements.start == 0}:
            self._up.wait(written)
        self._up.take()
        for host, card in there.copies:
            card.copy_(host, non_blocking=True)
        self._compute.follow(self._up)
        self._compute.take()
        if launches is None:
            adamw8bit([part(updates[one.number], one.elements, one.state) for one in there.pieces], maps, factor)
        else:
            for launch in launches:
                launch.run(maps, factor)
        self._down.follow(self._compute)
        self._down.take()
        for host, card in there.copies:
            host.copy_(card, non_blocking=True)
        # Whoever still waits for the record before waited for this slot, or is to wait for these copies too.
        self._free[index] = there.written = self._down.record(there.written)
        for piece in batch.pieces:
            piece.state._written = there.written
