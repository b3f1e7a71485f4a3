"""The gradient of a table as that of the rows which a batch looked up: a sparse COO tensor, rows by vectors.

autograd adds up several of them by appending. `coalesced` sums up what is of one row. The host does not wait for the
number of rows: there are as many as could be, and those that no token looked up are zero.
"""

from __future__ import annotations

import torch

# Bytes a value that torch's kernel takes beside rows and sums: partial sums in fp32, of rows and of a tenth more.
SUMMING = 4.4


def fewer_rows(tokens: int, rows: int) -> bool:
    """Whether the rows of so many tokens, their sums, and what it takes to sum up are less than the table."""
    return 4 * tokens < rows


def row_gradient(ids: torch.Tensor, dy: torch.Tensor, rows: int, padding_id: int | None) -> torch.Tensor:
    """Not coalesced: a row for each token, those of `padding_id` zero.

    Args:
        ids: integers [...].
        dy: of the rows that were looked up [..., H].
        rows: of the table.
    """
    ids, dy = ids.reshape(1, -1).long(), dy.reshape(-1, dy.shape[-1])  # a sparse tensor takes int64 alone
    if padding_id is not None:
        dy = dy.masked_fill(ids[0, :, None] == padding_id, 0)
    return _rows_of_table(ids, dy, rows, is_coalesced=False)


def coalesced(gradient: torch.Tensor) -> torch.Tensor:
    """The same tensor, with each row once and in order: min(tokens, rows of the table) rows.

    What is of one row is summed up by the kernel, and so to the bit, of the dense gradient.
    """
    if gradient.is_coalesced():
        return gradient
    ids, dy = gradient._indices()[0], gradient._values()
    rows, count = gradient.shape[0], min(gradient.shape[0], len(ids))
    absent = torch.ones(rows, dtype=torch.uint8, device=ids.device).index_fill_(0, ids, 0)
    there = absent.argsort(stable=True)[:count].sort().values  # of those that are absent the first ones
    place = places(there, rows)[ids].long()
    values = torch.ops.aten.embedding_dense_backward(dy, place, count, -1, False)
    return _rows_of_table(there[None], values, rows, is_coalesced=True)


def _rows_of_table(ids: torch.Tensor, values: torch.Tensor, rows: int, is_coalesced: bool) -> torch.Tensor:
    """By torch's bare constructor: `torch.sparse_coo_tensor` of torch 2.11 warns that invariants are not checked even
    where it is told not to."""
    return torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
        1, 1, (rows, values.shape[1]), ids, values,
        dtype=values.dtype, layout=torch.sparse_coo, device=values.device, is_coalesced=is_coalesced,
    )  # fmt: skip


def places(there: torch.Tensor, rows: int) -> torch.Tensor:
    """Where each row of a table is among the distinct rows `there`, int32 [rows]; -1: nowhere."""
    numbers = torch.arange(len(there), dtype=torch.int32, device=there.device)
    return torch.full((rows,), -1, dtype=torch.int32, device=there.device).index_copy_(0, there, numbers)


def values_of(gradient: torch.Tensor) -> torch.Tensor:
    """What a coalesced gradient, or a dense one, has of numbers: their norm is its norm."""
    return gradient._values() if gradient.is_sparse else gradient
