from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steep.ops.base_weight import DenseWeight
from steep.ops.lora import Lora, LoraGroup, Projection
from tests.ops.closeness import assert_as_good, error
from tests.ops.lora_cases import make_projection

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _columns_of_wider(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((shape[0], shape[1] + 24), torch.nan, dtype=dtype, device=device)[:, 8:-16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
def test_every_buffer_may_be_columns_of_a_wider_one(device, residual) -> None:
    """And hold NaN before; the residual stream may be fp32 while products are of bf16."""
    dtype, tokens = torch.bfloat16, 63
    projections = [make_projection(88, n, r, dtype=dtype, device=device) for n, r in ((96, (4,)), (40, (16, 3)))]
    group = LoraGroup(projections, dtype)
    buffer = _columns_of_wider(group.buffer_shape, dtype, device)
    xe = _columns_of_wider((tokens, group.input_width), dtype, device)
    dye = _columns_of_wider((tokens, group.gradient_width), dtype, device)
    out = _columns_of_wider((tokens, group.outputs), residual or dtype, device)
    dx = _columns_of_wider((tokens, 88), residual or dtype, device)
    x, dy, add = (torch.randn(tokens, size).to(device) for size in (88, group.outputs, group.outputs))
    xe[:, group.x_columns] = x
    dye[:, : group.outputs] = dy
    add = None if residual is None else add.to(residual)

    group.fill(buffer)
    group.extend_input(xe, buffer)
    group.forward(xe, buffer, out, add=add)
    group.extend_gradient(dye, buffer)
    group.input_gradient(dye, buffer, out=dx)

    weight = torch.cat([_merged(projection) for projection in projections])
    x, dy = x.to(dtype).double(), dy.to(dtype).double()
    truth = x @ weight.T + (0 if add is None else add.double())
    bound = 6e-3 if out.dtype == torch.bfloat16 else 5e-3  # x·Aᵀ, s·B and the output are rounded
    assert error(out, truth) < bound and error(dx, dy @ weight) < bound
    assert error(out / 2, truth) > bound and error(dx / 2, dy @ weight) > bound

    for name, of_fp32, of_own in zip(
        "abab", group.adapter_gradients(dye, xe, torch.float32), group.adapter_gradients(dye, xe), strict=False
    ):
        assert of_fp32 is not None and of_own is not None
        assert of_fp32.dtype == torch.float32 and of_own.dtype == dtype
        assert (of_fp32.bfloat16() != of_fp32).any(), name  # not bf16, cast up
        assert_as_good(of_own, of_fp32.bfloat16(), of_fp32, name=name)


def _merged(projection: Projection) -> torch.Tensor:
    assert isinstance(projection.weight, DenseWeight)
    weight = projection.weight.weight.double()
    for adapter in projection.adapters:
        weight = weight + adapter.scale * adapter.b.detach().double() @ adapter.a.detach().double()
    return weight


@pytest.mark.parametrize("ranks", [(1,), (4,), (3, 5), (8,), ()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(96, 40), (50, 31)])
def test_blocks_of_columns_begin_at_multiples_of_eight(ranks, bias, outputs) -> None:
    group = LoraGroup([make_projection(52, size, ranks, bias=bias) for size in outputs], torch.float32)
    assert group.x_columns.start % 8 == group.input_width % 8 == group.gradient_width % 8 == 0
    assert group.outputs == sum(outputs)
    assert group.buffer_shape == (group.gradient_width, group.input_width)


def test_without_padding_nothing_is_wider_than_it_must_be() -> None:
    group = LoraGroup([make_projection(64, size, (16,)) for size in (96, 32, 32)], torch.float32)
    assert (group.gradient_width, group.input_width) == (160 + 48, 64 + 48)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_is_multiplied_in_fp32_and_rounded_once(device, adapter_dtype, dtype) -> None:
    projection = make_projection(64, 96, (16,), adapter_dtype=adapter_dtype, device=device)
    projection = replace(projection, adapters=(replace(projection.adapters[0], scale=0.7071),))
    buffer = LoraGroup([projection], dtype).filled_buffer(torch.device(device))
    (adapter,) = projection.adapters
    assert torch.equal(buffer[:96, :16], (adapter.b.detach().float() * adapter.scale).to(dtype))
    assert torch.equal(buffer[96:, 16:], adapter.a.detach().to(dtype))


def test_a_frozen_adapter_between_two_that_train_costs_no_gradient() -> None:
    """PiSSA's frozen start stands beside the adapter that trains; its gradient is not computed."""
    projections = []
    for size in (96, 32):
        own, start = make_projection(64, size, (8, 8)).adapters
        frozen = Lora(start.a.detach(), start.b.detach(), start.scale)
        projections.append(replace(make_projection(64, size), adapters=(own, frozen)))
    group = LoraGroup(projections, torch.float32)
    xe, dye = torch.randn(63, group.input_width), torch.randn(63, group.gradient_width)
    gradients = group.adapter_gradients(dye, xe)
    assert [gradient is None for gradient in gradients] == [False, False, True, True] * 2
    assert gradients[0] is not None and gradients[0].untyped_storage().nbytes() == 8 * 64 * 4


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_in_the_dtype_that_autograd_keeps(device) -> None:
    """fp32 for bf16 adapters that are given it: the sum as it was accumulated, not a rounded one cast up."""
    group = LoraGroup([make_projection(64, 96, (8, 8), dtype=torch.bfloat16, device=device)], torch.bfloat16)
    kept, own = group.projections[0].adapters
    kept.a.grad_dtype = kept.b.grad_dtype = torch.float32
    how = {"device": device, "dtype": torch.bfloat16}
    xe, dye = torch.randn(63, group.input_width).to(**how), torch.randn(63, group.gradient_width).to(**how)
    gradients, exact = group.adapter_gradients(dye, xe), group.adapter_gradients(dye, xe, torch.float32)
    for gradient, truth, tensor in zip(gradients, exact, (kept.a, kept.b, own.a, own.b), strict=True):
        assert gradient is not None and truth is not None
        assert gradient.dtype == (torch.float32 if tensor is kept.a or tensor is kept.b else torch.bfloat16)
        assert error(gradient, truth) < (1e-6 if gradient.dtype == torch.float32 else 1.8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_filling_makes_no_temporary_of_the_weights_size(adapter_dtype) -> None:
    projection = make_projection(
        4096, 14336, (256,), bias=True, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, device="cuda"
    )
    group = LoraGroup([projection], torch.bfloat16)
    buffer = group.filled_buffer(torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    group.fill(buffer)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
