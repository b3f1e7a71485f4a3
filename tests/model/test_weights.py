"""Gradients of adapters that are summed over tiles."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from steep.model import weights
from steep.model.weights import AdapterGradients
from steep.ops.lora import Lora, LoraGroup
from tests.ops.closeness import error
from tests.ops.lora_cases import make_projection

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TILES = (slice(0, 40), slice(40, 64), slice(64, 103))


def group_of(device: str, *, in_fp32: bool = False, freezes: bool = False) -> LoraGroup:
    """Three projections in bf16 whose gradients have odd sizes. in_fp32: the second one's are kept so; freezes: the
    first one's are not asked for."""
    projections = [
        make_projection(52, size, (rank,), dtype=torch.bfloat16, device=device)
        for size, rank in ((50, 3), (31, 5), (40, 8))
    ]
    if in_fp32:
        (adapter,) = projections[1].adapters
        adapter.a.grad_dtype = adapter.b.grad_dtype = torch.float32
    if freezes:
        (adapter,) = projections[0].adapters
        frozen = Lora(adapter.a.detach(), adapter.b.detach(), adapter.scale)
        projections[0] = replace(projections[0], adapters=(frozen,))
    return LoraGroup(projections, torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [{}, {"in_fp32": True}, {"freezes": True}], ids=str)
def test_tiles_give_what_the_whole_gives(device: str, how: dict[str, bool]) -> None:
    group = group_of(device, **how)
    made = {"device": device, "dtype": torch.bfloat16}
    xe, dye = torch.randn(103, group.input_width).to(**made), torch.randn(103, group.gradient_width).to(**made)
    sums = AdapterGradients(group, len(TILES))
    for tile in TILES:
        sums.add(dye[tile], xe[tile])
    given = sums.take()
    truth = [each for each in group.adapter_gradients(dye, xe, torch.float32) if each is not None]
    trained = [tensor for each in group.projections for tensor in each.tensors() if tensor.requires_grad]
    assert len(given) == len(truth) == len(trained) == (4 if how.get("freezes") else 6)
    for gradient, exact, tensor in zip(given, truth, trained, strict=True):
        kept = tensor.grad_dtype or tensor.dtype
        assert gradient.dtype == kept and gradient.shape == tensor.shape and gradient.is_contiguous()
        assert error(gradient, exact) < (1e-6 if kept == torch.float32 else 2e-3)
        assert error(gradient / 2, exact) > 0.4
    assert [gradient.data_ptr() % 16 for gradient in given[-1::-2]] == [0] * (len(given) // 2)  # of b: a product each


def test_nothing_is_made_beside_the_sums_and_what_is_kept() -> None:
    """Each tile's products are added where the sums are, and all become bf16 in one step."""
    group = group_of("cpu")
    xe, dye = torch.randn(103, group.input_width).bfloat16(), torch.randn(103, group.gradient_width).bfloat16()
    sums = AdapterGradients(group, len(TILES))
    with mock.patch.object(weights.torch, "empty", wraps=torch.empty) as empty:
        for tile in TILES:
            sums.add(dye[tile], xe[tile])
    assert empty.call_count == 1
    assert len({gradient.untyped_storage().data_ptr() for gradient in sums.take()}) == 1
    assert sums.take() == []
