"""Bytes that parts of a fused step take: what layers keep, their work, the loss, and what trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch

from steep.model.attention_bytes import BY_KERNEL, AttentionForm, in_heads
from steep.model.block import PLACES, Place, drops_x2
from steep.model.layer import Layer
from steep.ops.backend import gradient_dtype
from steep.ops.fp8_groups import Fp8Products
from steep.ops.linear_cross_entropy import Way, chunk_size, faster_way, tile_size
from steep.ops.lora import Group


class Stored(NamedTuple):
    """Bytes a token of what a layer keeps."""

    on_gpu: int
    on_host: int


def stored_bytes(
    layer: Layer, dtype: torch.dtype, stream: torch.dtype, fp8: Fp8Products = "none"
) -> list[list[Stored]]:
    """What a layer keeps, its input included, of each level at each place. Nothing is on the GPU at the last one."""
    qkv, _, gate_up, _ = layer.groups(dtype, fp8)
    hidden = layer.o.weight.shape[0]
    x, width = hidden * stream.itemsize, dtype.itemsize
    added = hidden * width
    at_2 = x + layer.attention.num_heads * (layer.attention.head_dim * width + 4)
    at_1 = at_2 + qkv.outputs * width
    at_0 = at_1 + (added if layer.attention_out_norm else 0)
    of_mlp = added if layer.mlp_out_norm else 0
    gate_up_bytes = gate_up.gradient_width * width
    parts = [(x, at_0, gate_up_bytes + of_mlp), (x, at_1, of_mlp), (x, at_2, of_mlp), (x, 0, of_mlp)]
    found = [[Stored(sum(of_level) - there, there) for there in (0, *accumulate(of_level))] for of_level in parts]
    return [
        [each._replace(on_host=each.on_host - x * (level == 2 and drops_x2(level, place))) for place, each in pairs]
        for level, pairs in enumerate(zip(PLACES, places, strict=True) for places in found)
    ]


def products_a_byte(layer: Layer, host: int) -> float:
    """Floating-point operations of a layer's forward pass for each byte that is copied to the host meanwhile.

    Args:
        host: bytes a token.
    """
    projections = (*layer.qkv, layer.o, *layer.gate_up, layer.down)
    return 2 * sum(math.prod(projection.weight.shape) for projection in projections) / max(host, 1)


def work_bytes(
    layer: Layer,
    dtype: torch.dtype,
    stream: torch.dtype,
    level: int,
    tokens: int,
    fp8: Fp8Products = "none",
    tile: int | None = None,
    place: Place = "gpu",
    form: AttentionForm = BY_KERNEL,
) -> int:
    """Bytes that a layer's backward pass takes beside what it kept, at its peak: weight buffers, rows that are computed
    again, and gradients between them, where that of its output is its own (`Batch.takes_dy`). The peak is in the MLP or
    in attention's backward; see `steep.model.block`. Over an fp8 base also dy in e4m3, the transposed weight of a
    product, and what products of the forward pass take that are not in fp8.

    Args:
        tile: tokens that are computed at a time where that is row by row; None: all.
        place: where it was kept, and comes back from before.
        form: how attention is computed.
    """
    qkv, o, _, _ = layer.groups(dtype, fp8)
    attention, width, x = layer.attention, dtype.itemsize, layer.o.weight.shape[0] * stream.itemsize
    heads, several = attention.num_heads * attention.head_dim, tile is not None and tile < tokens
    of_tile = min(tile or tokens, tokens)
    whole = qkv.outputs if attention.q_norm else 0  # columns of all tokens, during the whole backward pass
    if level >= 2:
        whole += qkv.outputs if several else qkv.input_width + qkv.outputs
    if level >= 3:
        whole += heads
    standing = tokens * (whole * width + x)  # and dy
    again = 0  # columns of a tile, while it is differentiated from y to attention's output
    if level >= 1 and layer.attention_out_norm:
        again += o.outputs
    again_x2 = drops_x2(level, place)
    if again_x2 or again:
        again += o.input_width
    between = of_tile * (again * width + (x if again_x2 else 0))
    between += o.buffer_bytes if again or several else 0  # else it is filled after the MLP
    between += qkv.buffer_bytes if level >= 2 else 0
    between += _in_mlp(layer, dtype, level, of_tile, fp8, several=several)
    buffers = qkv.buffer_bytes + _dy_in_fp8(qkv, of_tile)
    freed = tokens * layer.groups(dtype, fp8).gate_up.gradient_width * width if level == 0 else 0  # by then
    if several:
        made = tokens * heads * width  # the gradient of attention's output; that of x2 is written over dy
        in_fp32 = 4 * sum(matrix.numel() for matrix in layer.trained())
        group = in_heads(layer, tokens, width, form)
        rows = of_tile * (qkv.gradient_width + qkv.input_width + o.outputs) * width
        return standing + made + in_fp32 + max(between, max(group, buffers + rows) - freed)
    dq = 4 * heads * form.sums(tokens, attention.num_heads)  # in fp32, in some backends
    in_attention = buffers + tokens * (x + dq + (o.gradient_width + heads + qkv.gradient_width + qkv.outputs) * width)
    in_attention += form.beyond_kernel(layer, tokens, width, attention.num_heads) - freed
    in_forward = qkv.buffer_bytes + tokens * qkv.input_width * width
    in_forward += max(qkv.forward_bytes(tokens), o.forward_bytes(tokens))
    return standing + max(between, in_attention, in_forward)


def _in_mlp(layer: Layer, dtype: torch.dtype, level: int, tokens: int, fp8: Fp8Products, *, several: bool) -> int:
    """Bytes of `MlpHalf.backward` of one tile; where there are several, both weight buffers stay."""
    _, _, gate_up, down = layer.groups(dtype, fp8)
    width, hidden = dtype.itemsize, layer.o.weight.shape[0]
    dy_of_gate_up, dy_of_down = _dy_in_fp8(gate_up, tokens), _dy_in_fp8(down, tokens)
    of_down = dy_of_down + tokens * down.gradient_width * width + max(down.transposed_bytes, dy_of_gate_up)
    of_down = down.buffer_bytes + tokens * down.input_width * width + max(of_down, down.forward_bytes(tokens))
    of_gate_up = gate_up.buffer_bytes + tokens * gate_up.input_width * width
    to_normed = tokens * hidden * width + dy_of_gate_up + gate_up.transposed_bytes
    to_normed = max(to_normed, gate_up.forward_bytes(tokens))  # before, when gate_up is computed
    if several:
        to_normed += down.buffer_bytes
    if level >= 1:
        return of_gate_up + tokens * gate_up.gradient_width * width + max(of_down, to_normed)
    return max(of_down + (gate_up.buffer_bytes if several else 0), of_gate_up + to_normed)


def _dy_in_fp8(group: Group, tokens: int) -> int:
    """Bytes of what a group's dX reads in e4m3, with its scales."""
    rows = group.quantised_gradient(tokens, torch.device("meta"))
    return 0 if rows is None else tokens * rows.codes.stride(0) + rows.scale.nbytes


