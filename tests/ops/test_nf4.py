"""NF4 is read as bitsandbytes reads it, to the bit, by the reference and by the kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from steep.kernels import nf4 as kernels
from steep.ops.backend import interpreted
from steep.ops.base_weight import DenseWeight
from steep.ops.nf4 import Nf4Stack, Nf4Weight, nf4_reference, stacked
from tests.ops.closeness import assert_as_good
from tests.ops.quantised import nf4, nf4_on_gpu

SMALL = [(1, 64), (3, 192), (9, 576), (2, 4160)]
REAL = [(14336, 4096), (4096, 14336), (1024, 4096), (1536, 576), (63, 1024)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    count, write = [], kernels.write
    monkeypatch.setattr(kernels, "write", lambda *arguments: count.append(1) or write(*arguments))
    yield count


def check_write(stored: Nf4Weight, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Into columns of a wider buffer, whose other columns stay as they are; its rows may begin anywhere."""
    rows, columns = truth.shape
    for before, beside in ((8, 16), (3, 4)):
        buffer = torch.full((rows, before + columns + beside), torch.nan, dtype=dtype, device=truth.device)
        own = buffer[:, before : before + columns]
        stored.write(own)
        assert torch.equal(own, truth.to(dtype))
        assert buffer[:, :before].isnan().all() and buffer[:, before + columns :].isnan().all()
        assert not torch.equal(own / 2, truth.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [*SMALL, (3, 8), (7, 72), (7, 100), (3, 33), (5, 7), (300, 64)])
def test_reference(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    stored, truth = nf4(torch.randn(shape), double)
    assert stored.shape == shape
    check_write(stored, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_interpreted(shape: tuple[int, int], double: bool, dtype: torch.dtype, calls: list[int]) -> None:
    stored, truth = nf4(torch.randn(shape), double)
    with interpreted():
        check_write(stored, truth, dtype)
    assert calls == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [*SMALL, *REAL])
def test_kernel(shape: tuple[int, int], double: bool, dtype: torch.dtype, calls: list[int]) -> None:
    stored, truth = nf4_on_gpu(shape, double)
    check_write(stored, truth, dtype)
    assert calls == [1, 1]


@pytest.mark.gpu
def test_beyond_int32() -> None:
    """Rows so far apart that the last begins past 2^31 elements."""
    stored, truth = nf4(torch.randn(3, 64), device="cuda")
    buffer = torch.empty(3, 2**30 + 2**20, dtype=torch.bfloat16, device="cuda")
    stored.write(buffer[:, :64])
    assert torch.equal(buffer[:, :64], truth.bfloat16())


@pytest.mark.parametrize("block_size", [32, 128, 256, 4096])
@pytest.mark.parametrize("context", [nullcontext, interpreted])
def test_block_sizes(block_size: int, context: type) -> None:
    """Blocks run across rows."""
    stored, truth = nf4(torch.randn(5, 576), block_size=block_size)
    with context():
        check_write(stored, truth, torch.bfloat16)


@pytest.mark.parametrize(("columns", "block_size"), [(100, 64), (72, 64), (64, 32)])
def test_what_the_kernel_cannot_read_takes_the_reference(columns: int, block_size: int, calls: list[int]) -> None:
    stored, truth = nf4(torch.randn(7, columns), block_size=block_size)
    with interpreted():
        check_write(stored, truth, torch.bfloat16)
    assert calls == []


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_unit(parts: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(kernels, "PARTS", parts)
    stored, truth = nf4(torch.randn(3, 192))
    with interpreted():
        check_write(stored, truth, torch.bfloat16)
    assert calls == [1, 1]


@pytest.mark.parametrize("context", [nullcontext, interpreted])
def test_one_buffer_serves_both_products(context: type) -> None:
    stored, truth = nf4(torch.randn(24, 64))
    buffer = torch.full((24, 64), torch.nan)
    with context():
        stored.write(buffer)
    x, dy = torch.randn(5, 64), torch.randn(5, 24)
    weight = truth.clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    y = leaf @ weight.T
    y.backward(dy)
    assert leaf.grad is not None
    assert_as_good(x @ buffer.T, y.detach(), (x.double() @ truth.double().T).float())
    assert_as_good(dy @ buffer, leaf.grad, (dy.double() @ truth.double()).float())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codes": torch.zeros(10, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(64, dtype=torch.int8)}, "codes"),
        ({"absmax": torch.zeros(2)}, "absmax"),
        ({"nested_absmax": None}, "nested_absmax"),
        ({"offset": torch.zeros(1, dtype=torch.float16)}, "offset"),
        ({"table": torch.zeros(15)}, "table"),
        ({"block_size": 48}, "48"),
    ],
)
def test_another_storage_is_refused_by_name(change: dict[str, object], named: str) -> None:
    stored, _ = nf4(torch.randn(2, 64))
    assert nf4_reference(stored).shape == (2, 64)
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(stored, **change)


