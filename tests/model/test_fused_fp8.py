"""The fused step with products in fp8: what is computed when, shown exactly; and how far e4m3 is from fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from steep.model import decoder, projections
from steep.model.install import fused_of, install, uninstall
from steep.model.unwrap import unwrap
from steep.ops import fp8, fp8_linear, fp8_product
from steep.ops.base_weight import DenseWeight
from steep.ops.fp8 import Fp8Weight
from tests.model.test_fused import adapted, assert_same, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import FAMILIES, tiny_model

BLOCK = 16  # so that a tiny model has several


@pytest.fixture(params=["rows", "blocks"])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes in fp32 stand in the place of e4m3, those of weights with scales that differ: nothing is lost by them, so
    what is left is which rows are quantised when, and which product reads them with which scales."""
    modules = (fp8, fp8_linear, fp8_product)
    for name, value in (("E4M3", torch.float32), ("BLOCK", BLOCK)):
        for module in modules:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    def weight(values: torch.Tensor) -> Fp8Weight:
        rows, columns = values.shape
        generator = torch.Generator().manual_seed(rows)
        if request.param == "rows":
            scale = torch.rand(rows, generator=generator) + 0.5
            return Fp8Weight(values / scale[:, None], scale)
        scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) + 0.5
        wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return Fp8Weight((values / wide).contiguous(), scale)

    monkeypatch.setattr(projections, "DenseWeight", lambda values: weight(values.detach()))
    fits = fp8_linear.fits_fp8
    monkeypatch.setattr(fp8_linear, "fits_fp8", lambda weights, dtype: fits(weights, torch.bfloat16))
    monkeypatch.setattr("steep.ops.fp8_groups.fits_fp8", lambda weights, dtype: fits(weights, torch.bfloat16))
    monkeypatch.setattr(decoder, "has_fp8_units", lambda device: True)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
@pytest.mark.usefixtures("exact")
def test_every_family_at_every_level(family: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    product = fp8_linear.fp8_product
    monkeypatch.setattr(fp8_linear, "fp8_product", lambda *given, **how: calls.append(how) or product(*given, **how))
    model = adapted(tiny_model(family))
    assert_same(model, packed(), levels=level)
    assert fused_of(model).fp8 == "both"
    forward = 3 + 2 + 1 + 1  # weights that stand apart have a product each
    again = {0: 0, 1: 2, 2: 5, 3: 6}[level]
    if level in (1, 2) and "post_feedforward_layernorm" in dict(unwrap(model).model.layers[0].named_modules()):
        again += 1  # of o, before its norm
    assert len(calls) == 2 * (forward + again + 4)


@pytest.mark.parametrize("products", ["backward", "none"])
@pytest.mark.usefixtures("exact")
def test_fewer_products_in_fp8_compute_the_same(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    product = fp8_linear.fp8_product
    monkeypatch.setattr(fp8_linear, "fp8_product", lambda *given, **how: calls.append(how) or product(*given, **how))
    model = adapted(tiny_model("qwen2"))  # with biases
    loss, gradients = loss_and_gradients(model, packed())
    fused_loss, fused = loss_and_gradients(install(model, levels=1, fp8_products=products), packed())
    assert abs(fused_loss - loss) < 2e-5 * loss
    assert max(error(fused[name], gradients[name]) for name in gradients) < 2e-5
    assert len(calls) == (8 if products == "backward" else 0)


def over_fp8(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`model` in bf16 whose fused layers read their weights in e4m3, and the library's layers those same values."""
    model.to(torch.bfloat16)
    kept: dict[int, Fp8Weight] = {}
    for layer in unwrap(model).model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2 and "lora_" not in name:
                stored = kept[parameter.data_ptr()] = fp8.quantise_weight(parameter.detach())
                stored.write(parameter.data)
    monkeypatch.setattr(projections, "DenseWeight", lambda weight: kept.get(weight.data_ptr()) or DenseWeight(weight))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_how_far_it_is_from_the_truth(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each direction in e4m3 adds its own error to the gradients; none is lost, in any layer."""
    model = over_fp8(adapted(tiny_model(family)), monkeypatch)
    truth_loss, truth = loss_and_gradients(copy.deepcopy(model).float(), packed())
    found: dict[str, float] = {}
    for products in ("none", "backward", "both"):
        install(model, levels=1, fp8_products=products)  # pyright: ignore[reportArgumentType]
        loss, gradients = loss_and_gradients(model, packed())
        uninstall(model)
        errors = [error(gradient, truth[name]) for name, gradient in gradients.items()]
        assert abs(loss - truth_loss) < 0.01 * truth_loss
        assert max(errors) < 0.25, products
        found[products] = sum(errors) / len(errors)
    assert found["none"] < found["backward"] < found["both"] < 0.12
    assert found["both"] > 2 * found["none"]  # it is e4m3 that was measured
