from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from steep.kernels import copy_rows
from steep.ops import lora
from steep.ops.backend import interpreted
from steep.ops.lora import Lora
from steep.ops.lora_linear import lora_linear, lora_linear_reference, lora_linears
from steep.ops.lora_mlp import lora_mlp
from steep.ops.lora_qkv import lora_qkv, lora_qkv_reference
from tests.ops.lora_cases import (
    assert_op_as_good,
    assert_summed_in_fp32,
    copied,
    fill_new_tensors,
    make_projection,
    stored_as,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _linear(x, projections):
    return lora_linear(x, projections[0])


def _linear_reference(x, projections):
    return lora_linear_reference(x, projections[0])


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(
    ("sizes", "ranks", "bias"),
    [
        ((96, 160), (16,), False),
        ((96, 160), (4,), True),
        ((90, 50), (3,), True),  # nothing that a multiple of eight divides
        ((128, 64), (192,), False),  # a rank above min(in, out)
        ((96, 64), (12, 12), False),  # two adapters stacked
        ((96, 64), (), True),
        ((96, 64), (), False),
    ],
)
def test_lora_linear(monkeypatch, device, dtype, tokens, sizes, ranks, bias) -> None:
    projection = make_projection(sizes[0], sizes[1], ranks, bias=bias, dtype=dtype, device=device)
    x = torch.randn(tokens, sizes[0]).to(device, dtype)
    fill_new_tensors(monkeypatch)
    assert_op_as_good(_linear, _linear_reference, x, [projection])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(
    ("outputs", "ranks", "biases"),
    [
        ((256, 64, 64), ((16,), (16,), (16,)), (False, False, False)),
        ((256, 64, 64), ((4,), (192,), (256,)), (True, True, True)),
        ((256, 64, 64), ((32,), (), (8,)), (False, True, False)),
        ((256, 64, 64), ((), (8,), ()), (False, False, False)),
        ((100, 36, 36), ((5, 5), (3, 3), (1, 1)), (True, True, True)),
        ((256, 64, 64), ((), (), ()), (True, False, False)),
    ],
)
def test_lora_qkv(monkeypatch, device, dtype, tokens, outputs, ranks, biases) -> None:
    projections = [
        make_projection(128, size, rank, bias=bias, dtype=dtype, device=device)
        for size, rank, bias in zip(outputs, ranks, biases, strict=True)
    ]
    x = torch.randn(tokens, 128).to(device, dtype)
    fill_new_tensors(monkeypatch)
    assert_op_as_good(lora_qkv, lora_qkv_reference, x, projections)


@pytest.mark.gpu
def test_lora_qkv_at_full_size() -> None:
    projections = [
        make_projection(4096, size, (256,), dtype=torch.bfloat16, device="cuda") for size in (4096, 1024, 1024)
    ]
    x = torch.randn(2048, 4096).to("cuda", torch.bfloat16)
    assert_op_as_good(lora_qkv, lora_qkv_reference, x, projections)


@pytest.mark.parametrize("device", ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_over_a_quantised_weight(monkeypatch, device, dtype, storage) -> None:
    """It is dequantised into columns of the group's buffer."""
    how = {"dtype": dtype, "device": "cuda" if device == "cuda" else "cpu"}
    projections = [make_projection(64, size, (rank,), **how) for size, rank in ((96, 16), (32, 8), (32, 4))]
    projections = [stored_as(storage, projection) for projection in projections]
    x = torch.randn(63, 64).to(**how)
    fill_new_tensors(monkeypatch)
    with interpreted() if device == "interpreter" else nullcontext():
        assert_op_as_good(lora_qkv, lora_qkv_reference, x, projections)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_in_fp32_train_under_bf16_products(device) -> None:
    projections = [
        make_projection(96, size, (8,), dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
        for size in (96, 32, 32)
    ]
    x = torch.randn(63, 96).to(device, torch.bfloat16)
    assert_op_as_good(lora_qkv, lora_qkv_reference, x, projections)
    lora_qkv(x, projections).sum().backward()
    gradient = _gradient(projections[1].adapters[0].b)
    assert gradient.dtype == torch.float32 and (gradient.bfloat16() != gradient).any()  # not bf16, cast up


@pytest.mark.parametrize("trained", ["first", "second", "a", "b"])
def test_only_what_trains_gets_a_gradient(trained) -> None:
    def freeze(index: int, adapter: Lora) -> Lora:
        a = trained == "a" or trained == ("first", "second")[index]
        b = trained == "b" or trained == ("first", "second")[index]
        return Lora(adapter.a.detach().requires_grad_(a), adapter.b.detach().requires_grad_(b), adapter.scale)

    projections = []
    for size in (96, 32, 32):
        projection = make_projection(64, size, (8, 16))
        adapters = tuple(freeze(index, adapter) for index, adapter in enumerate(projection.adapters))
        projections.append(replace(projection, adapters=adapters))
    assert_op_as_good(lora_qkv, lora_qkv_reference, torch.randn(63, 64), projections)


def test_rows_of_any_strides_are_copied_by_the_kernel(monkeypatch) -> None:
    calls, kernel = [], copy_rows.copy_rows
    monkeypatch.setattr(copy_rows, "copy_rows", lambda *given: calls.append(1) or kernel(*given))
    projection, results = make_projection(64, 96), []
    for lie in (torch.clone, lambda x: torch.cat([x, x], dim=1)[:, :64], lambda x: x.t().contiguous().t()):
        torch.manual_seed(0)
        x = lie(torch.randn(63, 64)).requires_grad_()
        with interpreted():
            y = lora_linear(x, projection)
            (dx,) = torch.autograd.grad(y.sum(), x)  # of which dy is one number, expanded
        results.append((y, dx))
    assert len(calls) == 3 * 3  # x, dy, x again
    assert all(torch.equal(one, other) for each in results for one, other in zip(each, results[0], strict=True))


@pytest.mark.parametrize("op", ["linear", "qkv", "mlp"])
def test_autocast_changes_nothing(op: str) -> None:
    """Products are in the dtype of x, in the backward pass too."""
    projections = {
        "linear": (make_projection(64, 32),),
        "qkv": tuple(make_projection(64, size) for size in (32, 16, 16)),
        "mlp": (make_projection(64, 96), make_projection(64, 96), make_projection(96, 64)),
    }[op]

    def computed() -> list[torch.Tensor]:
        own = [copied(projection) for projection in projections]
        leaf = x.clone().requires_grad_()
        y = lora_mlp(leaf, own[0], own[1], own[2], "silu") if op == "mlp" else lora_linears(leaf, own)
        y.square().sum().backward()
        gradients = [tensor.grad for projection in own for tensor in projection.tensors()]
        return [y.detach(), *[gradient for gradient in (leaf.grad, *gradients) if gradient is not None]]

    x = torch.randn(5, 64)
    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
    assert len(found) == 2 + 2 * len(projections)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_an_input_that_needs_no_gradient() -> None:
    projection = make_projection(64, 96)
    lora_linear(torch.randn(63, 64), projection).sum().backward()
    assert projection.adapters[0].b.grad is not None


def test_no_product_of_q_k_and_v_is_summed_in_16_bit(monkeypatch) -> None:
    assert_summed_in_fp32(monkeypatch, lora_qkv, [make_projection(64, size) for size in (96, 32, 32)])


@pytest.mark.parametrize(("rank", "rows"), [(8, 24), (4, 20)])  # 4 is padded to 8
def test_autograd_takes_the_gradients_as_they_are(rank, rows) -> None:
    """The gradients of a are rows of one tensor, and stay so: nothing is copied on the way to `.grad`."""
    projections = [make_projection(64, size, (rank,)) for size in (96, 32, 32)]
    lora_qkv(torch.randn(63, 64), projections).sum().backward()
    storages = [_gradient(projection.adapters[0].a).untyped_storage() for projection in projections]
    assert len({storage.data_ptr() for storage in storages}) == 1
    assert storages[0].nbytes() == rows * 64 * 4


def test_how_many_products_q_k_and_v_take(monkeypatch) -> None:
    shapes: list[tuple[int, int]] = []

    def counted(a, b, **options):
        shapes.append((a.shape[0], b.shape[1]))
        return product(a, b, **options)

    product = lora.product
    monkeypatch.setattr(lora, "product", counted)
    projections = [make_projection(64, size, (8,)) for size in (96, 32, 32)]
    x = torch.randn(63, 64, requires_grad=True)
    y = lora_qkv(x, projections)
    assert shapes == [(63, 8), (63, 16), (63, 96), (63, 64)]  # x·Aᵀ of q, of k and v; y of q, of k and v
    shapes.clear()
    y.sum().backward()
    assert shapes == [
        (63, 8), (63, 16),  # dy·s·B
        (63, 64),  # dX
        (63, 8), (63, 16),  # x·Aᵀ again
        (96, 8), (32, 8), (32, 8),  # dB
        (24, 64),  # dA, of all three
    ]  # fmt: skip
