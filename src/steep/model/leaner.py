"""Less of the card's memory for a model that is training, where it was planned too tightly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from steep.model.attention_bytes import AttentionForm
from steep.model.block import Place
from steep.model.fused import Fused
from steep.model.install import fused_of
from steep.model.placement import Kept
from steep.model.recompute import leaner_than, needed_bytes
from steep.model.tiling import tile_sizes
from steep.model.unwrap import unwrap
from steep.ops.linear_cross_entropy import Way

_CUT: dict[Way, str] = {
    "tokens": ", the loss cut by tokens",
    "vocabulary": ", the loss cut by the vocabulary",
    "narrow": ", the loss cut into narrow parts of the vocabulary",
}


def make_leaner(model: Any) -> str | None:
    """Let the layers of an installed model keep less from now on than its last batch did, or compute it in smaller
    tiles; where they cannot, let its loss need less. A checkpoint keeps that, as it does what was chosen at first.

    Returns:
        What they keep now, in words; None: they keep the least already, or memory did not run out in a fused call.
    """
    fused = fused_of(model)
    causal: Any = unwrap(model)
    if fused.levels is None or fused.last is None or (fused.calls and not fused.was_fused):
        return None
    tokens, dtype, stream, row = fused.last
    layer, fp8 = fused.layer(causal.model.layers[0]), fused.fp8 or "none"
    kept = Kept.of([layer], dtype, stream, fp8, tokens)
    on_gpu: list[Place] = ["gpu"] * len(fused.levels)
    places: Sequence[Place] = fused.places or on_gpu
    form = AttentionForm.here(layer, dtype, row, causal.model.norm.weight.device)
    needed = needed_bytes(kept, layer, dtype, stream, tokens, fp8, form)
    here = fused.levels, fused.tile or tile_sizes(tokens)[0]
    on_host = kept.in_host_memory(fused.levels, places)

    def needed_at(levels: Sequence[int], tile: int) -> float:
        """Of what keeps no more in host memory than now: how much more that has is not known."""
        return needed(levels, places, tile) if kept.in_host_memory(levels, places) <= on_host else math.inf

    found = leaner_than(*here, tokens, needed_at)
    if found is not None:
        fused.levels, fused.tile = found
    elif not causal.narrow_loss(tokens):
        return None
    fused.chosen_for = 0  # by what was free, which was not enough
    fused.give_up_pass()
    return _in_words(fused, tokens)


def _in_words(fused: Fused, tokens: int) -> str:
    counts = Counter(fused.levels)
    levels = " and ".join(f"{level} in {count} layers" for level, count in sorted(counts.items()))
    loss = _CUT[fused.loss_way] if fused.loss_way else ""
    return f"level {levels}, in tiles of {fused.tile or tokens:,} tokens{loss}"
