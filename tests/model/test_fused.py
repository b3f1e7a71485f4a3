"""The fused forward against the library's own, in fp32, on the same weights: losses, every gradient, every family."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from peft import AutoPeftModel, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, LlamaForCausalLM
from transformers.utils import find_labels

from steep.errors import UserError
from steep.model import decoder, mlp_half, tiling
from steep.model import loss as loss_of_steep
from steep.model.adapters import add_adapters
from steep.model.families import FUSED, library_class
from steep.model.install import fused_of, install, is_installed, uninstall
from steep.model.load import load
from steep.model.unwrap import unwrap
from steep.ops import linear_cross_entropy, lora
from steep.training.arguments import TrainingArguments
from steep.training.trainer import Trainer
from tests.ops.closeness import error
from tests.tiny import FAMILIES, VOCAB_SIZE, save_tiny, tiny_model

EXACT = 2e-5  # fp32 against fp32, RMS of the difference over RMS of the truth
LENGTHS = ([5, 40, 19], [1, 60, 3])  # documents of two rows of 64


def adapted(model: Any, **settings: Any) -> Any:
    """`model` with adapters that have an effect, ready to train."""
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17 would take one that leaves the caps out
    model = add_adapters(model, r=settings.pop("r", 8), **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    return model.train()


def packed(lengths: Any = LENGTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tokens = torch.randint(3, VOCAB_SIZE, positions.shape, generator=generator)
    labels = tokens.masked_fill(positions == 0, -100)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def assert_same(
    model: Any, batch: dict[str, Any], *, levels: Any = 0, bound: float = EXACT, tile: int | None = None
) -> None:
    """The fused model's loss and gradients are the library's; and it was the fused forward that gave them."""
    uninstall(model)
    loss, gradients = loss_and_gradients(model, batch)
    install(model, levels=levels, tile=tile)
    fused_loss, fused = loss_and_gradients(model, batch)
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert abs(fused_loss - loss) <= bound * loss, (fused_loss, loss)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert error(fused[name], gradient) <= bound, f"{name}: {error(fused[name], gradient):.2e}"
        assert error(fused[name] / 2, gradient) > bound, f"{name}: a halved gradient passes"


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_every_family_at_every_level(family: str, level: int) -> None:
    assert_same(adapted(tiny_model(family)), packed(), levels=level)


@pytest.mark.parametrize("levels", [[0, 3], [2, 1]])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_every_family_in_tiles(family: str, levels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that divides neither the batch nor its documents: nothing wider than the residual stream, but what
    attention reads and what a level keeps, has the rows of all tokens."""
    widest: list[int] = []
    own = mlp_half.rows
    monkeypatch.setattr(mlp_half, "rows", lambda x, *given: widest.append(len(x)) or own(x, *given))
    model = adapted(tiny_model(family))
    assert_same(model, packed(), levels=levels, tile=50)
    assert {50, 28} <= set(widest)
    assert widest.count(128) == levels.count(0)  # gate and up, which it keeps


def test_a_tile_of_one_token_and_of_more_than_all() -> None:
    for tile in (1, 1000):
        assert_same(adapted(tiny_model("llama")), packed([[3, 5], [1, 7]]), levels=[3, 1], tile=tile)


@pytest.mark.parametrize("tile", [0, -1, 4.0, True, "4096"])
def test_a_tile_that_is_no_number_of_tokens(tile: Any) -> None:
    model = adapted(tiny_model("llama"))
    with pytest.raises(UserError, match="tile") as caught:
        install(model, tile=tile)
    assert "4096" in str(caught.value) and not is_installed(model)


def test_a_tile_is_given_with_levels() -> None:
    model = adapted(tiny_model("llama"))
    with pytest.raises(UserError, match="Give levels too"):
        install(model, tile=4096)
    assert not is_installed(model)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_is_refused_by_name(shape: tuple[int, int]) -> None:
    model = install(adapted(tiny_model("llama")))
    with pytest.raises(UserError, match="input_ids: a batch of"):
        model(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False)


