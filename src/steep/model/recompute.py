"""What each layer keeps for its backward pass, and where, chosen to fill the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from steep.model.attention_bytes import BY_KERNEL, AttentionForm
from steep.model.block import LEVELS, Place
from steep.model.layer import Layer
from steep.model.placement import Kept
from steep.model.step_bytes import training_bytes, work_bytes
from steep.model.tiling import fast_and_slower
from steep.ops.fp8_groups import Fp8Products
from steep.ops.host_states import staging_bytes

# Of what the card has free at the first step: allocations of odd sizes leave gaps.
USED_SHARE = 0.92
# Of what layers need, that the next leaner choice spares: 0.8 GiB of an 8B at level 0 with 4,096 tokens. By how much a
# step did not fit is not known: it is then tried a few times, and not some hundred.
LESS = 1 / 16
# Whose gradients are there with updates inside backward: of the one that computes, and of those whose updates over host
# memory are under way.
_LAYERS_AT_ONCE = 5


def level_lists(num_layers: int) -> Iterator[list[int]]:
    """Levels of all layers, from the least that is computed again to the most: of two neighbouring levels the lower one
    for some of the last layers."""
    for low in LEVELS[:-1]:
        for lower in range(num_layers, 0, -1):
            yield [low + 1] * (num_layers - lower) + [low] * lower
    yield [LEVELS[-1]] * num_layers


def candidates(num_layers: int, tokens: int) -> Iterator[tuple[list[int], int]]:
    """Levels of all layers with a tile, from the fastest to the leanest: each tile that is slower than others comes
    after all of these."""
    fast, slower = fast_and_slower(tokens)
    yield from product(level_lists(num_layers), fast)
    for tile in slower:
        yield from ((levels, tile) for levels in level_lists(num_layers))


@dataclass(frozen=True)
class Updates:
    """What of gradients and optimizer states is on the card, and when.

    Attributes:
        in_backward: a gradient is gone when its tensor is updated, so that those of a few layers are there at a time.
        on_host: whose states are in host memory.
        tied: the table is the head too, so that its gradient waits for that of the input embeddings; another table's
            comes when the layers' work is over.
        width: bytes of a value's states, where they are more than two moments in the parameter's dtype.
    """

    in_backward: bool = False
    on_host: str = "none"
    tied: bool = False
    width: int = 0

    def bytes_of(self, decoder: Any) -> int:
        """Bytes on the card, beside the weights, of what a decoder trains."""
        if not self.in_backward and self.on_host == "none":
            return training_bytes(decoder.parameters(), width=self.width)
        layers = [list(layer.parameters()) for layer in decoder.layers]
        of_layers = {id(parameter) for layer in layers for parameter in layer}
        others = [parameter for parameter in decoder.parameters() if id(parameter) not in of_layers]
        of_states = {"gradients": False, "width": self.width}
        states = 0 if self.on_host == "all" else sum(training_bytes(layer, **of_states) for layer in layers)
        if self.on_host == "none":
            states += training_bytes(others, **of_states)
        else:
            states += staging_bytes()
        if self.in_backward:
            of_table = training_bytes(others, states=False) if self.tied else 0
            return states + of_table + _LAYERS_AT_ONCE * max(training_bytes(layer, states=False) for layer in layers)
        return states + training_bytes(decoder.parameters(), states=False)


def room_on_card(decoder: Any, updates: Updates) -> float | None:
    """Bytes of the card that training may use beside the weights: most of what is free now, before the first backward
    pass, less gradients and states of what trains in the decoder. None: its weights are on no card."""
    device = decoder.norm.weight.device
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USED_SHARE * free - updates.bytes_of(decoder)


def bytes_beside_decoder(model: Any, updates: Updates) -> int:
    """Bytes of gradients and states of what a causal LM trains outside of its decoder: its head, unless that is the
    table."""
    of_decoder = {id(parameter) for parameter in model.model.parameters()}
    beside = (parameter for parameter in model.parameters() if id(parameter) not in of_decoder)
    return training_bytes(beside, states=updates.on_host == "none", width=updates.width)


def levels_within(
    room: float | None,
    host_room: int,
    num_layers: int,
    layer: Layer,
    dtype: torch.dtype,
    stream: torch.dtype,
    tokens: int,
    beside: int,
    fp8: Fp8Products = "none",
    form: AttentionForm = BY_KERNEL,
) -> tuple[list[int], list[Place], int]:
    """The first of `candidates` that needs no more than a room (`room_on_card`), less what the head takes, with the
    fewest layers that have something in host memory; or the last one; the first one without a card.

    Args:
        host_room: bytes of host memory that layers may have.
        layer: one of the decoder's.
        beside: bytes that the head takes, with its loss.
        fp8: which products are in fp8.
        form: how attention is computed.
    """
    if room is None:
        levels, tile = next(candidates(num_layers, tokens))
        return levels, ["gpu"] * num_layers, tile
    kept, limit = Kept.of([layer], dtype, stream, fp8, tokens), room - beside
    needed = needed_bytes(kept, layer, dtype, stream, tokens, fp8, form)

    def fits(levels: list[int], places: list[Place], tile: int) -> bool:
        return needed(levels, places, tile) <= limit

    for levels, tile in candidates(num_layers, tokens):
        places = kept.fewest(levels, host_room, partial(fits, levels, tile=tile))
        if places is not None:
            return levels, places, tile
    return levels, kept.most(levels, host_room), tile


def leaner_than(
    levels: Sequence[int], tile: int, tokens: int, needed: Callable[[Sequence[int], int], float]
) -> tuple[list[int], int] | None:
    """The first of `candidates` that needs less by a share that is worth a step, or the one that needs least; None:
    none needs less.

    Args:
        needed: bytes at given levels, in a given tile.
    """
    now, all_of_them = needed(levels, tile), list(candidates(len(levels), tokens))
    leanest = min(all_of_them, key=lambda each: needed(*each))
    enough = (each for each in all_of_them if needed(*each) <= (1 - LESS) * now)
    return next(enough, leanest if needed(*leanest) < now else None)


def needed_bytes(
    kept: Kept,
    layer: Layer,
    dtype: torch.dtype,
    stream: torch.dtype,
    tokens: int,
    fp8: Fp8Products,
    form: AttentionForm,
) -> Callable[[Sequence[int], Sequence[Place], int], int]:
    """Bytes that layers need on the GPU at their peak, at given levels and places in a given tile: what they keep, and
    the work of one."""

    @cache
    def work(tile: int, level: int, place: Place) -> int:
        return work_bytes(layer, dtype, stream, level, tokens, fp8, tile, place, form)

    def needed(levels: Sequence[int], places: Sequence[Place], tile: int) -> int:
        return max(own + work(tile, levels[index], places[index]) for index, own in kept.in_backward(levels, places))

    return needed
