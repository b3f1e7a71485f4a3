from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from steep.config import parse_config
from steep.errors import UserError
from steep.model.adapter_config import read_adapter_config
from steep.model.adapters import (
    add_adapters,
    load_adapter_weights,
    lowered_ranks,
    open_adapter,
    rank_pattern,
    save_adapter,
)
from steep.model.embeddings import is_tied
from steep.plan import plan_run
from tests.tiny import FAMILIES, VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer, write_corpus


def ids() -> torch.Tensor:
    return torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))


def train(model: torch.nn.Module, steps: int = 3) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(ids(), labels=ids()).loss)


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("use_dora", [True, False])
def test_adapters_begin_as_pefts_and_alike_for_a_seed(use_dora: bool) -> None:
    def begun() -> dict[str, Any]:
        model = tiny_model("llama")
        torch.manual_seed(3)
        return lora_layers(add_adapters(model, r=16, use_dora=use_dora))

    values, others = begun(), begun()
    for name, layer in values.items():
        a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        bound = a.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        assert b.count_nonzero() == 0 and 0.9 * bound < a.abs().max() <= bound
        assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert torch.equal(a, others[name].lora_A["default"].weight)
        if use_dora:
            length = layer.base_layer.weight.norm(dim=1)
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.flatten(), length)


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_matrix_is_drawn_once_and_not_where_a_checkpoint_brings_it(
    start: bool | str, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sizes, uniform = tiny_model("llama"), [], torch.Tensor.uniform_
    monkeypatch.setattr(
        torch.Tensor,
        "uniform_",
        lambda self, *given, **how: (sizes.append(self.numel()), uniform(self, *given, **how))[1],
    )
    layers = lora_layers(add_adapters(base, r=8, init_lora_weights=start, resumed=resumed)).values()
    assert sizes == ([] if resumed else [layer.lora_A["default"].weight.numel() for layer in layers])
    for layer in layers:
        assert len(layer.lora_A) == (1 if start is True else 2)
        for part in [*layer.lora_A.values(), *(layer.lora_B.values() if resumed else ())]:
            assert bool(part.weight.any()) is not resumed


def test_opening_an_adapter_draws_nothing(tmp_path: Path) -> None:
    save_adapter(add_adapters(tiny_model("llama"), r=8), tmp_path)
    base = tiny_model("llama")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    open_adapter(base, tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("rslora", [True, False])
def test_ranks_are_lowered_with_their_own_scale(rslora: bool) -> None:
    model = add_adapters(tiny_model("llama"), r=48, lora_alpha=16, use_rslora=rslora)
    layers = lora_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        expected = 32 if name.endswith(("k_proj", "v_proj")) else 48
        assert layer.r["default"] == expected
        assert layer.lora_A["default"].weight.shape[0] == expected
        scale = 16 / (math.sqrt(expected) if rslora else expected)
        assert layer.scaling["default"] == pytest.approx(scale)


def test_rank_pattern_names_layers_where_shapes_differ() -> None:
    shapes = {
        "layers.0.k_proj": (32, 64),
        "layers.1.k_proj": (16, 64),
        "layers.0.q_proj": (64, 64),
        "layers.0.v": (8, 64),
    }
    assert lowered_ranks(shapes, 32) == {"layers.1.k_proj": 16, "layers.0.v": 8}
    assert rank_pattern(shapes, 32) == {"v": 8, r"layers\.1\.k_proj": 16}
    assert rank_pattern(shapes, 8) == {}


def test_adapters_are_put_on_once() -> None:
    model = add_adapters(tiny_model("llama"), r=8)
    for given in (model, model.get_base_model()):
        with pytest.raises(UserError, match=r"^model: it has adapters already"):
            add_adapters(given, r=8)


def test_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="steep"):
        add_adapters(tiny_model("llama"), r=48)
    assert [record.message for record in caplog.records] == [
        "r is lowered on 4 of 14 layers (model.layers.0.self_attn.k_proj: 32)"
    ]


@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_trains(tied: bool, trained_dtype: str) -> None:
    model = add_adapters(tiny_model("llama", tied), r=8, trained_dtype=trained_dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[trained_dtype]
    assert {p.dtype for p in trained.values()} == {wanted}
    whole = [name for name in trained if "lora_" not in name]
    assert len(trained) - len(whole) == 28
    assert len(whole) == (1 if tied else 2)
    assert is_tied(tiny_model("llama", tied)) is tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_opens_on_the_stock_base(family: str, tied: bool, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "base", tied=tied)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = add_adapters(base, r=8)
    inner: Any = model.get_base_model()
    first = float(model(ids(), labels=ids()).loss.detach())
    loss = train(model)
    assert loss < first - 0.05
    head, table = inner.get_output_embeddings(), inner.get_input_embeddings()
    assert (head.weight is table.weight) is tied
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    opened = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert float(opened(ids(), labels=ids()).loss) == pytest.approx(loss, abs=1e-6)

    again = add_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), r=8)
    load_adapter_weights(again, tmp_path / "adapter", "x")
    with torch.no_grad():
        assert float(again(ids(), labels=ids()).loss) == loss


def test_loading_keeps_dtypes_and_bits(tmp_path: Path) -> None:
    model = add_adapters(tiny_model("llama"), r=8, trained_dtype="bf16").to(torch.bfloat16)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    other = add_adapters(tiny_model("llama", seed=3), r=8, trained_dtype="bf16")
    load_adapter_weights(other, tmp_path, "x")
    expected = dict(model.named_parameters())
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())