def test_a_long_batch_is_computed_in_tiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "WHOLE", 100)
    monkeypatch.setattr(tiling, "LARGE", 64)
    tiles: list[int] = []
    block = decoder.block

    def noted(x: torch.Tensor, layer: Any, batch: Any, backend: str) -> torch.Tensor:
        tiles.append(batch.tile)
        return block(x, layer, batch, backend)

    monkeypatch.setattr(decoder, "block", noted)
    assert_same(adapted(tiny_model("llama")), packed(), levels=1)
    assert tiles == [64, 64]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied(family: str, tied: bool) -> None:
    assert_same(adapted(tiny_model(family, tied=tied)), packed())


@pytest.mark.parametrize(
    ("family", "vocabulary", "hidden"),
    [("gemma3", 262_144, 640), ("llama", 128_256, 2048)],
    ids=["Gemma-3-270M", "Llama-3.2-1B"],
)
@pytest.mark.gpu  # a CPU takes half a minute for them
def test_tied_tables_of_real_shapes(family: str, vocabulary: int, hidden: int) -> None:
    """One layer of them. A tied table has the gradients of the rows that were looked up in that of its head."""
    shape: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": 1}
    if family == "gemma3":
        shape["layer_types"] = ["full_attention"]
    model = adapted(tiny_model(family, tied=True, **shape)).cuda()
    batch = {name: values.cuda() for name, values in packed([[9, 15]]).items()}
    batch["input_ids"][0, 5:7] = vocabulary - 1  # twice, and far from the others
    (table,) = (p for name, p in model.named_parameters() if p.requires_grad and "lora" not in name)
    found: list[torch.Tensor] = []
    for fuse in (uninstall, install):
        fuse(model)
        model(**batch, use_cache=False).loss.backward()
        assert table.grad is not None and not table.grad.is_sparse
        found.append(table.grad)
        model.zero_grad(set_to_none=True)
    expected, ours = found
    size = expected.norm()
    looked_up = expected[batch["input_ids"][0]]
    bound = 1e-2  # the card's own products in fp32, in another order
    assert (ours[batch["input_ids"][0]] - looked_up).norm() <= bound * looked_up.norm()
    assert ours.sub_(expected).norm() <= bound * size


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_positions_are_scaled_as_the_model_scales_them(scaling: dict[str, Any]) -> None:
    model = adapted(tiny_model("llama", rope_parameters={"rope_theta": 1e4, **scaling}))
    plain = adapted(tiny_model("llama"))
    assert_same(model, packed())
    scaled, unscaled = (loss_and_gradients(each, packed())[0] for each in (model, plain))
    assert abs(scaled - unscaled) > 10 * EXACT * unscaled


def test_a_sliding_window() -> None:
    assert_same(adapted(tiny_model("mistral", sliding_window=16)), packed())


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_window_in_the_config_of_a_family_that_has_none(family: str) -> None:
    assert_same(adapted(tiny_model(family, sliding_window=4)), packed())


