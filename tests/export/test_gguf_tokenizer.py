"""Tokenizers in GGUF: llama.cpp makes the tokens that transformers makes, and what it would not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from steep.errors import UserError
from steep.export import gguf_tokenizer
from steep.export.gguf_tokenizer import Vocabulary, add_vocabulary, is_misread_by_converter, read_vocabulary
from steep.model.pre_tokenizers import pre_tokenizer_name
from tests.export.gguf_texts import TEXTS
from tests.export.llama_cpp_judge import opened, token_ids
from tests.export.tokenizers_of_kinds import SPACE, byte_level, sentencepiece_json, sentencepiece_style
from tests.tiny import BOS, EOS, tiny_config, tiny_tokenizer

BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"]
WITHOUT_TOKENS_OF_THEIR_OWN = [text for text in TEXTS if "<s>" not in text]


def vocabulary_file(vocabulary: Vocabulary, file: Path) -> Path:
    """A GGUF file with a tokenizer and no model."""
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(512)
    add_vocabulary(writer, vocabulary)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    writer.close()
    return file


def vocabulary_of(tokenizer: Any, rows: int | None = None) -> Vocabulary:
    return read_vocabulary(tokenizer, tiny_config("llama", vocab_size=rows or len(tokenizer)))


def differing(tokenizer: Any, file: Path, texts: list[str]) -> list[str]:
    ids = token_ids(file, texts, vocab_only=True)
    return [text for text, found in zip(texts, ids, strict=True) if found != tokenizer(text)["input_ids"]]


# --- byte-level BPE -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.llama_cpp
def test_byte_level_tokens_are_llama_cpps(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(name)
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.model, vocabulary.pre_tokenizer) == ("gpt2", name)
    assert vocabulary.adds_bos == (name == "llama-bpe")
    assert differing(tokenizer, vocabulary_file(vocabulary, tmp_path / "v.gguf"), TEXTS) == []


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.llama_cpp
def test_another_pre_tokenizers_name_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(name)
    other = BYTE_LEVEL[BYTE_LEVEL.index(name) - 1]
    monkeypatch.setattr(gguf_tokenizer, "pre_tokenizer_name", lambda *_: other)
    assert differing(tokenizer, vocabulary_file(vocabulary_of(tokenizer), tmp_path / "v.gguf"), TEXTS)


@pytest.mark.llama_cpp
def test_text_comes_back(tmp_path: Path) -> None:
    tokenizer = byte_level("qwen2")
    with opened(vocabulary_file(vocabulary_of(tokenizer), tmp_path / "v.gguf"), vocab_only=True) as judge:
        for text in WITHOUT_TOKENS_OF_THEIR_OWN:
            assert judge.detokenize(judge.tokenize(text.encode(), add_bos=False)).decode() == text


@pytest.mark.llama_cpp
def test_ordinary_tokens_added_later_are_found_in_the_text(tmp_path: Path) -> None:
    tokenizer = byte_level("llama-bpe")
    tokenizer.add_tokens(["대한민국", "헌법 제", AddedToken("국어", normalized=False)])
    vocabulary = vocabulary_of(tokenizer)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["국어"] == types["헌법 제"] == TokenType.USER_DEFINED
    assert types[EOS] == TokenType.CONTROL
    file = vocabulary_file(vocabulary, tmp_path / "v.gguf")
    first, second = (tokenizer.convert_tokens_to_ids(token) for token in ("대한민국", "헌법 제"))
    assert tokenizer("대한민국헌법 제1조")["input_ids"][1:3] == [first, second]
    assert differing(tokenizer, file, [*TEXTS, "대한민국헌법 제1조", "a대한민국 b"]) == []
    with opened(file, vocab_only=True) as judge:
        ids = judge.tokenize("대한민국헌법 제1조".encode(), add_bos=False)
        assert judge.detokenize(ids).decode() == "대한민국헌법 제1조"


@pytest.mark.llama_cpp
def test_tokens_that_extend_the_merges_are_merged(tmp_path: Path) -> None:
    tokenizer = byte_level("qwen2")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    left, right = tokenizer.tokenize("뱃살")[:2]
    description["model"]["vocab"][left + right] = len(tokenizer)
    description["model"]["merges"].append([left, right])
    longer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token=EOS)
    assert longer("뱃살")["input_ids"][0] == len(tokenizer)
    assert differing(longer, vocabulary_file(vocabulary_of(longer), tmp_path / "v.gguf"), [*TEXTS, "뱃살"]) == []


def test_rows_without_a_token_get_an_unused_one() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    vocabulary = vocabulary_of(tokenizer, rows=len(tokenizer) + 2)
    assert vocabulary.tokens[-3:] == [tokenizer.convert_ids_to_tokens(len(tokenizer) - 1), "[PAD384]", "[PAD385]"]
    assert vocabulary.types[-3:] == [TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED]


def test_a_special_token_without_a_row_is_left_out_and_an_ordinary_one_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    assert len(vocabulary_of(tokenizer, rows=384).tokens) == 384
    tokenizer.add_tokens(["강물"])
    with pytest.raises(UserError, match=r"1 tokens have no row in the embeddings \('강물'"):
        vocabulary_of(tokenizer, rows=384)


def test_special_ids_are_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    assert vocabulary_of(tokenizer).special == {"bos": 1, "eos": 2, "pad": 0}
    # llama.cpp would take token 11 for a beginning that is not said.
    config = tiny_config("llama", vocab_size=384, bos_token_id=None)
    without = tiny_tokenizer()
    assert read_vocabulary(without, config).special == {"bos": 2, "eos": 2, "pad": 0}
    without.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        read_vocabulary(without, config)


def test_a_chat_template_goes_along() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    writer = GGUFWriter(None, "llama")
    add_vocabulary(writer, vocabulary_of(tokenizer))
    assert writer.kv_data[0]["tokenizer.chat_template"].value == tokenizer.chat_template


# --- SentencePiece's BPE --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma"])
@pytest.mark.llama_cpp
def test_sentencepiece_tokens_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_style(kind)
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.model, vocabulary.adds_bos, vocabulary.adds_space) == ("llama", True, kind != "gemma")
    assert vocabulary.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    texts = TEXTS
    if kind == "mistral":  # transformers puts no second space before a text that begins with one; llama.cpp does
        texts = [text for text in WITHOUT_TOKENS_OF_THEIR_OWN if not text.startswith((" ", SPACE))]
    assert differing(tokenizer, vocabulary_file(vocabulary, tmp_path / "v.gguf"), texts) == []


@pytest.mark.llama_cpp
def test_scores_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentencepiece_style("gemma")
    vocabulary = vocabulary_of(tokenizer)
    vocabulary.scores[:] = [-1000.0] * len(vocabulary.scores)
    assert differing(tokenizer, vocabulary_file(vocabulary, tmp_path / "v.gguf"), TEXTS)


@pytest.mark.llama_cpp
def test_ordinary_tokens_are_added_to_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece_style("gemma")
    tokenizer.add_tokens([AddedToken("대한민국", normalized=False), AddedToken("헌법 제", normalized=True)])
    file = vocabulary_file(vocabulary_of(tokenizer), tmp_path / "v.gguf")
    assert differing(tokenizer, file, [*TEXTS, "대한민국헌법 제1조", "a대한민국 b", "  대한민국  "]) == []


def test_a_space_after_an_added_token_is_refused() -> None:
    for kind in ("llama", "mistral"):
        tokenizer = sentencepiece_style(kind)
        tokenizer.add_tokens([AddedToken("대한민국", normalized=True)])
        with pytest.raises(UserError, match="put a space after each of them"):
            vocabulary_of(tokenizer)


@pytest.mark.llama_cpp
def test_a_run_of_spaces_that_merges_make_stays_an_ordinary_piece(tmp_path: Path) -> None:
    tokenizer = sentencepiece_style("gemma")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    runs = [SPACE * length for length in range(2, 6)]
    for run in runs:
        description["model"]["vocab"].setdefault(run, len(description["model"]["vocab"]))
    known = [tuple(merge) for merge in description["model"]["merges"]]
    pairs = [(SPACE * a, SPACE * b) for a in range(1, 5) for b in range(1, 6 - a)]
    description["model"]["merges"] = [list(pair) for pair in [*known, *(pair for pair in pairs if pair not in known)]]
    # every other piece that now can be cut at a run of spaces
    vocab = description["model"]["vocab"]
    known = {tuple(merge) for merge in description["model"]["merges"]}
    for piece in vocab:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab and (piece[:cut], piece[cut:]) not in known:
                description["model"]["merges"].append([piece[:cut], piece[cut:]])
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )
    spaced.add_tokens([AddedToken(run, normalized=False) for run in runs])
    vocabulary = vocabulary_of(spaced)
    assert {vocabulary.types[vocab[run]] for run in runs} == {TokenType.NORMAL}
    file = vocabulary_file(vocabulary, tmp_path / "v.gguf")
    texts = ["a     b", "a  b   c", " a  "]
    assert differing(spaced, file, texts) == []
    with opened(file, vocab_only=True) as judge:
        ids = judge.tokenize(b"a     b", add_bos=False)
        assert vocab[SPACE * 5] in ids or vocab[SPACE * 4] in ids
        assert judge.detokenize(ids) == b"a     b"


def without_merges(unwanted: Callable[[list[str]], bool]) -> PreTrainedTokenizerFast:
    description = json.loads(sentencepiece_json("gemma").to_str())
    merges = description["model"]["merges"]
    description["model"]["merges"] = [pair for pair in merges if not unwanted(pair)]
    assert len(description["model"]["merges"]) < len(merges)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )


def test_a_merge_that_is_missing_is_refused() -> None:
    whole = json.loads(sentencepiece_json("gemma").to_str())["model"]["merges"]
    tokenizer = without_merges(lambda pair: pair == whole[0])
    with pytest.raises(
        UserError,
        match=r"llama.cpp would merge .* which this tokenizer does not.*not where .* no tokenizer\.model",
    ):
        vocabulary_of(tokenizer)


@pytest.mark.llama_cpp
def test_a_merge_that_no_text_comes_to_may_be_missing(tmp_path: Path) -> None:
    """Of a piece's two merges one makes its own text; without the other llama.cpp still makes the same tokens."""
    ways: dict[str, list[list[str]]] = {}
    for pair in json.loads(sentencepiece_json("gemma").to_str())["model"]["merges"]:
        ways.setdefault("".join(pair), []).append(pair)
    pairs = next(pairs for pairs in ways.values() if len(pairs) == 2)
    first, second = (without_merges(lambda pair, one=one: pair == one) for one in pairs)
    piece = "".join(pairs[0])
    harmless, harmful = (first, second) if len(first.tokenize(piece)) == 1 else (second, first)
    assert differing(harmless, vocabulary_file(vocabulary_of(harmless), tmp_path / "v.gguf"), TEXTS) == []
    with pytest.raises(UserError, match=f"into '{piece}', which this tokenizer does not"):
        vocabulary_of(harmful)


