"""What layers keep for their backward pass, in host memory: copied down while the next layer computes forward, and up
while the layer behind it computes backward.

On a card there is one stream down and one up, and they and the main stream wait for each other by events: the host
waits for nothing in a step.

    forward of a layer    main: computes       down: copies what it keeps
    forward of the next   main: computes, then waits for that copy, and lets go of what was copied
    backward              up: waits for what main has done so far, fetches the layer before the one that main begins
                          main: waits for what was fetched, computes

So the main stream alone takes memory and gives it back, in its own order, and none is held back by the allocator. What
is fetched goes into two buffers in turn, which live from the first fetch of a backward pass to its end; a layer may
write over what it gets. A long sequence has one buffer (`buffers_of`): a layer then fetches its own when it begins.

On a CPU the same happens at once, by plain copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from steep.ops.pinned import pinned_zeros

_Event = torch.cuda.Event | torch.Event
_ALIGNMENT = 256  # bytes: what the card's own allocator gives
_LARGE = 2**29  # bytes of one buffer


def buffers_of(size: int, little: bool) -> int:
    """Buffers of that many bytes on the card: one for the layer that computes, and one for the layer before it. Where
    layers have `little` on the host (`steep.model.block`), to fetch it takes a twentieth of the time that a layer
    computes, or so, and less the longer documents are: where it is large, one buffer is worth more than that."""
    return 1 if little and size >= _LARGE else 2


class HostStore:
    """The host memory of a model's layers: for each a buffer that is as large as it had to be so far. One forward pass
    at a time has it, until its backward pass is over or its graph is gone."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._holder: weakref.ref[HostPass] | None = None
        self._streams: dict[torch.device, _Streams] = {}

    def begin(self, device: torch.device, little: bool = False) -> HostPass | None:
        """The place of a forward pass that begins; None: another one has the memory.

        Args:
            little: see `buffers_of`.
        """
        if self._holder is not None and self._holder() is not None:
            return None
        if device not in self._streams:
            self._streams[device] = _Streams.of(device)
        new = HostPass(self, device, self._streams[device], little)
        self._holder = weakref.ref(new)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes that there are of it."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    @property
    def largest(self) -> int:
        """Bytes that a layer has had: of the longest batch so far, for which there is room on the card. A shorter one
        has no more buffers there."""
        return max((buffer.numel() for buffer in self._buffers.values()), default=0)

    def buffer(self, index: int, size: int, device: torch.device) -> torch.Tensor:
        """uint8 [size] for a layer."""
        there = self._buffers.pop(index, None)
        if there is None or there.numel() < size:
            if there is not None and device.type == "cuda":
                torch.cuda.synchronize(device)  # a batch is the longest so far: copies of the one before may go on
            del there
            there = pinned_zeros((size,), torch.uint8, device, "each step waits for the copies of its layers")
        self._buffers[index] = there
        return there[:size]

    def take_back(self) -> None:
        """From a pass that is given up, though somebody may still have it: it has no backward pass any more."""
        holder = None if self._holder is None else self._holder()
        if holder is not None:
            holder.leave()

    def free(self) -> None:
        """Give all of it back: no step is to come for now."""
        self.take_back()
        self._buffers.clear()

    def leave(self, leaving: HostPass) -> None:
        if self._holder is not None and self._holder() is leaving:
            self._holder = None


@dataclass(frozen=True)
class _Streams:
    """Of copies from and to a card; None on a CPU."""

    down: torch.cuda.Stream | None
    up: torch.cuda.Stream | None

    @classmethod
    def of(cls, device: torch.device) -> _Streams:
        on_card = device.type == "cuda"
        return cls(*((torch.cuda.Stream(device), torch.cuda.Stream(device)) if on_card else (None, None)))


@dataclass
class _Held:
    """Tensors that are being copied down.

    Attributes:
        versions: of the tensors when their copy began.
        copied: None: they are.
    """

    tensors: list[torch.Tensor]
    versions: list[int]
    copied: _Event | None


@dataclass
class _OnHost:
    """What a layer has in host memory.

    Attributes:
        tensors: views of its buffer.
    """

    buffer: torch.Tensor
    tensors: list[torch.Tensor]


@dataclass
class _Fetched:
    slot: int
    tensors: list[torch.Tensor]
    there: _Event | None


