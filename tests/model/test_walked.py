"""An installed model sets the mode and the gradients of all its modules, those that came later too, without the
library's own walk."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from steep.model import walked
from steep.model.install import install, uninstall
from steep.model.unwrap import unwrap
from tests.model.test_fused import adapted, loss_and_gradients, packed
from tests.tiny import tiny_model


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True).grad = torch.ones_like(parameter)


def have_gradients(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def modes(model: nn.Module) -> set[bool]:
    return {module.training for module in model.modules()}


@pytest.mark.parametrize("peft_is_around", [True, False])
def test_steps_take_no_walk_of_the_librarys(peft_is_around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama", tied=False).requires_grad_(False)
    if peft_is_around:
        model = adapted(model)
    else:
        model.lm_head.requires_grad_(True)
    install(model).eval().train()
    loss_and_gradients(model, packed())
    assert have_gradients(model)
    with monkeypatch.context() as patch:
        for name in ("named_children", "named_modules", "named_parameters"):
            patch.setattr(nn.Module, name, lambda *_, **__: pytest.fail("walked"))
        model.train()
        model.zero_grad()
    assert not have_gradients(model) and modes(model) == {True}


@pytest.mark.parametrize("part", [lambda model: model, lambda model: unwrap(model).model.layers[1].mlp])
def test_a_mode_that_changed_in_part_is_set_in_all(part: Callable[[Any], nn.Module]) -> None:
    model = install(adapted(tiny_model("llama")))
    for mode in (True, False, True, False):
        part(model).train(not mode)
        assert model.train(mode) is model
        assert modes(model) == {mode}
    assert modes(model.train().eval()) == {False}


CHANGES: dict[str, Callable[[Any], object]] = {
    "another adapter": lambda model: model.add_adapter("other", model.peft_config["default"]),
    "a module put in": lambda model: setattr(unwrap(model).model.layers[1].mlp, "more", nn.Linear(2, 2)),
    "a module replaced": lambda model: setattr(unwrap(model).model, "norm", copy.deepcopy(unwrap(model).model.norm)),
    "a parameter replaced": lambda model: setattr(unwrap(model).lm_head, "bias", nn.Parameter(torch.zeros(2))),
    "a parameter put in": lambda model: unwrap(model).model.register_parameter("more", nn.Parameter(torch.zeros(2))),
    "adapters unloaded": lambda model: model.unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_came_later_is_found(change: str) -> None:
    model = install(adapted(tiny_model("llama", tied=False), modules_to_save=[]))
    model.eval()
    model.zero_grad()
    CHANGES[change](model)
    give_gradients(model)
    for module in model.modules():
        module.training = False
    model.train()
    model.zero_grad()
    assert modes(model) == {True} and not have_gradients(model)


class OwnTrain(nn.Linear):
    def train(self, mode: bool = True) -> Any:
        self.asked = mode
        return super().train(mode)


def own_of_class(part: Any, patch: pytest.MonkeyPatch) -> None:
    part.__class__ = OwnTrain


def own_of_instance(part: Any, patch: pytest.MonkeyPatch) -> None:
    part.train = lambda mode=True: setattr(part, "asked", mode)


def own_of_every(part: Any, patch: pytest.MonkeyPatch) -> None:
    def train(self: Any, mode: bool = True) -> Any:
        self.asked = mode
        return nn.Module.train(self, mode)

    patch.setattr(nn.Linear, "train", train)


@pytest.mark.parametrize("own", [own_of_class, own_of_instance, own_of_every])
@pytest.mark.parametrize("mode", [True, False])
def test_a_modules_own_train_is_called_though_its_mode_is_set(
    own: Callable[..., None], mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = install(adapted(tiny_model("llama"))).train(mode)
    part: Any = unwrap(model).model.layers[1].mlp.up_proj.base_layer
    own(part, monkeypatch)
    model.train(mode)
    assert part.asked is mode and modes(model) == {mode}


def test_a_mode_is_a_bool() -> None:
    model: Any = install(adapted(tiny_model("llama")))
    for mode in (1, None):
        with pytest.raises(ValueError, match="boolean"):
            model.train(mode)


def test_the_last_adapter_may_be_deleted() -> None:
    """PEFT's wrapper knows no active adapter then, and falls over it in get_base_model()."""
    model = install(adapted(tiny_model("llama")))
    model.delete_adapter("default")
    give_gradients(model)
    assert modes(model.eval()) == {False} and modes(model.train()) == {True}
    model.zero_grad()
    assert not have_gradients(model)
    assert type(uninstall(model)) is peft.PeftModelForCausalLM


