"""Rows of a table, and its gradient in the dtype that autograd keeps."""

from __future__ import annotations

import pytest
import torch

from steep.ops.embedding import embedding, embedding_reference


def table(dtype: torch.dtype, grad_dtype: torch.dtype | None = None) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(37, 24).to(dtype))
    if grad_dtype is not None:
        parameter.grad_dtype = grad_dtype
    return parameter


@pytest.mark.parametrize("padding_id", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradient_are_torchs(dtype: torch.dtype, padding_id: int | None) -> None:
    ids = torch.randint(0, 37, (3, 50))
    dy = torch.randn(3, 50, 24).to(dtype)
    one, other = table(dtype), table(dtype)
    other.data.copy_(one.data)
    rows, expected = embedding(one, ids, padding_id), embedding_reference(other, ids, padding_id)
    assert torch.equal(rows, expected)
    rows.backward(dy)
    expected.backward(dy)
    assert one.grad is not None and other.grad is not None
    assert torch.equal(one.grad, other.grad) and one.grad.abs().sum() > 0


def test_the_gradient_of_micro_batches_is_their_sum_in_fp32() -> None:
    one = table(torch.bfloat16, torch.float32)
    truth = torch.zeros(37, 24)
    for seed in range(3):
        torch.manual_seed(seed)
        ids, dy = torch.randint(0, 37, (200,)), torch.randn(200, 24).bfloat16()
        embedding(one, ids).backward(dy)
        truth.index_add_(0, ids, dy.float())
    assert one.grad is not None and one.grad.dtype == torch.float32
    assert torch.allclose(one.grad, truth, atol=1e-5)
    assert not torch.allclose(one.grad.bfloat16().float(), truth, atol=1e-5)
