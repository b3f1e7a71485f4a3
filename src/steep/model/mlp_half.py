"""The second half of a decoder layer: y = x2 + down(act(gate(n))·up(n)) with n = norm(x2), forward and backward.

Gemma norms what is added: y = x2 + norm(down(...)).
"""

from __future__ import annotations

from typing import Any

import torch

from steep.model.layer import Batch, Layer, Rows, place, rows
from steep.model.weights import AdapterGradients, Weights
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

    def gradient_rows(self, x2: torch.Tensor) -> torch.Tensor:
        """gate_up, still empty, as wide as its gradient's rows, which the backward pass writes over it."""
        return rows(x2, self.gate_up.gradient_width, self.batch.dtype)

    def project(self, normed: Rows, weights: Any, gate_up: torch.Tensor) -> None:
        """Write gate and up."""
        out = gate_up[:, : self.gate_up.outputs]
        self.gate_up.forward(normed.extended, weights, out, quantised=normed.quantised)

    def forward(
        self,
        x2: torch.Tensor,
        of_gate_up: Weights,
        of_down: Weights,
        gate_up: torch.Tensor | None,
        out: torch.Tensor | None,
        y: torch.Tensor,
    ) -> None:
        """Write y, which may be x2.

        Args:
            gate_up: where to keep it; None: nowhere.
            out: where to keep down's output, if a norm follows it.
        """
        if gate_up is None:
            gate_up = self.gradient_rows(x2)
        self.project(self.normed(x2, of_gate_up.buffer), of_gate_up.buffer, gate_up)
        of_gate_up.used()
        hidden, quantised = rows(x2, self.down.input_width, self.batch.dtype), self.down.quantised_input(*place(x2))
        columns = hidden[:, self.down.x_columns]
        gated_forward(gate_up, self.intermediate, self.layer.activation, out=columns, quantised=quantised)
        weights, norm = of_down.buffer, self.layer.mlp_out_norm
        self.down.extend_input(hidden, weights)
        if norm is None:
            self.down.forward(hidden, weights, y, add=x2, quantised=quantised)
        else:
            if out is None:
                out = rows(x2, self.down.outputs, self.batch.dtype)
            self.down.forward(hidden, weights, out, quantised=quantised)
            norm.forward(out, residual=x2, out=y)
        of_down.used()

    def backward(
        self,
        dy: torch.Tensor,
        x2: torch.Tensor,
        gate_up: torch.Tensor | None,
        out: torch.Tensor | None,
        of_gate_up: Weights,
        of_down: Weights,
        gradients: tuple[AdapterGradients, AdapterGradients],
    ) -> torch.Tensor:
        """The gradient of norm(x2).

        Args:
            gate_up: what `forward` kept, and overwritten; None: computed again.
            out: down's output where a norm follows it.
            gradients: of gate and up, and of down: added to.
        """
        norm, normed = self.layer.mlp_out_norm, None
        if gate_up is None:
            multiplied, gate_up = self.normed(x2, of_gate_up.buffer), self.gradient_rows(x2)
            self.project(multiplied, of_gate_up.buffer, gate_up)
            normed = multiplied.extended
            del multiplied
        d_out = rows(dy, self.down.gradient_width, self.batch.dtype)
        quantised = self.down.quantised_gradient(*place(dy))
        if norm is None:
            copy_rows(dy, d_out[:, : self.down.outputs], quantised=quantised)
        else:
            assert out is not None
            norm.backward(dy, out, out=d_out[:, : self.down.outputs], quantised=quantised)
        self.down.extend_gradient(d_out, of_down.buffer)
        hidden = rows(dy, self.down.input_width, self.batch.dtype)
        dh = hidden[:, self.down.x_columns]
        self.down.input_gradient(d_out, of_down.buffer, out=dh, quantised=quantised)
        quantised = self.gate_up.quantised_gradient(*place(dy))
        gated_backward(dh, gate_up, self.intermediate, self.layer.activation, quantised=quantised)
        self.down.extend_input(hidden, of_down.buffer)
        gradients[1].add(d_out, hidden)
        of_down.used()
        del hidden, dh, d_out  # the widest there is, before what follows
        if normed is None:
            normed = self.normed(x2, of_gate_up.buffer, is_multiplied=False).extended
        self.gate_up.extend_gradient(gate_up, of_gate_up.buffer)
        d_normed = self.gate_up.input_gradient(gate_up, of_gate_up.buffer, quantised=quantised)
        of_gate_up.used()
        gradients[0].add(gate_up, normed)
        return d_normed

    def add_backward(
        self, d_normed: torch.Tensor, x2: torch.Tensor, dy: torch.Tensor, into: Rows | None
    ) -> torch.Tensor:
        """The gradient of x2, in the columns of `into` if given, and quantised where it is."""
        if into is None:
            return self.layer.mlp_norm.backward(d_normed, x2, add=dy)
        return self.layer.mlp_norm.backward(d_normed, x2, add=dy, out=into.extended, quantised=into.quantised)
