"""Several runs beside each other: what was set differently, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steep.report.read import Run
from steep.report.verdict import Change, changes

_OWN = ("training.output_dir",)  # differs always, and says nothing


def flattened(tree: Any, name: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}, "c": [2]}`` → ``{"a.b": 1, "c[0]": 2}``; an empty list or section is a value."""
    if isinstance(tree, Mapping) and tree:
        parts = [(f"{name}.{key}" if name else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        parts = [(f"{name}[{number}]", value) for number, value in enumerate(tree)]
    else:
        return {name: tree}
    return {key: leaf for part, value in parts for key, leaf in flattened(value, part).items()}


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields of the run files that are not the same everywhere, with the value in each run; "–" where absent."""
    trees = [flattened(run.config) if run.config else {} for run in runs]
    names = [name for name in dict.fromkeys(name for tree in trees for name in tree) if name not in _OWN]
    shown = {name: [_shown(tree[name]) if name in tree else "–" for tree in trees] for name in names}
    return {name: values for name, values in shown.items() if len(set(values)) > 1}


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scores:
    """One domain in several runs.

    Attributes:
        changes: of each run; None where it has no such domain.
        best: number of the run with the fewest bits per byte; None where there is none, or several.
        comparable: whether all runs scored the same amount of text.
    """

    domain: str
    role: str
    changes: list[Change | None]
    best: int | None
    comparable: bool


def scores(runs: Sequence[Run]) -> list[Scores]:
    """Every domain of any of the runs."""
    by_run = [{change.domain: change for change in changes(run)} for run in runs]
    found = []
    for domain in dict.fromkeys(domain for changed in by_run for domain in changed):
        row = [changed.get(domain) for changed in by_run]
        there = [change for change in row if change is not None]
        shown = [
            None if change is None or change.now["bits_per_byte"] is None else round(change.now["bits_per_byte"], 3)
            for change in row
        ]
        lowest = min((value for value in shown if value is not None), default=None)
        comparable = len({change.now.get("bytes") for change in there}) == 1
        alone = lowest is not None and shown.count(lowest) == 1 and comparable and len(there) > 1
        found.append(Scores(domain, there[0].role, row, shown.index(lowest) if alone else None, comparable))
    return sorted(found, key=lambda score: score.role != "train")


def headline(runs: Sequence[Run], found: Sequence[Scores]) -> str:
    """Which run is ahead where, in a few sentences; the first three domains."""
    ahead = [(score, runs[score.best].label) for score in found if score.best is not None]
    if not ahead:
        return "No run is ahead of the others."
    verbs = {True: "learned", False: "kept"}
    text = " ".join(f"{label} {verbs[score.role == 'train']} {score.domain} best." for score, label in ahead[:3])
    return text if all(run.finished for run in runs) else f"So far: {text}"
