"""Rows of a table, and the table's gradient as exact as it is kept.

torch gives that gradient in the dtype of the rows: summed over micro-batches it would round once in each. Here it comes
in `table.grad_dtype`, fp32 where several micro-batches make a step. By choice it has those rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import gradient_dtype
from steep.ops.row_gradient import fewer_rows, row_gradient


def embedding_reference(table_VH: torch.Tensor, ids: torch.Tensor, padding_id: int | None = None) -> torch.Tensor:
    """The same by torch, with a gradient in the table's dtype."""
    return torch.nn.functional.embedding(ids, table_VH, padding_idx=padding_id)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: torch.Tensor, ids: torch.Tensor, padding_id: int | None, by_rows: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.by_rows = by_rows
        ctx.rows, ctx.dtype, ctx.padding_id = len(table), gradient_dtype(table), padding_id
        return torch.nn.functional.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        dy = grad_outputs[0].to(ctx.dtype)
        if ctx.by_rows:
            return row_gradient(ids, dy, ctx.rows, ctx.padding_id), None, None, None
        padding_id = -1 if ctx.padding_id is None else ctx.padding_id
        return torch.ops.aten.embedding_dense_backward(dy, ids, ctx.rows, padding_id, False), None, None, None


def embedding(
    table_VH: torch.Tensor, ids: torch.Tensor, padding_id: int | None = None, by_rows: int = 0
) -> torch.Tensor:
    """The rows [..., H] of `ids` [...], in the table's dtype.

    Args:
        padding_id: a row that gets no gradient.
        by_rows: the table's gradient is sparse (`row_gradient`), and so many batches are added up. Where that is no
            smaller it is dense all the same. 0: it is dense.
    """
    sparse = by_rows > 0 and fewer_rows(by_rows * ids.numel(), len(table_VH))
    return _Embedding.apply(table_VH, ids, padding_id, sparse)  # pyright: ignore[reportReturnType]
