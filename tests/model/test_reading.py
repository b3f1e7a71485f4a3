"""What was read of a layer is read again when anything of it changes, and not before."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from steep.model import reading
from steep.model.install import fused_of, install, uninstall
from steep.model.load import load
from steep.model.projections import Unfused
from steep.model.unwrap import unwrap
from tests.model.test_fused import EXACT, adapted, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import save_tiny, tiny_config, tiny_model


def layer_of(model: Any) -> Any:
    return unwrap(model).model.layers[1]


def replace_a(model: Any) -> None:
    up = layer_of(model).mlp.up_proj
    up.lora_A["default"].weight = nn.Parameter(torch.zeros_like(up.lora_A["default"].weight))


def move_base(model: Any) -> None:
    weight = layer_of(model).mlp.up_proj.base_layer.weight
    weight.data = weight.data.clone()


def view_base(model: Any, *other: Any) -> None:
    """At the same address."""
    weight = layer_of(model).mlp.up_proj.base_layer.weight
    weight.data = weight.data.view(*other)


class MyNorm(LlamaRMSNorm):
    pass


class MyLinear(nn.Linear):
    pass


class MyAdapted(LoraLinear):
    pass


OTHER_CONFIG = tiny_config("llama", num_key_value_heads=4)
CHANGES: dict[str, Callable[[Any], object]] = {
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "another scale": lambda model: layer_of(model).mlp.up_proj.set_scale("default", 5.0),
    "another adapter": lambda model: (
        model.add_adapter("other", model.peft_config["default"]), model.set_adapter("other")
    ),
    "another matrix": replace_a,
    "weights elsewhere": move_base,
    "weights of another shape": lambda model: view_base(model, 64, 128),
    "weights of another dtype": lambda model: view_base(model, torch.int32),
    "evaluation": lambda model: model.eval(),
    "a trained norm": lambda model: layer_of(model).input_layernorm.weight.requires_grad_(True),
    "merged": lambda model: model.merge_adapter(),
    "a hook on A": lambda model: layer_of(model).mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_: None),
    "a hook on attention": lambda model: layer_of(model).self_attn.register_forward_pre_hook(lambda *_: None),
    "the adapters unloaded": lambda model: model.unload(),
    "another activation": lambda model: setattr(layer_of(model).mlp, "act_fn", nn.SiLU()),
    "another forward": lambda model: setattr(layer_of(model).mlp, "forward", nn.Identity().forward),
    "a hook on the activation": lambda model: layer_of(model).mlp.act_fn.register_forward_hook(lambda *_: None),
    "attention that is not causal": lambda model: setattr(layer_of(model).self_attn, "is_causal", False),
    "another scale of attention": lambda model: setattr(layer_of(model).self_attn, "scaling", 0.5),
    "another eps": lambda model: setattr(layer_of(model).input_layernorm, "variance_epsilon", 1.0),
    "dropout in attention": lambda model: setattr(layer_of(model).self_attn, "attention_dropout", 0.5),
    "no scale of attention": lambda model: delattr(layer_of(model).self_attn, "scaling"),
    "another class of a norm": lambda model: setattr(layer_of(model).input_layernorm, "__class__", MyNorm),
    "another class of a projection": lambda model: setattr(layer_of(model).self_attn.o_proj, "__class__", MyAdapted),
    "another class of a base": lambda model: setattr(
        layer_of(model).self_attn.o_proj.base_layer, "__class__", MyLinear
    ),
    "another config": lambda model: setattr(layer_of(model).self_attn, "config", OTHER_CONFIG),
}  # fmt: skip
REFUSED = {
    "a trained norm", "merged", "a hook on A", "a hook on attention", "another forward", "a hook on the activation",
    "attention that is not causal", "dropout in attention", "no scale of attention",
    "another class of a norm", "another class of a projection", "another class of a base",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(adapted(tiny_model("llama", tied=False), modules_to_save=[]))
    fused: Any = unwrap(model).fused
    read: list[int] = []
    own = reading.read_layer
    monkeypatch.setattr(reading, "read_layer", lambda *given: (read.append(1), own(*given))[1])
    for _ in range(3):
        fused.layer(layer_of(model))
    assert len(read) == 1
    CHANGES[change](model)
    try:
        again = fused.layer(layer_of(model))
        assert again is fused.layer(layer_of(model))
        assert change not in REFUSED
    except Unfused:
        assert change in REFUSED
    assert len(read) == 2


@pytest.mark.parametrize("whole", [False, True])
def test_another_scale_of_a_4_bit_weight_is_seen(whole: bool, tmp_path: Path) -> None:
    model, _ = load(str(save_tiny("llama", tmp_path, hidden_size=128)), base="nf4", compute_dtype="fp32")
    model = install(adapted(model))
    fused, weight = fused_of(model), layer_of(model).mlp.up_proj.base_layer.weight
    first = fused.layer(layer_of(model))
    assert fused.layer(layer_of(model)) is first
    if whole:
        weight.quant_state = copy.copy(weight.quant_state)
    else:
        weight.quant_state.absmax = weight.quant_state.absmax.clone()
    assert fused.layer(layer_of(model)) is not first


def test_another_scale_of_a_weight_in_e4m3_is_seen(tmp_path: Path) -> None:
    model, _ = load(str(save_tiny("llama", tmp_path)), base="fp8", compute_dtype="fp32")
    model = install(adapted(model))
    fused, base = fused_of(model), layer_of(model).mlp.up_proj.base_layer
    first = fused.layer(layer_of(model))
    base.scale *= 2  # as `load_state_dict` does it: read by reference
    assert fused.layer(layer_of(model)) is first
    base.scale = base.scale.clone()
    assert fused.layer(layer_of(model)) is not first


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", lambda model: setattr(model.config, "sliding_window", None)),
        ("gemma2", lambda model: setattr(layer_of(model).self_attn, "attn_logit_softcapping", 0.1)),
        ("gemma3", lambda model: setattr(layer_of(model).self_attn, "scaling", 2.0)),
        ("gemma3", lambda model: setattr(layer_of(model).post_feedforward_layernorm, "eps", 1.0)),
        ("llama", lambda model: setattr(layer_of(model).post_attention_layernorm, "variance_epsilon", 1.0)),
    ],
    ids=["window", "soft cap", "scale", "eps of Gemma", "eps"],
)
def test_a_number_that_changed_counts(family: str, change: Callable[[Any], object]) -> None:
    model, batch = tiny_model(family, sliding_window=4) if family == "mistral" else tiny_model(family), packed()
    model = adapted(model)
    with torch.no_grad():
        before = install(model)(**batch, use_cache=False).loss
        change(unwrap(model))
        changed = model(**batch, use_cache=False).loss
        assert unwrap(model).fused.calls == 2  # pyright: ignore[reportAttributeAccessIssue]
        expected = uninstall(model)(**batch, use_cache=False).loss
    assert abs(changed - expected) <= EXACT * expected < 0.1 * abs(before - expected)


def test_a_class_whose_forward_is_replaced_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(adapted(tiny_model("llama")))
    fused: Any = unwrap(model).fused
    fused.layer(layer_of(model))
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(Unfused, match="the forward of every LlamaMLP was replaced by one of"):
        fused.layer(layer_of(model))
    monkeypatch.undo()
    fused.layer(layer_of(model))


MEMORY: dict[str, Callable[[Any], object]] = {
    "merged and unloaded": lambda model: model.merge_and_unload(),
    "unloaded": lambda model: model.unload(),
    "elsewhere": lambda model: model.to(torch.float64),
    "replaced": lambda model: setattr(layer_of(model).mlp, "up_proj", nn.Linear(64, 128, bias=False)),
    "merged": lambda model: (model.merge_adapter(), model(**packed(), use_cache=False)),
    "merged before a call that is refused": lambda model: (
        model.merge_adapter(), model(**packed(), use_cache=False, output_hidden_states=True)
    ),
    "other parameters": lambda model: (
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True),
        step(model),
    ),
    "tied": lambda model: (setattr(unwrap(model).lm_head, "weight", unwrap(model).model.embed_tokens.weight)),
}  # fmt: skip


def step(model: Any) -> None:
    model.train()
    model(**packed(), use_cache=False)
    model.zero_grad()


@pytest.mark.parametrize("change", MEMORY)
def test_nothing_holds_what_the_model_let_go(change: str) -> None:
    """A reading does not outlive what it is of, and setting modes and gradients keeps nothing."""
    model = install(adapted(tiny_model("llama", tied=False), modules_to_save=[]))
    base: Any = unwrap(model)
    model.eval()
    with torch.no_grad():
        step(model)
    up = layer_of(model).mlp.up_proj
    held = [weakref.ref(base.fused._readings[id(layer_of(model))].layer)] if change != "tied" else []
    if change == "other parameters":
        held += map(weakref.ref, base.model.parameters())
    if change == "tied":
        held.append(weakref.ref(base.lm_head.weight))
    if change in ("merged and unloaded", "unloaded", "replaced"):
        held += [weakref.ref(up), weakref.ref(up.lora_A["default"].weight)]
    if change in ("merged and unloaded", "unloaded"):
        held.append(weakref.ref(model))
    del up
    with torch.no_grad():
        MEMORY[change](model)
    del model
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def test_a_model_goes_without_the_garbage_collector() -> None:
    model = install(tiny_model("llama").requires_grad_(False))
    fused: Any = model.fused
    with torch.no_grad():
        model(**packed(), use_cache=False)
    model.eval()
    layer = weakref.ref(fused.layer(layer_of(model)))
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None and not fused._readings
    finally:
        gc.enable()


@pytest.mark.parametrize("refused", ["padding on the left", "hidden states"])
def test_calls_that_are_refused_cost_no_reading(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop may take turns between fused steps and such calls."""
    model, read = install(adapted(tiny_model("llama"))), []
    own = reading.read_layer
    monkeypatch.setattr(reading, "read_layer", lambda *given: (read.append(1), own(*given))[1])
    left: dict[str, Any] = {"input_ids": packed()["input_ids"], "attention_mask": torch.ones(2, 64).long()}
    left["attention_mask"][0, :3] = 0
    asked = left if refused == "padding on the left" else {**packed(), "output_hidden_states": True}
    with torch.no_grad():
        for number in range(4):
            if number == 2:  # transformers put its hooks in when it was first asked for hidden states
                read.clear()
            model(**packed(), use_cache=False)
            model(**asked, use_cache=False)
    assert unwrap(model).fused.calls == 4 and not read  # pyright: ignore[reportAttributeAccessIssue]


