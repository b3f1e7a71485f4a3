"""A decoder layer as one operation: what it computes, what it keeps for the backward pass, and what it computes again.

    n1 = norm(x)       q, k, v = n1·Wᵀ, turned by rope       a = attention(q, k, v)       x2 = x + o(a)
    n2 = norm(x2)      gate, up = n2·Wᵀ                      h = act(gate)·up             y = x2 + down(h)

The base weights are frozen, so the backward pass needs no more than x, x2, (q, k, v), a, (gate, up). What of it is kept
is the layer's level:

    0  x, x2, qkv, a, gate and up      again: norms, h
    1  x, x2, qkv, a                   again: + gate, up
    2  x, x2, a                        again: + q, k, v, rope
    3  x                               again: + attention, o

`down` is never computed again: where a norm follows it (Gemma) its output is kept.

Where it is kept is the layer's place: on the GPU, or in host memory (`steep.model.host_store`), from each place on also
what the one before has there:

    gpu        nothing is in host memory
    x          x
    attention  x2, qkv, a, and o's output where a norm follows it; at level 2 x2 is nowhere, and computed again
    all        gate and up, and down's output where a norm follows it

All but attention is row by row, and computed for a tile of tokens at a time (`Batch.tile`), so that of a long sequence
only what attention reads and gives is there as a whole. The tiles share one filled weight buffer of each group.

The gradient of y is written over by those of x2 and x where several tiles are computed and nobody else has it: so of a
long sequence one gradient of the stream goes through all layers.

The residual stream (x, x2, y and their gradients) keeps the dtype that it comes in; all else is in the compute dtype,
with fp32 inside norms, products and softmax. Autocast is off inside.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from steep.model.attention_half import AttentionHalf
from steep.model.host_store import HostLayer, left_in_an_error
from steep.model.layer import Batch, Layer, rows
from steep.model.mlp_half import MlpHalf
from steep.model.weights import AdapterGradients, Weights
from steep.ops.backend import without_autocast
from steep.ops.copy_rows import copy_rows
from steep.ops.products import sums_in_fp32
from steep.ops.slices import rows_of

LEVELS = (0, 1, 2, 3)
Place = Literal["gpu", "x", "attention", "all"]
PLACES: tuple[Place, ...] = get_args(Place)
# What is in host memory with each, and not with the one before.
_ON_HOST = {
    "gpu": (),
    "x": ("x",),
    "attention": ("x2", "qkv", "attended", "saved", "attention_out"),
    "all": ("gate_up", "mlp_out"),
}


def drops_x2(level: int, place: str) -> bool:
    """Whether a layer computes x2 again from a. At level 3 it has no a; at level 2 in host memory that takes less time
    than to copy x2, and of a long sequence neither memory has much to spare."""
    return level >= 3 or (level == 2 and place in ("attention", "all"))


def has_little(levels: Sequence[int], places: Sequence[Place]) -> bool:
    """Whether no layer has more in host memory than x and a."""
    return all(level >= 2 or place in ("gpu", "x") for level, place in zip(levels, places, strict=True))


def block(x: torch.Tensor, layer: Layer, batch: Batch, backend: str) -> torch.Tensor:
    """The layer's output [T, H] for x [T, H]: differentiable in x and in the adapters that train, once.

    Args:
        backend: of attention.
    """
    return _Block.apply(x, layer, batch, backend, *layer.trained())  # pyright: ignore[reportReturnType]


@dataclass
class _Kept:
    """What a forward pass leaves to its backward pass. None: computed again, or not there, or in host memory; x is
    here for that alone.

    Attributes:
        saved: tensors beside attention's output.
    """

    x: torch.Tensor | None = None
    x2: torch.Tensor | None = None
    qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    saved: tuple[torch.Tensor, ...] = ()
    attention_out: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    mlp_out: torch.Tensor | None = None
    host: HostLayer | None = None
    _on_host: tuple[str, ...] = ()

    def to_host(self, host: HostLayer) -> None:
        """Let go of what belongs there."""
        there: list[tuple[str, torch.Tensor]] = []
        for place in PLACES[: PLACES.index(host.place) + 1]:
            for name in _ON_HOST[place]:
                kept = getattr(self, name)
                there += [(name, each) for each in (kept if name == "saved" else (kept,)) if each is not None]
                setattr(self, name, () if name == "saved" else None)
        host.keep([tensor for _, tensor in there])
        self.host, self._on_host = host, tuple(name for name, _ in there)

    def from_host(self) -> None:
        """Have it again."""
        if self.host is None:
            return
        for name, tensor in zip(self._on_host, self.host.fetch(), strict=True):
            setattr(self, name, (*self.saved, tensor) if name == "saved" else tensor)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, batch: Batch, backend: str, *trained: torch.Tensor
    ) -> torch.Tensor:
        first, second, kept = AttentionHalf(layer, batch, backend), MlpHalf(layer, batch), _Kept()
        level = batch.level if any(ctx.needs_input_grad) else None  # it is there without gradients too
        keeps, level = level is not None, LEVELS[-1] if level is None else level
        with without_autocast(x.device.type), sums_in_fp32():
            qkv, _ = first.project(x, batch.weights(first.qkv))
            rotated = first.rotate(qkv)
            if level <= 1:
                kept.qkv = qkv
            del qkv
            attended, saved = first.attend(rotated)
            del rotated
            x2 = torch.empty_like(x)
            if level == 0 and layer.attention_out_norm is not None:
                kept.attention_out = rows(x, first.o.outputs, batch.dtype)
            weights = batch.weights(first.o)
            for tile in batch.tiles:
                of_tile = first.attended(rows_of(attended, tile), weights.buffer)
                first.add(rows_of(x, tile), of_tile, weights.buffer, rows_of(x2, tile), _at(kept.attention_out, tile))
                weights.used()
            if level <= 2:
                kept.attended, kept.saved = attended, saved
            if not drops_x2(level, "gpu" if batch.host is None else batch.host.place):
                kept.x2 = x2
            del attended, saved, of_tile
            y = x2 if kept.x2 is None else torch.empty_like(x2)
            if level == 0:
                kept.gate_up = second.gradient_rows(x2)
            if keeps and layer.mlp_out_norm is not None:
                kept.mlp_out = rows(x, second.down.outputs, batch.dtype)
            of_gate_up, of_down = batch.weights(second.gate_up), batch.weights(second.down)
            for tile in batch.tiles:
                to_keep = _at(kept.gate_up, tile), _at(kept.mlp_out, tile)
                second.forward(rows_of(x2, tile), of_gate_up, of_down, *to_keep, rows_of(y, tile))
        if keeps:
            kept.x = x
            if batch.host is not None:
                kept.to_host(batch.host)
            stays, kept.x = () if kept.x is None else (x,), None
            ctx.save_for_backward(*stays, *trained)  # what is changed before the backward pass is an error
            ctx.halves, ctx.kept, ctx.trained = (first, second), kept, trained
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, kept = ctx.saved_tensors, ctx.kept
        if kept is None:
            raise RuntimeError("a fused layer's gradients are written over what it kept, so that there is one backward")
        (first, second), ctx.kept, ctx.halves = ctx.halves, None, None  # nothing stays behind while the graph is alive
        with left_in_an_error(kept.host):
            kept.from_host()
            x = saved[0] if kept.x is None else kept.x
            with without_autocast(x.device.type), sums_in_fp32():
                dx, gradients = _Backward(first, second, kept).run(x, dy.contiguous())
        trained = first.layer.trained()
        if len(trained) != len(ctx.trained) or not all(map(operator.is_, trained, ctx.trained)):
            raise RuntimeError("an adapter was frozen, or made to train, after the forward of a fused layer")
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *gradients)


class _Backward:
    """The backward pass of one layer: between its two ends, which attention separates, all is row by row."""

    def __init__(self, first: AttentionHalf, second: MlpHalf, kept: _Kept) -> None:
        self.first, self.second, self.kept, self.batch = first, second, kept, first.batch
        groups = first.qkv, first.o, second.gate_up, second.down
        self.gradients = [AdapterGradients(group, len(self.batch.tiles)) for group in groups]

    def run(self, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of x, and of the adapters that train."""
        first, kept, tiles, normed = self.first, self.kept, self.batch.tiles, None
        weights = self.batch.weights(first.qkv, passes=1 if kept.qkv is not None else 2)
        if kept.qkv is None:
            kept.qkv, normed = first.project(x, weights)
            rotated = first.rotate(kept.qkv)
        else:
            rotated = kept.qkv if first.layer.attention.q_norm is None else first.rotate(kept.qkv)
        if kept.attended is None:
            kept.attended, kept.saved = first.attend(rotated)
        dx2, d_attended = self._between(x, dy)
        d_qkv = first.attend_backward(d_attended, rotated, kept.attended, kept.saved)
        del rotated, d_attended
        kept.attended, kept.saved = None, ()
        dx = dx2 if len(tiles) > 1 else None
        for tile in tiles:
            of_tile = rows_of(d_qkv, tile), rows_of(kept.qkv, tile), rows_of(dx2, tile), rows_of(x, tile), normed
            made = first.project_backward(*of_tile, tile, weights.buffer, self.gradients[0], into=_at(dx, tile))
            weights.used()
        return made if dx is None else dx, [each for gradients in self.gradients for each in gradients.take()]

    def _between(self, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of x2 and of attention's output."""
        first, second, kept, tiles = self.first, self.second, self.kept, self.batch.tiles
        assert kept.attended is not None
        dx2 = d_attended = None
        if len(tiles) > 1:
            dx2, d_attended = dy if self.batch.takes_dy else torch.empty_like(x), torch.empty_like(kept.attended)
        of_o, of_gate_up, of_down = map(self.batch.weights, (first.o, second.gate_up, second.down))
        of_mlp = self.gradients[2], self.gradients[3]
        for tile in tiles:
            x2, attended, out = self._again(rows_of(x, tile), tile, of_o)
            gate_up, mlp_out = _at(kept.gate_up, tile), _at(kept.mlp_out, tile)
            if tile is tiles[-1]:
                kept.x2 = kept.attention_out = kept.gate_up = kept.mlp_out = None
            d_normed = second.backward(rows_of(dy, tile), x2, gate_up, mlp_out, of_gate_up, of_down, of_mlp)
            del gate_up, mlp_out
            d_out, into = first.gradient_rows(x2)
            d_x2 = second.add_backward(d_normed, x2, rows_of(dy, tile), into)
            del d_normed, x2, into
            if attended is None:
                attended = first.attended(rows_of(kept.attended, tile), of_o.buffer, is_multiplied=False).extended
            given = d_out, out, attended, of_o.buffer, self.gradients[1]
            made = first.output_backward(d_x2, *given, into=_at(d_attended, tile))
            of_o.used()
            del given, d_out, out, attended
            if dx2 is not None:
                copy_rows(d_x2, rows_of(dx2, tile))
        return d_x2 if dx2 is None else dx2, made if d_attended is None else d_attended

    def _again(
        self, x: torch.Tensor, tile: slice, weights: Weights
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x2; o's input rows, if they were needed to make it again; and o's output, where a norm follows it."""
        first, kept = self.first, self.kept
        assert kept.attended is not None
        x2, out = _at(kept.x2, tile), _at(kept.attention_out, tile)
        if x2 is not None and (out is not None or first.layer.attention_out_norm is None):
            return x2, None, out
        attended = first.attended(rows_of(kept.attended, tile), weights.buffer)
        if x2 is None:
            x2 = torch.empty_like(x)
            out = first.add(x, attended, weights.buffer, x2)
        else:
            out = first.output(attended, weights.buffer)
        return x2, attended.extended, out


def _at(whole: torch.Tensor | None, tile: slice) -> torch.Tensor | None:
    return None if whole is None else rows_of(whole, tile)
