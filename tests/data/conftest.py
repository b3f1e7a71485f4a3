"""A tiny tokenizer, and a writer of text files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "법령의 조문은 이 법령에 따른다", "one two three"]


def make_tokenizer(
    *, merges: bool = True, bos: bool = True, eos: bool = True, appends_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> and </s>; without `merges` each byte is one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = 3 + len(alphabet) + (60 if merges else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(TEXTS, trainer)
    if bos or appends_eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if appends_eos else "")
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>", "pad_token": "<pad>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="session", name="make_tokenizer")
def make_tokenizer_fixture() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token; BOS in front, EOS behind: a text of n ASCII characters has n + 2 tokens."""
    return make_tokenizer(merges=False)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: list[str], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def no_eos_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token, and nothing around it: a text of one character has one token."""
    return make_tokenizer(merges=False, bos=False, eos=False)
