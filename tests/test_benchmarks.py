"""The benchmarks measure what they say: each row of an op is right, on a CPU and at a small size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import op_rows
from benchmarks.ops import TOLERANCE, wrong_by

SMALL = {
    "TOKENS": 48, "HIDDEN": 128, "INTERMEDIATE": 192, "VOCABULARY": 320, "RANK": 16, "HEADS": 4, "KV_HEADS": 2,
    "HEAD_DIM": 32, "DEVICE": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", op_rows.ROWS)
def test_each_op_is_held_against_its_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in SMALL.items():
        monkeypatch.setattr(op_rows, constant, value)
    monkeypatch.setattr(op_rows, "liger", lambda _: None)
    cases = 0
    for case in op_rows.ROWS[name]():
        assert wrong_by(case) <= TOLERANCE, case.op
        assert case.bytes or case.flops
        case.ours()  # what is timed runs too, also again
        case.ours()
        result = case.result
        case.result = lambda result=result: _halved(result())
        assert wrong_by(case) > TOLERANCE, f"{case.op}: a halved result passes"
        cases += 1
    assert cases


def _halved(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (result if isinstance(result, torch.Tensor) else result[0]) / 2