@pytest.mark.parametrize("base", ["nf4", "fp8", "fp32"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_base_in_4_8_and_32_bit(family: str, base: str, tmp_path: Path) -> None:
    model, _ = load(str(save_tiny(family, tmp_path, hidden_size=128)), base=base, compute_dtype="fp32")
    assert_same(adapted(model), packed(), levels=1)


def test_a_base_whose_absmax_is_not_quantised_again(tmp_path: Path) -> None:
    """As BitsAndBytesConfig has it unless told otherwise."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    folder = save_tiny("llama", tmp_path, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised).requires_grad_(False)
    assert_same(adapted(model), packed())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_base_in_8_bit(family: str, tmp_path: Path) -> None:
    """The library rounds activations to 8 bit too, so the truth is a plain model of the same weights."""
    model, _ = load(str(save_tiny(family, tmp_path, hidden_size=128)), base="int8", compute_dtype="fp32")
    model = adapted(model)
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Linear8bitLt):
            linear = nn.Linear(module.in_features, module.out_features, bias=False).requires_grad_(False)
            weight: Any = module.weight
            linear.weight.data = int8_vectorwise_dequant(weight.CB, weight.SCB)
            plain.set_submodule(name, linear)
    loss, gradients = loss_and_gradients(uninstall(plain), packed())
    fused_loss, fused = loss_and_gradients(install(model), packed())
    assert abs(fused_loss - loss) < EXACT * loss
    assert max(error(fused[name], gradients[name]) for name in gradients) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_a_base_in_bf16_is_as_exact_as_the_librarys(family: str, stream: str, tmp_path: Path) -> None:
    model, _ = load(str(save_tiny(family, tmp_path, hidden_size=128)), base="bf16", compute_dtype="bf16")
    model = adapted(model, trained_dtype=stream)
    truth_loss, truth = loss_and_gradients(copy.deepcopy(model).float(), packed())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, library = loss_and_gradients(model, packed())
        loss, fused = loss_and_gradients(install(model), packed())
    assert abs(loss - truth_loss) < 2e-3 * truth_loss
    worst = max(error(library[name], truth[name]) for name in truth)
    for name, gradient in truth.items():
        assert error(fused[name], gradient) <= 1.25 * error(library[name], gradient) + 2e-3, name
    assert worst < 0.2


def test_layers_may_keep_different_things() -> None:
    assert_same(adapted(tiny_model("qwen3")), packed(), levels=[3, 0])


def test_rows_padded_on_the_right_compute_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the layers nor the head with its loss."""
    rows: list[int] = []
    block, own = decoder.block, loss_of_steep.linear_cross_entropy
    monkeypatch.setattr(decoder, "block", lambda x, *given: rows.append(len(x)) or block(x, *given))
    monkeypatch.setattr(
        loss_of_steep, "linear_cross_entropy", lambda x, *given, **named: rows.append(len(x)) or own(x, *given, **named)
    )
    model = adapted(tiny_model("llama"))
    tokens = torch.randint(3, VOCAB_SIZE, (3, 40))
    mask = torch.arange(40) < torch.tensor([40, 17, 1])[:, None]
    labels = tokens.masked_fill(~mask, -100)
    assert_same(model, {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    assert rows == 3 * [40 + 17 + 1]
    hidden = unwrap(model).model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    assert hidden[~mask].abs().max() == 0
    assert hidden[mask].abs().min() > 0


def test_the_number_of_targets_may_be_that_of_a_whole_batch() -> None:
    assert_same(adapted(tiny_model("llama")), {**packed(), "num_items_in_batch": torch.tensor(400)})


def test_gradients_add_up_over_micro_batches() -> None:
    model = adapted(tiny_model("llama"))
    batches = [{**packed(seed=seed), "num_items_in_batch": 244} for seed in (1, 2)]

    def summed() -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    library = summed()
    install(model)
    fused = summed()
    assert fused_of(model).calls == 2
    assert fused.keys() == library.keys()
    assert max(error(fused[name], library[name]) for name in library) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_changes_nothing_to_the_bit(family: str) -> None:
    """Another document of the same length in the row: loss gradients at a document's own inputs stay the same."""
    model = install(adapted(tiny_model(family)))

    def gradients(seed: int) -> torch.Tensor:
        batch = packed()
        others = packed(seed=seed)
        for name in ("input_ids", "labels"):
            batch[name][:, 5:45] = others[name][:, 5:45]
            batch[name][1] = others[name][1]
        batch["labels"][:, 5:45] = -100
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        model(**batch, inputs_embeds=embedded, num_items_in_batch=100).loss.backward()
        assert embedded.grad is not None
        return torch.cat([embedded.grad[0, :5], embedded.grad[0, 45:]])

    one, other = gradients(3), gradients(4)
    assert fused_of(model).calls == 2
    assert one.abs().sum() > 0
    assert torch.equal(one, other)


def test_evaluation_is_fused_and_generation_is_the_librarys() -> None:
    model = adapted(tiny_model("llama")).eval()
    model.generation_config.pad_token_id = 0
    batch = packed()
    tokens = batch["input_ids"][:1, :8]
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        completion = model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False)
        install(model)
        assert abs(model(**batch, use_cache=False).loss - expected) < EXACT
        assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False), completion)
        assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_disabled_adapters_leave_the_base() -> None:
    model, batch = adapted(tiny_model("llama")), packed()
    with torch.no_grad(), model.disable_adapter():
        expected = model(**batch, use_cache=False).loss
    install(model)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch, use_cache=False).loss
    assert abs(base - expected) < EXACT
    with torch.no_grad():
        assert abs(model(**batch, use_cache=False).loss - expected) > 1e-3


