"""What the fused forward leaves to the library: the answer is the library's own, and one line names the reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import AdaptionPromptConfig, CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import steep
from steep.errors import UserError
from steep.model import decoder as decoder_of_steep
from steep.model import install as installing
from steep.model import loss as loss_of_steep
from steep.model import reading
from steep.model.families import fused_class
from steep.model.install import fused_of, install, is_installed, uninstall, why_not_fused
from steep.model.refusals import library_class_of
from steep.model.unwrap import unwrap
from tests.model.test_fused import EXACT, adapted, assert_same, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import VOCAB_SIZE, tiny_model

Batch = dict[str, Any]


def rows(*lengths: int, width: int = 64) -> Batch:
    """Rows of these lengths, padded on the right."""
    tokens = torch.randint(3, VOCAB_SIZE, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def assert_left_to_the_library(model: Any, batch: Batch, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """`model` is installed. What it gives is what it gives once uninstalled, and nothing was computed fused."""
    loss, gradients = loss_and_gradients(model, batch)
    assert unwrap(model).fused.calls == 0  # pyright: ignore[reportAttributeAccessIssue]
    said = [record.message for record in caplog.records if "not fused" in record.message]
    assert len(said) == 1 and reason in said[0], said
    uninstall(model)
    expected, truth = loss_and_gradients(model, batch)
    assert abs(loss - expected) <= EXACT * expected
    assert max(error(gradients[name], truth[name]) for name in truth) <= EXACT


# ---- a model that changed after it was installed


def another_attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // value.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    return (query + key + value).transpose(1, 2).contiguous(), None


def set_attention(model: Any) -> None:
    AttentionInterface.register("mine", another_attention)
    model.config._attn_implementation = "mine"


def fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def not_causal(model: Any) -> None:
    model.config.is_causal = False


def bidirectional(model: Any) -> None:
    model.config.use_bidirectional_attention = True


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", set_attention, "its attention is mine"),
        ("llama", fewer_layers, "num_hidden_layers is 1"),
        ("llama", not_causal, "is_causal"),
        ("gemma3", bidirectional, "use_bidirectional_attention"),
    ],
)
def test_a_config_that_says_otherwise(
    family: str, change: Callable[[Any], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(family)
    if change is fewer_layers:  # the last gets no gradient then
        model.model.layers[1].requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
    model = adapted(model)
    if change is fewer_layers:
        for parameter in unwrap(model).model.layers[1].parameters():
            parameter.requires_grad_(False)
    install(model)
    change(unwrap(model))
    assert_left_to_the_library(model, packed(), reason, caplog)
    with pytest.raises(UserError, match=reason):
        install(model)


class TwiceTheNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


class TwiceTheMlp(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("part", "cls"), [("input_layernorm", TwiceTheNorm), ("mlp", TwiceTheMlp)])
def test_a_part_of_another_class_is_refused_by_name(part: str, cls: type) -> None:
    model = adapted(tiny_model("llama"))
    getattr(unwrap(model).model.layers[1], part).__class__ = cls
    with pytest.raises(UserError, match=cls.__name__):
        install(model)


def test_a_last_norm_of_another_class_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    unwrap(model).model.norm.__class__ = TwiceTheNorm
    assert_left_to_the_library(model, packed(), "TwiceTheNorm", caplog)
    with pytest.raises(UserError, match="TwiceTheNorm"):
        install(model)


@pytest.mark.parametrize("cls", [LlamaMLP, LlamaAttention, LlamaRMSNorm, LlamaDecoderLayer, LlamaModel, LoraLinear])
def test_a_class_whose_forward_was_replaced(
    cls: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As liger's and unsloth's functions do it, for every model of the process."""
    model, own, calls = install(adapted(tiny_model("llama"))), cls.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    assert_left_to_the_library(model, packed(), f"every {cls.__name__} was replaced by one of {__name__}", caplog)
    assert calls
    with pytest.raises(UserError, match="was replaced"):
        install(model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "create_causal_mask"),
        ("llama", "apply_rotary_pos_emb"),
        ("mistral", "create_sliding_window_causal_mask"),
    ],
)
def test_a_function_that_was_replaced(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"sliding_window": 16} if family == "mistral" else {}
    model, calls = install(adapted(tiny_model(family, **settings))), []
    module = sys.modules[library_class_of(unwrap(model)).__module__]
    own = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **named: calls.append(name) or own(*given, **named))
    assert_left_to_the_library(
        model, packed(), f"{name} of {module.__name__} was replaced by one of {__name__}", caplog
    )
    assert calls
    with pytest.raises(UserError, match="was replaced"):
        install(model)


