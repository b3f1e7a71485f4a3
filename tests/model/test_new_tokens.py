"""Rows of new tokens in the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from steep.errors import UserError
from steep.evaluation.adapters import base_model
from steep.evaluation.perplexity import evaluate
from steep.model.adapters import add_adapters, is_tied
from steep.model.load import keep_4bit_layout
from steep.model.new_tokens import check_trained, grow_embeddings, grow_tokenizer, rows_for
from tests.evaluation.oracle import TokenDocument, random_documents
from tests.tiny import FAMILIES, documents, save_tiny, sentencepiece_tokenizer, tiny_model, tiny_tokenizer

NEW = 40


def grown_from(original: Any, folder: Path) -> Any:
    grown = grow_tokenizer(original, folder, texts=documents("ko", 100), number=NEW)
    assert len(grown) == len(original) + NEW
    return grown


@pytest.fixture(params=["byte-level", "metaspace"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    original = tiny_tokenizer() if request.param == "byte-level" else sentencepiece_tokenizer()
    return original, grown_from(original, tmp_path / "grown")


def weights(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def expected_mean(old: torch.Tensor, original: Any, token: str) -> torch.Tensor:
    pieces = [piece.id for piece in original.backend_tokenizer.model.tokenize(token)]
    assert len(pieces) > 1
    return old[pieces].float().mean(dim=0).to(old.dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_means_of_the_old_pieces(pair: tuple[Any, Any], tied: bool, dtype: torch.dtype) -> None:
    original, grown = pair
    model: Any = tiny_model("llama", tied)
    model.to(dtype)
    before = [weight.detach().clone() for weight in weights(model)]
    grow_embeddings(model, original, grown)
    assert is_tied(model) is tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.vocab_size == 384 + NEW
    for old, new in zip(before, weights(model), strict=True):
        assert new.shape == (384 + NEW, 64) and new.dtype == dtype
        assert torch.equal(new[:384], old)
        for number in range(384, 384 + NEW):
            assert torch.equal(new[number], expected_mean(old, original, grown.convert_ids_to_tokens(number)))


def test_a_token_of_unknown_characters_begins_at_the_mean(tmp_path: Path) -> None:
    """Neither byte tokens nor one for the unknown: the old tokenizer has no piece for it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], show_progress=False)
    backend.train_from_iterator(documents("en", 40), trainer)
    original = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    grown = grow_tokenizer(original, tmp_path, words=["강물"])
    model: Any = tiny_model("llama", vocab_size=300)
    before = model.get_input_embeddings().weight.detach().clone()
    grow_embeddings(model, original, grown)
    weight = model.get_input_embeddings().weight
    assert weight.isfinite().all()
    torch.testing.assert_close(weight[grown.get_vocab()["강물"]], before[: len(original)].mean(dim=0))


@pytest.mark.parametrize("padded", [384 + NEW - 10, 384 + NEW, 512])
def test_rows_to_spare_are_used(padded: int, pair: tuple[Any, Any]) -> None:
    """Qwen's embeddings have more rows than its tokenizer has ids."""
    original, grown = pair
    model = tiny_model("llama", tied=False, vocab_size=padded)
    before = [weight.detach().clone() for weight in weights(model)]
    grow_embeddings(model, original, grown)
    rows = max(padded, 384 + NEW)
    assert rows_for(grown, padded) == model.config.vocab_size == rows
    for old, new in zip(before, weights(model), strict=True):
        assert new.shape == (rows, 64)
        last = 384 + NEW - 1
        assert torch.equal(new[last], expected_mean(old, original, grown.convert_ids_to_tokens(last)))
        assert torch.equal(new[384 + NEW :], old[384 + NEW :])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_without_new_tokens_is_the_base(family: str, tied: bool, tmp_path: Path) -> None:
    """With the new rows hidden, loss and logits are the stock model's to the bit, over a 4-bit base too."""
    original = tiny_tokenizer()
    grown = grown_from(original, tmp_path / "grown")
    save_tiny(family, tmp_path / "base", tied=tied)

    def stock() -> Any:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.float32, quantization_config=quantization
        )
        keep_4bit_layout(model)
        return model

    texts = {"d": random_documents(30, 12, 40)}
    expected = evaluate(stock(), texts, max_length=32)
    model = stock()
    grow_embeddings(model, original, grown)
    model = add_adapters(model, r=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = evaluate(model, texts, max_length=32)
    with base_model(model, 384):
        assert evaluate(model, texts, max_length=32) == expected
    with base_model(model):
        assert evaluate(model, texts, max_length=32)[0].loss > expected[0].loss  # the new rows take a share
    assert evaluate(model, texts, max_length=32) == trained
    new = {"d": [TokenDocument(np.array([5, 400, 410, 7], np.int32), num_bytes=9)]}
    assert evaluate(model, new, max_length=32)[0].tokens == 3


@pytest.mark.parametrize(
    ("tied", "trained", "missing"),
    [
        (False, ["embed_tokens"], "lm_head would stay frozen"),
        (False, ["lm_head"], "embed_tokens would stay frozen"),
        (False, [], "embed_tokens and lm_head would"),
        (True, [], "embed_tokens and lm_head would"),
        (False, ["embed_tokens", "lm_head"], None),
        (True, ["embed_tokens"], None),
        (True, ["lm_head"], None),
    ],
)
def test_new_rows_have_to_train(tied: bool, trained: list[str], missing: str | None) -> None:
    model = tiny_model("llama", tied)
    if missing is None:
        check_trained(model, trained)
    else:
        with pytest.raises(UserError, match=f"adapter.modules_to_save: .*{missing}"):
            check_trained(model, trained)


def test_a_script_gives_words_or_texts(tmp_path: Path) -> None:
    original = tiny_tokenizer()
    grown = grow_tokenizer(original, tmp_path, words=["구속", " 구속"])
    assert grown.decode(grown(" 구속", add_special_tokens=False)["input_ids"][-1:]) == " 구속"
    for wrong in ({}, {"words": ["구속"], "texts": documents("ko", 9), "number": 5}):
        with pytest.raises(UserError, match="tokens are given, or learned from texts"):
            grow_tokenizer(original, tmp_path, **wrong)


def test_a_model_is_grown_once(tmp_path: Path) -> None:
    """A second time the file of a checkpoint would have the second rows alone."""
    model, original = tiny_model("llama"), tiny_tokenizer()
    grow_embeddings(model, original, grow_tokenizer(original, tmp_path / "one", words=["강물"]))
    with pytest.raises(UserError, match="it was grown before"):
        grow_embeddings(model, original, grow_tokenizer(original, tmp_path / "two", words=["강물", "구속"]))
