"""The second half of a decoder layer: y = x2 + down(act(gate(n))·up(n)) with n = norm(x2), forward and backward.

Gemma norms what is added: y = x2 + norm(down(...)).
"""

from __future__ import annotations

from typing import Any

import torch

from steep.model.layer import Batch, Layer, Rows, place, rows
from steep.ops.copy_rows import copy_rows
from steep.ops.swiglu import gated_backward, gated_forward


class MlpHalf:
    """Shapes: x2, y [T, H]; gate_up [T, 2I + R], its last R columns for what LoRA adds to gradient rows."""

    def __init__(self, layer: Layer, batch: Batch) -> None:
        self.layer, self.batch = layer, batch
        groups = layer.groups(batch.dtype, batch.fp8)
        self.gate_up, self.down = groups.gate_up, groups.down
        self.intermediate = self.gate_up.outputs // 2

    def normed(self, x2: torch.Tensor, weights: Any, *, is_multiplied: bool = True) -> Rows:
        """The input rows of gate and up, whose filled buffer `weights` is.

        Args:
            is_multiplied: a product with the weights follows.
        """
        normed = rows(x2, self.gate_up.input_width, self.batch.dtype)
        quantised = self.gate_up.quantised_input(*place(x2)) if is_multiplied else None
        self.layer.mlp_norm.forward(x2, out=normed[:, self.gate_up.x_columns], quantised=quantised)
        self.gate_up.extend_input(normed, weights)
        return Rows(normed, quantised)

    def project(self, normed: Rows, weights: Any) -> torch.Tensor:
        """gate_up, as wide as its gradient's rows, which the backward pass writes over it."""
        gate_up = rows(normed.extended, self.gate_up.gradient_width, self.batch.dtype)
        out = gate_up[:, : self.gate_up.outputs]
        self.gate_up.forward(normed.extended, weights, out, quantised=normed.quantised)
        return gate_up

    def add(self, x2: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and down's output where a norm follows it."""
        hidden, quantised = rows(x2, self.down.input_width, self.batch.dtype), self.down.quantised_input(*place(x2))
        columns = hidden[:, self.down.x_columns]
        gated_forward(gate_up, self.intermediate, self.layer.activation, out=columns, quantised=quantised)
        weights, norm = self.down.filled_buffer(x2.device), self.layer.mlp_out_norm
        self.down.extend_input(hidden, weights)
        if norm is None:
            y = torch.empty_like(x2)
            self.down.forward(hidden, weights, y, add=x2, quantised=quantised)
            return y, None
        out = rows(x2, self.down.outputs, self.batch.dtype)
        self.down.forward(hidden, weights, out, quantised=quantised)
        return norm.forward(out, residual=x2), out

    def backward(
        self, dy: torch.Tensor, x2: torch.Tensor, gate_up: torch.Tensor | None, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The gradient of norm(x2), and those of the adapters of gate, up and down.

        Args:
            gate_up: as `project` gave it, and overwritten; None: computed again.
            out: down's output where a norm follows it.
        """
        norm = self.layer.mlp_out_norm
        normed = weights = None
        if gate_up is None:
            weights = self.gate_up.filled_buffer(dy.device)
            multiplied = self.normed(x2, weights)
            gate_up = self.project(multiplied, weights)
            normed = multiplied.extended
            del multiplied
        d_out = rows(dy, self.down.gradient_width, self.batch.dtype)
        quantised = self.down.quantised_gradient(*place(dy))
        if norm is None:
            copy_rows(dy, d_out[:, : self.down.outputs], quantised=quantised)
        else:
            assert out is not None
            norm.backward(dy, out, out=d_out[:, : self.down.outputs], quantised=quantised)
        of_down_weights = self.down.filled_buffer(dy.device)
        self.down.extend_gradient(d_out, of_down_weights)
        hidden = rows(dy, self.down.input_width, self.batch.dtype)
        dh = hidden[:, self.down.x_columns]
        self.down.input_gradient(d_out, of_down_weights, out=dh, quantised=quantised)
        quantised = self.gate_up.quantised_gradient(*place(dy))
        gated_backward(dh, gate_up, self.intermediate, self.layer.activation, quantised=quantised)
        self.down.extend_input(hidden, of_down_weights)
        of_down = self.down.adapter_gradients(d_out, hidden)
        del hidden, dh, d_out, of_down_weights  # the widest there is, before what follows
        if normed is None or weights is None:
            weights = self.gate_up.filled_buffer(dy.device)
            normed = self.normed(x2, weights, is_multiplied=False).extended
        self.gate_up.extend_gradient(gate_up, weights)
        d_normed = self.gate_up.input_gradient(gate_up, weights, quantised=quantised)
        return d_normed, self.gate_up.adapter_gradients(gate_up, normed) + of_down

    def add_backward(
        self, d_normed: torch.Tensor, x2: torch.Tensor, dy: torch.Tensor, into: Rows | None
    ) -> torch.Tensor:
        """The gradient of x2, in the columns of `into` if given, and quantised where it is."""
        if into is None:
            return self.layer.mlp_norm.backward(d_normed, x2, add=dy)
        return self.layer.mlp_norm.backward(d_normed, x2, add=dy, out=into.extended, quantised=into.quantised)
