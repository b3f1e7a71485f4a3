"""What an installed causal LM makes of its last hidden states: logits, and the loss."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steep.evaluation.perplexity import evaluate
from steep.model import decoder
from steep.model import loss as loss_of_steep
from steep.model.install import fused_of, install
from steep.model.load import keep_4bit_layout, load
from steep.model.unwrap import unwrap
from steep.ops import linear_cross_entropy
from tests.model.test_fused import EXACT, adapted, assert_same, packed
from tests.ops.closeness import error
from tests.tiny import FAMILIES, VOCAB_SIZE, save_tiny, tiny_model

BF16 = torch.bfloat16


# ---- a residual stream in fp32 over products in bf16, without autocast


def by_script(folder: Path) -> Any:
    """As peft's documentation prepares a model."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, dtype=BF16)
    keep_4bit_layout(model)  # of CPUs only
    torch.manual_seed(0)
    whole = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=8, target_modules=["q_proj", "up_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, config)


def by_steep(folder: Path) -> Any:
    model, _ = load(str(folder), base="nf4", compute_dtype="bf16")
    return adapted(model, trained_dtype="fp32")


@pytest.fixture(params=[by_script, by_steep])
def of_two_dtypes(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    model = request.param(save_tiny("llama", tmp_path / "model", hidden_size=128))
    model.generation_config.pad_token_id = 0
    return model.eval()


def test_logits_are_the_librarys(of_two_dtypes: Any) -> None:
    model, batch = of_two_dtypes, packed()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
    prompt = {"input_ids": batch["input_ids"][:, :8], "max_new_tokens": 3, "do_sample": False, "use_cache": False}

    def made() -> list[torch.Tensor]:
        with torch.no_grad():
            hidden = unwrap(model).model(**inputs).last_hidden_state
            return [hidden, model(**inputs).logits, model(**batch, use_cache=False).logits, model.generate(**prompt)]

    expected = made()
    install(model, logits=True)
    found = made()
    assert fused_of(model).calls == 6  # three of them to generate as many tokens
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    assert {each.dtype for each in found[:3]} == {torch.float32}
    assert all(error(one, other) < 0.02 for one, other in zip(found[:3], expected[:3], strict=True))


def test_a_loss_of_ones_own_trains(of_two_dtypes: Any) -> None:
    model, batch = of_two_dtypes.train(), packed()
    labels = batch.pop("labels")
    losses, gradients = [], []
    for fused in (False, True):
        if fused:
            install(model)
        model.zero_grad(set_to_none=True)
        logits = model(**batch, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert fused_of(model).calls == 1
    assert abs(losses[1] - losses[0]) < 2e-3 * losses[0]
    assert gradients[1].keys() == gradients[0].keys() and gradients[1]
    assert error(gradients[1]["base_model.model.lm_head.modules_to_save.default.weight"],
                 gradients[0]["base_model.model.lm_head.modules_to_save.default.weight"]) < 0.02  # fmt: skip


def test_evaluation_without_autocast(of_two_dtypes: Any, tmp_path: Path) -> None:
    model = of_two_dtypes
    documents: Any = {"all": [SimpleNamespace(tokens=np.arange(3, 40, dtype=np.int32), num_bytes=50)]}
    expected = evaluate(model, documents, max_length=32)[0].loss
    install(model, logits=True)
    assert abs(evaluate(model, documents, max_length=32)[0].loss - expected) < 0.01 * expected
    rows: Any = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB_SIZE, (4, 16))]
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(model=model, args=args, eval_dataset=rows)
    given = trainer.predict(rows)
    assert given.predictions.shape == (4, 16, VOCAB_SIZE)  # pyright: ignore[reportAttributeAccessIssue]
    assert abs(trainer.evaluate()["eval_loss"] - given.metrics["test_loss"]) < 1e-6  # pyright: ignore[reportOptionalSubscript]


def test_hidden_states_are_converted_for_the_loss_alone(of_two_dtypes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that were converted are not held while it is made."""
    model, given, seen = install(of_two_dtypes), [], []
    own = loss_of_steep.linear_cross_entropy
    unwrap(model).model.register_forward_hook(lambda *call: given.append(weakref.ref(call[2].last_hidden_state)))

    def spy(x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        seen.append((x.dtype, given[-1]() is None))
        return own(x, *others, **options)

    monkeypatch.setattr(loss_of_steep, "linear_cross_entropy", spy)
    model(**packed(), use_cache=False).loss.backward()
    assert seen == [(BF16, True)] and fused_of(model).calls == 1


# ---- a soft cap


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_logits_are_capped_by_the_families_that_do(family: str, cap: float | None) -> None:
    """Whatever the config of another holds."""
    model = adapted(tiny_model(family, final_logit_softcapping=cap))
    with torch.no_grad():
        expected = model(**packed(), use_cache=False).logits
    assert_same(model, packed())
    fused_of(model).logits = True
    with torch.no_grad():
        assert error(model(**packed(), use_cache=False).logits, expected) < EXACT


# ---- how the loss is made


@pytest.mark.parametrize("way", ["tokens", "vocabulary", "narrow", None])
def test_the_chosen_way_is_taken(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ways = install(adapted(tiny_model("llama"))), []
    own = linear_cross_entropy.linear_cross_entropy_forward
    monkeypatch.setattr(
        linear_cross_entropy,
        "linear_cross_entropy_forward",
        lambda *given, **options: ways.append(options["way"]) or own(*given, **options),
    )
    fused_of(model).loss_way = way
    model(**packed(), use_cache=False).loss.backward()
    assert ways == [way]


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_products_are_in_its_dtype(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the stream is in fp32; after the library's forward too, which gives it."""
    model, batch, dtypes = install(adapted(tiny_model("llama"))), packed(), []
    own = loss_of_steep.linear_cross_entropy
    monkeypatch.setattr(
        loss_of_steep,
        "linear_cross_entropy",
        lambda x, *given, **options: dtypes.append(x.dtype) or own(x, *given, **options),
    )
    if not fused:
        batch["attention_mask"] = torch.ones(2, 64)  # with documents in a row: the library's
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            model(**batch, use_cache=False).loss.backward()
    assert dtypes == [BF16, torch.float32] and fused_of(model).calls == (2 if fused else 0)


def test_padding_is_looked_at_before_the_layers_and_until_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder reads the mask, and waits for the GPU, before its layers; behind them it would have to wait for
    them."""
    model, seen = install(adapted(tiny_model("llama"))), []
    tokens = torch.randint(3, VOCAB_SIZE, (2, 20))
    mask = torch.arange(20) < torch.tensor([20, 12])[:, None]
    labels = tokens.masked_fill(~mask, -100)
    any_label, block = torch.Tensor.any, decoder.block
    monkeypatch.setattr(torch.Tensor, "any", lambda *given: seen.append("any") or any_label(*given))
    monkeypatch.setattr(decoder, "block", lambda *given: seen.append("block") or block(*given))
    for given, expected in ((labels, ["any"]), (tokens, ["any"]), (tokens, [])):
        seen.clear()
        model(input_ids=tokens, attention_mask=mask, labels=given, use_cache=False)
        assert seen == [*expected, "block", "block"]
        assert len(fused_of(model).said) == (0 if given is labels else 1)


@pytest.mark.parametrize("change", ["int32", "one less", "logits_to_keep"])
def test_labels_of_another_make_are_an_error(change: str) -> None:
    model, batch = install(adapted(tiny_model("llama"))), packed()
    labels = batch.pop("labels")
    given: dict[str, Any] = {
        "int32": {"labels": labels.int()},
        "one less": {"shift_labels": labels[:, 1:]},
        "logits_to_keep": {"shift_labels": labels[:, -8:], "logits_to_keep": 8},
    }[change]
    with pytest.raises(ValueError, match=r"labels are int64, one for each of the tokens \[2, 64\]"):
        model(**batch, **given, use_cache=False)


def test_what_is_converted_for_the_loss_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last hidden states in fp32, where products are in bf16: of 131,072 tokens of an 8B they are 2 GiB."""
    made: list[StorageWeakRef] = []
    norm, cross_entropy = decoder.rms_norm, loss_of_steep.linear_cross_entropy

    def normed(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_states = norm(*args, **kwargs)
        made.append(StorageWeakRef(hidden_states.untyped_storage()))
        return hidden_states

    def seen(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert hidden_states.dtype == BF16 and made[-1].expired()
        return cross_entropy(hidden_states, *args, **kwargs)

    monkeypatch.setattr(decoder, "rms_norm", normed)
    monkeypatch.setattr(loss_of_steep, "linear_cross_entropy", seen)
    model = install(adapted(tiny_model("llama")))
    with torch.autocast("cpu", dtype=BF16):
        model(**packed(), use_cache=False).loss.backward()
    assert len(made) == 1