def test_pissa_and_its_frozen_start_are_stacked() -> None:
    model = add_adapters(tiny_model("llama"), r=8, init_lora_weights="pissa").train()
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".default." in name:
            parameter.data.mul_(1.1)
    assert_same(model, packed(), levels=2)


def test_a_plain_model_without_adapters_evaluates_fused() -> None:
    model = tiny_model("qwen2").requires_grad_(False).eval()
    batch = packed()
    expected = model(**batch, use_cache=False).loss
    install(model)
    assert abs(model(**batch, use_cache=False).loss - expected) < EXACT
    assert model.fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


# ---- what stays as it was


def test_installing_changes_classes_only_and_can_be_undone() -> None:
    model = adapted(tiny_model("llama"))
    classes = {name: type(module) for name, module in model.named_modules()}
    names, before = list(model.state_dict()), {name: p.data_ptr() for name, p in model.named_parameters()}
    install(model)
    assert is_installed(model) and list(model.state_dict()) == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    changed = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    assert len(changed) == 5, changed  # PEFT's wrapper, the causal LM, its decoder, two layers
    uninstall(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not is_installed(model)
    assert not hasattr(unwrap(model), "fused")


def test_fused_classes_bear_the_names_of_those_they_stand_for() -> None:
    for fused in FUSED:
        assert fused.__name__ == library_class(fused).__name__
        assert fused.__qualname__ == fused.__name__
        assert pickle.loads(pickle.dumps(fused)) is fused


def test_copies_and_pickles_are_fused_too() -> None:
    model, batch = install(adapted(tiny_model("gemma3"))), packed()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_installed(copied)
            assert torch.equal(copied(**batch, use_cache=False).loss, expected)


def test_merging_gives_what_was_trained() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        merged = model.merge_and_unload()
        assert abs(merged(**batch, use_cache=False).loss - expected) < EXACT


def test_what_is_saved_opens_as_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, batch = install(adapted(tiny_model("llama"))), packed()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with torch.no_grad():
        opened = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
        assert abs(opened(**batch, use_cache=False).loss - model(**batch, use_cache=False).loss) < EXACT


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_adapters_of_no_task_type_open_again(wrapped_first: bool, tmp_path: Path) -> None:
    """PEFT saves the class that they were on, to make one of it: the library's, or one that computes as that does."""
    base = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "base")).requires_grad_(False)
    model: Any = get_peft_model(base if wrapped_first else install(base), LoraConfig(r=4, target_modules="all-linear"))
    install(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    if wrapped_first:
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
        library = transformers.LlamaForCausalLM
        assert saved == {"base_model_class": library.__name__, "parent_library": library.__module__}
    opened = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        loss = model(**packed(), use_cache=False).loss
        assert abs(opened(**packed(), use_cache=False).loss - loss) < EXACT
    assert not is_installed(opened)


def test_a_model_of_an_installed_models_class_computes_as_the_librarys() -> None:
    model, batch = install(tiny_model("gemma2").requires_grad_(False)).eval(), packed()
    expected = model(**batch, use_cache=False).loss
    other, decoder = type(model)(model.config).eval(), type(model.model)(model.config).eval()
    for made in (other, decoder):
        made.set_attn_implementation("eager")
    other.load_state_dict(model.state_dict())
    decoder.load_state_dict(model.model.state_dict())
    assert not is_installed(other)
    with torch.no_grad():
        assert abs(other(**batch, use_cache=False).loss - expected) < EXACT
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        hidden = model.model(**inputs).last_hidden_state
        assert error(decoder(**inputs).last_hidden_state, hidden) < EXACT
    assert is_installed(install(other.requires_grad_(False)))
    assert abs(other(**batch, use_cache=False).loss - expected) < EXACT and fused_of(other).calls == 1
    assert type(uninstall(other)) is transformers.Gemma2ForCausalLM


# ---- what is not fused


def test_a_mask_of_another_kind_goes_through_the_library(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(tiny_model("llama"))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 20))
    left = torch.arange(20) >= torch.tensor([0, 7])[:, None]
    batch = {"input_ids": tokens, "attention_mask": left.long(), "labels": tokens.masked_fill(~left, -100)}
    expected, gradients = loss_and_gradients(model, batch)
    install(model)
    for _ in range(2):
        loss, got = loss_and_gradients(model, batch)
    assert abs(loss - expected) < EXACT  # pyright: ignore[reportPossiblyUnboundVariable]
    assert max(error(got[name], gradients[name]) for name in got) < EXACT  # pyright: ignore[reportPossiblyUnboundVariable]
    assert unwrap(model).fused.calls == 0  # pyright: ignore[reportAttributeAccessIssue]
    said = [record.message for record in caplog.records if "not fused" in record.message]
    assert len(said) == 1 and "right padding" in said[0]