class TwiceTheTurns(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return super().forward(x, 2 * position_ids)


def of_another_class(rotary_emb: Any) -> None:
    rotary_emb.__class__ = TwiceTheTurns


def with_its_own_forward(rotary_emb: Any) -> None:
    other = copy.deepcopy(rotary_emb)
    other.__class__ = TwiceTheTurns
    rotary_emb.forward = other.forward


@pytest.mark.parametrize("change", [of_another_class, with_its_own_forward])
def test_rotations_that_were_replaced(change: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    change(unwrap(model).model.rotary_emb)
    reason = "TwiceTheTurns" if change is of_another_class else "rotary_emb was replaced"
    assert_left_to_the_library(model, packed(), reason, caplog)


def test_rotations_are_called_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library does it, for what looks at the arguments by name."""
    seen: list[set[str]] = []
    for family in ("llama", "gemma3"):
        model = install(adapted(tiny_model(family)))
        rotary_emb, own = unwrap(model).model.rotary_emb, nn.Module.__call__

        def call(module: Any, *args: Any, rotary_emb: Any = rotary_emb, own: Any = own, **kwargs: Any) -> Any:
            if module is rotary_emb:
                seen.append(set(kwargs))
            return own(module, *args, **kwargs)

        monkeypatch.setattr(type(rotary_emb), "__call__", call)
        model(**packed(), use_cache=False)
    assert seen == [{"position_ids"}] + 2 * [{"position_ids", "layer_type"}]


def test_a_causal_lm_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(adapted(tiny_model("llama")))
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, **kwargs: "mine")
    assert unwrap(model)(**packed()) == "mine"


def hooked(module: Any) -> None:
    add_hook_to_module(module, ModelHook())


def in_autocast(module: Any) -> None:
    """As accelerate prepares a model."""
    module.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(module.forward.__func__), module)


@pytest.mark.parametrize("replace", [hooked, in_autocast])
def test_a_decoder_whose_own_forward_was_replaced(replace: Callable[[Any], None]) -> None:
    """Before, it would be called in place of the fused one; later, it is around that."""
    model = adapted(tiny_model("llama"))
    replace(unwrap(model).model)
    with pytest.raises(UserError, match="the forward of the decoder was replaced"):
        install(model)
    assert not is_installed(model)
    model = install(adapted(tiny_model("llama")))
    replace(unwrap(model).model)
    assert model(**packed(), use_cache=False).loss.isfinite() and fused_of(model).calls == 1


@pytest.mark.parametrize("replace", [hooked, in_autocast])
def test_a_causal_lm_whose_own_forward_was_replaced(
    replace: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, losses = loss_of_steep.linear_cross_entropy, []
    monkeypatch.setattr(
        loss_of_steep,
        "linear_cross_entropy",
        lambda *given, **options: losses.append(own(*given, **options)) or losses[-1],
    )
    later = install(adapted(tiny_model("llama")))
    replace(unwrap(later))
    loss = later(**packed(), use_cache=False).loss
    assert fused_of(later).calls == len(losses) == 1
    install(later, levels=1)
    assert not caplog.text
    before = adapted(tiny_model("llama"))
    replace(unwrap(before))
    install(before)
    assert abs(before(**packed(), use_cache=False).loss - loss) < 1e-2 * loss
    assert fused_of(before).calls == len(losses) == 1  # its layers are fused
    assert "the loss is not fused: the forward of the causal LM was replaced" in caplog.text


def test_adapters_of_another_kind_are_refused_by_name() -> None:
    model = get_peft_model(
        tiny_model("llama"),
        AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),  # pyright: ignore[reportArgumentType]
    )
    with pytest.raises(UserError, match="AdaptedAttention"):
        install(model)


@pytest.mark.parametrize("config", [PrefixTuningConfig, CartridgeConfig])
def test_keys_and_values_that_are_learned_are_refused_by_name(config: Any) -> None:
    """PEFT hands them to each call as a cache, which in training is an error of the caller's."""
    model = tiny_model("llama").requires_grad_(False)
    model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match=f"{model.peft_config['default'].peft_type.value} trains what a key-value"):
        install(model)
    assert not is_installed(model)


def test_a_prompt_that_is_learned_is_fused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)  # pyright: ignore[reportArgumentType]
    model = get_peft_model(tiny_model("llama").requires_grad_(False), config).train()
    batch = {name: packed()[name] for name in ("input_ids", "labels")}
    expected, truth = loss_and_gradients(model, batch)
    loss, gradients = loss_and_gradients(install(model), batch)
    assert fused_of(model).calls == 1 and len(gradients) == 1
    assert abs(loss - expected) <= EXACT * expected
    assert max(error(gradients[name], truth[name]) for name in truth) <= EXACT


