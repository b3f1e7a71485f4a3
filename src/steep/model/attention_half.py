"""The first half of a decoder layer: x2 = x + o(attention(rope(qkv(norm(x))))), step by step, forward and backward.

Gemma norms what is added: x2 = x + norm(o(...)). Steps stand alone so that a level can take up the work anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from steep.model.layer import Batch, Layer, Rows, place, rows
from steep.model.weights import AdapterGradients, Weights
from steep.ops.attention import attention_backward, attention_backward_in_place, attention_forward
from steep.ops.copy_rows import copy_rows
from steep.ops.fp8 import Fp8Rows
from steep.ops.qk_norm import qk_norm_rope_backward, qk_norm_rope_forward
from steep.ops.rope import rope_backward, rope_forward
from steep.ops.slices import rows_of


class AttentionHalf:
    """Shapes: x, x2 [T, H]; qkv, rotated [T, (NH + 2 NK) * D]; `Rows` are input or gradient rows that LoRA extends."""

    def __init__(self, layer: Layer, batch: Batch, backend: str) -> None:
        self.layer, self.batch, self.backend = layer, batch, backend
        groups = layer.groups(batch.dtype, batch.fp8)
        self.qkv, self.o = groups.qkv, groups.o

    # ---- forward

    def normed(self, x: torch.Tensor, weights: Any, *, is_multiplied: bool = True) -> Rows:
        """The input rows of qkv, whose filled buffer `weights` is.

        Args:
            is_multiplied: a product with the weights follows.
        """
        normed = rows(x, self.qkv.input_width, self.batch.dtype)
        quantised = self.qkv.quantised_input(*place(x)) if is_multiplied else None
        self.layer.attention_norm.forward(x, out=normed[:, self.qkv.x_columns], quantised=quantised)
        self.qkv.extend_input(normed, weights)
        return Rows(normed, quantised)

    def project(self, x: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q, k and v of all tokens, as they are before norms and rope; and the input rows, where one tile has all."""
        qkv, normed = rows(x, self.qkv.outputs, self.batch.dtype), None
        for tile in self.batch.tiles:
            multiplied = self.normed(rows_of(x, tile), weights.buffer)
            self.qkv.forward(multiplied.extended, weights.buffer, rows_of(qkv, tile), quantised=multiplied.quantised)
            weights.used()
            normed = multiplied.extended
        return qkv, normed if len(self.batch.tiles) == 1 else None

    def rotate(self, qkv: torch.Tensor) -> torch.Tensor:
        """q and k normed, where the layer norms them, and turned; in place where it does not."""
        attention, batch = self.layer.attention, self.batch
        if attention.q_norm is None or attention.k_norm is None:
            rope_forward(qkv, batch.cos, batch.sin, *attention.heads)
            return qkv
        rotated = torch.empty_like(qkv)
        qk_norm_rope_forward(
            qkv,
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.q_norm.eps,
            batch.cos,
            batch.sin,
            *attention.heads,
            unit_offset=attention.q_norm.unit_offset,
            out=rotated,
        )
        return rotated

    def attend(self, rotated: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Attention's output [T, NH * D], and what its backward needs beside it."""
        out, saved = attention_forward(*self._heads(rotated), self.batch.packing, **self._how())
        return out.flatten(1), saved

    def attended(self, out: torch.Tensor, weights: Any, *, is_multiplied: bool = True) -> Rows:
        """The input rows of o, of attention's output; see `normed`."""
        attended = rows(out, self.o.input_width, self.batch.dtype)
        quantised = self.o.quantised_input(*place(out)) if is_multiplied else None
        copy_rows(out, attended[:, self.o.x_columns], quantised=quantised)
        self.o.extend_input(attended, weights)
        return Rows(attended, quantised)

    def output(self, attended: Rows, weights: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """o's output, where a norm follows it."""
        if out is None:
            out = rows(attended.extended, self.o.outputs, self.batch.dtype)
        self.o.forward(attended.extended, weights, out, quantised=attended.quantised)
        return out

    def add(
        self, x: torch.Tensor, attended: Rows, weights: Any, x2: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Write x2. Gives o's output where a norm follows it, in `out` if there is one."""
        norm = self.layer.attention_out_norm
        if norm is None:
            self.o.forward(attended.extended, weights, x2, add=x, quantised=attended.quantised)
            return None
        out = self.output(attended, weights, out)
        norm.forward(out, residual=x, out=x2)
        return out

    # ---- backward

    def gradient_rows(self, x: torch.Tensor) -> tuple[Rows, Rows | None]:
        """The gradient rows of o, still empty; and their columns, where the gradient of x2 is what belongs there."""
        d_out = Rows(rows(x, self.o.gradient_width, self.batch.dtype), self.o.quantised_gradient(*place(x)))
        same = self.layer.attention_out_norm is None and x.dtype == self.batch.dtype
        return d_out, Rows(d_out.extended[:, : self.o.outputs], d_out.quantised) if same else None

    def output_backward(
        self,
        dx2: torch.Tensor,
        d_out: Rows,
        out: torch.Tensor | None,
        attended: torch.Tensor,
        weights: Any,
        gradients: AdapterGradients,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of attention's output, from that of x2.

        Args:
            d_out: what `gradient_rows` gave.
            out: o's output where a norm follows it.
            attended, weights: o's input rows and buffer.
            into: where to write it.
        """
        (extended, quantised), norm = d_out, self.layer.attention_out_norm
        columns = extended[:, : self.o.outputs]
        if norm is not None:
            assert out is not None
            norm.backward(dx2, out, out=columns, quantised=quantised)
        elif dx2.data_ptr() != columns.data_ptr():
            copy_rows(dx2, columns, quantised=quantised)
        self.o.extend_gradient(extended, weights)
        d_attended = self.o.input_gradient(extended, weights, out=into, quantised=quantised)
        gradients.add(extended, attended)
        return d_attended

    def attend_backward(
        self, d_attended: torch.Tensor, rotated: torch.Tensor, attended: torch.Tensor, saved: tuple[Any, ...]
    ) -> torch.Tensor:
        """The gradients of q, k and v, as they are before rope's backward: the first columns of gradient rows, or
        where there are several tiles written over `rotated`, so that there is no more of them than that."""
        given = self._per_head(d_attended), *self._heads(rotated), self._per_head(attended), saved, self.batch.packing
        if len(self.batch.tiles) > 1:
            attention_backward_in_place(*given, **self._how())
            return rotated
        d_qkv = rows(rotated, self.qkv.gradient_width, self.batch.dtype)
        attention_backward(*given, into=d_qkv[:, : self.qkv.outputs], **self._how())
        return d_qkv

    def project_backward(
        self,
        d_qkv: torch.Tensor,
        qkv: torch.Tensor,
        dx2: torch.Tensor,
        x: torch.Tensor,
        normed: torch.Tensor | None,
        tile: slice,
        weights: Any,
        gradients: AdapterGradients,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of x.

        Args:
            d_qkv: of `attend_backward`; as all here, of the tokens of `tile`.
            normed: the input rows of qkv; None: made again.
            into: where to write it; may be `dx2`.
        """
        quantised, columns = self.qkv.quantised_gradient(*place(dx2)), d_qkv
        if d_qkv.shape[1] < self.qkv.gradient_width:
            d_qkv = rows(d_qkv, self.qkv.gradient_width, self.batch.dtype)
            copy_rows(columns, d_qkv[:, : self.qkv.outputs])
        self._rotate_backward(d_qkv[:, : self.qkv.outputs], qkv, tile, quantised)
        if normed is None:
            normed = self.normed(x, weights, is_multiplied=False).extended
        self.qkv.extend_gradient(d_qkv, weights)
        d_normed = self.qkv.input_gradient(d_qkv, weights, quantised=quantised)
        gradients.add(d_qkv, normed)
        return self.layer.attention_norm.backward(d_normed, x, add=dx2, out=into)

    def _rotate_backward(self, d_qkv: torch.Tensor, qkv: torch.Tensor, tile: slice, quantised: Fp8Rows | None) -> None:
        attention, cos, sin = self.layer.attention, rows_of(self.batch.cos, tile), rows_of(self.batch.sin, tile)
        if attention.q_norm is None or attention.k_norm is None:
            rope_backward(d_qkv, cos, sin, *attention.heads, quantised=quantised)
            return
        qk_norm_rope_backward(
            d_qkv,
            qkv,
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.q_norm.eps,
            cos,
            sin,
            *attention.heads,
            unit_offset=attention.q_norm.unit_offset,
            quantised=quantised,
        )

    def _how(self) -> dict[str, Any]:
        attention = self.layer.attention
        return {
            "scale": attention.scale,
            "window": attention.window,
            "softcap": attention.softcap,
            "backend": self.backend,
        }

    def _per_head(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(tensor.shape[0], -1, self.layer.attention.head_dim)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as [T, heads, head_dim], views of the first columns of `qkv`."""
        num_heads, num_kv_heads, head_dim = self.layer.attention.heads
        heads = qkv.as_strided(
            (qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim), (qkv.stride(0), head_dim, 1), qkv.storage_offset()
        )
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
        return q, k, v
