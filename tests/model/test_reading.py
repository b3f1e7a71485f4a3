"""What was read of a layer is read again when anything of it changes, and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from steep.model import reading
from steep.model.install import install
from steep.model.projections import Unfused
from steep.model.unwrap import unwrap
from tests.model.test_fused import adapted, packed
from tests.tiny import tiny_model


def layer_of(model: Any) -> Any:
    return unwrap(model).model.layers[1]


def replace_a(model: Any) -> None:
    up = layer_of(model).mlp.up_proj
    up.lora_A["default"].weight = nn.Parameter(torch.zeros_like(up.lora_A["default"].weight))


def move_base(model: Any) -> None:
    weight = layer_of(model).mlp.up_proj.base_layer.weight
    weight.data = weight.data.clone()


CHANGES: dict[str, Callable[[Any], object]] = {
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "another scale": lambda model: layer_of(model).mlp.up_proj.set_scale("default", 5.0),
    "another adapter": lambda model: (
        model.add_adapter("other", model.peft_config["default"]), model.set_adapter("other")
    ),
    "another matrix": replace_a,
    "weights elsewhere": move_base,
    "evaluation": lambda model: model.eval(),
    "a trained norm": lambda model: layer_of(model).input_layernorm.weight.requires_grad_(True),
    "merged": lambda model: model.merge_adapter(),
    "a hook on A": lambda model: layer_of(model).mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_: None),
    "a hook on attention": lambda model: layer_of(model).self_attn.register_forward_pre_hook(lambda *_: None),
    "the adapters unloaded": lambda model: model.unload(),
    "another activation": lambda model: setattr(layer_of(model).mlp, "act_fn", nn.SiLU()),
    "another forward": lambda model: setattr(layer_of(model).mlp, "forward", nn.Identity().forward),
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
    except Unfused:
        assert change in ("a trained norm", "merged", "a hook on A", "a hook on attention", "another forward")
    assert len(read) == 2


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
