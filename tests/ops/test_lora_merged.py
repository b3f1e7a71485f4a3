"""A group that merges gives what one that extends K gives, forward and backward, over every storage of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from steep.ops import lora_merged
from steep.ops.backend import interpreted
from steep.ops.lora import LoraGroup, Projection
from steep.ops.lora_linear import lora_linear_reference
from steep.ops.lora_merged import MergedGroup, merges_from
from steep.ops.merge import merges_whole
from steep.ops.nf4 import Nf4Weight
from steep.ops.products import product
from tests.ops.closeness import assert_as_good
from tests.ops.lora_cases import exact, make_projection, stored_as
from tests.ops.quantised import int8, nf4

CASES = {
    "q, k, v": [(96, (8,)), (32, (8,)), (32, (8,))],
    "one": [(64, (16,))],
    "unequal ranks": [(96, (5,)), (40, (12,))],
    "several adapters": [(64, (8, 3)), (48, (4,))],
    "none on the second": [(64, (8,)), (48, ())],
    "none at all": [(64, ()), (48, ())],
}


def projections(case: str, *, bias: bool, dtype: torch.dtype = torch.float32, storage: str = "nf4") -> list[Projection]:
    made = [make_projection(64, outputs, ranks, bias=bias, dtype=dtype) for outputs, ranks in CASES[case]]
    return [stored_as(storage, each) for each in made] if storage != "dense" else made


def results(group: LoraGroup, x: torch.Tensor, dy: torch.Tensor, add: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Everything that a group computes, in buffers that hold NaN before."""
    how = {"dtype": group.dtype, "device": x.device}
    buffer = torch.full(group.buffer_shape, torch.nan, **how)
    group.fill(buffer)
    xe, dye = (torch.full((len(x), n), torch.nan, **how) for n in (group.input_width, group.gradient_width))
    xe[:, group.x_columns], dye[:, : group.outputs] = x, dy
    out = torch.full((len(x), group.outputs), torch.nan, **how)
    group.extend_input(xe, buffer, gradients=False)
    group.forward(xe, buffer, out, add=add)
    if not group.forward_extends:
        group.extend_input(xe, buffer)
    group.extend_gradient(dye, buffer)
    found = {"output": out, "input": group.input_gradient(dye, buffer)}
    gradients = group.adapter_gradients(dye, xe)
    return found | {str(i): each for i, each in enumerate(gradients) if each is not None}


def plain(
    own: Sequence[Projection], x: torch.Tensor, dy: torch.Tensor, add: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = torch.cat([lora_linear_reference(leaf, each) for each in own], dim=1)
    y = y if add is None else y + add
    matrices = [matrix for each in own for matrix in each.tensors()]
    of_x, *of_matrices = torch.autograd.grad(y, [leaf, *matrices], dy)
    return {"output": y.detach(), "input": of_x, **{str(i): each for i, each in enumerate(of_matrices)}}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("storage", "dtype"), [("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32)]
)
def test_merged_is_extended(case: str, bias: bool, add: bool, storage: str, dtype: torch.dtype) -> None:
    own = projections(case, bias=bias, dtype=dtype, storage=storage)
    outputs = sum(each.weight.shape[0] for each in own)
    x, dy = torch.randn(63, 64).to(dtype), torch.randn(63, outputs).to(dtype)
    residual = torch.randn(63, outputs).to(dtype) if add else None
    truths = plain([exact(each) for each in own], x.float(), dy.float(), None if residual is None else residual.float())
    references, ours = plain(own, x, dy, residual), results(MergedGroup(own, dtype), x, dy, residual)
    extended = results(LoraGroup(own, dtype), x, dy, residual)
    assert ours.keys() == references.keys() == extended.keys()
    for name, truth in truths.items():
        assert_as_good(ours[name], references[name], truth, name=name)
        assert_as_good(extended[name], references[name], truth, name=name)


@pytest.mark.parametrize("case", ["q, k, v", "none on the second"])
def test_over_the_kernels(case: str) -> None:
    own = projections(case, bias=True)
    outputs = sum(each.weight.shape[0] for each in own)
    x, dy = torch.randn(5, 64), torch.randn(5, outputs)
    expected = plain([exact(each) for each in own], x, dy, None)
    with interpreted():
        ours = results(MergedGroup(own, torch.float32), x, dy, None)
    for name, truth in expected.items():
        assert_as_good(ours[name], truth, truth, slack=1e-5, name=name)


def test_the_forward_pass_makes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what merging is for: K stays as it is, and no product with A is needed before the backward pass."""
    own = projections("q, k, v", bias=False)
    group, shapes = MergedGroup(own, torch.float32), []
    buffer = group.filled_buffer(torch.device("cpu"))
    xe, out = torch.randn(7, group.input_width), torch.empty(7, group.outputs)

    def spy(a: torch.Tensor, b: torch.Tensor, **options) -> torch.Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return product(a, b, **options)

    monkeypatch.setattr(lora_merged, "product", spy)
    monkeypatch.setattr("steep.ops.lora.product", spy)
    group.extend_input(xe, buffer, gradients=False)
    group.forward(xe, buffer, out)
    assert shapes == [(7, 64, 160)]
    group.input_gradient(torch.randn(7, group.gradient_width), buffer)
    assert shapes[1:] == [(7, 160, 64)]


def test_from_how_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    own, bf16 = projections("q, k, v", bias=False), torch.bfloat16
    assert merges_from(own, bf16) == 0  # no kernel merges here
    monkeypatch.setattr(lora_merged, "merges_fast", lambda weight: isinstance(weight, Nf4Weight))
    few = merges_from(own, bf16)
    assert few > 0
    assert merges_from([replace(each, adapters=each.adapters * 2) for each in own], bf16) == few
    assert merges_from([stored_as("nf4", make_projection(256, 256))], bf16) > few
    assert merges_from([*own, make_projection(64, 64)], bf16) == 0
    single = replace(own[0], weight=nf4(torch.randn(64, 64), double=False)[0])
    assert merges_from([*own, single], bf16) == 0
    assert merges_from([replace(each, adapters=()) for each in own], bf16) == 0


def test_which_weights_keep_a_small_adapter() -> None:
    dense = make_projection(64, 64).weight
    assert merges_whole(dense, torch.float32) and not merges_whole(dense, torch.bfloat16)
    for double in (True, False):
        assert merges_whole(nf4(torch.randn(64, 64), double=double)[0], torch.bfloat16) is double
    assert merges_whole(int8(torch.randn(64, 64))[0], torch.bfloat16)
