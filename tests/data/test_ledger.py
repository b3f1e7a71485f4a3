"""The ledger: it adds up for what is right, agrees with a plain count, and notices what is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data.ledger import check_ledger
from steep.data.mixing import Side
from steep.data.packed_dataset import IGNORE
from steep.data.packing import Corpus, pack

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


@st.composite
def legal_times(draw: st.DrawFn, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(trained, seen) of a run: some whole epochs and part of one, in which some steps were not applied."""
    epochs = draw(st.integers(0, 2))
    seen = epochs + np.array(draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)))
    if draw(st.booleans()):
        return seen.copy(), seen
    refused = np.array(draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    return np.maximum(seen - refused, 0), seen


def illegal_times(trained: np.ndarray, seen: np.ndarray, row: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same run, but for what cannot be: each by its name."""
    found = {}
    found["trained without being seen"] = (np.where(np.arange(len(seen)) == row, seen + 1, trained), seen)
    if len(seen) > 1:
        other = (row + 1) % len(seen)
        twice = seen.copy()
        twice[row] = seen[other] + 2
        found["seen twice before all were once"] = (np.minimum(trained, twice), twice)
        if trained[other]:
            swapped = trained.copy()
            swapped[[row, other]] = seen[row] + 1, trained[other] - 1  # as many rows in all, but not the same
            found["one trained in place of another"] = (swapped, seen)
    return found


@settings(max_examples=100, deadline=None)
@given(drawn=corpora(), data=st.data())
def test_it_adds_up_for_any_run_and_no_other(byte_tokenizer, no_eos_tokenizer, drawn, data):
    sources, options = drawn
    tokenizer = no_eos_tokenizer if options["seed"] == 3 else byte_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        corpus = pack_drawn(sources, options, tokenizer, Path(folder))
        if corpus is None:
            return
        times, seen = data.draw(legal_times(len(corpus.train)))
        ledger = corpus.ledger(times, seen)
        assert ledger["problems"] == []
        assert ledger["adds_up"] is True
        assert json.loads(json.dumps(ledger)) == ledger

        labels = np.stack([corpus.train[index]["labels"].numpy() for index in range(len(corpus.train))])
        by_row = (labels != IGNORE).sum(axis=1)
        assert by_row.min() > 0  # no row without a target
        assert ledger["targets"] == by_row.sum()
        assert ledger["targets_trained"] == (by_row * times).sum()
        assert ledger["epochs"] == pytest.approx((by_row * times).sum() / by_row.sum())
        assert {int(n): targets for n, targets in ledger["times_trained"].items()} == {
            n: by_row[times == n].sum() for n in set(times.tolist())
        }
        assert (ledger["rows_seen"], ledger["rows_trained"]) == (seen.sum(), times.sum())
        assert ledger["rows_refused"] == (seen - times).sum()
        assert {int(n): rows for n, rows in ledger["times_seen"].items()} == {
            n: (seen == n).sum() for n in set(seen.tolist())
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
            available = side == Side.TRAIN
            assert part["tokens"]["trained"] == sum(counted)
            assert part["tokens"]["not_reached"] == source.lengths[available].sum() - sum(counted)
            assert part["documents"]["trained"] == sum(whole)
            assert part["documents"]["not_reached"] == available.sum() - sum(whole)
            assert part["partly_trained"] == sum(c > 0 for c in counted) - sum(whole)
            assert part["documents"]["read"] == len(source)
            assert part["documents"]["duplicates"] == (side == Side.DUPLICATE).sum()
            assert part["documents"]["too_short"] == (source.lengths < 2).sum()
            more = np.maximum(planned - 1, 0)
            assert part["documents"]["repeated_within_an_epoch"] == more.sum()
            assert part["tokens"]["repeated_within_an_epoch"] == (more * source.lengths).sum()
            assert part["truncated"] == part["stray"] == 0
            assert part["eos_added"] == len(source) * (tokenizer is byte_tokenizer)
            assert part["text_tokens"] == source.num_bytes.sum()  # a byte is a token
            if times.all():
                assert part["tokens"]["not_reached"] == source.lengths[available & (planned == 0)].sum()
        row = data.draw(st.integers(0, len(seen) - 1))
        for what, pair in illegal_times(times, seen, row).items():
            assert not corpus.ledger(*pair)["adds_up"], what


@pytest.fixture
def corpus(tmp_path: Path, byte_tokenizer) -> Corpus:
    texts = [f"{number:02}" + "x" * (number * 7 % 21) for number in range(30)]
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
    once = np.ones(len(corpus.train), int)
    ledger = corpus.ledger(once, once)
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
    assert (ledger["rows_refused"], ledger["times_seen"]) == (0, {"1": len(once)})
    nothing = corpus.ledger(np.zeros(len(corpus.train), np.int32), once)
    assert nothing["adds_up"]
    assert nothing["rows_refused"] == len(once)
    assert nothing["sources"][0]["tokens"]["trained"] == 0
    assert nothing["epochs"] == 0


def test_a_document_trained_in_part_is_not_reached(tmp_path: Path, byte_tokenizer):
    (tmp_path / "x.txt").write_text("abcdefghij")  # 12 tokens: 8 in the first row, 5 with one of them again
    corpus = pack(tmp_path / "x.txt", byte_tokenizer, max_length=8, cache_dir=tmp_path / "c", holdout=0)
    for times, seen, tokens in (([1, 0], [1, 1], 8), ([0, 2], [1, 2], 4), ([1, 1], [1, 1], 12)):
        ledger = corpus.ledger(np.array(times), np.array(seen))
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
    right = np.zeros(2, int)
    with pytest.raises(ValueError, match="times_trained must hold a count for each of 2 rows"):
        corpus.ledger(times, right)
    with pytest.raises(ValueError, match="times_seen must hold a count for each of 2 rows"):
        corpus.ledger(right, times)


def test_a_row_trained_thrice_and_others_never(corpus: Corpus):
    times = np.zeros(len(corpus.train), int)
    times[:2] = 3, 2
    assert corpus.ledger(times, times)["problems"] == [
        "rows were handed to the model 0 to 3 times: some twice in an epoch, or not at all"
    ]


def test_documents_of_one_token(tmp_path: Path, no_eos_tokenizer):
    drawn = [{"texts": ["a", "bc", "a", "d"], "role": "train"}, {"texts": ["a", "ef"], "role": "heldout"}]
    corpus = pack(write_sources(tmp_path, drawn), no_eos_tokenizer, cache_dir=tmp_path, max_length=8, holdout=0)
    assert [side.tolist() for side in corpus.sides] == [
        [Side.TOO_SHORT, Side.TRAIN, Side.TOO_SHORT, Side.TOO_SHORT],
        [Side.TOO_SHORT, Side.HELD_OUT],
    ]
    once = np.ones(len(corpus.train), int)
    train, heldout = corpus.ledger(once, once)["sources"]
    assert (train["documents"]["too_short"], train["tokens"]["too_short"]) == (3, 3)
    assert (train["documents"]["trained"], heldout["documents"]["held_out"]) == (1, 1)
    assert corpus.statistics["sources"][0]["too_short"] == {"documents": 3, "tokens": 3}
    assert corpus.ledger(once, once)["adds_up"]


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


def train_a_document_in_place_of_another(corpus: Corpus) -> None:
    rows, lengths = corpus.train, corpus.sources[0].lengths
    planned = np.flatnonzero(corpus.mixture.planned[0])
    one, other = next(pair for pair in itertools.combinations(planned, 2) if lengths[pair[0]] == lengths[pair[1]])
    rows.document[(rows.source == 0) & (rows.document == one)] = other


def move_the_end_of_a_row(corpus: Corpus) -> None:
    """The first row gets a piece of the next: one holds too much and one too little, and the sum is the same."""
    corpus.train.row_first = corpus.train.row_first.copy()
    corpus.train.row_first[1] += 1


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
        train_a_document_in_place_of_another,
        move_the_end_of_a_row,
        plan_a_document_once_more,
    ],
)
def test_a_damaged_index_does_not_add_up(corpus: Corpus, damage: Any, trained: int):
    damage(corpus)
    times = np.full(len(corpus.train), trained)
    ledger = corpus.ledger(times, times)
    assert ledger["problems"]
    assert ledger["adds_up"] is False


def numbers(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every whole number in a tree."""
    children = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else []
    for key, value in children:
        if isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key)
        yield from numbers(value, (*path, key))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("step", [1, -1])
def test_every_number_of_a_ledger_is_checked(corpus: Corpus, whole: bool, step: int):
    seen = np.ones(len(corpus.train), int) + (0 if whole else np.arange(len(corpus.train)) % 2)
    trained = seen if whole else np.maximum(seen - np.arange(len(corpus.train)) % 3, 0)
    ledger = corpus.ledger(trained, seen)
    assert check_ledger(ledger) == []
    assert len(list(numbers(ledger))) > 60
    unnoticed = set()
    for path in numbers(ledger):
        damaged = copy.deepcopy(ledger)
        place: Any = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] += step
        if not check_ledger(damaged):
            unnoticed.add(path)
    # Blank documents leave no trace anywhere else.
    assert unnoticed == {("sources", index, "empty") for index in range(3)}


