"""What layers keep, in bytes: how much of it a step has on the GPU, how much in host memory, and the fewest layers with
something there by which a step fits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from steep.model.block import LEVELS, PLACES, Place, has_little
from steep.model.host_store import buffers_of
from steep.model.layer import Layer
from steep.model.step_bytes import Stored, products_a_byte, stored_bytes
from steep.ops.fp8_groups import Fp8Products

# Copies are hidden where a layer computes so many operations forward for each byte: an H200 does 13,000 while a byte
# goes to its host, and cards that compute slower less. A plan takes what it knows of its card (`steep.planning.rates`).
HIDDEN = 10_000
_ALL = len(PLACES) - 1
_NUMBERS = {place: number for number, place in enumerate(PLACES)}


@dataclass(frozen=True)
class Kept:
    """What layers of a model keep of a batch.

    Attributes:
        stays, on_host: bytes of one layer that stay on the GPU, and that are in host memory, by level and place.
        furthest: by level, the last place whose copies are hidden behind what the layer computes, as a number.
    """

    stays: list[list[int]]
    on_host: list[list[int]]
    furthest: list[int]

    @classmethod
    def of(
        cls,
        layers: Iterable[Layer],
        dtype: torch.dtype,
        stream: torch.dtype,
        fp8: Fp8Products,
        tokens: int,
        hidden: float = HIDDEN,
    ) -> Kept:
        """The largest of several layers.

        Args:
            hidden: operations forward for each byte from which on a copy is hidden.
        """
        found = [(layer, stored_bytes(layer, dtype, stream, fp8)) for layer in layers]
        numbers = range(len(PLACES))
        stays, on_host = (
            [[tokens * max(each[level][place][memory] for _, each in found) for place in numbers] for level in LEVELS]
            for memory in (0, 1)
        )
        furthest = [min(_furthest(layer, each[level], level, hidden) for layer, each in found) for level in LEVELS]
        # of places at which the same is there, the first
        first = [on_host[level].index(on_host[level][place]) for level, place in enumerate(furthest)]
        return cls(stays, on_host, first)

    def on_gpu(self, levels: Sequence[int], places: Sequence[Place]) -> int:
        """Bytes that layers have on the GPU between the forward and the backward pass."""
        return sum(map(self._stays, levels, places))

    def in_host_memory(self, levels: Sequence[int], places: Sequence[Place]) -> int:
        return sum(map(self._there, levels, places))

    def in_backward(self, levels: Sequence[int], places: Sequence[Place]) -> list[tuple[int, int]]:
        """Of each of `moments` the layer, and the bytes that layers have on the GPU in its backward pass, which frees
        what is kept when it ends: with what was fetched of it and of the layer before it. What is held in the forward
        pass while it is copied is no more than that, in the same layer."""
        there = list(map(self._there, levels, places))
        stays = list(accumulate(map(self._stays, levels, places)))
        slot, found = max(there), []
        most = buffers_of(slot, has_little(levels, places))
        for index in moments(levels, places):
            slots = sum(size > 0 for size in there[max(index - most + 1, 0) :]) if slot else 0
            freed = 0
            if levels[index] == 0 and places[index] == "all":  # `work_bytes` has gate and up freed, and a slot stays
                freed = self.on_host[0][_ALL] - self.on_host[0][_ALL - 1]
            found.append((index, stays[index] + min(slots, most) * slot + freed))
        return found

    def fewest(self, levels: Sequence[int], room: int, fits: Callable[[list[Place]], bool]) -> list[Place] | None:
        """Places with which a step fits, whose layers have no more than `room` bytes in host memory; None: it does not
        fit."""
        reach, before = self._reach(levels, room), -1
        steps = {0, *(min(count, reach) for count in (len(levels) - 1, 2 * len(levels) - 2, reach))}
        for end in sorted(steps):  # of what is in between each needs less
            if fits(self._places(levels, end)):
                while end - before > 1:
                    middle = (before + end) // 2
                    before, end = (before, middle) if fits(self._places(levels, middle)) else (middle, end)
                return self._places(levels, end)
            before = end
        return None

    def most(self, levels: Sequence[int], room: int) -> list[Place]:
        """Places of as many as `room` bytes of host memory hold."""
        return self._places(levels, self._reach(levels, room))

    def _places(self, levels: Sequence[int], count: int) -> list[Place]:
        """The input of one layer after another goes to the host, the first layer's first; then the rest, as far as
        copies are hidden. What the last layer keeps goes last, and as a whole: its backward pass comes at once, so that
        nothing hides its copies."""
        others = len(levels) - 1
        inputs, rest = min(count, others), min(max(count - others, 0), others)
        numbers = [max(self.furthest[level], 1) for level in levels[:rest]] + [1] * (inputs - rest)
        of_last = max(self.furthest[levels[-1]], 1) if count > 2 * others else 0
        return [PLACES[number] for number in (*numbers, *[0] * (others - inputs), of_last)]

    def _reach(self, levels: Sequence[int], room: int) -> int:
        """The largest count of `_places` within the room."""
        if room <= 0:
            return 0
        counts = range(1, 2 * len(levels))
        return bisect_right(counts, room, key=lambda count: self.in_host_memory(levels, self._places(levels, count)))

    def _there(self, level: int, place: Place) -> int:
        return self.on_host[level][_NUMBERS[place]]

    def _stays(self, level: int, place: Place) -> int:
        return self.stays[level][_NUMBERS[place]]


def _furthest(layer: Any, places: Sequence[Stored], level: int, hidden: float) -> int:
    """What a layer of level 0 keeps beside the rest, gate and up, takes longer to copy than to compute again."""
    far = enumerate(places[: _ALL if level == 0 else _ALL + 1])
    return max((number for number, each in far if products_a_byte(layer, each.on_host) >= hidden), default=0)


def moments(levels: Sequence[int], places: Sequence[Place]) -> list[int]:
    """The layers in whose backward pass a step may need the most memory: the last of each run of equal ones, since a
    pass frees what its layer kept; the one behind such a run, when the first is fetched that is in host memory; and the
    first layer, after which all gradients are there."""
    pairs = list(zip(levels, places, strict=True))
    last = len(pairs) - 1
    return [
        index
        for index, pair in enumerate(pairs)
        if index in (0, last) or pairs[index + 1] != pair or pairs[index - 1][1] != pair[1]
    ]
