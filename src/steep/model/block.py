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

The residual stream (x, x2, y and their gradients) keeps the dtype that it comes in; all else is in the compute dtype,
with fp32 inside norms, products and softmax. Autocast is off inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.model.attention_half import AttentionHalf
from steep.model.layer import Batch, Layer
from steep.model.mlp_half import MlpHalf
from steep.ops.backend import without_autocast
from steep.ops.products import sums_in_fp32

LEVELS = (0, 1, 2, 3)


def block(x: torch.Tensor, layer: Layer, batch: Batch, backend: str) -> torch.Tensor:
    """The layer's output [T, H] for x [T, H]: differentiable in x and in the adapters that train, once.

    Args:
        backend: of attention.
    """
    return _Block.apply(x, layer, batch, backend, *layer.trained())  # pyright: ignore[reportReturnType]


@dataclass
class _Kept:
    """What a forward pass leaves to its backward pass, beside x. None: computed again, or not there."""

    x2: torch.Tensor | None = None
    qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    saved: tuple[Any, ...] = ()
    attention_out: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    mlp_out: torch.Tensor | None = None


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, batch: Batch, backend: str, *trained: torch.Tensor
    ) -> torch.Tensor:
        first, second, level = AttentionHalf(layer, batch, backend), MlpHalf(layer, batch), batch.level
        with without_autocast(x.device.type), sums_in_fp32():
            weights = first.qkv.filled_buffer(x.device)
            qkv = first.project(first.normed(x, weights), weights)
            rotated = first.rotate(qkv)
            weights = first.o.filled_buffer(x.device)
            attended, saved = first.attend(rotated, weights)
            del rotated
            x2, attention_out = first.add(x, attended, weights)
            attended = attended.extended
            weights = second.gate_up.filled_buffer(x.device)
            gate_up = second.project(second.normed(x2, weights), weights)
            del weights
            y, mlp_out = second.add(x2, gate_up)
        if any(ctx.needs_input_grad):
            kept = _Kept(mlp_out=mlp_out)
            if level <= 2:
                kept.x2, kept.attended, kept.saved = x2, attended, saved
            if level <= 1:
                kept.qkv = qkv
            if level == 0:
                kept.gate_up, kept.attention_out = gate_up, attention_out
            ctx.save_for_backward(x, *trained)  # an adapter that is changed before the backward pass is an error
            ctx.halves, ctx.kept, ctx.num_trained = (first, second), kept, len(trained)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *_ = ctx.saved_tensors
        kept, (first, second) = ctx.kept, ctx.halves
        if kept is None:
            raise RuntimeError("a fused layer's gradients are written over what it kept, so that there is one backward")
        dy = dy.contiguous()
        ctx.kept = None  # nothing stays behind while the graph is alive
        with without_autocast(x.device.type), sums_in_fp32():
            normed = weights = None
            if kept.qkv is None:
                weights = first.qkv.filled_buffer(x.device)
                multiplied = first.normed(x, weights)
                kept.qkv, normed = first.project(multiplied, weights), multiplied.extended
                del multiplied
                rotated = first.rotate(kept.qkv)
            else:
                rotated = kept.qkv if first.layer.attention.q_norm is None else first.rotate(kept.qkv)
            o_weights = first.o.filled_buffer(x.device)
            if kept.attended is None or kept.x2 is None:
                attended, kept.saved = first.attend(rotated, o_weights)
                kept.x2, kept.attention_out = first.add(x, attended, o_weights)
                kept.attended = attended.extended
                del attended
            elif first.layer.attention_out_norm is not None and kept.attention_out is None:
                kept.attention_out = first.output_again(kept.attended, o_weights)
            d_normed, of_mlp = second.backward(dy, kept.x2, kept.gate_up, kept.mlp_out)
            kept.gate_up = kept.mlp_out = None
            d_out, into = first.gradient_rows(x)
            dx2 = second.add_backward(d_normed, kept.x2, dy, into)
            kept.x2 = None
            del d_normed, into
            d_qkv, of_o = first.attend_backward(
                dx2, d_out, kept.attention_out, kept.attended, rotated, kept.qkv, kept.saved, o_weights
            )
            del rotated, kept, o_weights, d_out
            if normed is None or weights is None:
                weights = first.qkv.filled_buffer(x.device)
                normed = first.normed(x, weights, is_multiplied=False).extended
            dx, of_qkv = first.project_backward(d_qkv, dx2, x, normed, weights)
        gradients = [gradient for gradient in (*of_qkv, *of_o, *of_mlp) if gradient is not None]
        if len(gradients) != ctx.num_trained:
            raise RuntimeError("an adapter was frozen, or made to train, after the forward of a fused layer")
        return (dx if ctx.needs_input_grad[0] else None, None, None, None, *gradients)
