"""What the lines of `benchmarks.bases` come to: tables, and whether the bar for an fp8 base holds.

The bar: fp8 in both directions is not worse than NF4 with bf16 products in any of four columns, Korean and English, in
their own arithmetic and merged into the 16-bit original; and merged it is within 0.015 nats a token of the bf16 base.
Differences are of runs with the same seed. A part of the bar holds where the whole 95 % interval of the mean (Student's
t over the seeds) is within it; where the mean is and the interval is not, it is open, and takes more seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bases_arms import ARMS, DOMAINS, Work
from benchmarks.estimate import Estimate
from benchmarks.pages import markdown, with_part

Row = dict[str, Any]
Column = tuple[str, str]  # domain, and in which arithmetic

BEGIN, END = "<!-- benchmarks.bases: begin -->", "<!-- benchmarks.bases: end -->"
COLUMNS: list[Column] = [(domain, where) for domain in DOMAINS for where in ("own", "merged")]
JUDGED, FOUR_BIT, SIXTEEN_BIT = "fp8-both", "nf4", "bf16"
MERGED_WITHIN = 0.015  # nats a token
HOLDS, OPEN, FAILS = "holds", "open", "does not hold"
PRODUCTS = {"none": "bf16", "backward": "fp8 backward", "both": "fp8 both ways"}
INTERVALS = "mean ± half of the 95 % interval by Student's t over n seeds"


def works_of(rows: Sequence[Row]) -> list[tuple[Work, list[Row]]]:
    """Each work with its lines, in their order.

    Raises:
        SystemExit: see `refuse_unlike`.
    """
    works: dict[Work, list[Row]] = {}
    for row in rows:
        works.setdefault(Work(**{field.name: row[field.name] for field in dataclasses.fields(Work)}), []).append(row)
    for found in works.values():
        refuse_unlike(found)
    return list(works.items())


def refuse_unlike(rows: Sequence[Row]) -> None:
    """
    Raises:
        SystemExit: runs had other held-out text, or those of a seed other tokens; or two arms computed the same.
    """
    for what in ("heldout", "embedding_learning_rate", "scale"):
        if len({json.dumps(row[what], sort_keys=True) for row in rows}) > 1:
            raise SystemExit(f"runs of {rows[0]['model']} differ in {what}, and cannot be compared.")
    tokens: dict[int, int] = {}  # a seed's order of rows has the corpus's last one, which is short, or has it not
    for row in rows:
        if tokens.setdefault(row["seed"], row["tokens"]) != row["tokens"]:
            raise SystemExit(
                f"runs of {row['model']} with seed {row['seed']} differ in tokens, and cannot be compared."
            )
    seen: dict[tuple[int, str], str] = {}
    for row in rows:
        other = seen.setdefault((row["seed"], json.dumps(row["curve"])), row["arm"])
        if other != row["arm"]:
            raise SystemExit(
                f"{other} and {row['arm']} have the same losses to the last digit (seed {row['seed']}): they computed "
                "the same, and one of them is not what it says."
            )


def arms_of(rows: Sequence[Row]) -> list[str]:
    there = {row["arm"] for row in rows}
    return [arm for arm in ARMS if arm in there]


def by_seed(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["arm"] == arm}


def score(row: Row, column: Column, unit: str) -> float:
    """
    Args:
        unit: `loss`, which is in nats a token, or `bits_per_byte`.
    """
    domain, where = column
    return row[where][domain][unit]


def differences(rows: Sequence[Row], arm: str, other: str, column: Column) -> list[float]:
    """Nats of `arm` minus those of `other`, of each seed that both have."""
    ours, theirs = by_seed(rows, arm), by_seed(rows, other)
    shared = sorted(ours.keys() & theirs.keys())
    return [score(ours[seed], column, "loss") - score(theirs[seed], column, "loss") for seed in shared]


# ---- tables


def scores(rows: Sequence[Row], unit: str) -> list[str]:
    """Markdown, a line an arm."""
    head = ["base", "products", *(f"{DOMAINS[domain]}, {where}" for domain, where in COLUMNS)]
    lines = []
    for arm in arms_of(rows):
        own = by_seed(rows, arm).values()
        found = [Estimate.of([score(row, column, unit) for row in own]).text() for column in COLUMNS]
        lines.append([ARMS[arm]["base"], PRODUCTS[ARMS[arm].get("fp8_products", "none")], *found])
    return markdown(head, lines)


def apart(rows: Sequence[Row]) -> list[str]:
    """Markdown, a line for each arm that is held against nf4 or bf16, in nats."""
    lines = []
    for other in (FOUR_BIT, SIXTEEN_BIT):
        for arm in arms_of(rows):
            found = [differences(rows, arm, other, column) for column in COLUMNS]
            if found[0] and arm != other and (arm, other) != (SIXTEEN_BIT, FOUR_BIT):  # which stands there turned round
                lines.append([f"{arm} minus {other}", *(Estimate.of(values).text("+") for values in found)])
    return markdown(["arms", *(f"{DOMAINS[domain]}, {where}" for domain, where in COLUMNS)], lines) if lines else []


def title(work: Work) -> str:
    return (
        f"{work.model} on {work.gpu}: {work.steps} steps of {work.batch} × {work.seq:,} tokens, rank {work.r}, rate "
        f"{work.learning_rate:g}."
    )


# ---- the bar


def verdicts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each part of the bar, and whether it holds."""
    found = []
    for domain, where in COLUMNS:
        values = differences(rows, JUDGED, FOUR_BIT, (domain, where))
        what = f"{JUDGED} is not worse than {FOUR_BIT}, {DOMAINS[domain]}, {where}"
        found.append((what, verdict(values, 0.0)))
    for domain in DOMAINS:
        values = differences(rows, JUDGED, SIXTEEN_BIT, (domain, "merged"))
        what = f"{JUDGED} is within {MERGED_WITHIN} of {SIXTEEN_BIT}, {DOMAINS[domain]}, merged"
        found.append((what, verdict(values, MERGED_WITHIN)))
    return found


