"""Every field of PEFT's LoraConfig is computed fused, or falls back by name, or has no part in the forward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from steep.errors import UserError
from steep.model.install import fused_of, install, uninstall, why_not_fused
from steep.model.load import load
from steep.model.unwrap import unwrap
from tests.model.test_fused import EXACT, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import save_tiny, tiny_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Fields whose every value is computed fused, each with one that differs from the default.
FUSED: dict[str, dict[str, Any]] = {
    "r": {"r": 5},
    "target_modules": {"target_modules": ["q_proj", "down_proj"]},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "lora_alpha": {"lora_alpha": 3},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"up_proj": 7}},
    "ensure_weight_tying": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
}
# Fields that change what is computed: the reason that is given, and whether only the head goes through the library.
BY_NAME: dict[str, tuple[dict[str, Any], str]] = {
    "lora_dropout": ({"lora_dropout": 0.1}, "dropout"),
    "bias": ({"bias": "all"}, "layer 0 trains self_attn.q_proj.base_layer.bias"),
    "use_dora": ({"use_dora": True}, "Dora"),
    "lora_bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    "target_parameters": ({"target_modules": [], "target_parameters": ["gate_proj.weight"]}, "ParamWrapper"),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [5]}, "ALora"),
    "velora_config": ({"velora_config": "VeloraConfig"}, "elora"),
    "monteclora_config": ({"monteclora_config": "MontecloraConfig"}, "onteclora"),
    "kasa_config": ({"kasa_config": "KasaConfig"}, "asa"),
    "use_bdlora": ({"use_bdlora": "BdLoraConfig"}, "Bd"),
}
# What the forward never sees: the file format, where a beginning comes from, other base layers than these.
NO_PART = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "arrow_config",  # adapters chosen by the input: a variant that PEFT makes of several (tested below)
    "fan_in_fan_out",  # PEFT sets it back for nn.Linear
    "megatron_config", "megatron_core", "use_qalora", "qalora_group_size",  # base layers of other libraries: by type
    "trainable_token_indices",  # below: the embedding's module is called as it is
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "BdLoraConfig": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}
}


def worst(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest error; a gradient that is zero (LoRA's A, before B is not) has to be so exactly."""
    assert ours.keys() == truth.keys()
    for name in truth:
        assert bool(truth[name].any()) or not bool(ours[name].any()), name
    return max(error(ours[name], truth[name]) for name in truth if truth[name].any())


def with_adapter(settings: dict[str, Any]) -> Any:
    settings = {
        name: getattr(peft.tuners.lora.config, value)(**CONFIGS.get(value, {}))
        if isinstance(value, str) and value.endswith("Config")
        else value
        for name, value in settings.items()
    }
    biased, tied = bool({"bias", "lora_bias"} & set(settings)), "ensure_weight_tying" in settings
    model = tiny_model("qwen2" if biased else "llama", tied=tied).requires_grad_(False)
    given = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model.train()


def test_every_field_has_its_place() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = set(FUSED) | set(BY_NAME) | NO_PART
    assert fields - known == set(), "decide for each whether it is computed fused, and write it into the table"
    assert not set(FUSED) & set(BY_NAME) and not (set(FUSED) | set(BY_NAME)) & NO_PART


@pytest.mark.parametrize("field", FUSED)
def test_what_is_fused_is_what_the_library_computes(field: str) -> None:
    model, batch = with_adapter(FUSED[field]), packed()
    loss, gradients = loss_and_gradients(model, batch)
    fused_loss, fused = loss_and_gradients(install(model), batch)
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert abs(fused_loss - loss) < EXACT
    assert worst(fused, gradients) < EXACT


@pytest.mark.parametrize("field", BY_NAME)
def test_what_is_not_fused_is_named(field: str) -> None:
    if field not in {each.name for each in dataclasses.fields(peft.LoraConfig)}:
        pytest.fail(f"this version of PEFT has no {field}: take it out of the table")
    settings, reason = BY_NAME[field]
    assert reason in (why_not_fused(with_adapter(settings)) or "nothing")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": [*LINEAR, "lm_head"]}, "lm_head has LoRA"),
        ({"target_modules": [*LINEAR, "embed_tokens"]}, None),
        ({"trainable_token_indices": [3, 4]}, None),
    ],
)
def test_adapters_on_the_embeddings(
    settings: dict[str, Any], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The input embedding is called as it is. A head that is more than a weight goes through the library, the layers
    stay fused."""
    model, batch = with_adapter(settings), packed()
    loss, gradients = loss_and_gradients(model, batch)
    fused_loss, fused = loss_and_gradients(install(model), batch)
    assert abs(fused_loss - loss) < EXACT
    assert worst(fused, gradients) < EXACT
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert (reason or "") in caplog.text
    assert bool(reason) == ("goes through the whole logits" in caplog.text)


@pytest.mark.parametrize("base", ["fp32", "int8", "nf4"])
def test_whatever_else_trains_in_a_layer_is_named(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Computed fused, it would get no gradient, and nothing would show."""
    model, _ = load(str(save_tiny("qwen2", tmp_path, hidden_size=128)), base=base, compute_dtype="fp32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    layer = unwrap(model).model.layers[1]
    names = [name for name, each in layer.named_parameters() if each.is_floating_point() and "lora" not in name]
    assert {"self_attn.q_proj.base_layer.bias", "self_attn.k_proj.bias", "input_layernorm.weight"} <= set(names)
    for name in names:
        install(model)
        parameter = layer.get_parameter(name).requires_grad_()
        loss_and_gradients(model, packed())  # whatever trains has one
        assert fused_of(model).calls == 0 and f"layer 1 trains {name}" in caplog.text
        uninstall(model)
        with pytest.raises(UserError, match=f"layer 1 trains {name}"):
            install(model)
        parameter.requires_grad_(False)


def test_variants_that_peft_makes_later_are_named() -> None:
    from peft.tuners.lora.variants import ArrowLinearVariant

    model = with_adapter({})
    unwrap(model).model.layers[1].mlp.up_proj.lora_variant["default"] = ArrowLinearVariant()
    assert "Arrow" in (why_not_fused(model) or "nothing")


def test_a_merged_adapter_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = install(with_adapter({})), packed()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        model.merge_adapter()
        assert abs(model(**batch, use_cache=False).loss - expected) < EXACT
    assert "merged" in caplog.text


def test_an_adapter_for_each_row_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter({})
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=LINEAR, init_lora_weights=False))
    model.eval()
    batch = {**packed(), "adapter_names": ["default", "other"]}
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        install(model)
        assert abs(model(**batch, use_cache=False).loss - expected) < EXACT
    assert "has hooks" in caplog.text


def test_two_active_adapters_are_stacked() -> None:
    model = with_adapter({})
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR[2:], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    batch = packed()
    loss, gradients = loss_and_gradients(model, batch)
    fused_loss, fused = loss_and_gradients(install(model), batch)
    assert abs(fused_loss - loss) < EXACT
    assert any(".other." in name for name in fused)
    assert worst(fused, gradients) < EXACT
