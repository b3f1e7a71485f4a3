"""The benchmarks measure what they say: each row of an op is right, and peers do the same work. On a CPU, at small
sizes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import op_rows, ops, peers, planned, steep_run, table, train
from benchmarks.op_rows import first
from benchmarks.ops import TOLERANCE, wrong_by
from benchmarks.peers import PEERS, Peer, Work, bare_loop, batches, flattened
from benchmarks.shapes import empty_model, flops_a_step, write
from steep import load
from steep.model.unwrap import unwrap
from tests.faults.command import ForkServer
from tests.ops.closeness import assert_as_good
from tests.trees import tree_differences

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
        for _ in range(3):  # what is timed runs too, each time on the same tensors
            if case.before is not None:
                case.before()
            timed = case.ours()
        if case.direction == "both" or case.before is not None:  # it goes as far as what it is compared with
            assert wrong_by(case, first(timed)) <= TOLERANCE, case.op
        assert wrong_by(case, first(case.result()).double() / 2) > TOLERANCE, f"{case.op}: a halved result passes"
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


def launched(launch: Any, before: Any) -> float:
    """Each time gives what the first did."""
    results: list[torch.Tensor] = []
    for _ in range(3):
        if before is not None:
            before()
        results.append(first(launch()).clone())
    assert results[0].equal(results[1]) and results[0].equal(results[2])
    return 1.0


@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_liger_is_given_what_its_users_have_and_its_result_is_compared(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(op_rows, "liger", fake_liger)
    monkeypatch.setattr(ops, "milliseconds", launched)
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


def test_peers_train_the_same_model_on_the_same_tokens(
    tmp_path: Path, quick: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, here a fork."""
    out = tmp_path / "rows.jsonl"

    def run(command: list[str], *, env: dict[str, str], **streams: Any) -> subprocess.CompletedProcess[str]:
        return quick.run(command, tmp_path, env)

    monkeypatch.setattr(train, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    words = "--peers hf-varlen,steep-bare,hf-lean --shape tiny --device cpu --batch 2 --seq 48 --r 8 --steps 5 --packed"
    with pytest.raises(SystemExit) as ended:
        train.main([*words.split(), "--weights", str(tmp_path / "w"), "--out", str(out)])
    assert ended.value.code == 1  # for the one that cannot be here; the others go on
    varlen, steep, library = map(json.loads, out.read_text().splitlines())
    assert varlen["peer"] == "hf-varlen" and varlen["failed"]
    assert steep["fused"] and steep["levels"] == [0, 0]
    assert (steep["peer"], library["peer"]) == ("steep-bare", "hf-lean")
    assert steep["loss_first"] == pytest.approx(library["loss_first"], abs=5e-3)
    assert steep["loss_last"] == pytest.approx(library["loss_last"], abs=5e-3)
    assert steep["loss_first"] != steep["loss_last"]
    assert steep["steps_timed"] == 2 and steep["step_s_min"] <= steep["step_s"] <= steep["step_s_max"]
    assert sorted(steep["seconds"]) == [steep["step_s_min"], steep["step_s_max"]]
    assert steep["tokens_per_second"] == pytest.approx(2 * 48 / steep["step_s"])


def test_a_step_has_as_many_flops_as_counted_by_hand() -> None:
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # two layers: q and o, k and v, the MLP
    adapters = 2 * 8 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))
    products = 96 * (4 * linear + 6 * adapters + 6 * 384 * 64)
    attention = 2 * 3.5 * 4 * 2 * 48**2 / 2 * 64
    assert flops_a_step("tiny", 2, 48, 8) == products + attention


def timed(peer: str, step_s: float, call: str, **fields: object) -> dict[str, Any]:
    same = {"shape": "llama-3-8b", "batch": 2, "seq": 2048, "packed": False, "cap_gib": None, "gpu": "NVIDIA H200"}
    same |= {"loss_first": 12.0, "loss_last": 11.5, "cap_of": None, "r": 256, "steep_args": "", "steps_timed": 9}
    if peer == "steep":
        same["fused"] = True
    return {"peer": peer, "step_s": step_s, "call": call, "peak_allocated_gib": 10.04, **same, **fields}


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    return [line for line in table.table(rows).splitlines() if line.startswith("| H200")]