def loss_bytes(
    tokens: int,
    vocabulary: int,
    hidden: int,
    width: int,
    stream: int,
    gradient: int,
    way: Way | None,
    *,
    converts: bool,
    lifted: bool = False,
) -> int:
    """Bytes that the head's loss takes at its peak, the head's gradient not counted: the last hidden states, before and
    after the final norm, and their gradient, logits, and what is summed or converted. See
    `steep.ops.linear_cross_entropy`.

    Args:
        width, stream: bytes of a hidden state after the norm and before it.
        gradient: bytes of a value of the head's gradient; 0: it has none.
        converts: the head is kept in another dtype than the hidden states.
        lifted: products in fp16, whose gradients are in fp32 until the loss's own is known.
    """
    table, sums = vocabulary * hidden, gradient not in (0, 4)
    way = way or faster_way(tokens, hidden, width, sums)
    if way != "tokens":
        chunk = chunk_size(tokens, vocabulary, width, gradients=True, way=way)
        copy = chunk * hidden * width if converts else 0
        rounded = 0 if lifted else tokens * hidden * width  # the gradient, once the logits are gone
        return tokens * hidden * (stream + width + 4) + max(tokens * chunk * width, rounded) + copy
    tile = min(tile_size(tokens, vocabulary, width, not gradient), tokens)
    copy = table * width if converts else 0
    logits, summed = tile * vocabulary * width, 0
    if sums and tile < tokens:
        logits, summed = max(logits - table * gradient, 0), 4 * table  # what the sum becomes takes the logits' place
    return tokens * hidden * (stream + width + (4 if lifted else width)) + logits + summed + copy


def whole_logits_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes that a loss over the whole logits of a batch takes, about: in fp32 log-softmax, its gradient and theirs."""
    return 12 * tokens * vocabulary


def training_bytes(
    parameters: Iterable[torch.Tensor], *, gradients: bool = True, states: bool = True, width: int = 0
) -> int:
    """Bytes of what trains: of each value its gradient and an optimizer's two moments, which may not be there yet. They
    are counted in the parameter's dtype, as torch's own AdamW keeps them.

    Args:
        gradients, states: whether those are counted.
        width: bytes of a value's states, where they are more.
    """
    trained = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}
    return sum(
        parameter.numel()
        * (gradients * gradient_dtype(parameter).itemsize + states * max(2 * parameter.dtype.itemsize, width))
        for parameter in trained.values()
    )
