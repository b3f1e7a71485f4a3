"""Whether a run that was stopped ended as one that never was: the same bits, but for what is listed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.trees import tree_differences

# Times, rates and memory are of the process, not of the run. By the name of the file, then the field at any depth.
_OF_THE_CLOCK = {"tokens_per_second", "peak_memory_bytes", "save_seconds"}
OF_THE_PROCESS = {
    "metrics.jsonl": _OF_THE_CLOCK,
    "trainer_state.json": _OF_THE_CLOCK,  # its log holds the same rows
    "manifest.json": {"trainer_state.json", "training_args.json", "adapter_config.json"},  # digests of these
    "plan.json": {"cached"},
    "training_args.json": {"save_total_limit"},  # the run that others' checkpoints are held against keeps all its own
}


def differences(whole: Path, stopped: Path, *, named: Path | None = None) -> list[str]:
    """What is not the same in two run folders, a line each. Paths of the one stand for those of the other.

    Args:
        named: how `stopped` is called in its own files, where that is another path.
    """
    left, right = _files(whole), _files(stopped)
    found = [f"{name}: only in the run never stopped" for name in sorted(left - right)]
    found += [f"{name}: only in the run that was stopped" for name in sorted(right - left)]
    for name in sorted(left & right):
        found += file_differences(whole, stopped, name, named=named)
    return found


def _files(folder: Path) -> set[str]:
    """Names of all files and folders: a temporary that stayed is a difference too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def file_differences(whole: Path, stopped: Path, name: str, *, named: Path | None = None) -> list[str]:
    """The same for one file of both."""
    left, right = whole / name, stopped / name
    if left.is_dir():
        return [] if right.is_dir() else [f"{name}: no folder"]
    if left.suffix == ".safetensors":
        return [] if left.read_bytes() == right.read_bytes() else [f"{name}: {_tensor_that_differs(left, right)}"]
    trees = [_tree(path, folder) for path, folder in ((left, whole), (right, named or stopped))]
    return [f"{name}: {line}" for line in tree_differences(*trees)]


def _tensor_that_differs(left: Path, right: Path) -> str:
    with safe_open(left, "pt") as one, safe_open(right, "pt") as two:
        if one.keys() != two.keys():
            return "other tensors"
        for key in one.keys():  # noqa: SIM118 - not a dict
            a, b = one.get_tensor(key), two.get_tensor(key)
            if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
                return f"tensor {key} differs"
    return "the bytes differ, no tensor does"


def _tree(file: Path, folder: Path) -> Any:
    text = file.read_text(encoding="utf-8").replace(str(folder), "RUN")
    text = text.replace(str(folder.parent), "PLACE")
    left_out = OF_THE_PROCESS.get(file.name, set())
    if file.suffix == ".json":
        tree = without(json.loads(text), left_out)
        if file.name == "adapter_config.json":
            tree["target_modules"].sort()  # PEFT writes a set
        return tree
    if file.suffix == ".jsonl":
        return [without(json.loads(line), left_out) for line in text.splitlines()]
    return text


def without(tree: Any, names: set[str]) -> Any:
    """A tree less the fields of these names."""
    if isinstance(tree, dict):
        return {key: without(value, names) for key, value in tree.items() if key not in names}
    return [without(value, names) for value in tree] if isinstance(tree, list) else tree


def lines_lost_or_doubled(whole: Path, stopped: Path, *, up_to: int | None = None) -> int:
    """Lines of the three logs that are missing, there twice, or with other values; those of a step and before it."""
    count = 0
    for name in ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl"):
        expected, got = (_keyed(folder / name, up_to) for folder in (whole, stopped))
        count += sum(abs(len(expected.get(key, [])) - len(got.get(key, []))) for key in expected.keys() | got.keys())
        count += sum(
            expected[key] != got[key] for key in expected.keys() & got.keys() if len(expected[key]) == len(got[key])
        )
    return count


def _keyed(file: Path, up_to: int | None) -> dict[tuple[Any, ...], list[Any]]:
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []:
        row = without(json.loads(line), OF_THE_PROCESS.get(file.name, set()))
        # Completions are no part of training: those at its end are written after its last checkpoint.
        if up_to is None or row["step"] < up_to or (row["step"] == up_to and file.name != "samples.jsonl"):
            rows.setdefault((row["step"], row.get("domain"), row.get("prompt")), []).append(row)
    return rows


def caches(folder: Path) -> dict[str, bytes]:
    """The token caches below a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.arrow")}


def wrong_caches(whole: Path, stopped: Path) -> list[str]:
    """Names of the token caches that are not a fresh tokenisation's."""
    fresh = caches(whole)
    return [name for name, content in caches(stopped).items() if fresh.get(name) != content]


def damaged_checkpoints(whole: Path, stopped: Path, *, named: Path | None = None) -> list[str]:
    """What differs in the checkpoints that stand in a run folder from those of a run that kept all of its own."""
    there = tuple(f"{path.name}/" for path in stopped.glob("checkpoint-*"))
    expected, got = ({name for name in _files(folder) if name.startswith(there)} for folder in (whole, stopped))
    found = [f"{name}: missing" for name in sorted(expected - got)]
    found += [f"{name}: too many" for name in sorted(got - expected)]
    return found + [
        line for name in sorted(expected & got) for line in file_differences(whole, stopped, name, named=named)
    ]
