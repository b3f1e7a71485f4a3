"""Bytes that parts of a fused step take: what layers keep, their work, the loss, and what trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from steep.model.layer import Layer
from steep.ops.backend import gradient_dtype
from steep.ops.fp8_groups import Fp8Products
from steep.ops.linear_cross_entropy import Way, chunk_size, faster_way, tile_size
from steep.ops.lora import Group


def kept_bytes(layer: Layer, dtype: torch.dtype, stream: torch.dtype, fp8: Fp8Products = "none") -> list[int]:
    """Bytes a token that a layer keeps at each level, its input included."""
    qkv, o, gate_up, _ = layer.groups(dtype, fp8)
    hidden = layer.o.weight.shape[0]
    x, width = hidden * stream.itemsize, dtype.itemsize
    added = hidden * width
    at_3 = x + (added if layer.mlp_out_norm else 0)
    at_2 = at_3 + x + o.input_width * width + 4 * layer.attention.num_heads
    at_1 = at_2 + qkv.outputs * width
    at_0 = at_1 + gate_up.gradient_width * width + (added if layer.attention_out_norm else 0)
    return [at_0, at_1, at_2, at_3]


def work_bytes(
    layer: Layer, dtype: torch.dtype, stream: torch.dtype, level: int, tokens: int, fp8: Fp8Products = "none"
) -> int:
    """Bytes that a layer's backward pass takes beside what it kept, at its peak: weight buffers, rows that are computed
    again, and gradients between them. The peak is in the half that needs more; see `MlpHalf.backward` and
    `AttentionHalf.attend_backward`. Over an fp8 base also dy in e4m3, the transposed weight of a product,
    and what products of the forward pass take that are not in fp8."""
    qkv, o, gate_up, down = layer.groups(dtype, fp8)
    hidden, x, width = layer.o.weight.shape[0], layer.o.weight.shape[0] * stream.itemsize, dtype.itemsize
    rotated = qkv.outputs if layer.attention.q_norm else 0
    again = rotated  # columns of rows that are there during the whole backward pass
    if level >= 1 and layer.attention_out_norm:
        again += hidden
    if level >= 2:
        again += qkv.input_width + qkv.outputs
    if level >= 3:
        again += o.input_width
    residual = x * (2 if level >= 3 else 1)  # dy, and x2
    buffers = o.buffer_bytes + (qkv.buffer_bytes if level >= 2 else 0)
    dy_of_qkv, dy_of_o, dy_of_gate_up, dy_of_down = (_dy_in_fp8(group, tokens) for group in (qkv, o, gate_up, down))
    of_down = dy_of_down + tokens * down.gradient_width * width + max(down.transposed_bytes, dy_of_gate_up)
    of_down = down.buffer_bytes + tokens * down.input_width * width + max(of_down, down.forward_bytes(tokens))
    of_gate_up = gate_up.buffer_bytes + tokens * gate_up.input_width * width
    to_normed = tokens * hidden * width + dy_of_gate_up + gate_up.transposed_bytes
    to_normed = max(to_normed, gate_up.forward_bytes(tokens))  # before, when gate_up is computed
    in_attention = o.buffer_bytes + qkv.buffer_bytes + dy_of_o + dy_of_qkv
    in_attention += tokens * (o.gradient_width + o.input_width + qkv.gradient_width + qkv.outputs) * width
    in_forward = qkv.buffer_bytes + tokens * qkv.input_width * width
    in_forward += max(qkv.forward_bytes(tokens), o.forward_bytes(tokens))
    if level >= 1:
        in_mlp = buffers + of_gate_up + tokens * gate_up.gradient_width * width + max(of_down, to_normed)
    else:
        in_mlp = buffers + max(of_down, of_gate_up + to_normed)
        in_attention -= tokens * gate_up.gradient_width * width  # which was kept
    sums = 4 * tokens * layer.attention.num_heads * layer.attention.head_dim  # of dq in fp32, in some backends
    return tokens * (again * width + residual) + max(in_mlp, in_attention + sums + tokens * x, in_forward)


def _dy_in_fp8(group: Group, tokens: int) -> int:
    """Bytes of what a group's dX reads in e4m3, with its scales."""
    rows = group.quantised_gradient(tokens, torch.device("meta"))
    return 0 if rows is None else tokens * rows.codes.stride(0) + rows.scale.nbytes


def loss_bytes(
    tokens: int, vocabulary: int, hidden: int, width: int, gradient: int, way: Way | None, *, converts: bool
) -> int:
    """Bytes that the head's loss takes at its peak, the head's gradient not counted: the last hidden states and their
    gradient, logits, and what is summed or converted. See `steep.ops.linear_cross_entropy`.

    Args:
        width: bytes of a hidden state.
        gradient: bytes of a value of the head's gradient; 0: it has none.
        converts: the head is kept in another dtype than the hidden states.
    """
    table, sums = vocabulary * hidden, gradient not in (0, 4)
    if (way or faster_way(tokens, hidden, width, sums)) == "vocabulary":
        chunk = chunk_size(tokens, vocabulary, width, gradients=True)
        copy = chunk * hidden * width if converts else 0
        return tokens * hidden * (2 * width + 4) + tokens * chunk * width + copy
    tile = min(tile_size(tokens, vocabulary, width, not gradient), tokens)
    copy = table * width if converts else 0
    return 2 * tokens * hidden * width + tile * vocabulary * width + copy + (4 * table if sums and tile < tokens else 0)


def whole_logits_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes that a loss over the whole logits of a batch takes, about: in fp32 log-softmax, its gradient and theirs."""
    return 12 * tokens * vocabulary


def training_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of what trains: of each value its gradient and an optimizer's two moments, which may not be there yet. They
    are counted in the parameter's dtype, as torch's own AdamW keeps them."""
    trained = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}
    return sum(
        parameter.numel() * (gradient_dtype(parameter).itemsize + 2 * parameter.dtype.itemsize)
        for parameter in trained.values()
    )
