"""The ledger: it adds up for what is right, agrees with a plain count, and notices what is wrong."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data.ledger import check_ledger
from steep.data.mixing import Side
from steep.data.packing import IGNORE, Corpus, pack

from .test_packing import MAX_LENGTH, corpora, pack_drawn, write_sources


def plain_count(corpus: Corpus, times: np.ndarray) -> list[list[int]]:
    """For each source, how many tokens of each document were trained: one set of positions a document, row by row."""
    seen = [[set() for _ in range(len(source))] for source in corpus.sources]
    rows = corpus.train
    for row in np.flatnonzero(times):
        for piece in range(rows.row_first[row], rows.row_first[row + 1]):
            start, length = int(rows.start[piece]), int(rows.length[piece])
            seen[rows.source[piece]][rows.document[piece]] |= set(range(start + (start > 0), start + length))
    return [[len(positions) for positions in source] for source in seen]


@settings(max_examples=100, deadline=None)
@given(drawn=corpora(), data=st.data())
def test_it_adds_up_whatever_was_trained(byte_tokenizer, no_eos_tokenizer, drawn, data):
    sources, options = drawn
    tokenizer = no_eos_tokenizer if options["seed"] == 3 else byte_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        corpus = pack_drawn(sources, options, tokenizer, Path(folder))
        if corpus is None:
            return
        times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(corpus.train), max_size=len(corpus.train))))
        if data.draw(st.booleans()):
            times += 1
        ledger = corpus.ledger(times)
        assert ledger["problems"] == []
        assert ledger["adds_up"] is True
        assert json.loads(json.dumps(ledger)) == ledger

        labels = np.stack([corpus.train[index]["labels"].numpy() for index in range(len(corpus.train))])
        by_row = (labels != IGNORE).sum(axis=1)
        assert ledger["targets"] == by_row.sum()
        assert ledger["targets_trained"] == (by_row * times).sum()
        assert ledger["epochs"] == pytest.approx((by_row * times).sum() / max(by_row.sum(), 1))
        assert {int(n): targets for n, targets in ledger["times_trained"].items()} == {
            n: by_row[times == n].sum() for n in set(times.tolist())
        }
        for part, source, side, planned, counted in zip(
            ledger["sources"],
            corpus.sources,
            corpus.sides,
            corpus.mixture.planned,
            plain_count(corpus, times),
            strict=True,
        ):
            whole = [int(c == length) for c, length in zip(counted, source.lengths, strict=True)]
            assert part["tokens"]["trained"] == sum(counted)
            assert part["documents"]["trained"] == sum(whole)
            assert part["partly_trained"] == sum(c > 0 for c in counted) - sum(whole)
            assert part["documents"]["read"] == len(source)
            assert part["documents"]["duplicates"] == (side == Side.DUPLICATE).sum()
            again = np.maximum(planned - 1, 0)
            assert part["tokens"]["repeated_within_an_epoch"] == (again * source.lengths).sum()
            assert part["truncated"] == part["stray"] == 0
            assert part["eos_added"] == len(source) * (tokenizer is byte_tokenizer)
            if times.all():
                assert part["tokens"]["not_reached"] == source.lengths[(side == Side.TRAIN) & (planned == 0)].sum()


@pytest.fixture
def corpus(tmp_path: Path, byte_tokenizer) -> Corpus:
    texts = [f"{number:02}" + "x" * (number * 7 % 40) for number in range(30)]
    drawn = [
        {"texts": [*texts, "", texts[0]], "role": "train"},
        {"texts": ["replay one", "replay two, longer"], "role": "replay", "repeat": True},
        {"texts": ["held"], "role": "heldout"},
    ]
    return pack(
        write_sources(tmp_path, drawn),
        byte_tokenizer,
        cache_dir=tmp_path,
        max_length=MAX_LENGTH,
        holdout=0.2,
        replay_share=0.3,
    )


def test_the_parts_of_a_source(corpus: Corpus):
    ledger = corpus.ledger(np.ones(len(corpus.train), int))
    train, replay, heldout = ledger["sources"]
    assert train["empty"] == 1
    assert (train["name"], train["domain"], train["role"]) == ("0.jsonl", "0", "train")
    assert train["documents"]["duplicates"] == 1
    assert train["documents"]["held_out"] == len(corpus.heldout["0"])
    assert train["documents"]["not_reached"] == 0
    assert replay["documents"]["repeated_within_an_epoch"] > 0
    assert heldout["documents"]["held_out"] == 1
    assert (train["bos_added"], train["eos_added"]) == (31, 31)
    assert ledger["epochs"] == 1
    nothing = corpus.ledger(np.zeros(len(corpus.train), np.int32))
    assert nothing["adds_up"]
    assert nothing["sources"][0]["tokens"]["trained"] == 0
    assert nothing["epochs"] == 0


def test_a_document_trained_in_part_is_not_reached(tmp_path: Path, byte_tokenizer):
    (tmp_path / "x.txt").write_text("abcdefghij")  # 12 tokens: 8 in the first row, 5 with one of them again
    corpus = pack(tmp_path / "x.txt", byte_tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0)
    for times, tokens in (([1, 0], 8), ([0, 2], 4), ([1, 1], 12)):
        ledger = corpus.ledger(np.array(times))
        part = ledger["sources"][0]
        assert ledger["adds_up"]
        assert part["tokens"]["trained"] == tokens
        assert part["tokens"]["not_reached"] == 12 - tokens
        assert part["documents"]["trained"] == (tokens == 12)
        assert part["partly_trained"] == (tokens < 12)


@pytest.mark.parametrize("times", [np.ones(1, int), np.ones((2, 2), int), np.ones(2), np.array([1, -1])])
def test_counts_must_fit_the_rows(tmp_path: Path, byte_tokenizer, times: np.ndarray):
    (tmp_path / "x.txt").write_text("abcdefghij")
    corpus = pack(tmp_path / "x.txt", byte_tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0)
    with pytest.raises(ValueError, match="a count for each of 2 rows"):
        corpus.ledger(times)


def drop_a_row(corpus: Corpus) -> None:
    last = int(corpus.train.row_first[-2])
    for name in ("source", "document", "start", "length"):
        setattr(corpus.train, name, getattr(corpus.train, name)[:last])
    corpus.train.row_first = corpus.train.row_first[:-1]


def shift_a_piece(corpus: Corpus) -> None:
    piece = int(np.flatnonzero(corpus.train.start > 0)[0])
    corpus.train.start = corpus.train.start.copy()
    corpus.train.start[piece] -= 1


def shorten_a_piece(corpus: Corpus) -> None:
    corpus.train.length = corpus.train.length.copy()
    corpus.train.length[int(np.argmax(corpus.train.length))] -= 1


def name_another_document(corpus: Corpus) -> None:
    piece = int(np.flatnonzero(corpus.train.start > 0)[0])
    corpus.train.document[piece] = (corpus.train.document[piece] + 1) % len(corpus.sources[0])


def train_a_held_out_document(corpus: Corpus) -> None:
    held = np.flatnonzero(corpus.sides[0] == Side.HELD_OUT)[0]
    piece = int(np.flatnonzero((corpus.train.source == 0) & (corpus.train.start == 0))[0])
    corpus.train.document[piece] = held


def plan_a_document_once_more(corpus: Corpus) -> None:
    corpus.mixture.planned[0][np.argmax(corpus.mixture.planned[0])] += 1


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        drop_a_row,
        shift_a_piece,
        shorten_a_piece,
        name_another_document,
        train_a_held_out_document,
        plan_a_document_once_more,
    ],
)
def test_a_damaged_index_does_not_add_up(corpus: Corpus, damage: Any, trained: int):
    damage(corpus)
    ledger = corpus.ledger(np.full(len(corpus.train), trained))
    assert ledger["problems"]
    assert ledger["adds_up"] is False


def test_every_number_of_a_ledger_is_checked(corpus: Corpus):
    ledger = corpus.ledger(np.arange(len(corpus.train)) % 3)
    assert check_ledger(ledger) == []
    changes: list[tuple[Any, ...]] = [
        (name,) for name in ("rows", "max_length", "pieces", "padding", "targets", "targets_reached", "targets_trained")
    ]
    changes += [("times_trained", "1"), ("first_tokens_reached",)]
    for unit in ("documents", "tokens"):
        names = ["read", "duplicates", "held_out", "trained", "not_reached", "planned", "repeated_within_an_epoch"]
        changes += [("sources", 0, unit, name) for name in names]
    changes += [("sources", 0, "truncated"), ("sources", 0, "stray")]
    unnoticed = []
    for path in changes:
        damaged = copy.deepcopy(ledger)
        place: Any = damaged
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] += 10_000
        if not check_ledger(damaged):
            unnoticed.append(path)
    assert unnoticed == []
