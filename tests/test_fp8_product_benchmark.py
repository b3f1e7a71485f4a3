"""`benchmarks.fp8` times what it says, at small sizes on a CPU: groups are held against their weights, and the share is
of products, quantisation and transposition. `benchmarks.fp8_tiles` keeps what it finds of each tile."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fp8, fp8_tiles, measuring


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"HIDDEN": 128, "INTERMEDIATE": 256, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "RANK": 16}
    for name, value in {**sizes, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(fp8, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("adapters", [False, True])
def test_groups_that_are_timed_compute_their_weights_products(adapters: bool) -> None:
    groups = fp8.ours(48, adapters)
    assert list(groups) == ["qkv", "o", "gate_up", "down"]
    fp8.refuse_wrong(groups)
    for name, each in groups.items():
        before = each.wrong_by()
        assert before < fp8.TOLERANCE / 1.5, name
        for operand in (each.x.scale, each.dy.scale):
            operand /= 2
            assert each.wrong_by() > fp8.TOLERANCE, f"{name}: halved rows pass"
            operand *= 2
        if adapters:
            each.buffer.a.zero_()
            assert each.wrong_by() > fp8.TOLERANCE, f"{name}: dX without adapters passes"
    with pytest.raises(SystemExit, match="nothing is timed") if adapters else contextlib.nullcontext():
        fp8.refuse_wrong(groups)


@pytest.mark.usefixtures("small")
def test_the_share_is_of_products_quantisation_and_transposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.9, 1.1, 1.8, 0.2, 1.0, 1.25, 0.1, 2.0, 2.2])

    def sustained(launch: Any, seconds: float) -> float:
        launch()  # what is timed runs, and again on what it has written
        launch()
        return next(times)

    monkeypatch.setattr(fp8, "sustained_milliseconds", sustained)
    out = tmp_path / "rows.jsonl"
    fp8.main(["--tokens", "48", "--out", str(out)])
    *rows, share = map(json.loads, out.read_text().splitlines())
    assert [row["what"] for row in rows] == [
        "bare fp8", "bare fp8, exact", "bare bf16", "bare adapters", "ours", "ours, adapters", "transposition",
        "producers", "producers, e4m3",
    ]  # fmt: skip
    assert share["share"] == pytest.approx(0.9 / 1.2) and share["share_with_adapters"] == pytest.approx(1.1 / 1.45)
    linear = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    assert rows[0]["tflop_s"] == pytest.approx(2 * 2 * 48 * linear / 0.9e-3 / 1e12)
    assert rows[0]["ms_a_step"] == pytest.approx(32 * 0.9)
    assert "75.0% of the bare fp8 products' speed, 75.9% with adapters" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_what_was_timed_is_kept_when_a_later_line_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "sustained_milliseconds", lambda launch, seconds: 1.0)
    monkeypatch.setattr(fp8, "TOLERANCE", 0.0)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="nothing is timed"):
        fp8.main(["--tokens", "48", "--out", str(out)])
    kept = [json.loads(line)["what"] for line in out.read_text().splitlines()]
    assert kept == ["bare fp8", "bare fp8, exact", "bare bf16", "bare adapters"]


def test_a_kernel_is_compiled_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first launch takes longer than what is repeated for: counted, it would be the only one before two."""
    now, launches = 0.0, list[float]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    def launch() -> None:
        nonlocal now
        launches.append(now)
        now += 0.125 if len(launches) > 1 else 30

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measuring.sustained_milliseconds(launch, 4) == pytest.approx(125)
    assert len(launches) == 1 + 16 + 32


def test_producers_write_the_rows_that_products_read(small: None) -> None:
    groups = fp8.ours(48, adapters=False)
    operands = [(each.x, each.dy) for each in groups.values()]
    for rows in (rows for pair in operands for rows in pair):
        rows.scale.fill_(float("nan"))
    fp8.producers(48, groups, quantised=False)()
    assert all(rows.scale.isnan().all() for pair in operands for rows in pair)
    fp8.producers(48, groups, quantised=True)()
    assert all(rows.scale.isfinite().all() for pair in operands for rows in pair)


def test_fp8_products_are_timed_on_a_gpu_with_units_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(SystemExit, match="no GPU with fp8 units"):
        fp8.main([])


@pytest.mark.parametrize("backward", [False, True])
def test_each_tile_that_was_tried_has_a_line_that_says_where(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the kernel itself, in Triton's interpreter; a tile that is wrong or cannot be is not tried on other shapes."""
    small, wide = (fp8_tiles.Tile(64, 64, 128, 64, 4, 2, splits) for splits in (True, False))
    impossible, tried = small._replace(half=3), []
    product = fp8_tiles.fp8_linear.product

    def tracked(*given: Any, tile: Any) -> None:
        tried.append((given[2].shape, tile))
        product(*given, tile=tile)
        if tile == wide:
            given[4].div_(2)

    monkeypatch.setattr(fp8_tiles.fp8_linear, "product", tracked)
    monkeypatch.setattr(fp8_tiles, "DEVICE", "cpu")
    monkeypatch.setattr(fp8_tiles, "milliseconds", lambda launch: 0.5)
    monkeypatch.setattr(fp8_tiles, "candidates", lambda: iter((small, wide, impossible)))
    out = tmp_path / "rows.jsonl"
    words = f"--tokens 48 --rank 16 --shapes 128x128 128x192 --out {out}"
    fp8_tiles.main([*words.split(), *(["--backward"] * backward)])
    rows = list(map(json.loads, out.read_text().splitlines()))
    assert all(row["gpu"] == "none" and row["versions"]["torch"] and row["command"] for row in rows)
    names = ["torch", "torch", "write", "transpose"]
    assert [row["name"] for row in rows] == [*names, *["tile"] * 3, *names, "tile"]
    right, halved, failed = rows[4:7]
    assert right["right"] and right["splits"] and right["backward"] is backward
    assert not halved["right"] and halved["wrong"] == pytest.approx(0.5, abs=0.01)
    assert failed["half"] == 3 and failed["error"]
    assert [shape[0] for shape, tile in tried if tile != small] == [128, 128], "the second shape has the best alone"
    assert right["of_torch"] == pytest.approx((128 + 16) / 128)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
