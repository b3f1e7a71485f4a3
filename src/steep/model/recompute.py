"""What each layer keeps for its backward pass, chosen to fill the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steep.model.block import LEVELS
from steep.model.layer import Layer
from steep.model.step_bytes import kept_bytes, training_bytes, work_bytes

# Of what the card has free at the first step: allocations of odd sizes leave gaps.
USED_SHARE = 0.92


def levels_for(kept: Sequence[int], num_layers: int, tokens: int, budget: float) -> list[int]:
    """The levels of `num_layers` layers that keep at most `budget` bytes for `tokens` tokens, as low as they can be:
    of two neighbouring levels, the lower for as many of the last layers as fit. All at level 3 where not even that
    fits."""
    for low in LEVELS[:-1]:
        each = kept[low] - kept[low + 1]
        room = budget / tokens - num_layers * kept[low + 1]
        if room >= 0:
            lower = min(num_layers, int(room // each))
            return [low + 1] * (num_layers - lower) + [low] * lower
    return [LEVELS[-1]] * num_layers


def room_on_card(decoder: Any) -> float | None:
    """Bytes of the card that training may use beside the weights: most of what is free now, before the first backward
    pass, less gradients and states of what trains in the decoder. None: its weights are on no card."""
    device = decoder.norm.weight.device
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USED_SHARE * free - training_bytes(decoder.parameters())


def levels_within(
    room: float | None,
    num_layers: int,
    layer: Layer,
    dtype: torch.dtype,
    stream: torch.dtype,
    tokens: int,
    beside: int,
) -> list[int]:
    """`levels_for` a room (`room_on_card`), less a layer's own work and what the head takes; level 0 without a card.

    Args:
        layer: one of the decoder's.
        beside: bytes that the head takes, with its loss.
    """
    if room is None:
        return [LEVELS[0]] * num_layers
    needed = work_bytes(layer, dtype, stream, LEVELS[-1], tokens) + beside
    return levels_for(kept_bytes(layer, dtype, stream), num_layers, tokens, room - needed)
