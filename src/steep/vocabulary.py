"""The tokenizer of a run with new tokens: grown once, kept, and measured against the one that it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steep.data.encoder import digest
from steep.data.heldout import HeldoutDocument, heldout_by_domain
from steep.data.mixing import Side, assign_sides
from steep.data.packing import Corpus, tokenize_sources
from steep.data.sources import Source
from steep.data.token_file import Progress
from steep.data.tokens import TokenizedSource
from steep.errors import RunError, UserError
from steep.evaluation.perplexity import choose
from steep.model.bpe import Bpe, read_bpe
from steep.model.learned_tokens import MIN_COUNT, in_batches, learn
from steep.model.new_tokens import read_words, save_grown, tokens_for
from steep.model.resolve import read_tokenizer_folder
from steep.recorded import read_json
from steep.schema import DataSection
from steep.storage import cache_folder, published

_FIELD = "model.new_tokens"
_RECORD = "new_tokens.json"
_VERSION = b"1"  # of how tokens are learned and put in
# What learning reads at the most, so that its time and memory are bounded.
_CHARACTERS = 20_000_000
# Tokens on the way to others are often used up by them: a tenth is no reason to worry.
_MANY_UNSEEN = 0.1


@dataclass(frozen=True)
class Vocabulary:
    """A grown tokenizer.

    Attributes:
        tokenizer: with the new tokens. original: the model's own.
        folder: where the grown one is kept, with the list of the new tokens.
        before: the sources as the original reads them.
        learned: whether the tokens are learned from the text; else they come from a file.
        asked: how many tokens were asked for; a file's words, or `auto`. tokens: the new ones, as text, by id.
    """

    tokenizer: Any
    original: Any
    folder: Path
    before: list[TokenizedSource]
    learned: bool
    asked: int
    tokens: dict[int, str]

    @property
    def ids_before(self) -> int:
        """Ids up to the original's largest."""
        return max(self.original.get_vocab().values()) + 1

    @property
    def documents(self) -> dict[int, int]:
        """How many documents of a source the grown tokenizer is to read, by the source's number: as many as the
        original took to fill its `max_tokens`, so that both read the same ones."""
        return {index: len(source) for index, source in enumerate(self.before) if source.stopped}

    def base_documents(self, corpus: Corpus, max_tokens: int | None) -> dict[str, list[HeldoutDocument]]:
        """The held-out documents that `max_tokens` chooses of `corpus`, as the original tokenizer reads them: what the
        untouched base is scored on."""
        for before, after in zip(self.before, corpus.sources, strict=True):
            if not np.array_equal(before.hashes, after.hashes):
                raise RunError(f"{before.source.location} changed between two readings: let it stand and start again")
        documents = heldout_by_domain(self.before, corpus.sides)
        return {
            domain: [documents[domain][index] for index in choose(domain, heldout, max_tokens)]
            for domain, heldout in corpus.heldout.items()
        }

    def figures(self, corpus: Corpus) -> dict[str, Any]:
        """What the new tokens do to the text, JSON-able. `old_language` marks what the model could read before: replay
        text, and held-out text of a domain that is not trained."""
        trained = {item.source.domain_name for item in corpus.sources if item.source.role == "train"}
        by_source = []
        for before, after in zip(self.before, corpus.sources, strict=True):
            source, characters = before.source, int(before.num_chars.sum())
            by_source.append(
                {
                    "domain": source.domain_name,
                    "role": source.role,
                    "tokens_per_character_before": before.text_tokens / characters,
                    "tokens_per_character": after.text_tokens / characters,
                    "old_language": source.role == "replay"
                    or (source.role == "heldout" and source.domain_name not in trained),
                    "share_that_differs": _share_that_differs(before, after),
                }
            )
        unseen = self.unseen(corpus)
        return {
            "learned": self.learned,
            "asked": self.asked,
            "added": len(self.tokens),
            "unseen": len(unseen),
            "unseen_examples": unseen[:3],
            "sources": by_source,
        }

    def unseen(self, corpus: Corpus) -> list[str]:
        """New tokens that no train or replay source holds."""
        seen: set[int] = set()
        for item in corpus.sources:
            if item.source.role != "heldout":
                seen |= item.ids_among(self.tokens)
        return [token for number, token in self.tokens.items() if number not in seen]


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What the user should know of `Vocabulary.figures`, in plain words."""
    found = []
    if figures["added"] < figures["asked"]:
        found.append(
            f"{figures['asked']:,} new tokens were asked for, and the text gives {figures['added']:,}: others would "
            f"join pieces that stand side by side fewer than {MIN_COUNT} times."
        )
    if figures["unseen"] > _MANY_UNSEEN * figures["added"]:
        advice = (
            "Longer tokens were made out of them; ask for fewer, or give more text."
            if figures["learned"]
            else "In a file of tokens, a word that stands behind a space is written with a space (or ▁) in front."
        )
        found.append(
            f"{figures['unseen']:,} of {figures['added']:,} new tokens do not occur in the text that is trained, such "
            f"as {', '.join(map(repr, figures['unseen_examples']))}: their rows will learn nothing. {advice}"
        )
    return found


def _share_that_differs(before: TokenizedSource, after: TokenizedSource) -> float:
    """Share of the documents whose ids are not the same."""
    if before.digest == after.digest:
        return 0.0
    same = np.flatnonzero(before.lengths == after.lengths).tolist()
    equal = sum(np.array_equal(before.tokens(index), after.tokens(index)) for index in same)
    return 1 - equal / len(before)


def grown(
    new_tokens: str | int,
    original: Any,
    sources: Sequence[Source],
    data: DataSection,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> Vocabulary:
    """The tokenizer `original` with new tokens.

    Args:
        new_tokens: a file of them, or how many to learn from the text of role train.
        kept: the folder of a tokenizer that was grown before, for a run that has one; nothing is learned then.
        progress: called while `original` reads the text.

    Raises:
        UserError: a tokenizer that cannot grow, a file that cannot be read, a word that is no new token, or text that
            repeats nothing.
    """
    bpe = read_bpe(original, _FIELD)
    words = read_words(Path(new_tokens), _FIELD) if isinstance(new_tokens, str) and kept is None else {}
    before = tokenize_sources(sources, original, data.cache_dir, progress)
    if kept is None:
        kept = _make(bpe, original, words, new_tokens, before, data)
    record = _record(kept)
    tokens = {item["id"]: item["text"] for item in record["tokens"]}
    learned = isinstance(new_tokens, int)
    return Vocabulary(read_tokenizer_folder(kept), original, kept, before, learned, record["asked"], tokens)


def _make(
    bpe: Bpe,
    original: Any,
    words: dict[str, int],
    new_tokens: str | int,
    before: list[TokenizedSource],
    data: DataSection,
) -> Path:
    """The folder of the grown tokenizer in the cache, made unless it is there."""
    sides = assign_sides(before, data.holdout, data.keep_duplicates)
    key = [_VERSION, json.dumps(bpe.tree).encode(), json.dumps([*words]).encode()]
    if isinstance(new_tokens, int):
        # `sides` are a function of all sources, so all of them count.
        key += [str(new_tokens).encode(), *(source.digest.encode() for source in before)]
        key += [f"{source.source.role} {data.holdout} {data.keep_duplicates}".encode() for source in before]
    folder = cache_folder() / "tokenizers" / digest(key).hex()
    if folder.is_dir():
        return folder
    if isinstance(new_tokens, int):
        growth = learn(bpe, in_batches(_texts(bpe, before, sides)), new_tokens)
        if not growth.tokens:
            raise UserError(
                f"{_FIELD}.auto",
                f"no two tokens stand side by side in a word of the train text {MIN_COUNT} times",
                "Give more text, or leave it out.",
            )
    else:
        growth = tokens_for(bpe, words, _FIELD)
    asked = new_tokens if isinstance(new_tokens, int) else len(words)
    with published(folder, existing="keep") as staging:
        ids = save_grown(growth, original, staging).get_vocab()
        tokens = [{"id": ids[token], "text": bpe.text(token), "token": token} for token in growth.tokens]
        record = {"asked": asked, "words": [*words] or None, "tokens": tokens}
        (staging / _RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def _record(folder: Path) -> dict[str, Any]:
    file, remedy = folder / _RECORD, "Put it back, or train again."
    if not file.is_file():
        raise UserError("run folder", f"{file} is not there", remedy)
    return read_json(file, remedy)


def refuse_other_words(kept: Path, file: str, field: str) -> None:
    """Check that the file of new tokens says what the tokenizer in `kept` was grown by.

    Raises:
        UserError: it says something else.
    """
    if _record(kept)["words"] != [*read_words(Path(file), _FIELD)]:
        raise UserError(field, f"{file} ({_FIELD}) is not what the run began with", "Put it back, or start a new run.")


def _texts(bpe: Bpe, sources: list[TokenizedSource], sides: list[np.ndarray]) -> Iterator[str]:
    """The train documents' texts, made from their tokens: no source is read a second time. Evenly spread ones where
    there are more than `_CHARACTERS`."""
    chosen = [
        (source, np.flatnonzero(side == Side.TRAIN))
        for source, side in zip(sources, sides, strict=True)
        if source.source.role == "train"
    ]
    total = sum(int(source.num_chars[documents].sum()) for source, documents in chosen)
    for source, documents in chosen:
        for document in documents[:: 1 + total // _CHARACTERS]:
            text = source.tokens(document, source.prefix_length, int(source.lengths[document]) - source.has_eos)
            yield bpe.backend.decode(text.tolist(), skip_special_tokens=False)