@dataclass(eq=False)
class HostPass:
    """One forward pass and its backward pass."""

    store: HostStore
    device: torch.device
    streams: _Streams
    little: bool = False
    _held: _Held | None = None
    _on_host: dict[int, _OnHost] = field(default_factory=dict)
    _slots: list[torch.Tensor] = field(default_factory=list)
    _fetched: dict[int, _Fetched] = field(default_factory=dict)
    _left: bool = False

    def keep(self, index: int, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to copy what the layer `index` keeps, which may be nothing, and let go of what the one before it did.
        Nobody may write into the tensors before the next call."""
        sources = [tensor.detach().contiguous() for tensor in tensors]
        copied = None
        if sources:
            buffer = self.store.buffer(index, _size(sources), self.device)
            places = _places(buffer, sources)
            if (down := self.streams.down) is None:
                _copy(sources, places)
            else:
                down.wait_stream(self._main)
                with torch.cuda.stream(down):
                    _copy(sources, places)
                copied = down.record_event()
            self._on_host[index] = _OnHost(buffer, places)
        self.let_go()
        if sources:
            self._held = _Held(sources, [source._version for source in sources], copied)

    def let_go(self) -> None:
        """Of what was copied last, behind its copy.

        Raises:
            RuntimeError: it was written into meanwhile.
        """
        held, self._held = self._held, None
        if held is None:
            return
        if held.copied is not None:
            self._main.wait_event(held.copied)
        if any(tensor._version != version for tensor, version in zip(held.tensors, held.versions, strict=True)):
            raise RuntimeError("what a fused layer keeps was modified in place while it was copied to host memory")

    def fetch(self, index: int) -> list[torch.Tensor]:
        """What the layer `index` has on the host, for its backward pass, which begins: the last one of it. What the
        layer before it has is fetched meanwhile, if there are two buffers.

        Raises:
            RuntimeError: this pass was left.
        """
        if self._left:
            raise RuntimeError("what a fused layer kept in host memory is gone: an error ended this pass before")
        for wanted in (index, index - 1)[: buffers_of(self.store.largest, self.little)]:
            if wanted in self._on_host and wanted not in self._fetched:
                self._fetch(wanted, beside=self._fetched.get(index))
        self._on_host.pop(index, None)
        fetched = self._fetched.get(index)
        if fetched is None:
            return []
        if fetched.there is not None:
            self._main.wait_event(fetched.there)
        return fetched.tensors

    def leave(self) -> None:
        """It failed, and its graph may stay alive: the next forward pass gets the memory all the same."""
        self._left = True
        self.store.leave(self)

    @property
    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _fetch(self, index: int, beside: _Fetched | None) -> None:
        """Into a slot that `beside` has not."""
        there, source, up = None, self._on_host[index], self.streams.up
        slot = 0 if beside is None else 1 - beside.slot
        self._fetched = {number: other for number, other in self._fetched.items() if other.slot != slot}
        buffer = self._slot(slot)[: source.buffer.numel()]
        if up is None:
            buffer.copy_(source.buffer)
        else:
            up.wait_stream(
                self._main
            )  # which gave the slot its memory, or read what was in it, and awaited the copy down
            with torch.cuda.stream(up):
                buffer.copy_(source.buffer, non_blocking=True)
            there = up.record_event()
        self._fetched[index] = _Fetched(slot, _places(buffer, source.tensors), there)

    def _slot(self, number: int) -> torch.Tensor:
        """As large as any layer needs, made when it is first needed."""
        while len(self._slots) <= number:
            size = max(each.buffer.numel() for each in self._on_host.values())
            if not self._slots and self.streams.up is not None:
                # A pass may end while something is fetched, in an error: the memory goes back behind that.
                weakref.finalize(self, self._main.wait_stream, self.streams.up).atexit = False
            self._slots.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return self._slots[number]


@dataclass(frozen=True)
class HostLayer:
    """The part of one layer in a pass.

    Attributes:
        place: what it has on the host (`steep.model.block`).
    """

    whole: HostPass
    index: int
    place: str

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        self.whole.keep(self.index, tensors)

    def fetch(self) -> list[torch.Tensor]:
        return self.whole.fetch(self.index)

    def let_go(self) -> None:
        self.whole.let_go()

    def leave(self) -> None:
        self.whole.leave()


@contextmanager
def left_in_an_error(layer: HostLayer | None) -> Iterator[None]:
    """Within, an error ends the pass that `layer` is a part of."""
    try:
        yield
    except BaseException:
        if layer is not None:
            layer.leave()
        raise


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)


def _places(buffer: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of `buffer`, one behind the other, of these shapes and dtypes."""
    places, start = [], 0
    for tensor in like:
        places.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places


def _copy(sources: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    for source, place in zip(sources, places, strict=True):
        place.copy_(source, non_blocking=True)