@pytest.mark.parametrize("given", [{"use_cache": True}, {"past_key_values": DynamicCache()}, {"cache": DynamicCache()}])
def test_a_cache_in_training_is_an_error(given: dict[str, Any]) -> None:
    """By either of its names: transformers 5.24 has another one."""
    model = install(adapted(tiny_model("llama")))
    with pytest.raises(UserError, match="use_cache"):
        model(**packed(), **given)
    batch = packed()
    with pytest.raises(UserError, match="use_cache"):
        unwrap(model).model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **given)


def test_a_call_with_a_cache_is_the_librarys() -> None:
    model = adapted(tiny_model("llama")).eval()
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    tokens = packed()["input_ids"]

    def two_calls(first: dict[str, Any]) -> list[torch.Tensor]:
        whole = model(input_ids=tokens[:, :40], **first)
        rest = {"input_ids": tokens[:, 40:], "labels": tokens[:, 40:], name: whole[name]}
        with_labels = model(**rest)
        assert with_labels[name].get_seq_length() == 64
        return [whole.logits, with_labels.loss]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # of the name that the other version has
        expected = two_calls({"use_cache": True})
        install(model)
        for first in ({"use_cache": True}, {name: DynamicCache()}):
            assert all(map(partial(torch.allclose, atol=1e-5), two_calls(first), expected))
    assert fused_of(model).calls == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "Dora"), ({"lora_dropout": 0.1}, "dropout")],
)
def test_options_that_are_not_fused_are_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    model = adapted(tiny_model("llama"), **settings)
    with pytest.raises(UserError, match=reason):
        install(model)
    assert not is_installed(model)


def test_a_hook_on_a_layer_that_is_not_called_is_not_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    seen: list[int] = []
    unwrap(model).model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    model(**packed(), use_cache=False)
    assert seen == [1]
    assert "has hooks" in caplog.text


def test_levels_are_checked() -> None:
    model = adapted(tiny_model("llama"))
    unfit: tuple[Any, ...] = (4, [0], [0, 1, 2], 1.5, True, "01", [0, 1.0])
    for levels in unfit:
        with pytest.raises(UserError, match="levels"):
            install(model, levels=levels)


