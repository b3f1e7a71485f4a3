"""Writes the README's table of training steps from `benchmarks/results/*-train.jsonl`.

    python -m benchmarks.table [--check]

A column is a peer, a line a work; the newest call that timed both steep and the peer counts. Each ratio is of two rows
of one call. With --check nothing is written, and the exit code is 1 where the README is not in step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks.table: begin -->", "<!-- benchmarks.table: end -->"
STEEP, YARDSTICK = "steep", "hf"
PEERS = {
    YARDSTICK: "transformers + PEFT",
    "hf-lean": "the same, all in bf16",
    "hf-liger": "with Liger",
    "unsloth": "Unsloth",
}

Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """All rows of real shapes, the oldest first."""
    lines = [line for file in sorted(folder.glob("*-train.jsonl")) for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return sorted((row for row in rows if row["shape"] != "tiny"), key=lambda row: row["call"])


def work_of(row: Row) -> str:
    parts = [row["gpu"].removeprefix("NVIDIA "), row["shape"], f"{row['batch']} × {row['seq']}"]
    if row["packed"]:
        parts.append("packed")
    if row["cap_gib"]:
        parts.append(f"in {row['cap_gib']:g} GiB")
    return ", ".join(parts)


def cost(row: Row) -> str:
    return f"{row['step_s']:.3f} s, {row['peak_allocated_gib']:.1f} GiB"


def table(rows: Iterable[Row]) -> str:
    """Markdown; empty where no call timed steep and the yardstick."""
    calls: dict[str, dict[str, dict[str, Row]]] = {}  # work, call, peer
    for row in rows:
        calls.setdefault(work_of(row), {}).setdefault(row["call"], {})[row["peer"]] = row
    lines: list[tuple[str, dict[str, str]]] = []
    for work, by_call in calls.items():
        cells: dict[str, str] = {}
        for call in by_call.values():  # a newer call replaces an older one
            if STEEP not in call or YARDSTICK not in call:
                continue
            cells[STEEP] = cost(call[STEEP])
            for peer in PEERS:
                if peer in call:
                    ratio = call[peer]["step_s"] / call[STEEP]["step_s"]
                    cells[peer] = f"{cost(call[peer])} ({ratio:.2f}×)"
        if cells:
            lines.append((work, cells))
    if not lines:
        return ""
    peers = [peer for peer in PEERS if any(peer in cells for _, cells in lines)]
    head = ["work", "steep", *(PEERS[peer] for peer in peers)]
    shown = [[work, cells[STEEP], *(cells.get(peer, "–") for peer in peers)] for work, cells in lines]
    written = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *shown)]
    return "\n".join(
        [
            "One training step, QLoRA at rank 256 with both embeddings trained: time, and peak of allocated memory. In",
            "brackets: how many times as fast `steep train` was in the same call (`python -m benchmarks.train`).",
            "",
            *written,
        ]
    )


def in_step(text: str, rows: Iterable[Row]) -> str:
    """The README's text with the table of `rows` between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = table(rows)
    return f"{before}{BEGIN}\n{made}\n{END}{after}" if made else f"{before}{BEGIN}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    new = in_step(text, rows_of(RESULTS))
    if arguments.check:
        sys.exit(text != new)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
