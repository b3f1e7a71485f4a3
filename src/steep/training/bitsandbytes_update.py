"""bitsandbytes' AdamW update of bf16 weights, where no kernel of ours does it, as on a CPU.

The update runs in fp32, on copies of a few weights at a time; many small tensors share one. What comes of it is rounded
stochastically, or to the nearest where weights have fp32 masters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional

from steep.ops import master_weights

BLOCK = 256  # elements that share one scale in bitsandbytes' 8-bit states
SLICE = 2**24  # elements updated at once: bounds the copies to 0.4 GiB whatever the size of a tensor


def stochastic_round_(target: torch.Tensor, values: torch.Tensor, generator: torch.Generator) -> None:
    """Round fp32 `values` (overwritten) into bf16 `target` of the same size, up or down by chance, unbiased.

    bf16 is the upper half of fp32's bits: adding 16 random bits below it carries into it as often as it should.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(0, 2**16, generator=generator)
    noise.masked_fill_(values.isnan(), 0)  # a NaN's bits may all be ones: a carry would make it -0
    bits = values.view(torch.int32).add_(noise)
    # Little-endian: of each pair of 16-bit halves, the second is the upper one.
    target.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


@dataclass(frozen=True)
class Piece:
    """Part of a parameter, with its share of everything that one update reads and writes; all are flat views.

    Attributes:
        weights, gradient: bf16 [N], N ≤ SLICE.
        moments: both moments, 8-bit codes or fp32 [N], then the codes' scales, fp32 [ceil(N / BLOCK)].
        step: updates of this parameter, this one included.
        state: the whole parameter's, for its code tables.
        config: bitsandbytes' settings of this parameter.
        noise: of the rounding, drawn from piece to piece of this parameter.
        low: int16 [N], of weights with masters (`steep.ops.master_weights`).
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    moments: list[torch.Tensor]
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    noise: torch.Generator
    low: torch.Tensor | None

    def joins(self, other: Piece) -> bool:
        """Whether `other` can follow this one in a single update: same settings, same kind, whole blocks so far.

        A tensor that once had no gradient is at a step of its own, and Adam's bias correction depends on it.
        """
        same_place = self.weights.device == other.weights.device and self.step == other.step
        same_kind = self.moments[0].dtype == other.moments[0].dtype and self.config == other.config
        return same_place and same_kind and len(self.weights) % BLOCK == 0


def cut(
    parameter: torch.Tensor, state: dict[str, Any], config: dict[str, Any], noise: torch.Generator
) -> Iterator[Piece]:
    """A parameter in pieces of at most SLICE elements. SLICE is a multiple of BLOCK, so scales divide evenly."""
    assert parameter.grad is not None
    weights, gradient = parameter.detach().view(-1), parameter.grad.contiguous().view(-1)
    scales = [state[name] for name in ("absmax1", "absmax2") if state["state1"].dtype == torch.uint8]
    for start in range(0, len(weights), SLICE):
        stop = min(start + SLICE, len(weights))
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        moments = [state[name].view(-1)[start:stop] for name in ("state1", "state2")]
        moments += [scale[blocks] for scale in scales]
        low = state["low"].view(-1)[start:stop] if "low" in state else None
        yield Piece(weights[start:stop], gradient[start:stop], moments, state["step"], state, config, noise, low)


def update(pieces: Iterable[Piece]) -> None:
    """The update of all `pieces`. While the device works on some, the next are cut."""
    for batch in _batches(pieces):
        _update(batch)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in order, in runs that one update can take: at most SLICE elements."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + len(piece.weights) > SLICE or not batch[-1].joins(piece)):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.weights)
    if batch:
        yield batch


def _update(pieces: list[Piece]) -> None:
    """bitsandbytes' update of all `pieces` as one tensor, rounded into their weights."""
    weights = _joined([piece.weights for piece in pieces])
    lows = [piece.low for piece in pieces if piece.low is not None]  # all of a group have masters, or none
    values = master_weights.join(weights, _joined(lows)) if lows else weights.float()
    gradient = _joined([piece.gradient for piece in pieces]).float()
    moments = [_joined(list(parts)) for parts in zip(*(piece.moments for piece in pieces), strict=True)]
    step, state, config = pieces[0].step, pieces[0].state, pieces[0].config
    (beta1, beta2), eps, lr, decay = config["betas"], config["eps"], config["lr"], config["weight_decay"]
    if len(moments) == 2:
        functional.optimizer_update_32bit(
            "adam", gradient, values, moments[0], beta1, eps, step, lr, moments[1], beta2, weight_decay=decay
        )
    else:
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, values, moments[0], moments[1], beta1, beta2, 0.0, 0.0, eps, step, lr,
            state["qmap1"], state["qmap2"], moments[2], moments[3], weight_decay=decay,
        )  # fmt: skip
    for piece, part in zip(pieces, values.split([len(piece.weights) for piece in pieces]), strict=True):
        if piece.low is None:
            stochastic_round_(piece.weights, part, piece.noise)
        else:
            for kept, new in zip((piece.weights, piece.low), master_weights.split(part), strict=True):
                kept.copy_(new)
    if len(pieces) > 1:  # the moments of a single piece were updated in place
        for joined, parts in zip(moments, zip(*(piece.moments for piece in pieces), strict=True), strict=True):
            torch._foreach_copy_(list(parts), list(joined.split([len(part) for part in parts])))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