def test_no_product_may_be_summed_in_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the blocks and of the loss, forward and backward; torch's own setting is as before afterwards."""
    seen: dict[str, list[bool]] = {}

    def spy(module: Any) -> Any:
        own = module.product

        def product(*operands: Any, **options: Any) -> torch.Tensor:
            seen.setdefault(module.__name__, []).append(bool(matmul.allow_bf16_reduced_precision_reduction))
            return own(*operands, **options)

        return product

    matmul = torch.backends.cuda.matmul
    assert matmul.allow_bf16_reduced_precision_reduction
    for module in (lora, linear_cross_entropy):
        monkeypatch.setattr(module, "product", spy(module))
    model = adapted(tiny_model("llama"))
    install(model)
    loss = model(**packed()).loss
    counts = {name: len(calls) for name, calls in seen.items()}
    loss.backward()
    assert set(seen) == {lora.__name__, linear_cross_entropy.__name__}
    assert len(seen[lora.__name__]) > counts[lora.__name__] > 0
    assert not any(any(calls) for calls in seen.values())
    assert matmul.allow_bf16_reduced_precision_reduction


def test_document_lengths_stand_for_positions() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        lengths = [n for row in LENGTHS for n in row]
        assert torch.equal(model(**batch, use_cache=False, document_lengths=lengths).loss, expected)
        lengths = [64, 64]  # another packing shows: they are what attention goes by
        assert not torch.equal(model(**batch, use_cache=False, document_lengths=lengths).loss, expected)


def test_document_lengths_of_another_number_of_tokens_are_an_error() -> None:
    model = install(adapted(tiny_model("llama")))
    with pytest.raises(ValueError, match="document_lengths have 127 tokens, and the batch 128"):
        model(**packed(), use_cache=False, document_lengths=[64, 63])


def test_a_second_backward_is_an_error() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    del batch["labels"]
    total = unwrap(model).model(**batch, use_cache=False).last_hidden_state.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="there is one backward"):
        total.backward()


def test_an_adapter_that_is_frozen_before_its_backward_is_an_error() -> None:
    model = install(adapted(tiny_model("llama")))
    loss = model(**packed(), use_cache=False).loss
    unwrap(model).model.layers[0].mlp.up_proj.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="an adapter was frozen, or made to train, after"):
        loss.backward()


def test_another_adapter_in_its_place_is_an_error() -> None:
    """As many train as did, of the same shapes."""
    model = install(adapted(tiny_model("llama")))
    mlp = unwrap(model).model.layers[0].mlp
    for part in (mlp.gate_proj, mlp.up_proj):
        part.lora_B["default"].weight.requires_grad_(part is mlp.gate_proj)
    loss = model(**packed(), use_cache=False).loss
    for part in (mlp.gate_proj, mlp.up_proj):
        part.lora_B["default"].weight.requires_grad_(part is mlp.up_proj)
    with pytest.raises(RuntimeError, match="an adapter was frozen, or made to train, after"):
        loss.backward()


@pytest.mark.parametrize("setting", ["scale_grad_by_freq", "sparse"])
def test_an_embedding_of_torchs_own_settings_is_looked_up_by_torch(setting: str) -> None:
    """Also where its gradient is wanted by rows, which knows nothing of them."""
    settings: Any = {setting: True}
    table = torch.nn.Embedding(8, 4, **settings)
    ids = torch.tensor([[1, 1, 1, 5]])
    table(ids).sum().backward()
    assert table.weight.grad is not None
    expected, table.weight.grad = table.weight.grad.to_dense(), None
    decoder.looked_up(table, ids, by_rows=1).sum().backward()
    assert table.weight.grad is not None
    assert torch.equal(table.weight.grad.to_dense(), expected) and expected.any()


def test_trainer_finds_the_same_labels() -> None:
    for fused in FUSED:
        if fused.__name__.endswith("ForCausalLM"):
            assert find_labels(fused) == find_labels(library_class(fused)) == ["labels"]