@pytest.mark.parametrize("step", [1, -1])
def test_a_branch_adds_up_with_its_parents(corpus: Corpus, step: int):
    """They gave out an epoch and the even rows; the branch the odd ones, and then every third of the next epoch."""
    number = np.arange(len(corpus.train))
    before, seen = 1 + (number % 2 == 0), (number % 2) + (number % 3 == 0)
    ledger = corpus.ledger(seen, seen, before)
    assert check_ledger(ledger) == []
    assert ledger["rows_seen_before"] == before.sum() and ledger["rows_seen"] == seen.sum()
    assert ledger["times_seen_with_parents"] == {str(n): int((seen + before == n).sum()) for n in (2, 3)}
    for path in (("rows_seen_before",), ("times_seen_with_parents", "2"), ("times_seen_with_parents", "3")):
        damaged = copy.deepcopy(ledger)
        place: Any = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] += step
        assert check_ledger(damaged), path
    assert not corpus.ledger(seen, seen)["adds_up"]
    assert not corpus.ledger(before, before, seen * 2)["adds_up"]
    nothing = np.zeros(len(corpus.train), int)
    assert corpus.ledger(before, before, nothing) == corpus.ledger(before, before)


@pytest.mark.parametrize("step", [1, -1])
def test_skipped_rows_are_accounted_for(corpus: Corpus, step: int):
    """An epoch in which every fourth row was skipped, one of them trained in the next; every seventh was refused."""
    number = np.arange(len(corpus.train))
    skipped, refused = number % 4 == 1, number % 7 == 3
    again = number < 6
    seen, trained = 1 + again, 1 - (skipped | refused) + again
    refused &= ~skipped
    ledger = corpus.ledger(trained, seen, times_skipped=skipped.astype(int))
    assert check_ledger(ledger) == [] and ledger["adds_up"]
    assert ledger["rows_skipped"] == skipped.sum() and ledger["rows_refused"] == refused.sum() > 0
    never = skipped & ~again
    assert 0 < never.sum() < skipped.sum()
    pieces = np.repeat(never, np.diff(corpus.train.row_first))
    assert ledger["targets_skipped"] == (corpus.train.length[pieces].astype(int) - 1).sum() > 0
    for source in ledger["sources"]:
        assert source["tokens"]["skipped"] >= source["documents"]["skipped"]
    tokens = sum(source["tokens"]["skipped"] for source in ledger["sources"])
    assert 0 < tokens <= corpus.train.length[pieces].sum()
    for name in ("rows_skipped", "targets_skipped", "first_tokens_skipped"):
        assert check_ledger(ledger | {name: ledger[name] + step}), name
    assert not corpus.ledger(trained, seen, times_skipped=seen)["adds_up"]
    without = corpus.ledger(trained, seen)
    assert without["rows_refused"] == (skipped | refused).sum() and without["adds_up"]
    for source, other in zip(ledger["sources"], without["sources"], strict=True):
        for unit in ("documents", "tokens"):
            assert source[unit]["skipped"] + source[unit]["not_reached"] == other[unit]["not_reached"]


