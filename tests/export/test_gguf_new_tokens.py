"""A tokenizer with new tokens in GGUF: llama.cpp merges them as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.model.new_tokens import grow_tokenizer
from tests.export.gguf_texts import TEXTS
from tests.export.test_gguf_tokenizer import differing, vocabulary_file, vocabulary_of
from tests.export.tokenizers_of_kinds import SPACE, byte_level, sentencepiece_style
from tests.tiny import documents

KOREAN = documents("ko", 200)
WORDS = [" 구속영장", "대법원장", " 도서관", "photosynthesis", " 불법행위"]
MIXED = ["the 구속영장 of the 대법원장: 도서관이 도서관 photosynthesis, 불법행위 불법 행위", "😀 도서관이 뱃사람이 x+1"]


@pytest.mark.parametrize("source", ["text", "words"])
@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2", "llama", "mistral", "gemma"])
@pytest.mark.llama_cpp
def test_new_tokens_are_llama_cpps(kind: str, source: str, tmp_path: Path) -> None:
    original = sentencepiece_style(kind) if kind in ("llama", "mistral", "gemma") else byte_level(kind)
    grown: Any
    if source == "text":
        grown = grow_tokenizer(original, tmp_path / "grown", texts=KOREAN, number=120)
    else:
        words = [word for word in WORDS if len(original.tokenize(word)) > 1]
        grown = grow_tokenizer(original, tmp_path / "grown", words=words)
    texts = [*TEXTS, *KOREAN[:40], *MIXED]
    if kind == "mistral":  # transformers puts no second space before a text that begins with one; llama.cpp does
        texts = [text for text in texts if "<s>" not in text and not text.startswith((" ", SPACE))]
    new = set(grown.get_vocab().values()) - set(original.get_vocab().values())
    assert any(new & set(grown(text)["input_ids"]) for text in texts)
    assert differing(grown, vocabulary_file(vocabulary_of(grown), tmp_path / "v.gguf"), texts) == []
