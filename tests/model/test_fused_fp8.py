"""The fused step with products in fp8: what is computed when, shown exactly; and how far e4m3 is from fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from steep.errors import UserError
from steep.model import decoder, projections
from steep.model import layer as layer_of_model
from steep.model.choices import Choices, take_over
from steep.model.fp8_linear import Fp8Linear
from steep.model.install import fused_of, install, is_installed, uninstall
from steep.model.unwrap import unwrap
from steep.ops import fp8, fp8_groups, fp8_linear, fp8_product
from steep.ops.base_weight import DenseWeight
from steep.ops.fp8 import Fp8Weight
from steep.ops.fp8_linear import Fp8Group
from tests.fp8_checkpoints import in_e4m3
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
    why_not = fp8_linear.why_not_fp8
    for module in (fp8_linear, fp8_groups, layer_of_model):
        monkeypatch.setattr(module, "why_not_fp8", lambda weights, _, *heads: why_not(weights, torch.bfloat16, *heads))
    monkeypatch.setattr(decoder, "Fp8Linear", nn.Linear)
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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.usefixtures("exact")
def test_in_tiles(family: str) -> None:
    model = adapted(tiny_model(family))
    assert_same(model, packed(), levels=[3, 0], tile=50)
    assert fused_of(model).fp8 == "both"
    groups = fused_of(model).layer(unwrap(model).model.layers[0]).groups(torch.float32, "both")
    assert isinstance(groups.down, Fp8Group) and groups.down._read_in_place() is not None


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


# ---- where they cannot be


def stored(model: Any, *, strategy: str = "channel", but: tuple[str, ...] = ()) -> Any:
    """`model` in bf16 with its layers' weights in e4m3, other than those whose names end as `but` says."""
    model = model.to(torch.bfloat16)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(but or "none"):
            codes, scale = in_e4m3(module.weight.detach(), strategy)
            weight = Fp8Weight(codes.contiguous(), scale.squeeze(1) if strategy == "channel" else scale)
            model.model.layers.set_submodule(name, Fp8Linear(weight, None, torch.bfloat16))
    return adapted(model)


def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is one without fp8 units."""
    for module in ("install", "choices"):
        monkeypatch.setattr(f"steep.model.{module}.lacks_fp8_units", lambda: True)


@pytest.mark.parametrize("head_dim", [80, 96])
def test_blocks_that_run_across_heads_are_dequantised(head_dim: int) -> None:
    heads = 8 if head_dim == 80 else 4
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
    model = stored(tiny_model("llama", **shape), strategy="block")
    _, truth = loss_and_gradients(copy.deepcopy(model).float(), packed())
    install(model, levels=1, fp8_products="both")
    _, gradients = loss_and_gradients(model, packed())
    assert max(error(gradient, truth[name]) for name, gradient in gradients.items()) < 0.25
    line = "2 of the 8 groups of products, in 2 of 2 layers, are not in fp8: "
    assert fused_of(model).said == {line + f"blocks of 128 x 128 run across heads of {head_dim} (q, k, v)"}


def test_what_is_not_in_fp8_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = stored(tiny_model("llama"), but=("1.mlp.down_proj", "1.mlp.up_proj"))
    install(model, levels=1, fp8_products="both")
    for _ in range(2):
        loss_and_gradients(model, packed())
    line = "2 of the 8 groups of products, in 1 of 2 layers, are not in fp8: not all weights are in e4m3 (gate, up)"
    assert [record.message for record in caplog.records if "fp8" in record.message] == [line]
    whole = install(stored(tiny_model("llama")), levels=1, fp8_products="both")
    loss_and_gradients(whole, packed())
    assert not fused_of(whole).said


def test_a_first_layer_in_16_bits_does_not_speak_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishers often leave it so."""
    monkeypatch.setattr(decoder, "has_fp8_units", lambda device: True)
    model = tiny_model("llama")
    first = tuple(name for name, module in model.model.layers.named_modules() if type(module) is nn.Linear)[:7]
    assert all(name.startswith("0.") for name in first)
    model = install(stored(model, but=first), levels=1)
    loss_and_gradients(model, packed())
    assert fused_of(model).fp8 == "both"


@pytest.mark.parametrize("products", ["both", "backward"])
def test_what_no_group_can_have_is_refused(products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = tiny_model("llama")
    other = adapted(plain.to(torch.bfloat16))
    in_fp32 = stored(tiny_model("llama")).float()
    for model, reason in ((other, "no weight is in e4m3"), (in_fp32, "products are in float32")):
        with pytest.raises(UserError, match=f"fp8_products: no product can be in fp8: {reason}"):
            install(model, fp8_products=products)
        assert not is_installed(model)
        install(model, fp8_products="none")
    model = stored(tiny_model("llama"))
    lacking(monkeypatch)
    with pytest.raises(UserError, match=r"fp8_products: .*no fp8 units.*compute capability 8\.9"):
        install(model, fp8_products=products)
    assert fused_of(install(model, fp8_products="none")).fp8 == "none"


def test_a_card_without_units_takes_none_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Choices(True, "bf16", fp8_products="both")
    model = install(stored(tiny_model("llama")))
    lacking(monkeypatch)
    with pytest.raises(UserError, match=r"fp8_products: .*so far.*compute capability 8\.9"):
        take_over(model, before)
    assert fused_of(model).fp8 is None
    take_over(install(model, fp8_products="none"), before)
    assert fused_of(model).fp8 == "none"
