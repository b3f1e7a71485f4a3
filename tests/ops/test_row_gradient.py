"""The gradient of looked-up rows against the dense one: to the bit for one batch, summed over several."""

from __future__ import annotations

import pytest
import torch

from steep.ops.embedding import embedding
from steep.ops.row_gradient import coalesced, fewer_rows, places, values_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gradient_of(
    by_rows: bool, dtype: torch.dtype, device: str, padding_id: int | None, batches: int, scale: float = 1
) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    table = torch.nn.Parameter(torch.randn(300, 33, generator=draw).to(device, dtype))
    if batches > 1:
        table.grad_dtype = torch.float32  # pyright: ignore
    for _ in range(batches):
        ids = torch.randint(0, 40, (3, 21), generator=draw).to(device)  # each about twice
        rows = embedding(table, ids, padding_id, by_rows) * scale
        (rows * torch.randn(rows.shape, generator=draw).to(device, dtype)).sum().backward()
    assert table.grad is not None
    return table.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_id", [None, 7])
@pytest.mark.parametrize("batches", [1, 3])
def test_it_is_the_dense_gradient(device: str, dtype: torch.dtype, padding_id: int | None, batches: int) -> None:
    """Of one batch to the bit; of several the sums are in fp32, in another order."""
    dense = gradient_of(False, dtype, device, padding_id, batches, scale=2**0.5)
    ours = gradient_of(True, dtype, device, padding_id, batches, scale=2**0.5)
    assert ours.is_sparse and not ours.is_coalesced() and ours.dtype == dense.dtype
    summed = coalesced(ours)
    ids = summed._indices()[0]
    assert summed.is_coalesced() and torch.equal(ids, ids.unique()) and len(ids) == min(ours._nnz(), 300)
    assert coalesced(summed) is summed and summed.dtype == dense.dtype
    if batches == 1:
        assert torch.equal(summed.to_dense(), dense)
    assert torch.allclose(summed.to_dense(), dense, rtol=1e-5, atol=1e-5)
    norm = torch.linalg.vector_norm(values_of(summed), dtype=torch.float64)
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(dense, dtype=torch.float64).item(), rel=1e-6)
    assert padding_id is None or not summed.to_dense()[padding_id].any()
    where = places(ids, 300)
    assert where[ids].tolist() == list(range(len(ids))) and int((where < 0).sum()) == 300 - len(ids)
    with pytest.raises(AssertionError):  # equal ids of which the last one counts
        lost = torch.zeros_like(dense).index_copy_(0, ours._indices()[0], ours._values())
        assert torch.allclose(lost, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_id", [None, 7])
def test_numbers_of_rows_may_be_int32(padding_id: int | None) -> None:
    """As torch's embedding takes them."""
    ids, grads = torch.tensor([[3, 7, 3], [9, 0, 7]]), []
    for dtype in (torch.int32, torch.int64):
        for by_rows in (0, 1):
            table = torch.nn.Parameter(torch.ones(300, 5))
            (embedding(table, ids.to(dtype), padding_id, by_rows) * torch.arange(1.0, 6)).sum().backward()
            assert table.grad is not None and table.grad.is_sparse == bool(by_rows)
            grads.append(table.grad.to_dense())
    assert all(torch.equal(grads[0], other) for other in grads[1:]) and grads[0].any()


def test_a_row_that_is_not_finite_is_seen() -> None:
    ids, dy = torch.tensor([3, 5, 3]), torch.ones(3, 4)
    dy[2, 1] = float("nan")
    gradient = torch.sparse_coo_tensor(ids[None], dy, (9, 4), check_invariants=False)
    assert torch.linalg.vector_norm(values_of(coalesced(gradient))).isnan()


def test_it_is_dense_where_that_is_no_larger() -> None:
    table = torch.nn.Parameter(torch.randn(64, 8))
    embedding(table, torch.arange(16), None, by_rows=True).sum().backward()
    assert table.grad is not None and not table.grad.is_sparse and not fewer_rows(16, 64) and fewer_rows(15, 64)
