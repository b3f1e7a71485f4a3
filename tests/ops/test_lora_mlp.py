from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from steep.kernels import copy_rows, swiglu
from steep.ops.backend import interpreted
from steep.ops.lora import Projection
from steep.ops.lora_mlp import lora_mlp, lora_mlp_reference
from tests.ops.lora_cases import (
    assert_op_as_good,
    assert_summed_in_fp32,
    fill_new_tensors,
    make_projection,
    stored_as,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _over(function: Callable[..., torch.Tensor], activation: str, x: torch.Tensor, projections: Sequence[Projection]):
    gate, up, down = projections
    return function(x, gate, up, down, activation)


def _ops(activation: str):
    return partial(_over, lora_mlp, activation), partial(_over, lora_mlp_reference, activation)


def _mlp(hidden: int, intermediate: int, ranks: Sequence[Sequence[int]], **how) -> list[Projection]:
    """gate, up, down."""
    sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    return [make_projection(read, out, rank, **how) for (read, out), rank in zip(sizes, ranks, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(
    ("sizes", "ranks", "bias", "activation"),
    [
        ((64, 160), ((16,), (16,), (16,)), False, "silu"),
        ((64, 160), ((4,), (192,), (256,)), True, "silu"),
        ((64, 160), ((8,), (), (8, 8)), False, "gelu_tanh"),
        ((50, 90), ((3,), (5, 5), (1,)), True, "gelu_tanh"),
        ((64, 160), ((), (), ()), False, "silu"),
    ],
)
def test_lora_mlp(monkeypatch, device, dtype, tokens, sizes, ranks, bias, activation) -> None:
    projections = _mlp(sizes[0], sizes[1], ranks, bias=bias, dtype=dtype, device=device)
    x = torch.randn(tokens, sizes[0]).to(device, dtype)
    fill_new_tensors(monkeypatch)
    assert_op_as_good(*_ops(activation), x, projections)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_lora_mlp_over_the_kernels(monkeypatch, activation) -> None:
    """Over NF4, with the activation and its gradients in columns of wider buffers."""
    calls: list[str] = []
    for module, name in ((swiglu, "forward"), (swiglu, "backward"), (copy_rows, "copy_rows")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, of=name, run=kernel: calls.append(of) or run(*given))
    projections = _mlp(64, 160, ((16,), (4,), (8, 8)), dtype=torch.bfloat16)
    projections = [stored_as("nf4", projection) for projection in projections]
    x = torch.randn(63, 64).to(torch.bfloat16)
    fill_new_tensors(monkeypatch)
    with interpreted():
        assert_op_as_good(*_ops(activation), x, projections)
    rows = ["copy_rows"]  # of x; of dy, of gate and up, of x again
    assert calls == [*rows, "forward", *rows, *rows, "backward", *rows]


@pytest.mark.gpu
def test_lora_mlp_at_full_size() -> None:
    projections = _mlp(4096, 14336, ((256,), (256,), (256,)), dtype=torch.bfloat16, device="cuda")
    assert_op_as_good(*_ops("silu"), torch.randn(2048, 4096).to("cuda", torch.bfloat16), projections)


def test_no_product_of_the_mlp_is_summed_in_16_bit(monkeypatch) -> None:
    assert_summed_in_fp32(monkeypatch, _ops("silu")[0], _mlp(64, 160, ((8,), (8,), (8,))))


def test_the_graph_may_be_gone_through_twice() -> None:
    """What is saved is not written over: gate and up become their gradients in a buffer of their own."""
    projections = _mlp(64, 160, ((8,), (8,), (8,)))
    x = torch.randn(63, 64, requires_grad=True)
    inputs = [x, *(tensor for projection in projections for tensor in projection.tensors())]
    loss = _over(lora_mlp, "silu", x, projections).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, first, second))