def verdict(values: Sequence[float], most: float) -> str:
    """Whether differences are at most `most`."""
    if not values:
        return "no seed has both runs"
    change = Estimate.of(values)
    if not change.mean <= most:  # NaN does not hold
        return f"{FAILS}, {change.text('+')}"
    if change.half is None:
        return f"{OPEN}, {change.text('+')}: one seed has no interval"
    if not change.high <= most:
        return f"{OPEN}, {change.text('+')}: the mean is within it, its interval is not"
    return f"{HOLDS}, {change.text('+')}"


def bar_holds(rows: Sequence[Row]) -> bool:
    """In each work."""
    return all(answer.startswith(HOLDS) for _, found in works_of(rows) for _, answer in verdicts(found))


# ---- what is said


def tell(rows: Sequence[Row]) -> str:
    """Markdown, of every work: nats a token, differences, and the bar.

    Raises:
        SystemExit: see `refuse_unlike`.
    """
    parts = []
    for work, found in works_of(rows):
        answers = verdicts(found)
        holds = all(answer.startswith(HOLDS) for _, answer in answers)
        parts += [
            [f"{title(work)} Nats a token, fewer are better; {INTERVALS}."],
            scores(found, "loss"),
            ["Differences, seed by seed:"],
            apart(found),
            [f"The bar {'holds' if holds else 'is not shown to hold'}:"],
            [f"- {what}: {answer}" for what, answer in answers],
        ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def in_docs(text: str, files: Mapping[str, Sequence[Row]]) -> str:
    """The text of docs/decisions.md with what is said between its marks.

    Args:
        files: lines by the name of their file.
    """
    said = [f"From `benchmarks/results/{name}`.\n\n{tell(rows)}" for name, rows in files.items()]
    return with_part(text, BEGIN, END, "\n\n".join(said))


def in_recipe(text: str, files: Mapping[str, Sequence[Row]]) -> str:
    """The text of docs/recipe.md with bits a byte between its marks."""
    parts = [f"Bits a byte of held-out text, fewer are better; {INTERVALS}. Own: scored in the arithmetic of the run."]
    for name, rows in files.items():
        for work, found in works_of(rows):
            parts += [f"{title(work)} `benchmarks/results/{name}`", "\n".join(scores(found, "bits_per_byte"))]
    return with_part(text, BEGIN, END, "\n\n".join(parts))