def test_an_epoch_with_skipped_rows_leaves_nothing_else(corpus: Corpus):
    number = np.arange(len(corpus.train))
    skipped = number % 5 == 0
    ledger = corpus.ledger((~skipped).astype(int), np.ones(len(number), int), times_skipped=skipped.astype(int))
    assert ledger["adds_up"], ledger["problems"]
    for source in ledger["sources"]:
        for unit in ("documents", "tokens"):
            assert source[unit]["not_reached"] == source[unit]["not_planned"]
    source = next(source for source in ledger["sources"] if source["tokens"]["skipped"])
    source["tokens"]["skipped"] -= 1
    source["tokens"]["not_reached"] += 1
    source["trained_or_repeated_in_skipped_rows"] += 1
    assert check_ledger(ledger) == ["tokens not reached after a whole epoch: 1 and not 0"]


DOCUMENTS, TOKENS = ("sources", 0, "documents"), ("sources", 0, "tokens")
MOVES: dict[str, tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {  # what loses one, what gains one
    "documents trained that were not": ([(*DOCUMENTS, "not_reached")], [(*DOCUMENTS, "trained")]),
    "tokens trained that were not": ([(*TOKENS, "not_reached")], [(*TOKENS, "trained")]),
    "too short, but of two tokens": ([(*TOKENS, "held_out")], [(*TOKENS, "too_short")]),
    "trained more often": ([("times_trained", "1")], [("times_trained", "2")]),
    "a target of no document": ([], [("targets",), ("times_trained", "0")]),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_is_moved_is_noticed(corpus: Corpus, move: str):
    """The lines still add up by themselves; what the rows or the documents say is something else."""
    seen = 1 + np.arange(len(corpus.train)) % 2
    ledger = corpus.ledger(seen - (np.arange(len(seen)) % 3 == 2), seen)
    assert check_ledger(ledger) == []
    for paths, step in zip(MOVES[move], (-1, 1), strict=True):
        for path in paths:
            place: Any = ledger
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] += step
    assert check_ledger(ledger)


def test_an_epoch_leaves_nothing_that_was_planned(corpus: Corpus):
    once = np.ones(len(corpus.train), int)
    ledger = corpus.ledger(once, once)
    source = ledger["sources"][0]
    source["tokens"]["trained"] -= 1
    source["tokens"]["not_reached"] += 1
    source["repeated_in_trained_rows"] += 1
    assert check_ledger(ledger) == ["tokens not reached after a whole epoch: 1 and not 0"]


def test_what_stands_in_the_rows_is_told_as_it_is(corpus: Corpus):
    once = np.ones(len(corpus.train), int)
    ledger = corpus.ledger(once, once)
    ledger["sources"][0]["role"] = "heldout"
    [problem] = check_ledger(ledger)
    assert "tokens of a heldout source planned" in problem
    train_a_document_in_place_of_another(corpus)
    ledger = corpus.ledger(once, once)
    assert ledger["sources"][0]["documents"]["repeated_within_an_epoch"] == 1
    assert ledger["sources"][0]["tokens"]["repeated_within_an_epoch"] > 1
    for unit in ("documents", "tokens"):
        assert f"0, {unit}: repeated within an epoch without repeat: true" in ledger["problems"]
    move_the_end_of_a_row(corpus)
    told = " ".join(corpus.ledger(once, once)["problems"])
    assert "rows with more tokens than max_length: 1 and not 0" in told
    assert "places in the rows" in told
