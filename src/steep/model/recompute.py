"""What each layer keeps for its backward pass, and where, chosen to fill the memory that is free."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from steep.model.block import LEVELS, Place
from steep.model.layer import Layer
from steep.model.placement import Kept
from steep.model.step_bytes import training_bytes, work_bytes
from steep.model.tiling import tile_sizes
from steep.ops.fp8_groups import Fp8Products

# Of what the card has free at the first step: allocations of odd sizes leave gaps.
USED_SHARE = 0.92


def level_lists(num_layers: int) -> Iterator[list[int]]:
    """Levels of all layers, from the least that is computed again to the most: of two neighbouring levels the lower one
    for some of the last layers."""
    for low in LEVELS[:-1]:
        for lower in range(num_layers, 0, -1):
            yield [low + 1] * (num_layers - lower) + [low] * lower
    yield [LEVELS[-1]] * num_layers


def candidates(num_layers: int, tokens: int) -> Iterator[tuple[list[int], int]]:
    """Levels of all layers with a tile, from the fastest to the leanest. The smallest tile is slower than the others,
    and comes after all of them."""
    *fast, smallest = tile_sizes(tokens)
    yield from product(level_lists(num_layers), fast or [smallest])
    if fast:
        yield from ((levels, smallest) for levels in level_lists(num_layers))


def room_on_card(decoder: Any) -> float | None:
    """Bytes of the card that training may use beside the weights: most of what is free now, before the first backward
    pass, less gradients and states of what trains in the decoder. None: its weights are on no card."""
    device = decoder.norm.weight.device
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USED_SHARE * free - training_bytes(decoder.parameters())


def bytes_beside_decoder(model: Any) -> int:
    """Bytes of gradients and states of what a causal LM trains outside of its decoder: its head, unless that is the
    table."""
    of_decoder = {id(parameter) for parameter in model.model.parameters()}
    return training_bytes(parameter for parameter in model.parameters() if id(parameter) not in of_decoder)


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
) -> tuple[list[int], list[Place], int]:
    """The first of `candidates` that needs no more than a room (`room_on_card`), less what the head takes, with the
    fewest layers that have something in host memory; or the last one; the first one without a card.

    Args:
        host_room: bytes of host memory that layers may have.
        layer: one of the decoder's.
        beside: bytes that the head takes, with its loss.
        fp8: which products are in fp8.
    """
    if room is None:
        levels, tile = next(candidates(num_layers, tokens))
        return levels, ["gpu"] * num_layers, tile
    kept, limit = Kept.of([layer], dtype, stream, fp8, tokens), room - beside
    work = {
        tile: [work_bytes(layer, dtype, stream, level, tokens, fp8, tile) for level in LEVELS]
        for tile in tile_sizes(tokens)
    }

    def fits(levels: list[int], places: list[Place], tile: int) -> bool:
        return all(own + work[tile][levels[index]] <= limit for index, own in kept.in_backward(levels, places))

    for levels, tile in candidates(num_layers, tokens):
        places = kept.fewest(levels, host_room, partial(fits, levels, tile=tile))
        if places is not None:
            return levels, places, tile
    return levels, kept.most(levels, host_room), tile