def test_llama_cpps_converter_needs_tokenizer_model(tmp_path: Path) -> None:
    for name, tokenizer, misread in (
        ("pieces", sentencepiece_style("llama"), True),
        ("bytes", tiny_tokenizer(), False),
    ):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        assert is_misread_by_converter(folder) is misread
        (folder / "tokenizer.model").write_bytes(b"scores")
        assert not is_misread_by_converter(folder)


# --- what is refused ------------------------------------------------------------------------------------------


def altered(tokenizer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{role: token for role, token in tokenizer.special_tokens_map.items()}
    )


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (
            altered(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )),
            r"none of the ways that steep knows llama.cpp's name of.*convert_hf_to_gguf\.py",
        ),
        (
            altered(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "none of the ways that steep knows",
        ),
        (altered(tiny_tokenizer(), normalizer=normalizers.NFKC()), "changes its text first"),
        (
            altered(sentencepiece_style("gemma"), normalizer=normalizers.NFC(), pre_tokenizer=None),
            "treats spaces in none of the ways",
        ),
        (
            altered(sentencepiece_style("mistral"), pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "first", split=True)),
            "treats spaces in none of the ways",
        ),
        (
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({EOS: 0, "a": 1}, EOS)), eos_token=EOS),
            "this one is WordLevel",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_tokenises_otherwise_is_refused(tokenizer: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        vocabulary_of(tokenizer)


def test_composed_text_is_taken_for_granted() -> None:
    """Qwen's tokenizer composes its text (NFC), llama.cpp doesn't; nearly all text is composed."""
    tokenizer = altered(byte_level("qwen2"), normalizer=normalizers.NFC())
    assert vocabulary_of(tokenizer).pre_tokenizer == "qwen2"


def test_an_added_token_that_takes_spaces_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("강물", lstrip=True)])
    with pytest.raises(UserError, match="'강물' takes the spaces around it"):
        vocabulary_of(tokenizer)


def test_a_rule_that_is_nearly_a_known_one_has_no_name() -> None:
    known = json.loads(byte_level("llama-bpe").backend_tokenizer.to_str())["pre_tokenizer"]
    assert pre_tokenizer_name(known, True) == "llama-bpe"
    other = json.loads(json.dumps(known).replace("{1,3}", "{1,2}"))
    assert pre_tokenizer_name(other, True) is None
    removed = json.loads(json.dumps(known).replace("Isolated", "Removed"))
    assert pre_tokenizer_name(removed, True) is None
    assert pre_tokenizer_name(None, False) is None