def test_all_figures_of_a_line_are_of_one_call() -> None:
    rows = [
        timed("steep", 0.50, "0"),
        timed("hf", 0.90, "0"),
        timed("steep", 0.30, "1"),
        timed("hf", 0.75, "1"),
        timed("unsloth", 0.45, "1"),
        timed("steep", 0.25, "2"),
        timed("steep-bare", 0.24, "2"),
        timed("hf", 0.70, "2"),
        timed("steep", 0.10, "3"),  # without the libraries: no call to compare
    ]
    assert "| work | steep | its step alone | transformers + PEFT | Unsloth |" in table.table(rows).splitlines()
    newest, with_unsloth = lines_of(rows)
    work = "| H200, llama-3-8b, 2 × 2048 | "
    assert newest == f"{work}0.250 s, 10.0 GiB | 0.240 s, 10.0 GiB | 0.700 s, 10.0 GiB (2.80×) | – |"
    assert (
        with_unsloth
        == f"{work[:-3]}, on 1 | 0.300 s, 10.0 GiB | – | 0.750 s, 10.0 GiB (2.50×) | 0.450 s, 10.0 GiB (1.50×) |"
    )
    lean = f"{table.LEAN_BEGIN}\n{table.LEAN_END}"
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n{lean}"
    assert newest in table.in_step(text, rows)
    assert table.in_step(table.in_step(text, rows), rows) == table.in_step(text, rows)
    assert table.in_step(text, []) == f"a\n{table.BEGIN}\n{table.END}\nb\n{lean}"


def test_the_table_shows_steep_within_its_limit_against_the_libraries_without_one() -> None:
    (lean,) = lines_of([timed("steep", 0.4, "1", cap_gib=14.0), timed("hf", 0.8, "1")])
    assert (
        lean
        == "| H200, llama-3-8b, 2 × 2048, within 14 GiB allocated | 0.400 s, 10.0 GiB | 0.800 s, 10.0 GiB (2.00×) |"
    )
    same_work = [
        [timed("steep", 0.4, "1", cap_gib=26.31, cap_of="hf", levels=[0, 1]), timed("hf", 0.8, "1")],
        [timed("steep", 0.4, "2", cap_gib=26.29, cap_of="hf", levels=[0, 0]), timed("hf", 0.8, "2")],
        [timed("steep", 0.4, "3"), timed("hf", 0.8, "3")],
    ]
    (line,) = lines_of([row for call in same_work for row in call])
    assert "2 × 2048 |" in line
    (line,) = lines_of([timed("steep", 0.4, "1", peak_allocated_gib=10.05), timed("hf", 0.8, "1")])
    assert "2 × 2048, in more memory than transformers + PEFT |" in line
    for levels, place, felt in (([0, 0], "gpu", False), ([0, 1], "gpu", True), ([0, 0], "x", True)):
        rows = [timed("steep", 0.4, "1", levels=levels, places=[place, "gpu"], cap_gib=30.0), timed("hf", 0.8, "1")]
        (line,) = lines_of(rows)
        assert ("within" in line) is felt
        waits = place != "gpu"
        assert ("0.400 s, 10.0 GiB† |" in line) is waits is ("†: and host memory" in table.table(rows))


def test_the_yardstick_is_the_faster_of_the_libraries_ways() -> None:
    rows = [timed("hf", 0.9, "1"), timed("hf-flash", 0.6, "1"), timed("steep", 0.3, "1")]
    (line,) = lines_of([{**row, "packed": True} for row in rows])
    assert line == "| H200, llama-3-8b, 2 × 2048, packed | 0.300 s, 10.0 GiB | 0.600 s, 10.0 GiB, flash-attn (2.00×) |"
    rows.append(timed("hf-varlen", 0.5, "1"))
    (line,) = lines_of([{**row, "packed": True} for row in rows])
    assert "0.500 s, 10.0 GiB, torch's flash kernels (1.67×)" in line


def test_a_library_that_took_less_memory_is_said_so() -> None:
    rows = [timed("steep", 0.3, "1"), timed("hf", 0.9, "1"), timed("hf-liger", 0.8, "1", peak_allocated_gib=10.04)]
    rows.append(timed("unsloth", 0.45, "1", peak_allocated_gib=10.03))
    (line,) = lines_of(rows)
    assert line.endswith(
        "| 0.900 s, 10.0 GiB (3.00×) | 0.800 s, 10.0 GiB (2.67×) | 0.450 s, 10.0 GiB (1.50×, in more memory) |"
    )


def test_a_time_is_said_to_be_a_median_of_random_weights() -> None:
    rows = [timed("steep", 0.3, "1", steps_timed=8), timed("hf", 0.9, "1")]
    assert "time (median of 8 to 9 steps, random weights)" in table.table(rows)
    rows[1]["steps_timed"] = 8
    rows.append(timed("hf-varlen", 1.0, "1", steps_timed=3))  # not in the table: the slower one
    assert "time (median of 8 steps, random weights)" in table.table(rows)
    assert table.medians([timed("steep", 0.3, "1", steps_timed=1)]) == "median of 1 step, random weights"


