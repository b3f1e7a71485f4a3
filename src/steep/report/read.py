"""A run folder as plain data, whatever is there of it already. The files are described in docs/run-folder.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from steep.config import read_yaml
from steep.errors import UserError
from steep.run_folder import RunFolder

_FILES = (
    "run.yaml",
    "plan.json",
    "environment.json",
    "metrics.jsonl",
    "evaluation.jsonl",
    "samples.jsonl",
    "incidents.jsonl",
    "ledger.json",
    "proof.json",
    "final",
)


@dataclass(frozen=True)
class Run:
    """What a run folder says so far. Absent files are empty.

    Attributes:
        path, label: where it lies; how the page calls it.
        config, config_text: `run.yaml`, parsed and as it stands.
        plan, environment, ledger, proof: the JSON files.
        metrics, evaluation, samples, incidents: the JSON-lines files.
        finished: whether the result is there.
        written: when the newest file was written, in seconds since the epoch.
    """

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    written: float | None = None

    @property
    def begun(self) -> bool:
        return bool(self.config)

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as the files know."""
        return max((rows[-1]["step"] for rows in (self.metrics, self.evaluation) if rows), default=0)

    @property
    def first_step(self) -> int:
        """Optimizer steps before this run: 0, or those of the checkpoint that a branch began at."""
        return self.plan.get("first_step", 0)

    @property
    def steps(self) -> int | None:
        """The step at which the run is planned to end; a branch counts on from its parent's."""
        return self.first_step + self.plan["steps"] if self.plan else None

    @property
    def model(self) -> str:
        """The base model: its name on the hub, or the last part of its path."""
        name = str(self.config.get("model", {}).get("name", ""))
        return Path(name).name if name.startswith("/") else name

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of `metrics.jsonl`."""
        return self.metrics[-1] if self.metrics else {}

    @cached_property
    def logged(self) -> tuple[list[int], list[float]]:
        """Steps and tokens of the lines of `metrics.jsonl`."""
        return [row["step"] for row in self.metrics], [row.get("tokens") or 0 for row in self.metrics]

    @cached_property
    def domains(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of `evaluation.jsonl` of each domain, in order of their steps."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.evaluation:
            rows.setdefault(row["domain"], []).append(row)
        return rows


def labels(paths: Sequence[Path]) -> list[str]:
    """What the page calls the runs: the names of their folders, or their paths where two names are equal.

    Raises:
        UserError: a folder is given twice.
    """
    places = [path.absolute() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError("RUN", f"{paths[number]} is given twice", "Give each run once.")
    names = [place.name for place in places]
    return [name if names.count(name) == 1 else str(path) for path, name in zip(paths, names, strict=True)]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each folder.

    Raises:
        UserError: a folder is given twice, or a file in it is damaged.
    """
    return [read_run(path, label) for path, label in zip(paths, labels(paths), strict=True)]


def read_run(path: Path, label: str | None = None) -> Run:
    """Read one folder; a folder that does not exist yet is a run without anything.

    Raises:
        UserError: a file is damaged.
    """
    folder = RunFolder(path)
    folder.refuse_links()
    text = _text(folder / "run.yaml")
    return Run(
        path=path,
        label=label or path.absolute().name,
        config=_yaml(folder / "run.yaml", text),
        config_text=text,
        plan=folder.read_json("plan.json"),
        environment=folder.read_json("environment.json"),
        metrics=folder.read_lines("metrics.jsonl"),
        evaluation=folder.read_lines("evaluation.jsonl"),
        samples=folder.read_lines("samples.jsonl"),
        incidents=folder.read_lines("incidents.jsonl"),
        ledger=folder.read_json("ledger.json"),
        proof=folder.read_json("proof.json"),
        finished=folder.final.is_dir(),
        written=max((stamp[0] / 1e9 for stamp in stamps(path) if stamp), default=None),
    )


def stamps(path: Path) -> list[tuple[int, int] | None]:
    """Time of change (ns) and size of each file that is read: when these stand still, so does the run."""
    found: list[tuple[int, int] | None] = []
    for name in _FILES:
        file = path / name
        status = file.stat() if file.exists() else None
        found.append(status and (status.st_mtime_ns, status.st_size))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(
            "run folder", f"{file} is damaged: it is not UTF-8", "Give a folder that a run wrote."
        ) from error


def _yaml(file: Path, text: str) -> dict[str, Any]:
    try:
        tree = read_yaml(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError("run folder", f"{file} is damaged: {error}", "Mend the line it names.") from error
    if not isinstance(tree, dict):
        raise UserError("run folder", f"{file} is damaged: it holds no sections", "Give a folder that a run wrote.")
    return tree