class Watched(nn.Parameter):
    """As bitsandbytes' parameters, which pass every look at them through Python."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_parameters_are_not_asked_about_their_gradients() -> None:
    model: Any = install(tiny_model("llama", tied=False).requires_grad_(False))
    model.lm_head.weight = weight = Watched(model.lm_head.weight.data)
    weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    Watched.seen = 0
    model.zero_grad()
    assert Watched.seen == 0 and weight.grad is None


def test_a_module_in_itself_is_walked_through_once() -> None:
    model: Any = install(tiny_model("llama").requires_grad_(False))
    model.model.add_module("around", model)
    give_gradients(model)
    model.zero_grad()
    assert not have_gradients(model)
    model.train(model.training)


def test_gradients_can_be_set_to_zero() -> None:
    model = install(adapted(tiny_model("llama")))
    give_gradients(model)
    number = len(have_gradients(model))
    model.zero_grad(set_to_none=False)
    assert len(have_gradients(model)) == number > 0
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_modules_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = install(adapted(tiny_model("llama")))
    model.zero_grad()
    other = copied(model)
    for each in (model, other):
        give_gradients(each)
    other.zero_grad()
    other.eval()
    assert not have_gradients(other) and have_gradients(model)
    assert modes(other) == {False} and modes(model) == {True}


def test_the_wrapper_is_pefts_own_again() -> None:
    model = adapted(tiny_model("llama"))
    assert type(model) is peft.PeftModelForCausalLM
    install(model)
    assert type(model) is not peft.PeftModelForCausalLM and isinstance(model, peft.PeftModelForCausalLM)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert type(uninstall(model)) is peft.PeftModelForCausalLM


def test_a_wrapper_put_around_later_stays() -> None:
    inside = install(tiny_model("llama").requires_grad_(False))
    model: Any = peft.get_peft_model(inside, peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    loss_and_gradients(model, packed())
    model.train()
    model.zero_grad()
    assert modes(model) == {True} and not have_gradients(model)
    assert type(uninstall(model)) is peft.PeftModelForCausalLM


@pytest.mark.parametrize("merged", [True, False])
def test_a_wrapper_outlives_the_installed_model_in_it(merged: bool) -> None:
    model = install(adapted(tiny_model("llama")))
    uninstall(model.merge_and_unload() if merged else model.get_base_model())
    give_gradients(model)
    for mode in (True, False):
        model.train(mode)
        assert modes(model) == {mode}
    model.zero_grad()
    assert not have_gradients(model)
    assert type(uninstall(model)) is peft.PeftModelForCausalLM


def test_what_was_looked_at_ahead_is_done_without_a_walk_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = install(adapted(tiny_model("llama")))
    loss_and_gradients(model, packed())
    layer = unwrap(model).model.layers[1]
    layer.eval()
    model.look_ahead()
    assert modes(model) == {True} and have_gradients(model)
    with monkeypatch.context() as patch:
        for name in ("_levels", "_with_mode"):
            patch.setattr(walked, name, lambda *_: pytest.fail("walked"))
        model.zero_grad()
        assert model.train() is model
    assert not have_gradients(model)
    give_gradients(model)
    layer.eval()
    model.zero_grad()
    assert not have_gradients(model) and modes(model.train()) == {True}


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "all": lambda model: model,
    "LoRA's model": lambda model: model.base_model,
    "the causal LM": unwrap,
    "the decoder": lambda model: unwrap(model).model,
    "a layer": lambda model: unwrap(model).model.layers[1],
    "attention": lambda model: unwrap(model).model.layers[1].self_attn,
    "a base layer": lambda model: unwrap(model).model.layers[1].mlp.up_proj.base_layer,
    "dropout": lambda model: unwrap(model).model.layers[1].mlp.up_proj.lora_dropout["default"],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_mode_that_is_set_after_looking_ahead_is_set_back(part: str) -> None:
    model: Any = install(adapted(tiny_model("llama")))
    for layer in unwrap(model).model.layers:
        layer.mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.1)
    model.look_ahead()
    PARTS[part](model).eval()
    assert modes(model.train()) == {True}


def test_another_mode_is_not_passed_over_after_looking_ahead() -> None:
    model: Any = install(adapted(tiny_model("llama")))
    model.look_ahead()
    assert modes(model.eval()) == {False} and modes(model.train()) == {True}


def test_a_gradient_that_comes_after_looking_ahead_is_cleared() -> None:
    model: Any = install(adapted(tiny_model("llama")))
    model.look_ahead()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    assert have_gradients(model)
    model.zero_grad()
    assert not have_gradients(model)


def test_what_was_looked_at_ahead_can_be_forgotten() -> None:
    model: Any = install(adapted(tiny_model("llama")))
    before = set(model.__dict__)
    model.look_ahead()
    assert set(model.__dict__) - before == {"_with_gradient", "_with_mode"}
    model.forget_ahead()
    give_gradients(model)
    model.zero_grad()
    assert set(model.__dict__) == before and not have_gradients(model)
