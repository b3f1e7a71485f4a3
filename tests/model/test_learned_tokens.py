"""New tokens in a BPE: learned from text, or the words of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from steep.errors import UserError
from steep.model import learned_tokens
from steep.model.bpe import read_bpe
from steep.model.learned_tokens import learn
from steep.model.new_tokens import read_words, save_grown, tokens_for
from tests.tiny import documents, sentencepiece_tokenizer, tiny_tokenizer

KOREAN, ENGLISH = documents("ko", 200), documents("en", 100)
TEXTS = [
    *KOREAN[:20],
    *ENGLISH[:20],
    "강물이 crosses the 다리를, 2024년 12월! 뷁 漢字 naïve",
    "def f(x):\n\treturn  x + 1  # 편지를\n\n\n    강물이  두  칸",
    "😀👨‍👩‍👧 한국어🇰🇷도서관이 \u200b끝",
    "가",
    "도서관이",
    "<s>강물이</s> <0xEA> ▁강물이 Ġ강물이",
]
STYLES: dict[str, Callable[[], Any]] = {
    "byte-level": tiny_tokenizer,
    "Llama 2": lambda: sentencepiece_tokenizer("first"),
    "Llama 2, old": lambda: sentencepiece_tokenizer("normalizer"),
    "Gemma": lambda: sentencepiece_tokenizer("never"),
}


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(tokenizer: Any, tokens: list[int], **how: Any) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False, **how)


@pytest.fixture(params=STYLES)
def original(request: pytest.FixtureRequest) -> Any:
    return STYLES[request.param]()


def test_learned_tokens_are_ordinary_and_text_round_trips(original: Any, tmp_path: Path) -> None:
    growth = learn(read_bpe(original, "x"), [KOREAN[:100], KOREAN[100:]], 120)
    grown = save_grown(growth, original, tmp_path)
    assert len(growth.tokens) == 120
    assert len(grown) == len(original) + 120
    new = {number for token, number in grown.get_vocab().items() if token not in original.get_vocab()}
    assert new == set(range(384, 504))
    assert not new & set(grown.all_special_ids) and not new & set(grown.added_tokens_decoder)
    for text in TEXTS:
        before, after = ids(original, text), ids(grown, text)
        assert len(after) <= len(before)
        assert text_of(grown, after) == text_of(original, before)
        assert text_of(grown, after, skip_special_tokens=True) == text_of(original, before, skip_special_tokens=True)
    assert sum(len(ids(grown, text)) for text in KOREAN) < 0.8 * sum(len(ids(original, text)) for text in KOREAN)
    # Not a new token, so not another id.
    assert all(ids(grown, text) == ids(original, text) for text in ENGLISH)


def test_every_learned_token_can_be_reached(original: Any, tmp_path: Path) -> None:
    growth = learn(read_bpe(original, "x"), [KOREAN], 120)
    model = save_grown(growth, original, tmp_path).backend_tokenizer.model
    for token in growth.tokens:
        assert [piece.value for piece in model.tokenize(token)] == [token]


def test_learning_is_the_same_each_time_and_a_smaller_number_is_a_beginning(original: Any) -> None:
    bpe = read_bpe(original, "x")
    first, second, fewer = (learn(bpe, [KOREAN], number) for number in (120, 120, 50))
    assert first.tokenizer_json() == second.tokenizer_json()
    assert first.tokens[:50] == fewer.tokens


def test_the_next_merges_are_those_of_a_longer_training(tmp_path: Path) -> None:
    """Training to 320 entries and going on to 400 is training to 400, where old and new text are the same."""

    def trained(size: int) -> Any:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=learned_tokens.MIN_COUNT
        )
        words = [text.replace(".", "") for text in KOREAN]  # no punctuation: it is never joined here
        tokenizer.train_from_iterator(words, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    short, long = trained(320), trained(400)
    growth = learn(read_bpe(short, "x"), [[text.replace(".", "") for text in KOREAN]], 80)
    grown = save_grown(growth, short, tmp_path)
    expected = set(long.get_vocab()) - set(short.get_vocab())
    # Pairs that are equally frequent may be taken in another order at the end.
    assert len(expected & set(growth.tokens)) >= 78
    assert sum(len(ids(grown, text)) for text in KOREAN) <= 1.01 * sum(len(ids(long, text)) for text in KOREAN)


def test_a_character_in_bytes_becomes_a_token_before_it_is_joined() -> None:
    original = sentencepiece_tokenizer()
    growth = learn(read_bpe(original, "x"), [KOREAN], 120)
    assert not any("<0x" in token for token in growth.tokens)
    known: set[str] = set(original.get_vocab())
    for token in growth.tokens:
        assert len(token) == 1 or any(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        known.add(token)


def test_a_sentencepiece_token_is_merged_from_any_two_tokens(tmp_path: Path) -> None:
    """SentencePiece knows no merges: two neighbours whose spelling together is a token are joined, the likeliest
    first. A reader that knows only that, with later tokens less likely, has to find the same ids."""
    original = sentencepiece_tokenizer()
    growth = learn(read_bpe(original, "x"), [KOREAN], 120)
    grown = save_grown(growth, original, tmp_path)
    rank = {token: number for number, token in enumerate(growth.tokens)}
    vocabulary = grown.get_vocab()

    def joined(spelling: str) -> list[str]:
        pieces = list(spelling)
        while True:
            pairs = [
                (rank[one + other], place) for place, (one, other) in enumerate(pairwise(pieces)) if one + other in rank
            ]
            if not pairs:
                return pieces
            place = min(pairs)[1]
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]

    for text in KOREAN[:50]:
        for word in text.removesuffix(".").split(" "):
            if all(letter in vocabulary for letter in word):
                assert grown.tokenize(word)[-len(joined("▁" + word)) :] == joined("▁" + word)


def test_words_are_letters(original: Any) -> None:
    text = "3,000원 3,000원! ---- ---- 2024년... 2024년... x=1; x=1; \n\n\n\n 가. 가. "
    bpe = read_bpe(original, "x")
    growth = learn(bpe, [[text] * 30], 50)
    found = {bpe.text(token) for token in growth.tokens}
    if bpe.style == "metaspace":
        assert found == {"원", "년", "가", " 가", "x", " x"}
    else:
        assert not {letter for token in found for letter in token} & set("0123456789,.-=;\n!")


def test_fewer_tokens_where_the_text_repeats_too_little(original: Any) -> None:
    growth = learn(read_bpe(original, "x"), [["다람쥐 " * (learned_tokens.MIN_COUNT - 1)]], 50)
    assert growth.tokens == []
    growth = learn(read_bpe(original, "x"), [["다람쥐 " * (learned_tokens.MIN_COUNT + 1)]], 50)
    assert 3 <= len(growth.tokens) < 12


@pytest.mark.parametrize("kind", [LlamaTokenizer, GemmaTokenizer, Qwen2Tokenizer])
def test_a_class_that_builds_its_tokenizer_anew_keeps_the_new_tokens(kind: Any, tmp_path: Path) -> None:
    """transformers 5 reads only entries and merges of tokenizer.json for these."""
    plain = tiny_tokenizer() if kind is Qwen2Tokenizer else sentencepiece_tokenizer("never")
    tree = json.loads(plain.backend_tokenizer.to_str())["model"]
    special: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>"}
    merges: Any = [tuple(pair) for pair in tree["merges"]]
    original = kind(vocab=tree["vocab"], merges=merges, **special)
    growth = learn(read_bpe(original, "x"), [KOREAN], 60)
    grown = save_grown(growth, original, tmp_path)
    assert isinstance(grown, kind)
    for token, number in original.get_vocab().items():
        assert grown.get_vocab()[token] == number
    assert set(growth.tokens) <= set(grown.get_vocab())
    text = "강물이 도서관이 the river 뷁"
    assert len(ids(grown, text)) < len(ids(original, text))
    assert text_of(grown, ids(grown, text)) == text_of(original, ids(original, text)) == text
    grown.save_pretrained(tmp_path / "again")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "again"), text) == ids(grown, text)


@pytest.mark.parametrize("style", ["byte-level", "Llama 2"])
def test_added_tokens_keep_their_ids_and_gaps_are_filled(style: str, tmp_path: Path) -> None:
    """As in Llama 3: special tokens stand behind the model's entries, and new entries behind those."""
    original = STYLES[style]()
    original.add_special_tokens({"extra_special_tokens": ["<|one|>", "<|two|>"]})
    original.add_tokens(["plain"])
    tree = json.loads(original.backend_tokenizer.to_str())
    tree["added_tokens"][-1]["id"] = 390
    tree["model"]["vocab"]["plain"] = 390
    original.save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    original = AutoTokenizer.from_pretrained(tmp_path / "original")
    assert original.get_vocab()["plain"] == 390
    gaps = sorted(set(range(390)) - set(original.get_vocab().values()))
    assert len(gaps) == 4 and len(original) == 387
    growth = learn(read_bpe(original, "x"), [KOREAN], 20)
    grown = save_grown(growth, original, tmp_path / "grown")
    assert grown.get_vocab() == {**original.get_vocab(), **{token: grown.get_vocab()[token] for token in growth.tokens}}
    assert sorted(grown.get_vocab()[token] for token in growth.tokens) == [*gaps, *range(391, 407)]
    assert len(grown) == 407
    assert ids(grown, "<|two|>plain") == ids(original, "<|two|>plain")
    assert grown.all_special_ids == original.all_special_ids


