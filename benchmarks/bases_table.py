"""What the lines of `benchmarks.bases` come to: a table, and whether the bar for an fp8 base holds.

The bar: fp8 in both directions is not worse than NF4 with bf16 products in any of four columns, Korean and English, in
their own arithmetic and merged into the 16-bit original; and merged it is within 0.015 nats a token of the bf16 base.
Differences are of runs with the same seed, and a mean is known to two of its standard errors: where those decide it,
the answer is open, and takes more seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import markdown

Row = dict[str, Any]

DOMAINS = {"ko": "Korean", "en": "English"}
COLUMNS = [(domain, where) for domain in DOMAINS for where in ("own", "merged")]
JUDGED, FOUR_BIT, SIXTEEN_BIT = "fp8-both", "nf4", "bf16"
MERGED_WITHIN = 0.015  # nats a token
HOLDS, OPEN, FAILS = "holds", "open: within two standard errors, more seeds would say", "does not hold"
# What a line has to share with another to be compared with it.
SAME = ("model", "steps", "batch", "seq", "r", "learning_rate", "heldout_tokens", "gpu")


def tell(file: Path) -> bool:
    """Print all works of a file; whether the bar holds in each."""
    works: dict[tuple[Any, ...], list[Row]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        works.setdefault(tuple(row[name] for name in SAME), []).append(row)
    if not works:
        raise SystemExit(f"--summary: {file} has no lines.")
    holds = True
    for rows in works.values():
        refuse_unlike(rows)
        print("\n".join(table(rows)), end="\n\n")
        answers = verdicts(rows)
        for what, answer in answers:
            print(f"{what}: {answer}")
        holds &= all(answer.startswith(HOLDS) for _, answer in answers)
        print()
    print(f"the bar {'holds' if holds else 'is not shown to hold'}")
    return holds


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


def nats(row: Row, domain: str, where: str) -> float:
    return row[where][domain]["loss"]


def by_seed(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["arm"] == arm}


def differences(rows: Sequence[Row], arm: str, other: str, column: tuple[str, str]) -> list[float]:
    """Nats of `arm` minus those of `other`, of each seed that both have."""
    ours, theirs = by_seed(rows, arm), by_seed(rows, other)
    return [nats(ours[seed], *column) - nats(theirs[seed], *column) for seed in sorted(ours.keys() & theirs.keys())]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{deviation}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: nats a token (bits a byte) over the seeds, and differences to nf4 and to bf16 in nats."""
    work = rows[0]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    head = ["base, products", "seeds", *(f"{DOMAINS[domain]}, {where}" for domain, where in COLUMNS)]
    lines: list[list[str]] = []
    for arm in arms:
        own = list(by_seed(rows, arm).values())
        cells = [
            f"{spread([nats(row, *column) for row in own])} "
            f"({np.mean([row[column[1]][column[0]]['bits_per_byte'] for row in own]):.4f})"
            for column in COLUMNS
        ]
        lines.append([arm, str(len(own)), *cells])
    for arm in arms:
        for other in (FOUR_BIT, SIXTEEN_BIT):
            found = [differences(rows, arm, other, column) for column in COLUMNS]
            if arm != other and found[0]:
                cells = [spread(values, "+") for values in found]
                lines.append([f"{arm} minus {other}", str(len(found[0])), *cells])
    title = (
        f"{work['model']} on {work['gpu']}: {work['steps']} steps of {work['batch']} x {work['seq']} tokens, rank "
        f"{work['r']}, rate {work['learning_rate']:g}. Nats a token, mean ± standard deviation over seeds (bits a byte)"
    )
    return [title, "", *markdown(head, lines)]


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
    """Whether the mean of differences is at most `most`."""
    if not values:
        return "no seed has both runs"
    mean = np.mean(values)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    answer = HOLDS if mean <= most else OPEN if mean - 2 * error <= most else FAILS  # NaN does not hold
    return f"{answer} ({spread(values, '+')}, {len(values)} seed{'s' * (len(values) > 1)})"