def test_dropout_that_begins_later_is_seen() -> None:
    model = install(adapted(tiny_model("llama"), lora_dropout=0.2).eval())
    fused: Any = unwrap(model).fused
    fused.layer(layer_of(model))
    layer_of(model).mlp.up_proj.lora_dropout.train()
    layer_of(model).training = True
    with pytest.raises(Unfused, match="dropout"):
        fused.layer(layer_of(model))


def test_adapters_that_come_later_are_seen() -> None:
    model, batch = install(tiny_model("llama").requires_grad_(False)), packed()
    with torch.no_grad():
        base = model(**batch, use_cache=False).loss
        model = adapted(model)
        assert not torch.equal(model(**batch, use_cache=False).loss, base)
        assert torch.equal(model.unload()(**batch, use_cache=False).loss, base)


def test_copies_read_their_own() -> None:
    import copy

    model, batch = install(adapted(tiny_model("llama"))), packed()
    with torch.no_grad():
        before = model(**batch, use_cache=False).loss
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        assert torch.equal(model(**batch, use_cache=False).loss, before)
        assert not torch.equal(copied(**batch, use_cache=False).loss, before)


def test_a_layer_that_was_read_computes_in_each_dtype() -> None:
    """Evaluated under autocast, then trained without: projections are put together for each."""
    model, batch = adapted(tiny_model("llama")), packed()
    expected, truth = loss_and_gradients(model, batch)
    install(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert abs(model(**batch, use_cache=False).loss - expected) < 0.01 * expected
    loss, gradients = loss_and_gradients(model, batch)
    assert abs(loss - expected) < EXACT * expected
    assert max(error(gradients[name], truth[name]) for name in truth) < EXACT
