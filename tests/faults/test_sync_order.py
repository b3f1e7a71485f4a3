"""The order of write, fsync and rename in a real save: what a power cut finds on the disk depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.command import start_wrapped
from tests.faults.runs import Run
from tests.faults.scene import Scene
from tests.faults.trace import STRACE, publishing_faults, read_trace, replacing_faults, spike_faults

_RUN = Path("/runs/ko")
_GOOD = """\
7 write(9</runs/ko/metrics.jsonl>, ""..., 80) = 80
7 mkdir("/runs/ko/.writing-h-7-a", 0777) = 0
8 openat(AT_FDCWD</w>, "/runs/ko/.writing-h-7-a/optimizer.json", O_WRONLY|O_CREAT, 0666) = 5</runs/ko/x>
8 write(5</runs/ko/.writing-h-7-a/optimizer.json>, ""..., 10) = 10
8 write(5</runs/ko/.writing-h-7-a/optimizer.json>, ""..., 10 <unfinished ...>
7 write(9</runs/ko/metrics.jsonl>, ""..., 80) = 80
8 <... write resumed>) = 10
8 fsync(6</runs/ko/metrics.jsonl>) = 0
8 fsync(6</runs/ko/.writing-h-7-a/optimizer.json>) = 0
8 fsync(6</runs/ko/.writing-h-7-a>) = 0
8 rename("/runs/ko/.writing-h-7-a", "/runs/ko/checkpoint-8") = 0
8 fsync(6</runs/ko> <unfinished ...>
7 write(9</runs/ko/metrics.jsonl>, ""..., 80) = 80
8 <... fsync resumed>) = 0
8 rename("/runs/ko/checkpoint-4", "/runs/ko/.writing-h-7-b") = 0
8 fsync(6</runs/ko>) = 0
8 unlinkat(6</runs/ko/.writing-h-7-b>, "optimizer.json", 0) = 0
""".splitlines()


def faults(lines: Sequence[str]) -> list[str]:
    events = read_trace(lines)
    return publishing_faults(
        events, _RUN / "checkpoint-8", logs=[_RUN / "metrics.jsonl"], older=[_RUN / "checkpoint-4"]
    )


def test_the_right_order_is_let_pass() -> None:
    assert faults(_GOOD) == []


@pytest.mark.parametrize(
    ("missing", "fault"),
    [
        (7, "checkpoint-8: metrics.jsonl is not synced"),
        (8, "checkpoint-8/optimizer.json is not synced"),
        (9, "checkpoint-8: its folder .writing-h-7-a is not synced"),
        (11, "checkpoint-4 is deleted before the new name is on the disk"),
        (10, "no rename gave it its name"),
    ],
)
def test_a_missing_call_is_found(missing: int, fault: str) -> None:
    lines = [line for number, line in enumerate(_GOOD) if number != missing]
    if missing == 11:
        lines.remove("8 <... fsync resumed>) = 0")
    assert any(fault in line for line in faults(lines)), faults(lines)


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        (6, 8, "checkpoint-8/optimizer.json is not synced"),  # the last write after the fsync
        (8, 10, "checkpoint-8/optimizer.json is not synced"),  # the fsync after the rename
        (9, 10, "its folder .writing-h-7-a is not synced"),
        (10, 14, "checkpoint-4 is deleted before"),
    ],
)
def test_a_wrong_order_is_found(first: int, second: int, fault: str) -> None:
    lines = list(_GOOD)
    lines.insert(second, lines.pop(first))
    assert any(fault in line for line in faults(lines)), faults(lines)


def test_a_file_that_is_replaced_without_a_sync_is_found() -> None:
    lines = [
        '7 write(9</runs/ko/.writing-h-7-a>, ""..., 80) = 80',
        "7 fsync(9</runs/ko/.writing-h-7-a>) = 0",
        '7 rename("/runs/ko/.writing-h-7-a", "/runs/ko/ledger.json") = 0',
        "7 fsync(9</runs/ko>) = 0",
    ]
    assert replacing_faults(read_trace(lines), _RUN) == []
    for missing in (1, 3):
        left = [line for number, line in enumerate(lines) if number != missing]
        assert len(replacing_faults(read_trace(left), _RUN)) == 1


_SPIKE = """\
7 write(9</runs/ko/metrics.jsonl>, ""..., 80) = 80
7 openat(AT_FDCWD</w>, "/runs/ko/incidents.jsonl", O_WRONLY|O_CREAT|O_APPEND, 0666) = 5</runs/ko/incidents.jsonl>
7 write(5</runs/ko/incidents.jsonl>, ""..., 10) = 10
7 fsync(5</runs/ko/incidents.jsonl>) = 0
7 fsync(5</runs/ko>) = 0
7 write(5</runs/ko/.writing-h-7-a>, ""..., 10) = 10
7 fsync(5</runs/ko/.writing-h-7-a>) = 0
7 rename("/runs/ko/.writing-h-7-a", "/runs/ko/skipped_steps.json") = 0
7 fsync(5</runs/ko>) = 0
7 rename("/runs/ko/.writing-h-7-b", "/runs/ko/metrics.jsonl") = 0
""".splitlines()


@pytest.mark.parametrize(
    ("late", "fault"),
    [
        (3, "incidents.jsonl is not on the disk"),
        (4, "the name incidents.jsonl is not on the disk"),
        (8, "the name skipped_steps.json is not on the disk"),
        (7, "no line and no list"),
    ],
)
def test_a_spike_that_is_not_on_the_disk_when_the_run_goes_on_is_found(late: int, fault: str) -> None:
    assert spike_faults(read_trace(_SPIKE), _RUN) == []
    missing = [line for number, line in enumerate(_SPIKE) if number != late]
    assert any(fault in line for line in spike_faults(read_trace(missing), _RUN))
    if late != 7:
        assert any(fault in line for line in spike_faults(read_trace([*missing, _SPIKE[late]]), _RUN))


@pytest.mark.strace
def test_a_real_run_writes_in_the_right_order(scene: Scene, tmp_path: Path) -> None:
    place = tmp_path / "traced"
    trace = tmp_path / "trace"
    run = Run(
        scene,
        place,
        lambda words, folder, further: start_wrapped([*STRACE, str(trace)], words, folder, further),
        training={"max_steps": 7, "logging_steps": 1, "save_steps": 2, "eval_steps": 3},
    )
    run.finish()
    events = read_trace(trace.read_text(encoding="utf-8", errors="replace").splitlines())
    folder = run.folder
    logs = [folder / name for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")]
    saved = [2, 4, 6, 7]
    for number, step in enumerate(saved):
        # The one that goes for it stands until its name is on the disk.
        gone = [folder / f"checkpoint-{saved[number - 2]}"] if number >= 2 else []
        assert publishing_faults(events, folder / f"checkpoint-{step}", logs=logs, older=gone) == []
    assert run.checkpoints() == saved[-2:]
    assert publishing_faults(events, folder / "final", logs=logs) == []
    assert replacing_faults(events, folder) == []
    # Every file of a checkpoint was seen to be written: else nothing was asserted of it.
    for step in run.checkpoints():
        name = f"checkpoint-{step}"
        staging = next(event.path for event in events if event.kind == "rename" and event.new == str(folder / name))
        inside = [event for event in events if Path(event.path).parent == Path(staging)]
        later = {event.path: event.new for event in inside if event.kind == "rename"}
        seen = {Path(later.get(event.path, event.path)).name for event in inside if event.kind == "write"}
        assert seen == {path.name for path in (folder / name).iterdir()}
