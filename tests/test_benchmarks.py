"""The benchmarks measure what they say: each row of an op is right, and peers do the same work. On a CPU, at small
sizes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import op_rows, ops, table
from benchmarks.op_rows import first
from benchmarks.ops import TOLERANCE, wrong_by
from benchmarks.shapes import empty_model, flops_a_step

SMALL: dict[str, Any] = {
    "TOKENS": 48, "HIDDEN": 128, "INTERMEDIATE": 192, "VOCABULARY": 320, "RANK": 16, "HEADS": 4, "KV_HEADS": 2,
    "HEAD_DIM": 32, "LAYERS": 1, "DEVICE": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("name", op_rows.ROWS)
def test_each_op_is_held_against_its_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(op_rows, "liger", lambda _: None)
    cases = 0
    for case in op_rows.ROWS[name]():
        assert wrong_by(case, first(case.result())) <= TOLERANCE, case.op
        assert case.bytes or case.flops
        case.ours()  # what is timed runs too, also again
        case.ours()
        assert wrong_by(case, first(case.result()) / 2) > TOLERANCE, f"{case.op}: a halved result passes"
        cases += 1
    assert cases


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in SMALL.items():
        monkeypatch.setattr(op_rows, constant, value)


class Gated(torch.autograd.Function):
    """As Liger's: the gradients are written over what was saved."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        a, b = (part.data for part in ctx.saved_tensors)
        with torch.enable_grad():
            leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
            made = torch.autograd.grad(torch.nn.functional.silu(leaves[0]) * leaves[1], leaves, grads[0])
        return a.copy_(made[0]), b.copy_(made[1])


def fake_liger(name: str) -> Callable[..., Any] | None:
    """Liger's functions by its signatures, and what its kernels would copy first is an error."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, **_: Any) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        def rotate(heads: torch.Tensor) -> torch.Tensor:
            assert heads.transpose(1, 2).is_contiguous()
            one, two = heads.chunk(2, -1)
            return heads.copy_(heads * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None])

        return rotate(q), rotate(k)

    def swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.is_contiguous() and b.is_contiguous()
        return Gated.apply(a, b)  # pyright: ignore[reportReturnType]

    def fused_linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((x @ weight.T).float(), labels)

    return {each.__name__: each for each in (rms_norm, rope, swiglu, fused_linear_cross_entropy)}.get(name)


@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_liger_is_given_what_its_users_have_and_its_result_is_compared(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(op_rows, "liger", fake_liger)
    monkeypatch.setattr(ops, "milliseconds", lambda _: 1.0)
    for case in op_rows.ROWS[name]():
        rival = case.liger
        assert rival is not None
        wrong = dataclasses.replace(rival, as_reference=lambda result, right=rival.as_reference: right(result) / 2)
        assert ops.attempt("liger", case, wrong, check=True) is None
        assert "liger is" in capsys.readouterr().err
        assert ops.result_of(rival, case).equal(ops.result_of(rival, case))  # it wrote to copies
        assert ops.attempt("liger", case, rival, check=True) == 1.0
        assert (rival.note == "also makes dW") == (case.op == "rms_norm backward")
    assert not capsys.readouterr().err


def test_the_floor_of_a_loss_is_three_products_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    products = 3 * 2 * SMALL["TOKENS"] * SMALL["HIDDEN"] * SMALL["VOCABULARY"]
    assert [case.flops for case in op_rows.ROWS["linear_cross_entropy"]()] == [products] * 2


PARAMETERS = {
    "llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9, "mistral-7b": 7.25e9, "qwen3-8b": 8.19e9, "gemma-3-4b": 3.88e9,
    "llama-3.2-1b": 1.236e9, "llama-3.2-3b": 3.213e9,
}  # fmt: skip


@pytest.mark.parametrize("shape", PARAMETERS)
def test_a_shape_has_the_size_of_its_model(shape: str) -> None:
    model = empty_model(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(PARAMETERS[shape], rel=2e-3)


def test_peers_train_the_same_model_on_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = "--peers steep-bare,hf-lean --shape tiny --device cpu --batch 2 --seq 48 --r 8 --steps 5 --packed"
    command = [sys.executable, "-m", "benchmarks.train", *words.split(), "--weights", tmp_path / "w", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    steep, library = map(json.loads, out.read_text().splitlines())
    assert (steep["peer"], library["peer"]) == ("steep-bare", "hf-lean")
    assert steep["loss_first"] == pytest.approx(library["loss_first"], abs=5e-3)
    assert steep["loss_last"] == pytest.approx(library["loss_last"], abs=5e-3)
    assert steep["loss_first"] != steep["loss_last"]
    assert steep["steps_timed"] == 2 and steep["step_s_min"] <= steep["step_s"] <= steep["step_s_max"]
    assert steep["tokens_per_second"] == pytest.approx(2 * 48 / steep["step_s"])


def test_a_step_has_as_many_flops_as_counted_by_hand() -> None:
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two layers: q and o, k and v, the MLP
    adapters = 2 * 8 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))
    products = 96 * (4 * linear + 6 * adapters + 6 * 384 * 64)
    attention = 2 * 3.5 * 4 * 2 * 48**2 / 2 * 64
    assert flops_a_step("tiny", 2, 48, 8) == products + attention


def timed(peer: str, step_s: float, call: str, **fields: object) -> dict[str, object]:
    same = {"shape": "llama-3-8b", "batch": 2, "seq": 2048, "packed": False, "cap_gib": None, "gpu": "NVIDIA H200"}
    return {"peer": peer, "step_s": step_s, "call": call, "peak_allocated_gib": 10.04, **same, **fields}


def test_the_readme_is_in_step_with_the_results() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.in_step(text, table.rows_of(table.RESULTS)) == text, "run python -m benchmarks.table"


def test_a_ratio_of_the_table_is_of_one_call() -> None:
    rows = [
        timed("steep", 0.30, "1"),
        timed("hf", 0.75, "1"),
        timed("unsloth", 0.45, "1"),
        timed("steep", 0.25, "2"),
        timed("hf", 0.70, "2"),
        timed("steep", 0.10, "3"),  # without the yardstick: no call to compare
        timed("steep", 0.40, "4", cap_gib=14.0),
        timed("hf", 0.80, "4", cap_gib=14.0),
    ]
    *_, first, second = table.table(rows).splitlines()
    assert first == (
        "| H200, llama-3-8b, 2 × 2048 | 0.250 s, 10.0 GiB | 0.700 s, 10.0 GiB (2.80×) | 0.450 s, 10.0 GiB (1.50×) |"
    )
    assert second == ("| H200, llama-3-8b, 2 × 2048, in 14 GiB | 0.400 s, 10.0 GiB | 0.800 s, 10.0 GiB (2.00×) | – |")
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb"
    assert first in table.in_step(text, rows)
    assert table.in_step(table.in_step(text, rows), rows) == table.in_step(text, rows)
    assert table.in_step(text, []) == f"a\n{table.BEGIN}\n{table.END}\nb"
