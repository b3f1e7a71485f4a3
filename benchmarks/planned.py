"""The peak of memory that a plan says against the one that was measured, for shapes from 1B to 70B.

    python -m benchmarks.planned --run [--cases 0,3,7] [--weights DIR] [--out FILE]
    python -m benchmarks.planned [--check]

With --run each case of CASES is a few steps of `steep train` by `python -m benchmarks.train` in a process of its own,
which appends its line to `benchmarks/results/DATE-GPU-planned.jsonl`. Each GPU of the machine takes the next case, so
their times are not to be compared, and each run has a fixed amount of the host's memory. One that fails has a line too,
since a plan that was too small ends its run at the limit. Without --run, the table in docs/fused-step.md is written
from these lines and from those of `*-train.jsonl` that have a plan; with --check nothing is written, and the exit code
is 1 where it is not in step. A peak is of allocated memory, scoring of the base included, and a plan is made before the
weights load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import RESULTS, results_file
from benchmarks.pages import with_part
from benchmarks.shapes import SHAPES, folder_of, weight_bytes, write
from benchmarks.table import OF_THE_WORK, RANK, asked_gib

PAGE = Path(__file__).parent.parent / "docs" / "fused-step.md"
BEGIN, END = "<!-- benchmarks.planned: begin -->", "<!-- benchmarks.planned: end -->"
STEPS = 5, 2  # and of at least LONG tokens
LONG = 65_536
HOST = "--training.host_memory 96GiB"  # of each run, whatever others beside it take
GIB = 2**30

Row = dict[str, Any]


class Case(NamedTuple):
    """A run: which peer of `benchmarks.train`, and within how many GiB that are allocated."""

    shape: str
    batch: int
    seq: int
    peer: str
    cap_gib: float
    stored: str = "bf16"


CASES = [  # what takes longest is begun first
    Case("llama-3-8b", 1, 131_072, "steep-lean", 16.5),
    Case("llama-3-70b", 1, 8192, "steep-lean", 79, "nf4"),
    Case("llama-3-70b", 1, 2048, "steep-lean", 47, "nf4"),
    Case("llama-3-70b", 1, 2048, "steep", 79, "nf4"),
    Case("llama-3-8b", 1, 65_536, "steep-lean", 15),
    Case("llama-3-8b", 1, 32_768, "steep", 22),
    Case("llama-3-8b", 8, 2048, "steep", 47),
    Case("llama-3-8b", 4, 4096, "steep", 22),
    Case("llama-3-8b", 2, 2048, "steep", 15),
    Case("llama-3-8b", 2, 2048, "steep-fp8", 22),
    Case("llama-3-8b", 2, 2048, "steep-lean", 9),
    Case("llama-3.2-3b", 1, 65_536, "steep", 22),
    Case("llama-3.2-3b", 4, 2048, "steep", 15),
    Case("llama-3.2-1b", 1, 32_768, "steep", 15),
    Case("llama-3.2-1b", 8, 2048, "steep", 15),
    Case("llama-3.2-1b", 2, 2048, "steep-lean", 15),
]


def words_of(case: Case, weights: Path, out: Path) -> list[str]:
    """Of `python -m benchmarks.train`."""
    steps = STEPS[case.batch * case.seq >= LONG]
    given = {**case._asdict(), "steps": steps, "warm-up": 1, "weights": weights, "out": out, "steep-args": HOST}
    names = {"peer": "peers", "cap_gib": "cap-gib"}
    return [f"--{names.get(name, name)}={value}" for name, value in given.items()]


def refuse_full_disk(cases: Iterable[Case], weights: Path) -> None:
    """
    Raises:
        SystemExit: the weights of all shapes would not fit.
    """
    made = {(case.shape, case.stored) for case in cases}
    needed = sum(weight_bytes(shape, in_nf4=stored == "nf4") for shape, stored in made)
    weights.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(weights).free + sum(file.stat().st_size for file in weights.rglob("*.safetensors"))
    if needed > free:
        raise SystemExit(
            f"--weights: {weights} needs {needed / GIB:.0f} GiB, and its disk has {free / GIB:.0f}: give another one, "
            "or fewer --cases."
        )


def run(cases: list[Case], weights: Path, out: Path) -> list[Case]:
    """Run `cases`, one at a time on each GPU; those that failed."""
    gpus: SimpleQueue[int] = SimpleQueue()
    for gpu in range(torch.cuda.device_count()):
        gpus.put(gpu)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    writing: dict[tuple[str, str], Lock] = defaultdict(Lock)

    def of(case: Case) -> int:
        gpu = gpus.get()
        try:
            with writing[case.shape, case.stored], torch.cuda.device(gpu):  # once, by the first that needs them
                in_nf4 = case.stored == "nf4"
                write(case.shape, folder_of(weights, case.shape, "cuda", in_nf4=in_nf4), "cuda", in_nf4=in_nf4)
                torch.cuda.empty_cache()
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": listed[gpu] if listed[0] else str(gpu)}
            words = [sys.executable, "-m", "benchmarks.train", *words_of(case, weights, out)]
            return subprocess.run(words, env=environment, check=False).returncode
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(max_workers=gpus.qsize()) as pool:
        return [case for case, code in zip(cases, pool.map(of, cases), strict=True) if code]


def rows_of(folder: Path) -> list[Row]:
    """All lines of a fused run of a real shape that has a plan and a peak, or that failed here, the oldest first."""
    found: list[Row] = []
    for name in ("train", "planned"):
        for file in folder.glob(f"*-{name}.jsonl"):
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            found += (row for row in rows if (name == "planned" and "failed" in row) or belongs(row))
    return sorted(found, key=lambda row: row["call"])


def belongs(row: Row) -> bool:
    """Whether a run of a real shape is as `steep train` comes, and has both figures."""
    has_both = row.get("planned_gib") is not None and row.get("peak_allocated_gib") is not None
    as_it_is = row["r"] == RANK and not OF_THE_WORK.sub("", row["steep_args"]).strip()
    return has_both and as_it_is and row["gpu"] != "none" and row["fused"] and row["shape"] != "tiny"


def deviation(row: Row) -> float:
    """Of the plan from the measured peak, as a share of that."""
    return row["planned_gib"] / row["peak_allocated_gib"] - 1


def table(rows: Iterable[Row]) -> str:
    """Markdown, of each work the newest row; empty without rows."""
    order = list(SHAPES)
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        work = order.index(row["shape"]), row["batch"], row["seq"], row["packed"], row["peer"]
        newest[*work, row["gpu"], round(asked_gib(row) or 0, 1)] = row
    if not newest:
        return ""
    lines = []
    for key, row in sorted(newest.items()):
        work = (
            row["shape"], f"{row['batch']} × {row['seq']:,}{' packed' * row['packed']}", row["peer"], key[-1] or "–",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, (*work, *_found(row))))} |")
    done = [row for row in newest.values() if "failed" not in row]
    off = f"{max(abs(deviation(row)) for row in done):.1%}" if done else "–"
    failed = f", {len(newest) - len(done)} of which failed" * (len(done) < len(newest))
    head = (
        "shape", "rows", "run", "asked for, GiB allocated", "layers × level", "with host memory", "planned", "measured",
        "off by",
    )  # fmt: skip
    gpus = ", ".join(sorted({row["gpu"].removeprefix("NVIDIA ") for row in newest.values()}))
    return "\n".join(
        [
            f"{len(newest)} runs ({gpus}){failed}, GiB; the plan that is furthest off is so by {off}. `steep-lean`",
            "is [updates inside backward](#updates-inside-backward), states in host memory; `steep-fp8` a base in fp8.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *lines,
        ]
    )


def _found(row: Row) -> tuple[object, ...]:
    if "failed" in row:
        return "–", "–", "–", row["failed"].replace("|", "/"), "–"
    levels, places = row["levels"], row["places"] or ()
    return (
        ", ".join(f"{levels.count(level)} × {level}" for level in sorted(set(levels))),
        sum(place != "gpu" for place in places) or "–",
        f"{row['planned_gib']:.2f}", f"{row['peak_allocated_gib']:.2f}", f"{deviation(row):+.1%}",
    )  # fmt: skip


def in_step(text: str, rows: Iterable[Row]) -> str:
    """The page's text with the table of `rows` between its marks."""
    return with_part(text, BEGIN, END, table(rows))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure, in place of writing the table")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is not in step")
    parser.add_argument("--cases", help=f"numbers of 0 to {len(CASES) - 1}, by commas; default: all")
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "steep-benchmarks")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-planned.jsonl")
    arguments = parser.parse_args(sys.argv[1:] if words is None else words)
    if arguments.run:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU, whose memory this measures.")
        numbers = map(int, arguments.cases.split(",")) if arguments.cases else range(len(CASES))
        cases = [CASES[number] for number in numbers]
        refuse_full_disk(cases, arguments.weights)
        failed = run(cases, arguments.weights, arguments.out or results_file("planned"))
        for case in failed:
            print(f"failed: {case}", file=sys.stderr)
        sys.exit(bool(failed))
    text = PAGE.read_text(encoding="utf-8")
    new = in_step(text, rows_of(RESULTS))
    if arguments.check:
        sys.exit(text != new)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
