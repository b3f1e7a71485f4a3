from __future__ import annotations

import numpy as np
import pytest
import torch

from steep.evaluation.windows import Batch, pack, windows

MAX_LENGTH = 16


@pytest.mark.parametrize("stride", [1, 3, 8, 15])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 48, 49])
def test_each_token_but_the_first_is_scored_once_with_enough_before_it(length: int, stride: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    scored: list[int] = []
    for number, window in enumerate(windows(tokens, MAX_LENGTH, stride)):
        assert 2 <= len(window.tokens) <= MAX_LENGTH
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[-1] + 1))
        if number:
            assert window.first_scored == MAX_LENGTH - stride
            assert len(window.tokens) - window.first_scored <= stride
        scored.extend(window.tokens[window.first_scored :].tolist())
    assert scored == list(range(1, length))


def test_windows_fill_rows_without_being_cut() -> None:
    generator = np.random.default_rng(0)
    cut = [
        window
        for length in generator.integers(1, 60, 100)
        for window in windows(np.full(length, length, dtype=np.int32), MAX_LENGTH, 8)
    ]
    rows = pack(cut, MAX_LENGTH)
    packed = [window for row in rows for window in row.windows]
    assert sorted(map(id, packed)) == sorted(map(id, cut))
    assert all(row.length == sum(len(window.tokens) for window in row.windows) <= MAX_LENGTH for row in rows)
    total = sum(len(window.tokens) for window in cut)
    assert len(rows) <= 1.05 * total / MAX_LENGTH + 1


def test_batch_lays_out_positions_and_targets() -> None:
    first = np.array([10, 11, 12], dtype=np.int32)
    second = np.array([20, 21], dtype=np.int32)
    third = np.array([30, 31, 32, 33], dtype=np.int32)
    rows = pack([w for tokens in (first, second, third) for w in windows(tokens, 5, 2)], 5)
    batch = Batch.of(rows, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 0], [10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.scored.tolist() == [0, 1, 2, 5, 6, 8]
    assert batch.targets.tolist() == [31, 32, 33, 11, 12, 21]
    one_row = batch.as_one_row()
    assert one_row.input_ids.shape == one_row.position_ids.shape == (1, 10)
    assert torch.equal(one_row.input_ids[0, one_row.scored + 1], batch.targets)