def test_a_model_before_its_adapters_is_told_of_them() -> None:
    with pytest.raises(UserError, match=r"cannot be fused.*Put adapters on it first.*get_peft_model"):
        install(tiny_model("llama").requires_grad_(True))


def test_a_weight_that_cannot_be_read_is_refused_by_name() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for linear in (Linear4bit(128, 64, bias=False), Linear8bitLt(128, 64, bias=False, has_fp16_weights=True)):
        model = tiny_model("llama").requires_grad_(False)
        model.model.layers[0].mlp.down_proj = linear.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(UserError, match="cannot be fused"):
            install(model)


def test_layers_of_another_kind_than_the_configs(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("gemma3")))
    model.config.layer_types = model.config.layer_types[::-1]
    assert_left_to_the_library(model, packed(), "layer_types", caplog)


def test_heads_whose_norms_differ(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("qwen3")))
    unwrap(model).model.layers[1].self_attn.k_norm.variance_epsilon = 1.0
    assert_left_to_the_library(model, packed(), "another eps", caplog)


def test_a_window_that_is_not_the_configs(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("gemma3")))
    model.config.sliding_window = 4
    assert_left_to_the_library(model, packed(), "another window", caplog)


@pytest.mark.parametrize("drops", [True, False])
def test_dropout_goes_by_its_own_mode(drops: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In evaluation with dropout switched on each call is another draw; in training with it switched off, none is."""
    model = install(adapted(tiny_model("llama")))
    for layer in unwrap(model).model.layers:
        for part in layer.modules():
            if isinstance(part, LoraLayer):
                part.lora_dropout["default"] = nn.Dropout(0.5)
    model.train(not drops)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(drops)
    with torch.no_grad():
        losses = {float(model(**packed(), use_cache=False).loss) for _ in range(3)}
    assert len(losses) == (3 if drops else 1)
    assert fused_of(model).calls == (0 if drops else 3) and ("LoRA dropout" in caplog.text) == drops


# ---- hooks


@pytest.mark.parametrize("path", ["mlp.act_fn", "mlp.up_proj.lora_dropout.default", "self_attn.q_proj.base_layer"])
def test_a_hook_anywhere_in_a_layer_is_called(path: str, caplog: pytest.LogCaptureFixture) -> None:
    model, seen = install(adapted(tiny_model("llama"))), []
    part = unwrap(model).model.layers[1].get_submodule(path)
    part.register_forward_hook(lambda *_: seen.append(1))
    assert_left_to_the_library(model, packed(), f"{path} of layer 1 has hooks", caplog)
    assert seen == [1, 1]
    with pytest.raises(UserError, match="has hooks"):
        install(model)


def test_hooks_on_every_module(caplog: pytest.LogCaptureFixture) -> None:
    model, seen = install(adapted(tiny_model("llama"))), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    try:
        assert_left_to_the_library(model, packed(), "hooks on every module", caplog)
    finally:
        handle.remove()
    assert {LlamaMLP, LlamaAttention, LlamaRMSNorm} <= seen


@pytest.mark.filterwarnings("ignore:Full backward hook")  # token ids have no gradient
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_hooks_on_the_embeddings_are_called(grad_dtype: torch.dtype | None) -> None:
    model, seen = tiny_model("llama", tied=False).requires_grad_(False).bfloat16().train(), []
    table: Any = model.get_input_embeddings()
    table.weight.requires_grad_(True).grad_dtype = grad_dtype or torch.bfloat16
    table.register_full_backward_hook(lambda *_: seen.append("backward"))
    table.register_full_backward_pre_hook(lambda *_: seen.append("before it"))
    install(model)(**packed(), use_cache=False).loss.backward()
    assert seen == ["before it", "backward"] and model.fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_on_a_decoder_layer_sees_the_librarys_shapes_once(
    number: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, seen = install(adapted(tiny_model("llama"))), []

    def hook(module: nn.Module, first: Any, *_: Any) -> None:
        seen.append(first[0].shape)

    getattr(unwrap(model).model.layers[number], f"register_{kind}_hook")(hook)
    loss_and_gradients(model, packed())
    assert seen == [(2, 64, 64)]
    assert f"layer {number} has hooks" in caplog.text
    seen.clear()
    with pytest.raises(UserError, match="has hooks"):
        install(uninstall(model))


def test_no_layer_is_called_before_all_are_read(caplog: pytest.LogCaptureFixture) -> None:
    """FSDP's hooks are let be: they look at no shapes. Here one counts, and the layer behind it cannot be fused."""
    model, seen = install(adapted(tiny_model("llama"))), []

    def hook(*_: Any) -> None:
        seen.append(1)

    hook.__module__ = "torch.distributed.fsdp._fully_shard"
    first, second = unwrap(model).model.layers
    first.register_forward_pre_hook(hook)
    loss_and_gradients(model, packed())
    assert unwrap(model).fused.calls == 1 and seen == [1]  # pyright: ignore[reportAttributeAccessIssue]
    second.mlp.register_forward_hook(lambda *_: None)
    loss_and_gradients(model, packed())
    assert unwrap(model).fused.calls == 1 and seen == [1, 1]  # pyright: ignore[reportAttributeAccessIssue]


def test_layers_are_read_as_they_are_called_where_the_last_call_was_fused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What refuses the second one then finds the first computed, once; the next call looks at both before."""
    model, seen = install(adapted(tiny_model("llama"))), []
    own, computed = decoder_of_steep.refuse_hooks_of_layer, decoder_of_steep.block
    monkeypatch.setattr(
        decoder_of_steep, "refuse_hooks_of_layer", lambda layer, name: (seen.append(name), own(layer, name))
    )
    monkeypatch.setattr(decoder_of_steep, "block", lambda *given: (seen.append("computed"), computed(*given))[1])
    first, first_gradients = loss_and_gradients(model, packed())
    assert seen == ["layer 0", "layer 1", "computed", "computed"]
    seen.clear()
    loss_and_gradients(model, packed())
    assert seen == ["layer 0", "computed", "layer 1", "computed"]
    unwrap(model).model.layers[1].mlp.register_forward_hook(lambda *_: None)
    for expected in (["layer 0", "computed", "layer 1"], ["layer 0", "layer 1"]):
        seen.clear()
        loss, gradients = loss_and_gradients(model, packed())
        assert seen == expected
        assert abs(loss - first) < EXACT * first
        for name, gradient in gradients.items():
            assert error(gradient, first_gradients[name]) < EXACT
    assert caplog.text.count("not fused") == 1 and fused_of(model).calls == 2


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["mlp", "mlp.down_proj", "self_attn", "input_layernorm"])
def test_a_part_that_is_another_since_the_last_fused_call(
    name: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = install(adapted(tiny_model("llama")))
    expected, _ = loss_and_gradients(model, packed())
    layer = unwrap(model).model.layers[number]
    layer.set_submodule(name, Other(layer.get_submodule(name)))
    loss, _ = loss_and_gradients(model, packed())
    assert abs(loss - expected) < EXACT * expected and fused_of(model).calls == 1
    assert caplog.text.count("not fused") == 1


@pytest.mark.parametrize("asked", ["hidden_states", "attentions"])
def test_outputs_between_layers_are_the_librarys(asked: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model = adapted(model).eval()
    with torch.no_grad():
        expected = copy.deepcopy(model)(**packed(), use_cache=False, **{f"output_{asked}": True})[asked]
        install(model)
        found = model(**packed(), use_cache=False, **{f"output_{asked}": True})[asked]
    assert unwrap(model).fused.calls == 0  # pyright: ignore[reportAttributeAccessIssue]
    assert len(found) == len(expected) >= 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_attention_that_is_asked_not_to_be_causal(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = adapted(tiny_model("llama")), packed([[64], [64]])
    causal, _ = loss_and_gradients(model, batch)
    assert_left_to_the_library(install(model), {**batch, "is_causal": False}, "is_causal=False was asked for", caplog)
    loss, _ = loss_and_gradients(model, {**batch, "is_causal": False})
    assert abs(loss - causal) > 1e-3


def test_an_argument_that_is_not_known_goes_to_the_library(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    with suppress(ValueError):  # newer versions of transformers refuse it
        model(**packed(), use_cache=False, softcap=0.1)
    assert "not fused" in caplog.text and "called with softcap" in caplog.text


def test_arguments_that_change_nothing_are_fused() -> None:
    """As Trainer, PEFT, TRL and collators hand them on."""
    model, batch = install(adapted(tiny_model("llama"))), packed()
    ends = torch.tensor([0, 5, 45, 64, 69, 109, 128], dtype=torch.int32)
    harmless = {
        "is_causal": True, "output_router_logits": True, "output_attentions": False, "output_hidden_states": None,
        "cache_position": torch.arange(64), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40,
        "max_length_k": 40, "seq_idx": batch["position_ids"], "token_type_ids": torch.zeros(2, 64),
        "special_tokens_mask": torch.zeros(2, 64), "unknown": None,
    }  # fmt: skip
    expected = model(**batch, use_cache=False).loss
    assert model(**batch, use_cache=False, **harmless).loss == expected
    assert fused_of(model).calls == 2
    without_head = {**batch, "num_items_in_batch": 100, "ignore_index": -100, **harmless}
    unwrap(model).lm_head.register_forward_hook(lambda *_: None)
    model(**without_head, use_cache=False)
    assert fused_of(model).calls == 3


@pytest.mark.parametrize("of_config", [True, False])
def test_a_tuple_is_given_where_one_is_asked_for(of_config: bool) -> None:
    model, batch = tiny_model("llama").requires_grad_(False).eval(), packed()
    of_decoder = {name: batch[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
    asked = {} if of_config else {"return_dict": False}
    expected = model(**batch, use_cache=False).loss  # with this config, the library's own falls over its decoder's
    model.config.return_dict = not of_config
    (hidden,) = model.model(**of_decoder, **asked)  # pyright: ignore[reportCallIssue]
    of_none = type(model.model(**of_decoder, return_dict=None))  # pyright: ignore[reportCallIssue]
    install(model)
    given = model.model(**of_decoder, **asked)  # pyright: ignore[reportCallIssue]
    assert type(given) is tuple and len(given) == 1 and error(given[0], hidden) < EXACT
    assert type(model.model(**of_decoder, return_dict=None)) is of_none  # pyright: ignore[reportCallIssue]
    assert type(model.model(**of_decoder, return_dict=True)) is BaseModelOutputWithPast  # pyright: ignore[reportCallIssue]
    loss = model(**batch, use_cache=False, **asked)
    assert type(loss) is tuple and abs(loss[0] - expected) < EXACT * expected
    assert model(**batch, use_cache=False, return_dict=True).loss == loss[0]
    assert model.fused.calls == 5  # pyright: ignore[reportAttributeAccessIssue]


# ---- masks, positions, documents


def test_positions_that_are_no_documents_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    for first in (5, 6):
        model(**{**batch, "position_ids": first + torch.arange(64)[None]}, use_cache=False)
    assert caplog.text.count("not fused") == 1 and "do not start at 0 with each document" in caplog.text
    assert len(fused_of(model).said) == 1


def test_packed_positions_with_a_mask(caplog: pytest.LogCaptureFixture) -> None:
    for mask in (torch.ones(2, 64), rows(64, 62)["attention_mask"]):
        caplog.clear()
        model = install(adapted(tiny_model("llama")))
        assert_left_to_the_library(model, {**packed(), "attention_mask": mask}, "start anew", caplog)


def test_a_mask_without_padding_is_fused() -> None:
    model = adapted(tiny_model("llama"))
    assert_same(model, rows(64, 64))
    assert_same(model, {**rows(64, 40), "position_ids": 3 + torch.arange(64)[None]})


def test_a_row_without_a_token(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    assert_left_to_the_library(model, rows(64, 0), "without a token", caplog)


def test_cumulated_lengths_without_positions(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    del batch["position_ids"]
    ends = torch.tensor([0, 5, 45, 64, 65, 125, 128], dtype=torch.int32)
    assert_left_to_the_library(model, {**batch, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, "cu_seq_lens", caplog)


def test_document_lengths_without_positions_are_an_error() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    del batch["position_ids"]
    with pytest.raises(ValueError, match="position_ids"):
        model(**batch, use_cache=False, document_lengths=[64, 64])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("longest", [30, 64])
def test_rotations_that_go_by_the_longest_row_count_its_padding(rope: dict[str, Any], longest: int) -> None:
    rope = {**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    limit = 32 if rope["rope_type"] == "dynamic" else 128
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=limit)
    batch = rows(longest, 17)
    fused = adapted(model)
    library = loss_and_gradients(copy.deepcopy(fused), batch)
    install(fused)
    loss, gradients = loss_and_gradients(fused, batch)
    assert unwrap(fused).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert abs(loss - library[0]) <= EXACT * loss
    assert max(error(gradients[name], library[1][name]) for name in gradients) <= EXACT


def test_embeddings_may_lie_in_any_order() -> None:
    model, batch = adapted(tiny_model("llama")).eval(), packed([[5, 40, 19]])
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    apart = embedded.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        expected = model(**batch, inputs_embeds=embedded, use_cache=False).loss
        install(model)
        assert abs(model(**batch, inputs_embeds=apart, use_cache=False).loss - expected) < EXACT
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


# ---- how it is called and wrapped


def test_hidden_states_come_first_among_positional_arguments() -> None:
    model = tiny_model("llama").requires_grad_(False).eval()
    layer, hidden = model.model.layers[0], torch.randn(1, 8, 64)  # pyright: ignore[reportAttributeAccessIssue]
    positions = torch.arange(8)[None]
    turns = model.model.rotary_emb(hidden, positions)  # pyright: ignore[reportAttributeAccessIssue]
    mask = torch.zeros(1, 1, 8, 8)
    expected = layer(hidden, mask, position_ids=positions, position_embeddings=turns)
    install(model)
    assert torch.equal(layer(hidden, mask, position_ids=positions, position_embeddings=turns), expected)


def test_replicas_of_data_parallel_are_refused_by_name() -> None:
    model = install(adapted(tiny_model("llama")))
    unwrap(model).model._is_replica = True
    with pytest.raises(UserError, match="DataParallel"):
        model(**packed(), use_cache=False)


def test_a_class_of_fsdp_over_a_fused_one_is_installed() -> None:
    model, batch = install(tiny_model("llama").requires_grad_(False).eval()), packed()
    for module in (model.model.layers[0], model):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert is_installed(model) and why_not_fused(model) is None
    model(**batch, use_cache=False)
    assert model.fused.calls == 1
    with pytest.raises(UserError, match="FSDPLlamaForCausalLM"):
        uninstall(model)
    assert fused_class(type(model)) is None


def test_a_machine_without_its_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert why_not_fused(tiny_model("llama").requires_grad_(False)) == installing.why_not_here()
    with pytest.raises(UserError, match=r"compute capability 7\.5, and the card has 7\.0"):
        install(tiny_model("llama").requires_grad_(False))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_an_installed_model_may_be_compiled() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    expected = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    loss, gradients = loss_and_gradients(torch.compile(model, backend="eager"), batch)
    assert torch.equal(loss, expected[0])
    assert unwrap(model).fused.calls == 2  # pyright: ignore[reportAttributeAccessIssue]
    for name, gradient in expected[1].items():
        assert torch.equal(gradients[f"_orig_mod.{name}"], gradient)


def test_launches_happen_on_the_card_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[torch.Size] = []
    own = torch.cuda.device_of

    def spy(tensor: torch.Tensor) -> Any:
        guarded.append(tensor.shape)
        return own(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", spy)
    install(adapted(tiny_model("llama")))(**packed(), use_cache=False)
    assert guarded == [(128, 64), (128, 64)]  # of the decoder, and of the loss


@pytest.mark.parametrize("of", ["adapters", "attention"])
def test_dropout_that_does_nothing_yet_is_told(of: str, caplog: pytest.LogCaptureFixture) -> None:
    """As from_pretrained and get_peft_model leave a model: in evaluation mode."""
    install(adapted(tiny_model("llama")).eval())
    assert not caplog.text
    base = tiny_model("llama", attention_dropout=0.1 if of == "attention" else 0.0)
    model = install(adapted(base, lora_dropout=0.1 if of == "adapters" else 0.0).eval())
    assert "it has dropout: what is evaluated is fused, and training will not be" in caplog.text
    with torch.no_grad():
        model(**packed(), use_cache=False)
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_how_it_computes_is_asked_of_installed_models_only() -> None:
    model = adapted(tiny_model("llama"))
    with pytest.raises(UserError, match=r"it is not fused. Call steep\.install\(model\) first"):
        steep.fused_of(model)
    assert steep.fused_of(install(model)) is unwrap(model).fused  # pyright: ignore[reportAttributeAccessIssue]


def test_hooks_that_transformers_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once hidden states and attentions were asked for, it has hooks on modules that record what a call asks for."""
    model, batch = adapted(tiny_model("llama")), packed()
    unwrap(model).set_attn_implementation("eager")  # which gives attentions
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    expected = model(**batch, **asked)
    assert any(module._forward_hooks for module in model.modules())
    install(model)
    fused: Any = unwrap(model).fused
    read: list[int] = []
    own = reading.read_layer
    monkeypatch.setattr(reading, "read_layer", lambda *given: (read.append(1), own(*given))[1])
    for _ in range(2):
        assert abs(model(**batch, use_cache=False).loss - expected.loss) <= EXACT * expected.loss
    assert fused.calls == 2 and len(read) == 2  # a layer once
    again = model(**batch, **asked)
    assert fused.calls == 2 and len(again.hidden_states) == 3 and len(again.attentions) == 2


@pytest.mark.parametrize("given", ["llama", None])
def test_what_is_no_model_is_told_so(given: Any) -> None:
    with pytest.raises(UserError, match=r"it is a (str|NoneType)"):
        install(given)


@pytest.mark.parametrize(
    ("levels", "told"), [(5, "5 are no levels of 2"), ("2", "2 are no levels of 2"), ([0], r"\[0\] are no")]
)
def test_levels_are_told_as_they_were_given(levels: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        install(adapted(tiny_model("llama")), levels=levels)