def test_steep_over_e4m3_has_a_column_where_it_was_timed() -> None:
    rows = [timed("steep", 0.3, "1"), timed("hf", 0.9, "1"), timed("steep-fp8", 0.225, "1", fused=True)]
    (line,) = lines_of(rows)
    over = "0.225 s, 10.0 GiB (4.00× as fast as transformers + PEFT)"
    assert line == f"| H200, llama-3-8b, 2 × 2048 | 0.300 s, 10.0 GiB | {over} | 0.900 s, 10.0 GiB (3.00×) |"
    assert table.OVER_FP8 in table.table(rows) and table.OVER_FP8 not in table.table(rows[:2])
    assert not lines_of([*rows[1:]]), "steep itself is what a line is of"


def test_a_row_that_failed_is_not_in_the_table(tmp_path: Path) -> None:
    rows = [timed("hf", 0.9, "1"), timed("steep", 0.3, "1")]
    (tmp_path / "a-train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "b-train.jsonl").write_text(json.dumps({"shape": "llama-3-8b", "call": "2", "failed": "no"}) + "\n")
    assert table.rows_of(tmp_path) == rows


@pytest.mark.parametrize(
    "other",
    [
        {"r": 8},
        {"shape": "tiny"},
        {"gpu": "none", "peak_allocated_gib": None},
        {"fused": False, "steep_args": "--model.fused off"},
        {"steep_args": "--model.fused_levels 3"},
        {"fused": False},
    ],
)
def test_what_the_table_says_nothing_of_is_not_in_it(other: dict[str, Any], tmp_path: Path) -> None:
    rows = [timed("steep", 0.3, "1"), timed("hf", 0.9, "1")]
    newer = [timed("steep", 0.1, "2", **other), timed("hf", 0.2, "2", **{"fused": True, **other, "steep_args": ""})]
    (tmp_path / "a-train.jsonl").write_text("\n".join(map(json.dumps, rows + newer)) + "\n")
    assert table.table(table.rows_of(tmp_path)) == table.table(rows)


def test_the_lean_table_has_each_work_within_its_limit_once(tmp_path: Path) -> None:
    def lean(step_s: float, call: str, **fields: object) -> dict[str, Any]:
        seen = {"fused": True, "tokens_per_second": 4096 / step_s, "peak_reserved_gib": 11.5, "cap_gib": 10.0}
        return timed("steep-lean", step_s, call, **{**seen, **fields})

    stretched = "--model.rope_scaling.rope_type linear --model.rope_scaling.factor 2 --training.vram 9.5GiB"
    rows = [
        lean(9.0, "1", batch=1, seq=65536, cap_gib=22.0, steep_args=" --training.host_memory 96GiB", steps_timed=1),
        lean(0.5, "2"), lean(0.4, "3", planned_host_gib=3.26),
        lean(0.3, "4", cap_gib=16.0, peak_allocated_gib=15.5),
        lean(20.0, "5", batch=1, seq=262144, steep_args=f" --training.host_memory 9GiB {stretched}"),
        lean(21.0, "5", batch=1, seq=131072, steep_args=" --training.vram 9.5GiB", cap_gib=None),
        lean(0.1, "6", cap_gib=8.0, steep_args=" --training.host_memory 9GiB --model.fused off"),
        lean(0.1, "7", cap_gib=7.0, fused=False), timed("steep", 0.2, "8"), timed("hf", 0.4, "8"),
    ]  # fmt: skip
    (tmp_path / "a-train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = table.rows_of(tmp_path)
    peaks, held = "10.0 GiB | 11.5 GiB", "10 GiB, asked for 9.5"
    assert [line.removeprefix("| H200, ") for line in table.lean_table(found).splitlines() if "| H200" in line] == [
        f"llama-3-8b, 2 × 2,048 | NF4 | 10 GiB | 0.4 s | 9 | 10,240 | {peaks} | 3.3 GiB |",
        "llama-3-8b, 2 × 2,048 | NF4 | 16 GiB | 0.3 s | 9 | 13,653 | 15.5 GiB | 11.5 GiB | – |",
        f"llama-3-8b, 1 × 65,536 | NF4 | 22 GiB | 9 s | 1 | 455 | {peaks} | ≤ 96 GiB |",
        f"llama-3-8b, 1 × 131,072 | NF4 | no limit, asked for 9.5 | 21 s | 9 | 195 | {peaks} | – |",
        f"llama-3-8b, 1 × 262,144, positions stretched 2× | NF4 | {held} | 20 s | 9 | 205 | {peaks} | ≤ 9 GiB |",
    ]
    assert "the median of 1 to 9 steps, random weights; a row of text is one document." in table.lean_table(found)
    assert len(lines_of(found)) == 1 and table.lean_table(found[-2:]) == ""


# ---- benchmarks.train


def run_main(
    words: str, results: dict[str, dict[str, Any] | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[dict[str, Any]], dict[str, list[str]]]:
    """Exit code, rows written, and the words for each peer's process, which would measure `results`."""
    given: dict[str, list[str]] = {}

    def run(_: Any, peer: str, words: list[str]) -> Any:
        given[peer] = words
        return results[peer]

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "write", lambda *_, **__: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "rows.jsonl"
    out.unlink(missing_ok=True)
    always = ["--peers", ",".join(results), "--shape", "tiny", "--device", "cpu", "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        train.main([*always, *words.split()])
    return int(end.value.code or 0), list(map(json.loads, out.read_text().splitlines())), given


def measured(seconds: float, *losses: float, **fields: Any) -> dict[str, Any]:
    same = {"seconds": [seconds] * 12, "losses": losses, "first_step_s": 1.0, "versions": {}}
    return {**same, "peak_allocated_gib": None, "peak_reserved_gib": None, **fields}


@pytest.mark.parametrize(
    ("steep", "bare", "lean", "agree"),
    [
        ((12.0, 11.0), (12.0, 11.5), (12.0, 11.7), True),  # plain bf16 learns less
        ((12.0, 11.0), (12.0, 11.3), (12.0, 11.5), False),  # the last of the bare loops
        ((12.0, 11.0), (12.0, 11.5), (12.1, 11.5), False),  # the first
        ((6.0, 11.5), (12.0, 11.5), (12.0, 11.5), False),  # steep's own
        ((float("nan"), 11.5), (12.0, 11.5), (12.0, 11.5), False),
    ],
)
def test_losses_have_to_agree(
    steep: tuple[float, ...],
    bare: tuple[float, ...],
    lean: tuple[float, ...],
    agree: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results: Any = {
        "steep": measured(0.1, *steep), "steep-bare": measured(0.1, *bare), "hf": measured(0.2, 12.0, 11.51),
        "hf-lean": measured(0.2, *lean),
    }  # fmt: skip
    assert run_main("", results, tmp_path, monkeypatch)[0] == (0 if agree else 1)


@pytest.mark.parametrize(
    ("fp8", "agree"),
    [(12.0, True), (12.1, True), (12.2, False), (float("nan"), False)],  # 9.2 / sqrt(2 x 2048) are allowed
)
def test_over_e4m3_the_first_loss_may_be_another_draw(
    fp8: float, agree: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results: Any = {"steep": measured(0.3, 12.0, 11.5), "steep-fp8": measured(0.2, fp8, 9.0)}
    for others in ({}, {"hf": measured(0.8, 12.0, 11.5)}):
        code, rows, _ = run_main("", {**results, **others}, tmp_path, monkeypatch)
        assert code == (0 if agree else 1)
        assert [row["peer"] for row in rows] == [*results, *others]
        said = capsys.readouterr().out
        assert "steep-fp8 against steep: 1.50 x as fast" in said
        assert ("steep-fp8 against the fastest of hf, hf-flash, hf-varlen: 4.00 x as fast" in said) == bool(others)


def test_over_e4m3_is_the_same_command_with_another_base(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []

    def steep_train(
        work: Work, vocab_size: int, temporary: Path, begun: float, words: list[str], profiled: int
    ) -> dict[str, Any]:
        assert profiled == 0
        told.append(words)
        return measured(0.1, 6.0, 5.9)

    monkeypatch.setattr(train, "steep_train", steep_train)
    monkeypatch.setenv("BENCHMARK_BEGUN", "0")
    words = ["--shape", "tiny", "--device", "cpu", "--weights", str(tmp_path), "--steep-args=--model.fused off"]
    for peer in ("steep", "steep-fp8", "steep-fp8-lean"):
        train.measure(train.parse(words), peer)
    off, fp8 = ["--model.fused", "off"], ["--model.base", "fp8"]
    lean = [
        "--training.optimizer_in_backward",
        "true",
        "--training.max_grad_norm",
        "0",
        "--training.offload_optimizer",
        "all",
    ]
    assert told == [off, [*fp8, *off], [*fp8, *lean, *off]]
    monkeypatch.setattr(sys, "argv", sys.argv)  # it is set
    result = steep_run.steep_train(tiny(weights), 384, tmp_path, time.time(), list(steep_run.RUNS["steep-fp8"]))
    assert result["losses"][0] == pytest.approx(math.log(384), abs=0.1)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["base"] == "fp8"


def test_weights_that_are_written_in_nf4_are_those_that_loading_makes(weights: Path, tmp_path: Path) -> None:
    stored = write("tiny", tmp_path, "cpu", in_nf4=True)
    made, read = (load(str(folder), base="nf4", compute_dtype="bf16")[0].state_dict() for folder in (weights, stored))
    assert tree_differences(made, read) == []
    assert sum("quant_state" in name for name in read) == 14
    in_bf16, in_4_bit = (sum(file.stat().st_size for file in folder.glob("model-0.*")) for folder in (weights, stored))
    assert in_4_bit < 0.5 * in_bf16


def test_steps_that_are_not_timed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step takes a minute one of them has to do."""
    result = {**measured(0.2, 12.0, 11.5), "seconds": [9.0, 8.0, 0.2]}
    code, (row,), _ = run_main("--steps 3 --warm-up 2", {"hf": result}, tmp_path, monkeypatch)
    assert code == 0 and (row["steps_timed"], row["step_s"], row["seconds"]) == (1, 0.2, [0.2])
    for words, reason in (
        ("--steps 3", "the first 3 are not timed"),
        ("--steps 3 --warm-up 0", "--warm-up: the first step has no beginning"),
        ("--stored nf4", r"--stored nf4 .*leave steep-fp8 out of --peers"),
    ):
        with pytest.raises(SystemExit, match=reason):
            train.refuse(train.parse(words.split()), ["steep-fp8"])


def test_one_loop_alone_is_not_said_to_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main("", {"hf": measured(0.2, 12.0, 11.5)}, tmp_path, monkeypatch)
    assert "no losses are compared" in capsys.readouterr().out
    run_main("", {"steep": measured(0.1, 12.0, 11.5), "hf": measured(0.2, 12.0, 11.5)}, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "steep's first loss and theirs differ by 0.0000" in said and "bare loops differ" not in said


def test_a_limit_is_steeps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: Any = {"steep": measured(0.1, 6.0, 5.9), "hf": measured(0.2, 6.0, 5.9, peak_allocated_gib=26.3)}
    _, rows, _ = run_main("--cap-gib 14", results, tmp_path, monkeypatch)
    assert [(row["peer"], row["cap_gib"]) for row in rows] == [("steep", 14.0), ("hf", None)]
    _, rows, given = run_main("--cap-gib hf", results, tmp_path, monkeypatch)
    assert [(row["peer"], row["cap_gib"], row["cap_of"]) for row in rows] == [("hf", None, None), ("steep", 26.3, "hf")]
    assert train.work_of(train.parse(given["steep"])).cap_gib == 26.3
    both: Any = {"steep-fp8": results["steep"], **results}
    _, rows, given = run_main("--cap-gib hf", both, tmp_path, monkeypatch)
    assert [(row["peer"], row["cap_gib"]) for row in rows] == [("hf", None), ("steep-fp8", 26.3), ("steep", 26.3)]
    assert train.work_of(train.parse(given["steep-fp8"])).cap_gib == 26.3


def test_a_call_says_what_else_steep_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: Any = {"steep": measured(0.1, 6.0, 5.9), "hf": measured(0.2, 6.0, 5.9)}
    _, rows, _ = run_main("--steep-args=--model.fused=off", results, tmp_path, monkeypatch)
    assert [row["steep_args"] for row in rows] == ["--model.fused=off", ""]


def test_packed_rows_have_no_mfu() -> None:
    result = measured(0.1, 6.0, 5.9, peak_allocated_gib=1.0, peak_reserved_gib=1.0)
    words = ["--shape", "tiny"]
    plain, packed = (train.row_of(train.parse(given), "hf", result, 1e12) for given in (words, [*words, "--packed"]))
    assert plain["mfu"] > 0 and packed["mfu"] is None
    assert "MFU -," in train.shown(packed)


def test_steep_plans_within_its_limit(weights: Path) -> None:
    work = tiny(weights, cap_gib=14.0)
    assert steep_run.run_file(work, Path("a"), Path("b"))["training"]["vram"] == "14.000000GiB"
    assert steep_run.planned(work)[0] == [0, 0]
    assert steep_run.planned(dataclasses.replace(work, cap_gib=1e-4))[0] == [3, 3]
    lean = steep_run.steep_bare(dataclasses.replace(work, cap_gib=1e-4))
    assert steep_run.chosen(lean.model, 0)["levels"] == [3, 3]


def test_steep_that_is_not_fused_on_a_gpu_is_no_result() -> None:
    unfused, fused = {"chosen": {"fused": False}}, {"chosen": {"fused": True}}
    for peer in ("steep", "steep-fp8", "steep-bare", "steep-script"):
        with pytest.raises(RuntimeError, match="not fused"):
            train.refuse_unfused(train.parse([]), peer, unfused)
        train.refuse_unfused(train.parse([]), peer, fused)
    train.refuse_unfused(train.parse(["--steep-args", "--model.fused off"]), "steep", unfused)
    train.refuse_unfused(train.parse(["--device", "cpu"]), "steep", unfused)
    train.refuse_unfused(train.parse([]), "hf", {})


@pytest.mark.parametrize("installed", ["flash_attention_2", None])
def test_the_libraries_with_flash_attention_are_timed_on_packed_rows(
    installed: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "flash_package", lambda: installed)
    always = ["steep", "steep-bare", "hf"]
    assert train.usual_peers(train.parse([])) == always
    assert train.usual_peers(train.parse(["--packed", "--device", "cpu"])) == always
    assert not capsys.readouterr().out
    packed = train.usual_peers(train.parse(["--packed"]))
    assert packed == [*always, *(["hf-flash"] if installed else []), "hf-varlen"]
    assert ("hf-flash is left out" in capsys.readouterr().out) == (installed is None)


def test_a_limit_above_the_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "gpu_bytes", lambda: 79 * train.GIB)
    train.refuse(train.parse(["--cap-gib", "79"]), ["steep"])
    with pytest.raises(SystemExit, match=r"the GPU has 79\.0 GiB"):
        train.refuse(train.parse(["--cap-gib", "80"]), ["steep"])
    train.refuse(train.parse(["--cap-gib", "20.5", "--card-gib", "22"]), ["steep"])
    for words in (
        ["--card-gib", "22"],
        ["--cap-gib", "22.5", "--card-gib", "22"],
        ["--cap-gib", "hf", "--card-gib", "9"],
    ):
        with pytest.raises(SystemExit, match="--card-gib: give what may be allocated of it"):
            train.refuse(train.parse(words), ["steep", "hf"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.cuda.is_available():
        pytest.skip("the work is for a CPU, and steep takes a GPU where there is one")
    return write("tiny", tmp_path_factory.mktemp("weights"), "cpu")


def tiny(weights: Path, **fields: Any) -> Work:
    same: dict[str, Any] = {"batch": 2, "seq": 96, "r": 8, "steps": 5, "packed": False, "device": "cpu"}
    return Work(str(weights), **{**same, **fields})


@pytest.mark.parametrize(("fused", "level"), [("on", 3), ("off", None)])
def test_steeps_own_command_is_timed_and_tells_what_it_chose(
    fused: str, level: int | None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tiny(weights, cap_gib=1e-4)
    monkeypatch.setattr(sys, "argv", sys.argv)  # it is set
    begun = time.time()
    result = steep_run.steep_train(work, 384, tmp_path, begun, ["--model.fused", fused])
    assert len(result["losses"]) == len(result["seconds"]) == 5
    assert all(seconds > 0 for seconds in result["seconds"][1:])
    assert 0 < result["first_step_s"] < time.time() - begun
    assert result["losses"][0] == pytest.approx(math.log(384), abs=0.1)
    assert result["losses"][0] != result["losses"][-1]
    chosen = result["chosen"]
    assert chosen["fused"] == (fused == "on")
    assert chosen["levels"] == (level if level is None else [level] * 2)  # there is not even room for these
    assert chosen["trained_dtype"] == "bf16" and (chosen["backends"] != {}) == (fused == "on")
    assert 0.15 < chosen["planned_gib"] < 0.16  # the libraries' workspaces for the most part
    assert chosen["planned_host_gib"] == 0  # nothing of a step; a copy of a checkpoint is none
    assert "planned_s" not in chosen  # there is no card


def test_a_call_that_was_not_fused_is_seen(weights: Path) -> None:
    work = tiny(weights)
    peer = steep_run.steep_bare(work)
    bare_loop(peer, work, 0.0)
    assert steep_run.chosen(peer.model, 5)["fused"]
    assert not steep_run.chosen(peer.model, 6)["fused"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_as_one_row_has_the_losses_of_its_rows(
    packed: bool, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SHORTEST", 16)
    monkeypatch.setattr(peers, "LONGEST", 50)
    work = tiny(weights, packed=packed)
    losses = []
    for flat in (False, True):
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
        peer = Peer(model, torch.optim.SGD(model.parameters(), lr=0.1), flat=flat)
        losses.append(bare_loop(peer, work, 0.0)["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    row = flattened(next(batches(work, 384)))
    lengths = row["cu_seq_lens_q"].diff().tolist()
    assert sum(lengths) == 2 * 96 and max(lengths) == row["max_length_q"]
    assert len(lengths) > 2 if packed else lengths == [96, 96]


@pytest.mark.parametrize("packed", [False, True])
def test_torchs_flash_kernels_get_the_documents_of_a_row(
    packed: bool, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def by_document(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, scale: float, _: None
    ) -> torch.Tensor:
        lengths = ends.diff().tolist()
        assert max(lengths) == longest and sum(lengths) == len(q)
        calls.append(lengths)
        documents = zip(*(part.transpose(0, 1).split(lengths, 1) for part in (q, k, v)), strict=True)
        attend = torch.nn.functional.scaled_dot_product_attention
        outs = [attend(*(x[None] for x in each), is_causal=True, scale=scale, enable_gqa=True)[0] for each in documents]
        return torch.cat(outs, 1).transpose(0, 1)

    monkeypatch.setattr(peers, "SHORTEST", 16)
    monkeypatch.setattr(peers, "LONGEST", 50)
    monkeypatch.setattr(peers, "flash_kernel", by_document)
    work = tiny(weights, packed=packed)
    losses = [bare_loop(make(work), work, 0.0)["losses"] for make in (peers.hf, peers.hf_varlen)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert calls and all(len(lengths) > 2 if packed else lengths == [96, 96] for lengths in calls)


def test_torchs_flash_kernels_refuse_to_leave_a_cap_out() -> None:
    q = torch.randn(1, 2, 4, 16)
    same: dict[str, Any] = {"scaling": 1.0, "cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4}
    with pytest.raises(ValueError, match="does not cap"):
        peers.varlen_attention(None, q, q, q, None, softcap=50.0, **same)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
def test_torchs_flash_kernels_attend_within_documents_and_window(window: int | None) -> None:
    lengths, scale = [5, 300, 1, 130], 0.2
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    flash = peers.flash_kernel(q, k, v, ends, max(lengths), scale, window)

    token = torch.arange(sum(lengths), device="cuda")
    document = torch.bucketize(token, ends, right=True)
    behind = token[:, None] - token
    seen = (document[:, None] == document) & (behind >= 0) & (behind < (window or len(token)))

    def plain(dtype: torch.dtype) -> torch.Tensor:
        heads = (part.to(dtype).transpose(0, 1)[None] for part in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    assert_as_good(flash, plain(torch.bfloat16), plain(torch.float32))


def test_a_users_script_is_timed_fused(weights: Path) -> None:
    work = tiny(weights)
    installed = steep_run.steep_script(work)
    losses = [bare_loop(peer, work, 0.0)["losses"] for peer in (installed, peers.hf(work))]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    assert steep_run.chosen(installed.model, work.steps)["fused"]
    assert steep_run.chosen(installed.model, work.steps)["trained_dtype"] == "fp32"
    with pytest.raises(ValueError, match="without --cap-gib"):
        steep_run.steep_script(dataclasses.replace(work, cap_gib=14.0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--peers hf,other", "no such peer: other"),
        ("--steps 3", "--steps"),
        ("--batch 0", "0 is not above 0"),
        ("--r many", "--r"),
        ("--cap-gib -1", "-1 is not above 0"),
        ("--device cpu --cap-gib hf --peers steep", "has to be among the peers"),
        ("--device cpu --peers unsloth", r"not installed: unsloth \(unsloth\)"),
        ("--device cpu --peers hf-flash", r"not installed: hf-flash \(flash_attn\)"),
        ("--device cpu --peers hf,steep-script --cap-gib hf", "steep-script plans for the whole card"),
        ("--device cpu --peers hf,steep-script --cap-gib 14", "steep-script plans for the whole card"),
        ("", "there is no GPU"),
        ("--device cpu --out {folder}", "--out: .* is a folder"),
        ("--device cpu --out {folder}/file/rows.jsonl", "--out: .*/file cannot be made"),
        ("--device cpu --weights {folder}/file/weights", "--weights: .* cannot be made"),
    ],
)
def test_bad_words_are_refused_before_anything_is_measured(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "flash_of_the_hub", lambda: None)
    monkeypatch.setattr(train, "write", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(SystemExit) as end:
        train.main([*words.format(folder=tmp_path).split(), "--shape", "tiny"])
    assert re.search(said, f"{end.value.code}\n{capsys.readouterr().err}")


def test_a_peak_above_the_cap_is_no_result() -> None:
    train.refuse_over(14.0, 13.9)
    train.refuse_over(None, 26.0)
    with pytest.raises(RuntimeError, match=r"14.20 GiB, above the 14.00"):
        train.refuse_over(14.0, 14.2)


def test_ops_need_a_gpu_and_a_known_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, said in (([], "there is no GPU"), (["--only", "foo"], "invalid choice: 'foo'")):
        monkeypatch.setattr(sys, "argv", ["ops", *words])
        with pytest.raises(SystemExit) as end:
            ops.main()
        assert said in f"{end.value.code}\n{capsys.readouterr().err}"


def run_of(call: str, planned_gib: float, **fields: object) -> dict[str, Any]:
    kept = {"levels": [0, 1, 1], "places": ["gpu", "x", "x"], "cap_gib": 9.0}
    return timed("steep", 0.4, call, planned_gib=planned_gib, **{**kept, **fields})


def test_a_plan_stands_beside_the_newest_peak_of_its_work(tmp_path: Path) -> None:
    left_out = [
        timed("hf", 0.9, "3"),
        run_of("3", 8.0, gpu="none"),
        run_of("3", 8.0, shape="tiny"),
        run_of("3", 8.0, fused=False, levels=None),
        run_of("3", 8.0, steep_args="--training.seed 1"),
        run_of("3", 8.0, r=8),
        {**timed("steep", 0.4, "3"), "failed": "no"},
    ]
    rows = [run_of("1", 20.0), run_of("2", 9.538), run_of("2", 10.542, batch=16, places=None), *left_out]
    (tmp_path / "a-train.jsonl").write_text("\n".join(map(json.dumps, rows[1:])) + "\n")
    (tmp_path / "b-planned.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = planned.rows_of(tmp_path)
    assert found == rows[:3]
    shown = planned.table(found)
    assert shown.startswith("2 runs (H200), GiB; the plan that is furthest off is so by 5.0%")
    assert shown.splitlines()[-2:] == [
        "| llama-3-8b | 2 × 2,048 | steep | 9.0 | 1 × 0, 2 × 1 | 2 | 9.54 | 10.04 | -5.0% |",
        "| llama-3-8b | 16 × 2,048 | steep | 9.0 | 1 × 0, 2 × 1 | – | 10.54 | 10.04 | +5.0% |",
    ]
    over = {key: value for key, value in run_of("4", 0.0).items() if "gib" not in key or key == "cap_gib"}
    (tmp_path / "c-planned.jsonl").write_text(json.dumps({**over, "failed": "its peak was 9.20 GiB"}) + "\n")
    shown = planned.table(planned.rows_of(tmp_path))
    assert "2 runs (H200), 1 of which failed, GiB" in shown
    assert "| llama-3-8b | 2 × 2,048 | steep | 9.0 | – | – | – | its peak was 9.20 GiB | – |" in shown


def test_a_case_is_a_call_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "gpu_bytes", lambda: 80 * train.GIB)
    for case in planned.CASES:
        arguments = train.parse(planned.words_of(case, tmp_path, tmp_path / "out.jsonl"))
        train.refuse(arguments, [case.peer])
        assert (arguments.shape, arguments.peers, arguments.cap_gib) == (case.shape, case.peer, case.cap_gib)
        assert arguments.weights == tmp_path and arguments.stored == case.stored
        assert arguments.steep_args == planned.HOST
    with pytest.raises(SystemExit, match=r"--weights: .* needs 61 GiB, and its disk has 1: "):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=train.GIB))
        planned.refuse_full_disk(planned.CASES, tmp_path)


@pytest.mark.parametrize(("peer", "forwards"), [("hf", 2), ("hf-plain", 1)])
def test_a_library_computes_layers_as_often_as_it_is_said_to(peer: str, forwards: int, tmp_path: Path) -> None:
    folder = write("tiny", tmp_path / "weights", "cpu")
    made = PEERS[peer](Work(str(folder), 1, 16, 8, 1, False, "cpu"))
    calls: list[int] = []
    layer = unwrap(made.model).model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # a pass again ends before the last of a layer
    tokens = torch.randint(8, (1, 16))
    made.model.train()
    made.model(input_ids=tokens, labels=tokens).loss.backward()
    assert len(calls) == forwards