# --- a file of tokens ---------------------------------------------------------------------------------------------


def test_the_words_of_a_file_are_one_token_each(original: Any, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(" 구속영장\n구속\n▁대법원\nphotosynthesis\n photo\n\n", encoding="utf-8")
    words = read_words(file, "x")
    assert words == {" 구속영장": 1, "구속": 2, " 대법원": 3, "photosynthesis": 4, " photo": 5}
    bpe = read_bpe(original, "x")
    growth = tokens_for(bpe, words, "x")
    grown = save_grown(growth, original, tmp_path)
    for word in words:
        # Behind other text, as it would stand in one.
        text = f"the{word}"
        after = ids(grown, text)
        assert text_of(grown, after) == text
        assert text_of(grown, [after[-1]]).strip() == word.strip(), grown.convert_ids_to_tokens(after)
    text = "the 대법원 the 구속영장 photosynthesis 구속 the"
    assert text_of(grown, ids(grown, text)) == text
    assert len(ids(grown, text)) < len(ids(original, text))
    assert ids(grown, ENGLISH[0]) == ids(original, ENGLISH[0])
    tokens = set(growth.tokens)
    assert {bpe.spell(word) for word in words} <= tokens


def test_few_tokens_stand_on_the_way_to_a_word() -> None:
    """`ab`, `cd` and `abcd` over letters: the two short ones are all that the long one needs."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefĠ")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = read_bpe(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "x")
    assert set(tokens_for(bpe, {"abcd": 1, "ab": 2, "cd": 3}, "x").tokens) == {"ab", "cd", "abcd"}
    assert len(tokens_for(bpe, {"abcdef": 1}, "x").tokens) == 5
    assert tokens_for(bpe, {"ababab": 1}, "x").tokens == ["ab", "abab", "ababab"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no token"),
        (b"\n \n", "holds no token"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("가나\n다라\n가나\n".encode(), r"line 3: '가나' stands in line 1 too"),
        (" 가나\n▁가나\n".encode(), r"line 2: ' 가나' stands in line 1 too"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=problem) as raised:
        read_words(file, "model.new_tokens")
    assert str(raised.value).startswith("model.new_tokens: ")


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("the", "line 7: 'the' is a token already"),
        ("New York", "line 7: 'New York' is taken apart by the tokenizer before its merges"),
    ],
)
def test_a_word_that_is_no_new_token_is_refused(word: str, problem: str) -> None:
    bpe = read_bpe(tiny_tokenizer(), "x")
    if word == "the":
        word = next(token for token in bpe.vocabulary if token.isascii() and token.isalpha() and len(token) == 2)
        problem = problem.replace("the", word)
    with pytest.raises(UserError, match=problem):
        tokens_for(bpe, {word: 7}, "x")


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "words", "slow"])
def test_a_tokenizer_that_cannot_grow_is_refused(kind: str) -> None:
    tokenizer: Any
    if kind == "slow":
        tokenizer = object()
    else:
        model = {
            "Unigram": lambda: models.Unigram([("a", 0.0), ("b", -1.0)], 0, False),
            "WordPiece": lambda: models.WordPiece({"a": 0, "[UNK]": 1}),
            "words": lambda: models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"),
        }[kind]()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    problem = {
        "slow": "object has no tokenizer.json that could grow",
        "words": "neither byte-level nor SentencePiece's",
    }.get(kind, f"the tokenizer is a {kind} and not a BPE")
    with pytest.raises(UserError, match=f"model.new_tokens: .*{problem}"):
        read_bpe(tokenizer, "model.new_tokens")
