"""Writes the README's tables of training steps from `benchmarks/results/*-train.jsonl`.

    python -m benchmarks.table [--check]

A column is a peer, a line a call: of each work the newest that timed steep and the libraries, and an older one where
that has a peer which no newer one has. So all figures and ratios of a line are of one call. transformers + PEFT is the
fastest of `hf`, `hf-flash` and `hf-varlen`. Only what the table says of itself is in it: real shapes at rank 256 on a
GPU, and steep as it is by default, without `--steep-args`. The second table is of the lean peers, of each work within
its limit the newest: `--steep-args` say there what a run was asked to fill where that is not `--cap-gib`, how much host
memory it was allowed, and how positions were stretched. With
--check nothing is written, and the exit code is 1 where the README is not in step.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS
from benchmarks.pages import markdown, with_part
from benchmarks.shapes import SHAPES

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks.table: begin -->", "<!-- benchmarks.table: end -->"
LEAN_BEGIN, LEAN_END = "<!-- benchmarks.table, lean: begin -->", "<!-- benchmarks.table, lean: end -->"
LEAN = {"steep-lean": "NF4", "steep-fp8-lean": "e4m3"}  # the base
# Where kept tensors may go, what a plan may fill (`within`), and positions beyond the model's own: no choice of how a
# step is computed.
OF_THE_WORK = re.compile(r" *--(training\.(host_memory|vram)|model\.rope_scaling\.\w+) \S+")
RANK = 256
STEEP, ALONE, FP8 = "steep", "steep-bare", "steep-fp8"
LIBRARY = {"hf": "", "hf-flash": ", flash-attn", "hf-varlen": ", torch's flash kernels"}
ITS_STEP, OVER_FP8, YARDSTICK = "its step alone", "steep over e4m3", "transformers + PEFT"
PEERS = {
    "hf-lean": "the same, all in bf16", "hf-plain": "transformers + PEFT, without checkpointing",
    "hf-liger": "with Liger", "unsloth": "Unsloth",
}  # fmt: skip
COLUMNS = [STEEP, ITS_STEP, OVER_FP8, YARDSTICK, *PEERS.values()]

Row = dict[str, Any]


def rows_of(folder: Path) -> list[Row]:
    """All rows that the table is about, the oldest first."""
    lines = [line for file in sorted(folder.glob("*-train.jsonl")) for line in file.read_text().splitlines()]
    return sorted(filter(belongs, map(json.loads, lines)), key=lambda row: row["call"])


def belongs(row: Row) -> bool:
    if "failed" in row or row["shape"] == "tiny" or row["gpu"] == "none":
        return False
    given = row.get("steep_args", "")  # a library's row says nothing of it
    if row["peer"] in LEAN:
        given = OF_THE_WORK.sub("", given)
    return row["r"] == RANK and row.get("fused", True) and not given


def work_of(call: dict[str, Row]) -> str:
    steep = call[STEEP]
    parts = [steep["gpu"].removeprefix("NVIDIA "), steep["shape"], f"{steep['batch']} × {steep['seq']}"]
    if steep["packed"]:
        parts.append("packed")
    if steep["cap_gib"] and not steep["cap_of"]:
        # A limit under which all is kept on the card changes nothing.
        if any(steep.get("levels", [1])) or waits_in_host_memory(steep):
            parts.append(f"within {steep['cap_gib']:g} GiB allocated")
    elif steep["peak_allocated_gib"] > library_of(call)["peak_allocated_gib"]:
        parts.append(f"in more memory than {YARDSTICK}")
    return ", ".join(parts)


def library_of(call: dict[str, Row]) -> Row:
    return min((call[peer] for peer in LIBRARY if peer in call), key=lambda row: row["step_s"])


def waits_in_host_memory(row: Row) -> bool:
    """Whether some of what layers keep does."""
    return any(place != "gpu" for place in row.get("places") or ())


def cost(row: Row) -> str:
    return f"{row['step_s']:.3f} s, {row['peak_allocated_gib']:.1f} GiB" + "†" * waits_in_host_memory(row)


def shown_of(call: dict[str, Row]) -> dict[str, Row]:
    """A call's rows by column."""
    by_column = {STEEP: STEEP, ITS_STEP: ALONE, OVER_FP8: FP8, **{column: peer for peer, column in PEERS.items()}}
    found = {column: call[peer] for column, peer in by_column.items() if peer in call}
    return found | {YARDSTICK: library_of(call)}


def cell(column: str, row: Row, steep: Row, library: Row) -> str:
    if column in (STEEP, ITS_STEP):
        return cost(row)
    if column == OVER_FP8:
        return f"{cost(row)} ({library['step_s'] / row['step_s']:.2f}× as fast as {YARDSTICK})"
    # Of the yardstick the work says it.
    more = column != YARDSTICK and steep["peak_allocated_gib"] > row["peak_allocated_gib"]
    ratio = f"{row['step_s'] / steep['step_s']:.2f}×{', in more memory' * more}"
    return f"{cost(row)}{LIBRARY.get(row['peer'], '')} ({ratio})"