def test_loading_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    add_adapters(tiny_model("llama"), r=8, modules_to_save=[]).save_pretrained(
        str(tmp_path), save_embedding_layers=False
    )
    with pytest.raises(UserError, match="embed_tokens"):
        load_adapter_weights(add_adapters(tiny_model("llama"), r=8), tmp_path, "x")
    with pytest.raises(UserError, match="does not fit"):
        load_adapter_weights(add_adapters(tiny_model("llama"), r=4, modules_to_save=[]), tmp_path, "x")
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter_weights(add_adapters(tiny_model("llama"), r=4), tmp_path / "none", "x")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.lora_B", "model.embed_tokens", "lm_head"])
def test_a_tensor_too_few_or_too_many_is_named(name: str, tied: bool, tmp_path: Path) -> None:
    def adapted(seed: int = 0) -> PeftModel:
        return add_adapters(tiny_model("llama", tied, seed), r=8)

    adapted().save_pretrained(str(tmp_path), save_embedding_layers=False)
    file, key = tmp_path / "adapter_model.safetensors", f"base_model.model.{name}.weight"
    whole = load_file(file)
    extra = key.replace("layers.1", "layers.2") if "layers" in key else key.replace(".weight", ".bias")
    for stored, problem in (
        ({other: tensor for other, tensor in whole.items() if other != key}, f"lacks {key}"),
        ({**whole, extra: whole[key].clone()}, f"has an unknown tensor {extra}"),
    ):
        save_file(stored, file)
        model = adapted(seed=1)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(UserError, match=f"^x: {re.escape(f'{file} {problem}')}. Use the model and adapter"):
            load_adapter_weights(model, tmp_path, "x")
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    save_file(whole, file)
    load_adapter_weights(model, tmp_path, "x")
    after = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(after[other], tensor) for other, tensor in whole.items())


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_are_not_loaded_into_a_base(tied: bool, tmp_path: Path) -> None:
    add_adapters(tiny_model("llama", tied), r=8).save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = add_adapters(tiny_model("llama", tied, seed=1), r=8, modules_to_save=[])
    with pytest.raises(UserError, match=r"has an unknown tensor base_model\.model\.(lm_head|model\.embed_tokens)\."):
        load_adapter_weights(model, tmp_path, "x")
    base: Any = tiny_model("llama", tied, seed=1)
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_an_unknown_target_lists_the_models_own() -> None:
    with pytest.raises(UserError) as raised:
        add_adapters(tiny_model("llama"), target_modules=["q_prj"])
    assert "the model has no linear layer 'q_prj'. Did you mean 'q_proj'?" in str(raised.value)
    assert "It has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj." in str(raised.value)


def mamba() -> Any:
    config = AutoConfig.for_model("mamba", vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config)


REFUSED_BY_PEFT = r"PEFT refuses them on MambaForCausalLM: .*'out_proj' is incompatible"


def test_layers_that_peft_refuses() -> None:
    with pytest.raises(UserError, match=REFUSED_BY_PEFT) as raised:
        add_adapters(mamba(), r=8, target_modules="all-linear", modules_to_save=[])
    assert raised.value.field == "adapter.target_modules"


def test_layers_that_peft_refuses_are_told_in_the_plan(tmp_path: Path) -> None:
    mamba().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = parse_config(
        {
            "model": {"name": str(tmp_path / "base"), "base": "fp32"},
            "adapter": {"r": 8, "target_modules": "all-linear", "modules_to_save": []},
            "data": {"sources": [{"path": str(write_corpus(tmp_path / "text", 20))}], "max_length": 64},
            "training": {"output_dir": str(tmp_path / "run")},
        }
    )
    with pytest.raises(UserError, match=REFUSED_BY_PEFT):
        plan_run(config)


def test_all_linear_leaves_the_head_alone() -> None:
    model = add_adapters(tiny_model("llama"), r=4, target_modules="all-linear", modules_to_save=[])
    assert len(lora_layers(model)) == 14
    assert not any("lm_head" in name for name in lora_layers(model))


@pytest.mark.parametrize("r", [0, -1])
def test_no_rank_is_refused(r: int) -> None:
    with pytest.raises(UserError, match=rf"adapter\.r: {r} is not a rank"):
        add_adapters(tiny_model("llama"), r=r)


def test_an_unknown_module_to_save_is_refused() -> None:
    with pytest.raises(UserError, match="'wte' is not an embedding"):
        add_adapters(tiny_model("llama"), modules_to_save=["wte"])


def test_null_is_what_is_not_set(tmp_path: Path) -> None:
    """Other writers leave it there; PEFT's own code trips over it."""
    model = add_adapters(tiny_model("llama"), r=8, lora_alpha=8, use_rslora=False)
    train(model)
    save_adapter(model, tmp_path)
    expected = model.eval()(ids()).logits
    file = tmp_path / "adapter_config.json"
    unset = dict.fromkeys(("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"))
    file.write_text(json.dumps(json.loads(file.read_text()) | unset))
    config = read_adapter_config(tmp_path, "run folder")
    assert [config.rank_pattern, config.alpha_pattern, config.use_rslora, config.lora_dropout] == [{}, {}, False, 0.0]
    assert torch.equal(open_adapter(tiny_model("llama"), tmp_path).eval()(ids()).logits, expected)
