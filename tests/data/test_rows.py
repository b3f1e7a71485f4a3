"""The packing index: every token a target once, nothing lost, nothing needlessly split or padded."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data.rows import Pieces, pack_best_fit, pack_sequential

MAX_LENGTH = 8
lengths_of_documents = st.lists(st.integers(1, 3 * MAX_LENGTH + 2), min_size=1, max_size=40)


def row_lengths(pieces: Pieces) -> list[list[int]]:
    return [pieces.length[a:b].tolist() for a, b in zip(pieces.row_first[:-1], pieces.row_first[1:], strict=True)]


@pytest.mark.parametrize("pack", [pack_sequential, pack_best_fit])
@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents)
def test_every_target_exactly_once(pack, lengths: list[int]):
    pieces = pack(np.array(lengths), MAX_LENGTH)
    assert (pieces.item.dtype, pieces.start.dtype, pieces.length.dtype) == (np.int32, np.int32, np.uint8)
    assert pieces.row_first[0] == 0
    assert pieces.row_first[-1] == len(pieces.item)
    assert all(0 < sum(row) <= MAX_LENGTH for row in row_lengths(pieces))
    targets = [np.zeros(length, int) for length in lengths]
    firsts = np.zeros(len(lengths), int)
    for item, start, length in zip(pieces.item, pieces.start, pieces.length, strict=True):
        assert length >= 2 or lengths[item] == 1  # no piece without a target
        assert start + length <= lengths[item]
        targets[item][start + 1 : start + length] += 1
        firsts[item] += start == 0
    assert (firsts == 1).all()
    for document in targets:
        assert document[0] == 0
        assert (document[1:] == 1).all()


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents)
def test_sequential_keeps_the_order_and_pads_one_place_at_most(lengths: list[int]):
    pieces = pack_sequential(np.array(lengths), MAX_LENGTH)
    assert (np.diff(pieces.item) >= 0).all()
    assert all(sum(row) >= MAX_LENGTH - 1 for row in row_lengths(pieces)[:-1])


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents)
def test_best_fit_splits_only_what_is_longer_than_a_row(lengths: list[int]):
    pieces = pack_best_fit(np.array(lengths), MAX_LENGTH)
    counts = np.bincount(pieces.item, minlength=len(lengths))
    for length, count in zip(lengths, counts, strict=True):
        assert count == max(1, -(-(length - 1) // (MAX_LENGTH - 1)))
    # Best fit never opens a row while a piece would fit another: no two rows are half empty.
    assert sum(2 * sum(row) <= MAX_LENGTH for row in row_lengths(pieces)) <= 1


def test_best_fit_takes_the_tightest_row():
    pieces = pack_best_fit(np.array([3, 5, 6, 2]), 8)
    assert row_lengths(pieces) == [[6, 2], [5, 3]]


def test_a_single_place_left_is_padded():
    assert row_lengths(pack_sequential(np.array([7, 5]), 8)) == [[7], [5]]
    assert row_lengths(pack_sequential(np.array([7, 1, 5]), 8)) == [[7, 1], [5]]
    assert row_lengths(pack_sequential(np.array([6, 5]), 8)) == [[6, 2], [4]]


def test_the_index_is_small_and_quick():
    lengths = np.random.default_rng(0).geometric(1 / 600, 200_000)
    for pack in (pack_sequential, pack_best_fit):
        start = time.process_time()
        pieces = pack(lengths, 2048)
        assert time.process_time() - start < 3  # seconds; a million documents take five times as long
        size = pieces.item.nbytes + pieces.start.nbytes + pieces.length.nbytes
        assert size <= 64 * len(lengths)
        assert pieces.row_first.nbytes <= 16 * (len(pieces.row_first))
