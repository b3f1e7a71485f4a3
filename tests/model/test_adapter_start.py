"""LoftQ and PiSSA over the stock base, and what they save."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steep.errors import UserError
from steep.evaluation.adapters import base_model
from steep.model.adapter_start import ADAPTER, START, best_factors, joined_config
from steep.model.adapters import add_adapters, load_adapter_weights, open_adapter, save_adapter
from steep.model.load import keep_4bit_layout, load
from tests.fp8_checkpoints import compressed, publish
from tests.tiny import save_tiny

DEVICE = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base"), tied=False)


def ids() -> torch.Tensor:
    return torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids().to(model.device)).logits.double()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference over that of `other`."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = ids().to(model.device)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()


def product(layer: Any) -> torch.Tensor:
    return (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).detach()


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (33, 33)])
@pytest.mark.parametrize("r", [1, 8, 33])
def test_no_factors_of_that_rank_are_nearer(shape: tuple[int, int], r: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    b, a = best_factors(matrix, r)
    assert b.shape == (shape[0], r) and a.shape == (r, shape[1])
    tail = torch.linalg.svdvals(matrix.double())[r:].square().sum().sqrt()
    assert float((matrix - b @ a).double().norm()) == pytest.approx(float(tail), rel=1e-4, abs=1e-4)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-3)


def test_a_matrix_of_lower_rank_gives_finite_factors() -> None:
    matrix = torch.randn(16, 2) @ torch.randn(2, 24)
    b, a = best_factors(matrix, 8)
    assert difference(b @ a, matrix) < 1e-3
    b, a = best_factors(torch.zeros(8, 12), 4)
    assert torch.equal(b @ a, torch.zeros(8, 12))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("rslora", [True, False])
def test_loftq_takes_up_what_quantisation_lost(base: Path, kind: str, rslora: bool) -> None:
    model, _ = load(str(base), base=kind, compute_dtype="fp32")
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map=DEVICE)
    frozen = {name: dequantize_module_weight(module) for name, module in quantised(model).items()}
    peft_model = add_adapters(model, r=16, use_rslora=rslora, init_lora_weights="loftq")
    for name, layer in layers(peft_model).items():
        weight: Any = original.get_submodule(name).weight
        error = (weight.detach() - frozen[name]).double()
        moved = layer.scaling[ADAPTER] * product(layer).double()
        rank = layer.r[ADAPTER]
        tail = torch.linalg.svdvals(error)[rank:].square().sum().sqrt()
        assert float((error - moved).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-5)
        assert torch.equal(dequantize_module_weight(layer.get_base_layer()), frozen[name])  # still the stock base
    near = difference(logits(peft_model), logits(original))
    with base_model(peft_model):
        far = difference(logits(peft_model), logits(original))
    assert near < far * (0.85 if kind == "nf4" else 1), (near, far)


def quantised(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}


def test_loftq_without_the_16_bit_weights_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, _ = load(str(tmp_path), base="nf4")
    save_tiny("llama", tmp_path, num_hidden_layers=1)  # another checkpoint in its place
    with pytest.raises(UserError, match=r"loftq needs the 16-bit model\.layers\.1\.self_attn\.q_proj\.weight"):
        add_adapters(model, r=4, init_lora_weights="loftq")


def test_loftq_over_weights_that_are_published_in_e4m3_is_refused(base: Path, tmp_path: Path) -> None:
    """They are floating point too, and what they lack is their scale."""
    model, _ = load(str(publish(base, tmp_path / "published", compressed())))
    with pytest.raises(UserError, match=r"loftq needs the 16-bit model\.layers\.0\.self_attn\.q_proj\.weight"):
        add_adapters(model, r=4, init_lora_weights="loftq")


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp32"])
def test_pissa_begins_at_the_base_and_trains_its_principal_directions(base: Path, kind: str, rslora: bool) -> None:
    model, _ = load(str(base), base=kind, compute_dtype="fp32")
    before = logits(model)
    frozen = {name: dequantize_module_weight(module) for name, module in quantised(model).items()}
    peft_model = add_adapters(model, r=48, use_rslora=rslora, init_lora_weights="pissa")
    for name, layer in layers(peft_model).items():
        put_in = layer.scaling[ADAPTER] * product(layer)
        tail = torch.linalg.svdvals(frozen[name].double())[layer.r[ADAPTER] :].square().sum().sqrt()
        assert float((frozen[name] - put_in).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-4)
    assert difference(logits(peft_model), before) < 1e-5
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if f".{START}." in name]
    assert len([name for name in trained if ".lora_" in name]) == 28
    start = {n: p.clone() for n, p in peft_model.named_parameters() if f".{START}." in n}
    train(peft_model)
    assert difference(logits(peft_model), before) > 1e-3
    assert all(torch.equal(p, start[n]) for n, p in peft_model.named_parameters() if n in start)


def test_evaluating_the_base_does_not_start_training_the_frozen_adapter(base: Path) -> None:
    model, _ = load(str(base), base="fp32", compute_dtype="fp32")
    before = logits(model)
    peft_model = add_adapters(model, r=8, init_lora_weights="pissa")
    train(peft_model)
    flags = {name: p.requires_grad for name, p in peft_model.named_parameters()}
    with base_model(peft_model):
        assert torch.equal(logits(peft_model), before)
    assert {name: p.requires_grad for name, p in peft_model.named_parameters()} == flags
    with peft_model.disable_adapter():  # PEFT's own way is why it has to be restored
        pass
    assert {name: p.requires_grad for name, p in peft_model.named_parameters()} != flags


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp32"])
def test_a_trained_pissa_adapter_opens_on_the_stock_base(base: Path, tmp_path: Path, kind: str, rslora: bool) -> None:
    model, _ = load(str(base), base=kind, compute_dtype="fp32")
    peft_model = add_adapters(model, r=48, lora_alpha=16, use_rslora=rslora, init_lora_weights="pissa")
    train(peft_model)
    save_adapter(peft_model, tmp_path)
    expected = logits(peft_model)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    settings = {"quantization_config": quantization} if kind == "nf4" else {}
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map=DEVICE, **settings)
    keep_4bit_layout(stock)
    opened = PeftModel.from_pretrained(stock, str(tmp_path))
    saved = opened.peft_config["default"]
    assert isinstance(saved, LoraConfig) and saved.r == 96 and set((saved.rank_pattern or {}).values()) == {64}
    for name, layer in layers(opened).items():
        assert layer.scaling["default"] == pytest.approx(layers(peft_model)[name].scaling[ADAPTER])
    assert difference(logits(opened), expected) < 1e-6
    again, _ = load(str(base), base=kind, compute_dtype="fp32")
    assert difference(logits(open_adapter(again, tmp_path)), expected) < 1e-6


def test_halving_the_saved_scale_is_seen(base: Path, tmp_path: Path) -> None:
    model, _ = load(str(base), base="fp32", compute_dtype="fp32")
    peft_model = add_adapters(model, r=8, init_lora_weights="pissa")
    train(peft_model)
    save_adapter(peft_model, tmp_path)
    expected = logits(peft_model)
    config = LoraConfig.from_pretrained(str(tmp_path))
    config.lora_alpha /= 2  # pyright: ignore[reportAttributeAccessIssue]
    config.save_pretrained(str(tmp_path))
    again, _ = load(str(base), base="fp32", compute_dtype="fp32")
    assert difference(logits(open_adapter(again, tmp_path)), expected) > 1e-3


def test_a_pissa_checkpoint_is_taken_apart_again_to_the_bit(base: Path, tmp_path: Path) -> None:
    def fresh(resumed: bool) -> PeftModel:
        model, _ = load(str(base), base="fp32", compute_dtype="fp32")
        return add_adapters(model, r=48, init_lora_weights="pissa", resumed=resumed)

    peft_model = fresh(False)
    train(peft_model)
    save_adapter(peft_model, tmp_path)
    again = fresh(True)
    assert difference(logits(again), logits(peft_model)) > 1e-4
    load_adapter_weights(again, tmp_path, "x")
    state = peft_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in peft_model.named_parameters()
    }


@pytest.mark.parametrize("rslora", [True, False])
def test_every_pattern_keeps_its_scale(rslora: bool) -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, use_rslora=rslora, rank_pattern={"k": 4}, alpha_pattern={"v": 4}, init_lora_weights=True
    )
    joined = joined_config(config)

    def scale(config: LoraConfig, layer: str) -> float:
        r = (config.rank_pattern or {}).get(layer, config.r)
        return (config.alpha_pattern or {}).get(layer, config.lora_alpha) / (math.sqrt(r) if config.use_rslora else r)

    for layer in ("q", "k", "v"):
        assert scale(joined, layer) == pytest.approx(scale(config, layer))
    assert (joined.r, joined.rank_pattern) == (16, {"k": 8})


@pytest.mark.parametrize("given", ["pissa_niter_4", "qpissa", "olora", "gaussian", False])
def test_another_beginning_is_refused(base: Path, given: Any) -> None:
    model, _ = load(str(base), base="fp32", compute_dtype="fp32")
    with pytest.raises(UserError, match=r"adapter\.init_lora_weights: steep does not have"):
        add_adapters(model, r=4, init_lora_weights=given)


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_dora_begins_at_the_stock_weights(base: Path, start: str) -> None:
    model, _ = load(str(base), base="nf4")
    with pytest.raises(UserError, match=r"adapter\.use_dora"):
        add_adapters(model, r=4, init_lora_weights=start, use_dora=True)


def test_dora_over_8_bits_is_refused(base: Path) -> None:
    model, _ = load(str(base), base="int8")
    with pytest.raises(UserError, match=r"adapter\.use_dora: .* 8 bits"):
        add_adapters(model, r=4, use_dora=True)


def test_dropout_would_part_the_two_adapters(base: Path) -> None:
    model, _ = load(str(base), base="fp32")
    with pytest.raises(UserError, match=r"adapter\.lora_dropout"):
        add_adapters(model, r=4, init_lora_weights="pissa", lora_dropout=0.1)


def test_a_layer_without_directions_still_trains(base: Path) -> None:
    model, _ = load(str(base), base="fp32", compute_dtype="fp32")
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
    before = logits(model)
    peft_model = add_adapters(model, r=8, init_lora_weights="pissa")
    assert difference(logits(peft_model), before) < 1e-5
    layer: Any = peft_model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    train(peft_model)
    assert layer.lora_B[ADAPTER].weight.abs().max() > 0  # pyright: ignore[reportIndexIssue, reportCallIssue]
