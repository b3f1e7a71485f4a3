"""New tokens learned from text: byte-pair encoding goes on where the tokenizer's own training ended.

The old tokenizer cuts the text, each of its tokens counts as one letter, and the trainer of `tokenizers` learns merges
of those. So the new tokens are what an ordinary, larger vocabulary would have had next, for this text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from steep.model.bpe import Bpe, Growth

MIN_COUNT = 10
"""How often two tokens have to stand side by side: a row that is met more seldom has too little to learn from."""

# Letters of the trainer's alphabet. A character that the old tokenizer spells in bytes is a lead and a tail, which
# stand nowhere else: the merge that joins them is the character's own token. Leads come first, since the trainer takes
# the pair of the lower letters where two are equally frequent; so nothing else joins a lead or a tail before.
_LEAD, _TAIL, _PIECE = 0x10000, 0x20000, 0x30000
_BYTE = 0xE000
_BYTES = re.compile(f"[{chr(_BYTE)}-{chr(_BYTE + 255)}]+")
_BATCH = 256  # documents cut at a time
_AT_ONCE = 1000  # copies of a word in one string for the trainer


def learn(bpe: Bpe, texts: Iterable[Sequence[str]], number: int) -> Growth:
    """Learn up to `number` new tokens; fewer where the text repeats too little.

    Tokens are joined inside of words only, and words are made of letters: no digits, no punctuation.

    Args:
        texts: documents, in batches.
    """
    words = _byte_level_words(bpe, texts) if bpe.style == "byte-level" else _metaspace_words(bpe, texts)
    letters = len(set().union(*words)) if words else 0
    asked = number
    while True:
        merges = _train(words, letters + asked)
        growth = _growth(bpe, merges, number)
        # Some merges make a token that exists: old ones cut differently, or two ways to the same new one.
        if len(growth.tokens) == number or len(merges) < asked:
            return growth
        asked += number - len(growth.tokens)


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts as `learn` takes them."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _train(words: Counter[str], size: int) -> list[tuple[str, str]]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=MIN_COUNT, show_progress=False)
    trained.train_from_iterator(_copies(words), trainer)
    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]


def _copies(words: Counter[str]) -> Iterator[str]:
    """Each word as often as it was counted; the trainer takes no counts."""
    for word, copies in words.items():
        for start in range(0, copies, _AT_ONCE):
            yield " ".join([word] * min(_AT_ONCE, copies - start))


def _growth(bpe: Bpe, merges: Iterable[tuple[str, str]], number: int) -> Growth:
    tokens = {id: token for token, id in bpe.vocabulary.items()}

    def spelt(letters: str) -> str:
        """In the vocabulary's spelling; a lead stands for its character, its tail for nothing."""
        return "".join(
            tokens[ord(letter) - _PIECE] if ord(letter) >= _PIECE
            else "" if ord(letter) >= _TAIL
            else chr(ord(letter) - _LEAD)
            for letter in letters
        )  # fmt: skip

    growth = Growth(bpe)
    for left, right in merges:
        if len(growth.tokens) == number:
            break
        if right < chr(_PIECE) and len(left) == len(right) == 1:
            growth.add_character(spelt(left))
        else:
            growth.join(spelt(left), spelt(right))
    growth.finish()
    return growth


def _byte_level_words(bpe: Bpe, texts: Iterable[Sequence[str]]) -> Counter[str]:
    """The pre-tokeniser's words, in letters of the trainer, with their counts."""
    letters = _letter_table(bpe)
    words: Counter[str] = Counter()
    for batch in texts:
        for encoding in bpe.backend.encode_batch(list(batch), add_special_tokens=False):
            line = "".join([letters[number] for number in encoding.ids])
            ends = np.flatnonzero(np.diff(np.array(encoding.word_ids, dtype=np.int64))) + 1
            edges = [0, *ends.tolist(), len(line)]
            words.update(line[edges[i] : edges[i + 1]] for i in range(len(edges) - 1))
    tokens = {id: token for token, id in bpe.vocabulary.items()}
    decoder = decoders.ByteLevel()
    kept: Counter[str] = Counter()
    for word, copies in words.items():
        pieces = [tokens[ord(letter) - _PIECE] for letter in word]
        # Some pre-tokenisers leave a quotation mark or the like in front of the letters.
        first = 0 if _is_word(decoder.decode(pieces)) else 1
        if len(pieces) - first > 1 and (first == 0 or _is_word(decoder.decode(pieces[1:]))):
            kept[word[first:]] += copies
    return kept


def _metaspace_words(bpe: Bpe, texts: Iterable[Sequence[str]]) -> Counter[str]:
    """What lies between spaces and everything that is no letter, in letters of the trainer, with its count."""
    table = _letter_table(bpe)
    for token, number in bpe.vocabulary.items():
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        if byte:
            table[number] = chr(_BYTE + int(byte[1], 16))
        elif token.startswith(bpe.space) and _is_word(token.removeprefix(bpe.space), or_nothing=True):
            table[number] = f" {table[number]}"
        elif not _is_word(token):
            table[number] = " "
    words: Counter[str] = Counter()
    for batch in texts:
        for encoding in bpe.backend.encode_batch_fast(list(batch), add_special_tokens=False):
            line = "".join([table[number] for number in encoding.ids])
            words.update(_BYTES.sub(_characters, line).split(" "))
    return Counter({word: copies for word, copies in words.items() if len(word) > 1})


def _characters(run: re.Match[str]) -> str:
    """Characters that the old tokenizer spelt in bytes, as lead and tail; what is no letter parts words."""
    text = bytes(ord(letter) - _BYTE for letter in run[0]).decode("utf-8", errors="replace")
    return "".join(
        chr(_LEAD + ord(letter)) + chr(_TAIL + ord(letter)) if _is_word(letter) and ord(letter) < 0x10000 else " "
        for letter in text
    )


def _letter_table(bpe: Bpe) -> list[str]:
    return [chr(_PIECE + number) for number in range(max(bpe.vocabulary.values()) + 1)]


def _is_word(text: str, or_nothing: bool = False) -> bool:
    """Whether it is letters (and the marks on them), with a space in front or not."""
    text = text.removeprefix(" ")
    return all(unicodedata.category(character)[0] in "LM" for character in text) if text else or_nothing
