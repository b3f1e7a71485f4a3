"""Projections with adapters, as the tests of LoRA ops need them, and one body that tries an op against fp32 truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from steep.ops import lora
from steep.ops.base_weight import DenseWeight
from steep.ops.lora import Lora, Projection
from steep.ops.products import product
from tests.ops.closeness import SLACK, assert_as_good, slack_of
from tests.ops.quantised import int8, nf4

Function = Callable[[torch.Tensor, Sequence[Projection]], torch.Tensor]


def make_projection(
    in_features: int,
    out_features: int,
    ranks: Sequence[int] = (8,),
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Projection:
    """A dense weight and adapters of about the weight's size, so that each matters to the output; scales differ, and
    are no powers of two."""

    def draw(*shape: int, of: torch.dtype | None = None) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(device, of or dtype)

    adapters = tuple(
        Lora(
            draw(rank, in_features, of=adapter_dtype).requires_grad_(),
            draw(out_features, rank, of=adapter_dtype).requires_grad_(),
            scale=(-1) ** index * (0.7 + 0.2 * index),
        )
        for index, rank in enumerate(ranks)
    )
    weight = DenseWeight(draw(out_features, in_features))
    return Projection(weight, torch.randn(out_features).to(device, dtype) if bias else None, adapters)


def stored_as(storage: str, projection: Projection) -> Projection:
    """The same over bitsandbytes' storage of its weight, ``nf4`` or ``int8``."""
    assert isinstance(projection.weight, DenseWeight)
    weight = projection.weight.weight
    stored, _ = {"nf4": nf4, "int8": int8}[storage](weight, device=weight.device.type)
    return replace(projection, weight=stored)


def exact(projection: Projection) -> Projection:
    """The same in fp32, of the same values; its adapters are new leaves."""
    weight = torch.empty(projection.weight.shape, device=device_of(projection))
    projection.weight.write(weight)
    bias = None if projection.bias is None else projection.bias.float()
    return Projection(DenseWeight(weight), bias, _leaves(projection, torch.float32))


def copied(projection: Projection) -> Projection:
    """The same with adapters that are new leaves."""
    return replace(projection, adapters=_leaves(projection, None))


def device_of(projection: Projection) -> torch.device:
    if projection.adapters:
        return projection.adapters[0].a.device
    weight = projection.weight
    return (weight.weight if isinstance(weight, DenseWeight) else weight.codes).device  # pyright: ignore[reportAttributeAccessIssue]


def _leaves(projection: Projection, dtype: torch.dtype | None) -> tuple[Lora, ...]:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(tensor.requires_grad)

    return tuple(Lora(leaf(adapter.a), leaf(adapter.b), adapter.scale) for adapter in projection.adapters)


def fill_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers hold NaN, so that what an op reads and did not write shows."""

    def filled(new: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*arguments, **options) -> torch.Tensor:
            made = new(*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def assert_summed_in_fp32(monkeypatch: pytest.MonkeyPatch, op: Function, projections: Sequence[Projection]) -> None:
    """In no product of the op, forward or backward, may cuBLAS add in 16 bit; afterwards it may as before."""
    matmul, allowed = torch.backends.cuda.matmul, []

    def spy(*operands: torch.Tensor, **options) -> torch.Tensor:
        allowed.append(matmul.allow_bf16_reduced_precision_reduction or matmul.allow_fp16_reduced_precision_reduction)
        return product(*operands, **options)

    monkeypatch.setattr(lora, "product", spy)
    y = op(torch.randn(5, projections[0].weight.shape[1], requires_grad=True), projections)
    forward = len(allowed)
    assert forward and matmul.allow_bf16_reduced_precision_reduction
    y.sum().backward()
    assert len(allowed) > forward and not any(allowed)
    assert matmul.allow_bf16_reduced_precision_reduction


def assert_op_as_good(op: Function, reference: Function, x: torch.Tensor, projections: Sequence[Projection]) -> None:
    """The output, the input's gradient and every adapter's, against the reference in fp32 and in x's dtype."""
    # One token's gradient of a rank-1 adapter hangs on one rounded number, and so the comparison on luck.
    slack = slack_of(x) if len(x) > 1 or x.dtype == torch.float32 else 5 * SLACK
    results = []
    cotangent = None
    for function, dtype, change in (
        (reference, torch.float32, exact),
        (reference, x.dtype, copied),
        (op, x.dtype, copied),
    ):
        own = [change(projection) for projection in projections]
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = function(leaf, own)
        if cotangent is None:
            cotangent = torch.randn_like(y).to(x.dtype)
        assert y.dtype == dtype
        y.backward(cotangent.to(dtype))
        named = {"output": y.detach(), "input": leaf.grad}
        for i, projection in enumerate(own):
            for j, adapter in enumerate(projection.adapters):
                for name in ("a", "b"):
                    tensor = getattr(adapter, name)
                    assert (tensor.grad is not None) == tensor.requires_grad
                    assert tensor.grad is None or tensor.grad.is_contiguous()
                    named[f"{name} of adapter {j} of projection {i}"] = tensor.grad
        results.append(named)
    truths, references, ours = results
    for name, truth in truths.items():
        if truth is not None:
            assert_as_good(ours[name], references[name], truth, slack, name)
