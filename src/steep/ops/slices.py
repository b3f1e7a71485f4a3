"""Rows and columns of a matrix, itself where they are all of them: a slice takes the host as long as a small tensor's
memory does, and a layer takes a hundred of them."""

from __future__ import annotations

import torch


def rows_of(whole: torch.Tensor, rows: slice) -> torch.Tensor:
    """whole[rows], of `rows` with a start and a stop inside of it."""
    return whole if rows.stop - rows.start == whole.shape[0] else whole[rows]


def columns_of(whole: torch.Tensor, columns: slice) -> torch.Tensor:
    """whole[:, columns], likewise."""
    return whole if columns.stop - columns.start == whole.shape[1] else whole[:, columns]
