"""Rows of a table, and the table's gradient as exact as it is kept.

torch gives that gradient in the dtype of the rows: summed over micro-batches it would round once in each. Here it comes
in `table.grad_dtype`, fp32 where several micro-batches make a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import gradient_dtype


def embedding_reference(table_VH: torch.Tensor, ids: torch.Tensor, padding_id: int | None = None) -> torch.Tensor:
    """The same by torch, with a gradient in the table's dtype."""
    return torch.nn.functional.embedding(ids, table_VH, padding_idx=padding_id)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, ids: torch.Tensor, padding_id: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype, ctx.padding_id = len(table), gradient_dtype(table), padding_id
        return torch.nn.functional.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        padding_id = -1 if ctx.padding_id is None else ctx.padding_id
        dy = grad_outputs[0].to(ctx.dtype)
        return torch.ops.aten.embedding_dense_backward(dy, ids, ctx.rows, padding_id, False), None, None


def embedding(table_VH: torch.Tensor, ids: torch.Tensor, padding_id: int | None = None) -> torch.Tensor:
    """The rows [..., H] of `ids` [...], in the table's dtype.

    Args:
        padding_id: a row that gets no gradient.
    """
    return _Embedding.apply(table_VH, ids, padding_id)  # pyright: ignore[reportReturnType]