def table(rows: Iterable[Row]) -> str:
    """Markdown; empty where no call timed steep and the libraries."""
    calls: dict[str, dict[str, Row]] = {}
    for row in rows:
        calls.setdefault(row["call"], {})[row["peer"]] = row
    works: dict[str, list[dict[str, Row]]] = {}  # the oldest call first
    for call in calls.values():
        if STEEP in call and any(peer in call for peer in LIBRARY):
            works.setdefault(work_of(call), []).append(shown_of(call))
    lines: list[tuple[str, dict[str, Row]]] = []
    for work, found in works.items():
        seen: set[str] = set()
        for shown in reversed(found):
            if not seen.issuperset(shown):
                lines.append((f"{work}, on {shown[STEEP]['call'][:10]}" if seen else work, shown))
                seen.update(shown)
    if not lines:
        return ""
    columns = [column for column in COLUMNS if any(column in shown for _, shown in lines)]
    body = [
        [work, *(cell(column, shown[column], shown[STEEP], shown[YARDSTICK]) if column in shown else "–"
                 for column in columns)]
        for work, shown in lines
    ]  # fmt: skip
    all_shown = [row for _, shown in lines for row in shown.values()]
    return "\n".join(
        [
            f"One training step, QLoRA at rank {RANK} with both embeddings trained: time ({medians(all_shown)}), and",
            "peak of allocated memory. In brackets: how many times as fast `steep train` was. A line is one call of",
            "`python -m benchmarks.train`, whose words are in its rows of `benchmarks/results/*-train.jsonl`. Memory",
            "that a work is within limits what steep allocates, and no one else; with the gaps between allocations",
            "it may take a ninth more. But for a column that says so, the other libraries compute each layer's",
            "forward pass again in the backward pass (gradient checkpointing), as their documentation has it;",
            "steep does so as far as its memory asks for it.",
            *(
                ["†: and host memory, in which some of what layers keep waits for the backward pass."]
                * any(map(waits_in_host_memory, all_shown))
            ),
            "",
            *markdown(["work", *columns], body),
        ]
    )


def medians(rows: Iterable[Row]) -> str:
    """What a time is."""
    counts = sorted({row["steps_timed"] for row in rows})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"median of {number} step{'s' * (counts[-1] > 1)}, random weights"


def asked_gib(row: Row) -> float | None:
    """GiB that a run was to allocate."""
    asked = re.search(r"--training\.vram ([\d.]+)GiB", row["steep_args"])
    return float(asked[1]) if asked else row["cap_gib"]


def within(row: Row) -> str:
    """What its process was held to, and what the run was asked for where that is another amount."""
    asked, held_to = asked_gib(row), row["cap_gib"]
    if asked == held_to:
        return f"{held_to:g} GiB"
    return f"{f'{held_to:g} GiB' if held_to else 'no limit'}, asked for {asked:g}"


def host_memory(row: Row) -> str:
    """As the plan had it; else what it was allowed."""
    if (planned := row.get("planned_host_gib")) is not None:
        return f"{planned:.1f} GiB"
    allowed = re.search(r"--training\.host_memory ([\d.]+)GiB", row["steep_args"])
    return f"≤ {allowed[1]} GiB" if allowed else "–"


def lean_table(rows: Iterable[Row]) -> str:
    """Markdown, of each work within its limit the newest, the smallest first; empty where there is none."""
    order, newest = list(SHAPES), dict[tuple[Any, ...], Row]()
    for row in rows:
        if row["peer"] in LEAN:
            work = order.index(row["shape"]), row["batch"] * row["seq"], row["batch"], row["peer"]
            newest[*work, row["gpu"], asked_gib(row)] = row
    if not newest:
        return ""
    head = (
        "work", "base", "within, allocated", "a step", "steps timed", "tokens/s", "peak, allocated", "reserved",
        "host memory",
    )  # fmt: skip
    body = []
    for _, row in sorted(newest.items(), key=lambda each: (*each[0][:3], each[1]["peak_allocated_gib"])):
        stretched = re.search(r"rope_scaling\.factor (\S+)", row["steep_args"])
        work = f"{row['gpu'].removeprefix('NVIDIA ')}, {row['shape']}, {row['batch']} × {row['seq']:,}"
        body.append((
            f"{work}, positions stretched {stretched[1]}×" if stretched else work, LEAN[row["peer"]],
            within(row), f"{row['step_s']:.3g} s", str(row["steps_timed"]), f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_allocated_gib']:.1f} GiB", f"{row['peak_reserved_gib']:.1f} GiB", host_memory(row),
        ))  # fmt: skip
    return "\n".join(
        [
            "The same training with weights updated inside the backward pass (so without clipping by the norm of all",
            "gradients), the optimizer's states in host memory, and of what layers keep as much as the limit asks for.",
            f"A time is the {medians(newest.values())}; a row of text is one document.",
            "A limit is on what is allocated: where its process was held to another than the run was asked for, both",
            "are there. Host memory is what the plan has there of states and of what layers keep; ≤: what the run was",
            "allowed, where its row says no more. The command of a line is in its row of",
            "`benchmarks/results/*-train.jsonl`.",
            "",
            *markdown(head, body),
        ]
    )


def in_step(text: str, rows: Iterable[Row]) -> str:
    """The README's text with the tables of `rows` between their marks."""
    rows = list(rows)
    return with_part(with_part(text, BEGIN, END, table(rows)), LEAN_BEGIN, LEAN_END, lean_table(rows))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(sys.argv[1:] if words is None else words)
    text = README.read_text(encoding="utf-8")
    new = in_step(text, rows_of(RESULTS))
    if arguments.check:
        sys.exit(text != new)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