def test_labels_alone_make_no_cache() -> None:
    model, batch = adapted(tiny_model("llama")).eval(), packed()
    model.config.use_cache = True
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss
        assert abs(install(model)(**batch).loss - expected) < EXACT
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_disabled_adapter_that_was_merged_is_taken_out() -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(**batch, use_cache=False).loss
        model.merge_adapter()
        with model.disable_adapter():
            assert abs(model(**batch, use_cache=False).loss - base) < EXACT


def test_labels_at_padded_places_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = install(adapted(tiny_model("llama")))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 20))
    mask = torch.arange(20) < torch.tensor([20, 12])[:, None]
    batch = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
    right = tokens.clone()
    right[1, 13:] = -100  # what is predicted from the last token that is there still counts
    expected = model(**batch, labels=right).loss
    assert caplog.text == ""
    assert torch.equal(model(**batch, labels=tokens).loss, expected)
    assert "padded places would predict are left out" in caplog.text and "num_items_in_batch counts them" in caplog.text


@pytest.mark.parametrize("kind", [transformers.Trainer, Trainer])
def test_trainer_evaluates_an_installed_model(kind: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments if kind is Trainer else transformers.TrainingArguments
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB_SIZE, (4, 16))]
    model = install(adapted(tiny_model("llama")))
    args = arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    scores = kind(model=model, args=args, eval_dataset=rows).evaluate()
    with torch.no_grad():
        loss = model(
            input_ids=torch.stack([row["input_ids"] for row in rows]),
            labels=torch.stack([row["labels"] for row in rows]),
        ).loss
    assert abs(scores["eval_loss"] - loss) < 1e-3


@pytest.mark.parametrize("logits", [False, True])
def test_metrics_that_get_no_logits_are_told(logits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: Any = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB_SIZE, (4, 16))]
    model = install(adapted(tiny_model("llama")), logits=logits)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=2
    )
    given: list[Any] = []
    trainer = transformers.Trainer(
        model=model, args=args, eval_dataset=rows, compute_metrics=lambda each: given.append(each.predictions) or {}
    )
    trainer.evaluate()
    trainer.evaluate()
    assert [getattr(each, "shape", None) for each in given] == [(4, 16, VOCAB_SIZE) if logits else None] * 2
    assert caplog.text.count("logits=True") == (0 if logits else 1)


def test_an_adapter_changed_before_the_backward_pass_is_an_error() -> None:
    model = install(adapted(tiny_model("llama")))
    loss = model(**packed(), use_cache=False).loss
    with torch.no_grad():
        unwrap(model).model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_gone_through_once() -> None:
    model = install(adapted(tiny_model("llama")))
    loss = model(**packed(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"once|second time"):
        loss.backward()


@pytest.mark.parametrize("label", [VOCAB_SIZE, 10**9, -1])
def test_a_label_outside_of_the_vocabulary_is_an_error(label: int) -> None:
    model = install(adapted(tiny_model("llama")))
    batch = packed()
    batch["labels"][0, 5] = label
    with pytest.raises(IndexError, match=f"label {label} is outside of the vocabulary of {VOCAB_SIZE}"):
        model(**batch, use_cache=False)
    batch["labels"][0, 5] = -100
    assert model(**batch, use_cache=False).loss.isfinite()


@pytest.mark.gpu
def test_a_label_outside_of_the_vocabulary_is_an_error_on_a_gpu() -> None:
    """In a process of its own: what an assertion on the card leaves behind computes nothing any more."""
    program = (
        "import torch\nfrom steep import install\nfrom tests.model.test_fused import adapted, packed, tiny_model\n"
        "model = install(adapted(tiny_model('llama')).cuda())\n"
        "batch = {name: tensor.cuda() for name, tensor in packed().items()}\n"
        "print(float(model(**batch, use_cache=False).loss), 'before', flush=True)\n"
        "batch['labels'][0, 5] = 10**6\nprint(float(model(**batch, use_cache=False).loss), 'after')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "before" in done.stdout and "after" not in done.stdout, done.stdout
    assert "assert" in done.stderr
