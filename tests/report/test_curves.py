"""Curves are smoothed over all points and thinned without losing a peak."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from steep.report.curves import MAX_POINTS, charts, smooth, thin
from steep.report.read import read_run
from tests.report.runs import edit, write_run


def by_id(*folders: Path) -> dict[str, dict]:
    found, _ = charts([read_run(folder) for folder in folders])
    return {chart.id: chart.as_dict() for chart in found}


def test_thinning_keeps_every_peak_and_both_ends() -> None:
    chance = random.Random(0)
    values = [chance.random() for _ in range(100_000)]
    values[12_345], values[77_777] = 9.0, -9.0
    kept = thin(values, 1_000)
    assert 900 < len(kept) <= 1_000 and kept == sorted(set(kept))
    assert {0, 12_345, 77_777, 99_999} <= set(kept)
    # Whatever stretch of a few groups one looks at, its range is nearly that of all points.
    for start in range(0, 99_000, 1_000):
        all_of_it = values[start : start + 1_000]
        shown = [values[i] for i in kept if start <= i < start + 1_000]
        assert max(shown) == max(all_of_it) or max(all_of_it) - max(shown) < 0.01
        assert min(shown) == min(all_of_it) or min(shown) - min(all_of_it) < 0.01


def test_taking_every_nth_point_would_lose_the_peak() -> None:
    values = [0.0] * 100_000
    values[12_345] = 9.0
    assert max(values[::100]) == 0.0 and max(values[i] for i in thin(values, 1_000)) == 9.0


def test_thinning_keeps_gaps_and_leaves_short_curves_alone() -> None:
    values = [1.0 if i != 5_000 else None for i in range(10_000)]
    assert 5_000 in thin(values, 100)
    assert thin([None] * 10_000, 100)[0] == 0
    assert thin(values[:100], 100) == list(range(100))


def test_smoothing_is_a_weighted_mean_of_the_past() -> None:
    values, keep = [3.0, 1.0, None, 5.0], 1 - 2 / 6
    assert smooth(values, 5) == [
        3.0,
        pytest.approx((3 * keep + 1) / (keep + 1)),
        None,
        pytest.approx((3 * keep**2 + keep + 5) / (keep**2 + keep + 1)),
    ]
    assert smooth([2.0] * 9, 5) == pytest.approx([2.0] * 9)


def test_one_run_has_all_charts(tmp_path: Path) -> None:
    found = by_id(write_run(tmp_path / "ko", steps=60))
    assert list(found) == [
        "loss", "domain-0", "domain-1", "domain-2", "learning-rates", "gradient-norm", "speed", "memory",
    ]  # fmt: skip
    assert [curve["name"] for curve in found["loss"]["curves"]] == ["as logged", "smoothed"]
    assert [chart["title"] for chart in found.values() if chart["group"] == "domains"] == ["korean", "english", "code"]
    base, trained = found["domain-0"]["curves"]
    assert (base["name"], base["step"], base["y"]) == ("base model", [0, 60], [2.56, 2.56])
    assert (trained["step"], trained["y"][0], trained["y"][-1]) == ([0, 20, 40, 60], 2.56, 1.68)
    assert trained["tokens"] == [step * 32_640 for step in trained["step"]]
    measured, planned = found["memory"]["curves"]
    assert measured["y"][-1] == pytest.approx(20_400_000_000 / 2**30, rel=1e-5)
    assert planned["y"] == [pytest.approx(19_800_000_000 / 2**30, rel=1e-5)] * 2


def test_groups_with_the_same_rates_share_a_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=60)
    names = [curve["name"] for curve in by_id(folder)["learning-rates"]["curves"]]
    assert names == ["adapters a, adapters b", "embeddings"]
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[-1]["learning_rate_adapters_b"] *= 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = [curve["name"] for curve in by_id(folder)["learning-rates"]["curves"]]
    assert names == ["adapters a", "adapters b", "embeddings"]


def test_scores_between_log_lines_stand_at_their_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=60, every=8, eval_every=20)
    trained = by_id(folder)["domain-0"]["curves"][1]
    assert trained["tokens"] == [0, 20 * 32_640, 40 * 32_640, 56 * 32_640]  # the last log line is that of step 56


def test_a_branch_has_scores_from_before_it_began(tmp_path: Path) -> None:
    """The base at step 0 and its parent's checkpoint at step 20 cost it no tokens; it ends where both have come to."""
    folder = write_run(tmp_path / "ko", steps=60, every=8, eval_every=20)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    own = [row | {"tokens": row["tokens"] - 20 * 32_640} for row in rows if row["step"] > 20]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    edit(folder / "plan.json", first_step=20, steps=40)
    curve = by_id(folder)["domain-0"]["curves"][1]
    assert (curve["step"], curve["tokens"]) == ([0, 20, 40, 60], [0, 0, 20 * 32_640, 36 * 32_640])
    run = read_run(folder)
    assert (run.first_step, run.steps) == (20, 60)


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=60)
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[29]["loss"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chart = by_id(folder)["loss"]
    raw, smoothed = chart["curves"]
    assert raw["y"][29] is None and smoothed["y"][29] is None and None not in smoothed["y"][30:]
    assert chart["note"].endswith(" Gaps: loss not finite (1 log lines).")
    for number in (39, 40):  # as of steps that the run passes over since it went back before them
        rows[number] |= {"loss": None, "tokens_per_second": 0.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert by_id(folder)["loss"]["note"].endswith(" Gaps: loss not finite (1 log lines), passed over (2 log lines).")


def test_several_runs_are_told_apart_by_colour_and_dashes(tmp_path: Path) -> None:
    found = by_id(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    smoothed = [curve for curve in found["loss"]["curves"] if curve["weight"] == "line"]
    assert [(curve["name"], curve["colour"], curve["dash"]) for curve in smoothed] == [("a", 1, 0), ("b", 2, 1)]
    assert [curve["name"] for curve in found["domain-0"]["curves"]] == ["base model", "a", "b"]  # one base for both


def test_different_base_models_have_a_line_each(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", domains={"korean": ("train", 2.5, 1.5)})
    b = write_run(tmp_path / "b", domains={"korean": ("train", 2.0, 1.5)})
    assert [curve["name"] for curve in by_id(a, b)["domain-0"]["curves"]] == [
        "a · base model", "a", "b · base model", "b",
    ]  # fmt: skip


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert charts([read_run(tmp_path / "none")]) == ([], "")


def test_long_runs_are_thinned_and_say_so(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, steps=5_000, eval_every=10)) for name in "ab"]
    found, note = charts(runs)
    points = sum(len(curve.values) for chart in found for curve in chart.curves)
    assert MAX_POINTS / 2 < points < 1.2 * MAX_POINTS
    assert "5,000" in note and "lowest and the highest" in note
    assert charts([read_run(write_run(tmp_path / "short"))])[1] == ""
