"""The first half of a decoder layer: x2 = x + o(attention(rope(qkv(norm(x))))), step by step, forward and backward.

Gemma norms what is added: x2 = x + norm(o(...)). Steps stand alone so that a level can take up the work anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from steep.model.layer import Batch, Layer, Rows, place, rows
from steep.ops.attention import attention_backward, attention_forward
from steep.ops.copy_rows import copy_rows
from steep.ops.fp8 import Fp8Rows
from steep.ops.qk_norm import qk_norm_rope_backward, qk_norm_rope_forward
from steep.ops.rope import rope_backward, rope_forward


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

    def project(self, normed: Rows, weights: Any) -> torch.Tensor:
        """q, k and v, as they are before norms and rope."""
        qkv = rows(normed.extended, self.qkv.outputs, self.batch.dtype)
        self.qkv.forward(normed.extended, weights, qkv, quantised=normed.quantised)
        return qkv

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

    def attend(self, rotated: torch.Tensor, weights: Any) -> tuple[Rows, tuple[Any, ...]]:
        """The input rows of o, whose filled buffer `weights` is: they hold attention's output. And what attention's
        backward needs beside them."""
        out, saved = attention_forward(*self._heads(rotated), self.batch.packing, **self._how())
        attended = rows(rotated, self.o.input_width, self.batch.dtype)
        quantised = self.o.quantised_input(*place(rotated))
        copy_rows(out.flatten(1), attended[:, self.o.x_columns], quantised=quantised)
        self.o.extend_input(attended, weights)
        return Rows(attended, quantised), saved

    def output(self, attended: Rows, weights: Any) -> torch.Tensor:
        """o's output, where a norm follows it."""
        out = rows(attended.extended, self.o.outputs, self.batch.dtype)
        self.o.forward(attended.extended, weights, out, quantised=attended.quantised)
        return out

    def output_again(self, attended: torch.Tensor, weights: Any) -> torch.Tensor:
        """`output`, of rows that were kept for the backward pass."""
        quantised, columns = self.o.quantised_input(*place(attended)), attended[:, self.o.x_columns]
        if quantised is not None:
            copy_rows(columns, columns, quantised=quantised)
        return self.output(Rows(attended, quantised), weights)

    def add(self, x: torch.Tensor, attended: Rows, weights: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x2, and o's output where a norm follows it."""
        norm = self.layer.attention_out_norm
        if norm is not None:
            out = self.output(attended, weights)
            return norm.forward(out, residual=x), out
        x2 = torch.empty_like(x)
        self.o.forward(attended.extended, weights, x2, add=x, quantised=attended.quantised)
        return x2, None

    # ---- backward

    def gradient_rows(self, x: torch.Tensor) -> tuple[Rows, Rows | None]:
        """The gradient rows of o, still empty; and their columns, where the gradient of x2 is what belongs there."""
        d_out = Rows(rows(x, self.o.gradient_width, self.batch.dtype), self.o.quantised_gradient(*place(x)))
        same = self.layer.attention_out_norm is None and x.dtype == self.batch.dtype
        return d_out, Rows(d_out.extended[:, : self.o.outputs], d_out.quantised) if same else None

    def attend_backward(
        self,
        dx2: torch.Tensor,
        d_out: Rows,
        out: torch.Tensor | None,
        attended: torch.Tensor,
        rotated: torch.Tensor,
        qkv: torch.Tensor,
        saved: tuple[Any, ...],
        weights: Any,
    ) -> tuple[Rows, list[torch.Tensor | None]]:
        """The gradient rows of qkv, from that of x2; and the gradients of o's adapters. `weights` is o's buffer,
        `d_out` what `gradient_rows` gave."""
        (d_out_rows, quantised), norm = d_out, self.layer.attention_out_norm
        columns = d_out_rows[:, : self.o.outputs]
        if norm is not None:
            assert out is not None
            norm.backward(dx2, out, out=columns, quantised=quantised)
        elif dx2.data_ptr() != columns.data_ptr():
            copy_rows(dx2, columns, quantised=quantised)
        self.o.extend_gradient(d_out_rows, weights)
        d_attended = self.o.input_gradient(d_out_rows, weights, quantised=quantised)
        gradients = self.o.adapter_gradients(d_out_rows, attended)
        d_qkv = rows(dx2, self.qkv.gradient_width, self.batch.dtype)
        d_heads = d_qkv[:, : self.qkv.outputs]
        attention_backward(
            self._per_head(d_attended),
            *self._heads(rotated),
            self._per_head(attended[:, self.o.x_columns]),
            saved,
            self.batch.packing,
            into=d_heads,
            **self._how(),
        )
        quantised = self.qkv.quantised_gradient(*place(dx2))
        self._rotate_backward(d_heads, qkv, quantised)
        return Rows(d_qkv, quantised), gradients

    def project_backward(
        self, d_qkv: Rows, dx2: torch.Tensor, x: torch.Tensor, normed: torch.Tensor, weights: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The gradients of x and of the adapters of q, k and v."""
        self.qkv.extend_gradient(d_qkv.extended, weights)
        d_normed = self.qkv.input_gradient(d_qkv.extended, weights, quantised=d_qkv.quantised)
        gradients = self.qkv.adapter_gradients(d_qkv.extended, normed)
        return self.layer.attention_norm.backward(d_normed, x, add=dx2), gradients

    def _rotate_backward(self, d_qkv: torch.Tensor, qkv: torch.Tensor, quantised: Fp8Rows | None) -> None:
        attention, batch = self.layer.attention, self.batch
        if attention.q_norm is None or attention.k_norm is None:
            rope_backward(d_qkv, batch.cos, batch.sin, *attention.heads, quantised=quantised)
            return
        qk_norm_rope_backward(
            d_qkv,
            qkv,
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.q_norm.eps,
            batch.cos,
            batch.sin,
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