def check_stack(stored: list[tuple[Nf4Weight, torch.Tensor]], before: int = 8) -> None:
    """Written as each is written alone, into columns of a wider buffer, whose other columns stay as they are; and once
    more, after a buffer of another alignment."""
    truth = torch.cat([weight for _, weight in stored]).bfloat16()
    rows, columns = truth.shape
    stack = Nf4Stack([weight for weight, _ in stored])
    for start in (before, 11 - before, before):
        buffer = torch.full((rows, columns + 24), torch.nan, dtype=torch.bfloat16, device=truth.device)
        inside = buffer[:, start : start + columns]
        stack.write(inside)
        assert torch.equal(inside, truth)
        assert int(buffer.isnan().sum()) == 24 * rows


@pytest.mark.parametrize("before", [8, 3])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rows", [(3,), (9, 4), (7, 5, 1), (40, 16, 16)])
@pytest.mark.parametrize("context", [nullcontext, interpreted])
def test_one_launch_writes_a_stack(
    context: type, rows: tuple[int, ...], double: bool, before: int, calls: list[int]
) -> None:
    """Weights end within a program's share, or where the next begins."""
    with context():
        check_stack([nf4(torch.randn(height, 192), double) for height in rows], before)
    assert calls == ([1, 1, 1] if context is interpreted else [])


@pytest.mark.gpu
@pytest.mark.parametrize("before", [8, 3])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [((7, 5, 1), 192), ((1, 1, 1), 64), ((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((576, 192, 192), 576)],
)
def test_one_launch_writes_a_stack_on_a_gpu(
    rows: tuple[int, ...], columns: int, double: bool, before: int, calls: list[int]
) -> None:
    check_stack([nf4_on_gpu((height, columns), double) for height in rows], before)
    assert calls == [1, 1, 1]


def test_what_is_stacked() -> None:
    """Neighbours of one kind, three at most; what is stored otherwise stays as it is."""
    dense = DenseWeight(torch.randn(2, 64))
    double = [nf4(torch.randn(height, 64))[0] for height in (2, 3, 4, 5)]
    plain, wide = nf4(torch.randn(2, 64), double=False)[0], nf4(torch.randn(2, 64), block_size=128)[0]
    odd = nf4(torch.randn(2, 64), block_size=32)[0]
    stacks = stacked([*double, dense, double[0], plain, wide, odd, plain])
    assert [stack.shape[0] for stack in stacks] == [2 + 3 + 4, 5, 2, 2, 2, 2, 2, 2]
    assert stacks[2] is dense
    buffer = torch.full((26, 64), torch.nan)
    truth = torch.full((26, 64), torch.nan)
    start = 0
    for weight in (*double, dense, double[0], plain, wide, odd, plain):
        weight.write(truth[start : start + weight.shape[0]])
        start += weight.shape[0]
    start = 0
    with interpreted():
        for stack in stacks:
            stack.write(buffer[start : start + stack.shape[0]])
            start += stack.shape[0]
    assert torch.equal(buffer, truth)
