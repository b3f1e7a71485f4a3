"""`steep verify-resume`: whether a killed and resumed run ends as one that was never stopped: here, with this model.

Two short runs of the run file, by the real command. One goes through. The other is killed (SIGKILL) in the middle of a
step, at a moment drawn by chance, once it has a checkpoint, and is resumed. What the two end with is compared to the
bit.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file

from steep import ranks
from steep.amounts import human_bytes
from steep.errors import RunError, UserError
from steep.plan import plan_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.terminal import Terminal
from steep.training.checkpoint import checkpoints, step_of
from steep.training.state_files import load_state

STEPS = 6
_STATES = ("optimizer", "schedule", "random", "observations", "scaler")
_OF_THE_CLOCK = ("tokens_per_second", "peak_memory_bytes", "save_seconds")
_SCORED = 2000  # held-out tokens of each domain
_LOOKS = 0.01  # seconds between two looks at a run's log


@dataclass(frozen=True)
class Part:
    """One thing that two runs ended with.

    Attributes:
        digests: SHA-256 of what each of the two has.
        difference: the first place where they differ, and by how much; None where they are equal to the bit.
    """

    name: str
    digests: tuple[str, str]
    difference: str | None


def verify_resume(config: RunConfig, *, steps: int = STEPS, terminal: Terminal | None = None) -> list[Part]:
    """Train `config` for a few steps twice, once killed and resumed, and compare.

    Args:
        steps: of each run, at least 3; the checkpoint that is gone on from is half way.

    Returns:
        What was compared, in the order of the table that `terminal` shows.

    Raises:
        UserError: what `steep train` would refuse; no room on the disk for both runs; several processes.
        RunError: one of the runs failed.
    """
    if ranks.world_size() > 1:
        problem = f"it starts its runs itself, each in one process, and here are {ranks.world_size()}"
        raise UserError("steep verify-resume", problem, "Start it without torchrun.")
    terminal = terminal or Terminal(quiet=True)
    terminal.say("planning the run, and a short one")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # CUDA is the runs', and takes memory
        short, needed, on_gpu = pool.submit(_shortened, config, steps, terminal.err.quiet).result()
    with _place_beside(RunFolder(config.training.output_dir), needed) as place:
        whole, killed = RunFolder(place / "never-stopped"), RunFolder(place / "killed")
        file = place / "run.yaml"
        file.write_text(short.to_yaml(), encoding="utf-8")
        terminal.say(f"1/3 a run that is never stopped: {steps} steps")
        with _running(file, whole) as process:
            arrivals = _watch(process, whole, steps, terminal)
            _ended_well(process, place)
        terminal.say("2/3 a run that is killed")
        moment = _kill(file, killed, place, steps, arrivals, terminal)
        (*_, kept) = checkpoints(killed.path)
        terminal.say(f"3/3 killed {moment}; going on from {kept.name}")
        with _running(file, killed, "--resume") as process:
            _watch(process, killed, steps, terminal, step_of(kept))
            _ended_well(process, place)
        parts = compare(whole, killed)
    terminal.show(_table(parts))
    different = [part for part in parts if part.difference]
    if not different:
        terminal.say(f"equal: killed {moment} and resumed from {kept.name}, the run ends in the same bits")
    else:
        terminal.warn(f"the first difference is in the {different[0].name}: {different[0].difference}")
    if different and on_gpu and not config.training.deterministic:
        terminal.say(
            "On a GPU two equal runs differ within rounding too, stopped or not; with training.deterministic: true "
            "they do not. Try --training.deterministic true, and keep it in the run file if it is worth its time."
        )
    return parts


def _shortened(config: RunConfig, steps: int, quiet: bool) -> tuple[RunConfig, int, bool]:
    """The run file for a few steps, cut into forwards for both runs alike; the bytes that two such runs need on the
    disk, and whether there is a GPU.

    Raises:
        UserError: the run file, or its short form, cannot be trained.
    """
    terminal = Terminal(quiet=quiet)
    terminal.attach()
    short = config.model_copy(deep=True)
    training = short.training
    training.report_to = "none"
    with terminal.tokenising() as progress:
        whole = plan_run(short, progress, refuses=True).steps
    for name in ("warmup_steps", "decay_steps", "cooldown_steps"):  # as long a part of the run as they were
        length = getattr(training, name)
        if length is not None and length >= 1:
            setattr(training, name, length / whole if length < whole else 1 - 1 / steps)
    changes = {
        "max_steps": steps, "save_steps": steps // 2, "save_total_limit": 2, "logging_steps": 1, "eval_steps": None,
        "metric_for_best_model": None,
    }  # fmt: skip
    changes |= {
        name: value
        for name, value in (("save_strategy", "steps"), ("logging_strategy", "steps"), ("eval_strategy", "no"))
        if name in training.further
    }
    for name, value in changes.items():
        setattr(training, name, value)
    short.evaluation.prompts = []
    short.evaluation.max_tokens = min(_SCORED, short.evaluation.max_tokens or _SCORED)
    plan = plan_run(short)
    short.training = plan.config.training.model_copy(update={"rows_per_step": None})
    return short, 2 * sum(plan.disk.values()), torch.cuda.is_available()


@contextmanager
def _place_beside(folder: RunFolder, needed: int) -> Iterator[Path]:
    """A temporary folder on the disk that the run is planned for, gone afterwards, whatever happens.

    Raises:
        UserError: it has too little room.
    """
    beside = folder.path.absolute().parent
    while not beside.is_dir():
        beside = beside.parent
    free = shutil.disk_usage(beside).free
    if free < needed:
        raise UserError(
            "training.output_dir",
            f"the disk of {beside} has {human_bytes(free)} free, and the two short runs need {human_bytes(needed)}",
            "Make room, or give an output_dir on another disk.",
        )
    with tempfile.TemporaryDirectory(prefix=".verify-resume-", dir=beside) as place:
        yield Path(place)


@contextmanager
def _running(file: Path, folder: RunFolder, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`steep train` as a process of its own, which does not outlive the block. What it says goes into a file."""
    command = [sys.executable, "-m", "steep", "train", str(file), "--training.output_dir", str(folder.path), *more]
    with (file.parent / "said").open("wb") as said, ThreadPoolExecutor(1) as starter:
        # In a thread, since a signal's exception is raised in the main one: half started, a process would be lost.
        started = starter.submit(
            subprocess.Popen, command, stdout=subprocess.DEVNULL, stderr=said, stdin=subprocess.DEVNULL
        )
        try:
            yield started.result()
        finally:
            process = started.result()
            process.kill()
            process.wait()


def _watch(
    process: subprocess.Popen[bytes], folder: RunFolder, steps: int, terminal: Terminal, done: int = 0
) -> list[float]:
    """Show a run's steps after `done` until it ends; when each of them was seen, seconds."""
    arrivals: list[float] = []
    with terminal.training(steps, done) as show:
        for row in _new_rows(process, folder, done):
            arrivals.append(time.monotonic())
            show(row)
    return arrivals


def _new_rows(process: subprocess.Popen[bytes], folder: RunFolder, seen: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl behind step `seen` as they come, until the process has ended."""
    while True:
        ended = process.poll() is not None
        for row in folder.read_lines("metrics.jsonl"):
            if row["step"] > seen:
                seen = row["step"]
                yield row
        if ended:
            return
        time.sleep(_LOOKS)


def _ended_well(process: subprocess.Popen[bytes], place: Path) -> None:
    """Raises a `UserError` or a `RunError` with what the run said, if it failed."""
    code = process.wait()
    if code == 0:
        return
    said = (place / "said").read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "nothing")
    if code == UserError.exit_code:
        raise UserError("steep train", last.removeprefix("error: "), "Nothing was compared.")
    raise RunError(f"a short run of `steep train` ended with exit code {code} and said: {last}")


def _kill(file: Path, folder: RunFolder, place: Path, steps: int, arrivals: list[float], terminal: Terminal) -> str:
    """Start a run and kill it between its first checkpoint and its last, in the middle of a step; when, in words.

    Raises:
        RunError: it failed, or was always done before it could be killed.
    """
    usual = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
    for most in (1.0, 0.5, 0.25, 0.1, 0.0, 0.0):  # of the steps left: this run may be faster than the one before
        after = steps // 2 + int(most * random.randint(0, steps - 1 - steps // 2))
        delay = random.uniform(0, most * usual)
        with _running(file, folder) as process, terminal.training(steps, 0) as show:
            for row in _new_rows(process, folder):
                show(row)
                if row["step"] >= after and checkpoints(folder.path):
                    time.sleep(delay)
                    break
            process.kill()
            code, saved = process.wait(), [step_of(checkpoint) for checkpoint in checkpoints(folder.path)]
            if code != -signal.SIGKILL or not saved:
                _ended_well(process, place)
            elif saved[-1] < steps:  # else nothing is left to go on with
                return f"{delay:.2f} s after step {row['step']}"
        shutil.rmtree(folder.path)
    raise RunError("the run was always done before it could be killed: give more --steps")


def compare(one: RunFolder, other: RunFolder) -> list[Part]:
    """Compare what two runs ended with: their last checkpoints, logs and ledgers."""
    last = [checkpoints(folder.path)[-1] for folder in (one, other)]
    trees: dict[str, list[Any]] = {
        "adapters": [load_file(checkpoint / "adapter_model.safetensors") for checkpoint in last]
    }
    for name in _STATES:
        if any((checkpoint / f"{name}.json").is_file() for checkpoint in last):
            trees[name] = [load_state(checkpoint, name) for checkpoint in last]
    trees["losses"] = [
        [{k: v for k, v in row.items() if k not in _OF_THE_CLOCK} for row in folder.read_lines("metrics.jsonl")]
        for folder in (one, other)
    ]
    trees["held-out scores"] = [folder.read_lines("evaluation.jsonl") for folder in (one, other)]
    trees["ledger"] = [folder.read_json("ledger.json") for folder in (one, other)]
    return [_compared(name, *pair) for name, pair in trees.items()]


def _compared(name: str, one: Any, other: Any) -> Part:
    pairs = list(zip_longest(_leaves(one), _leaves(other)))
    difference = next((found for pair in pairs if (found := _difference(*pair))), None)
    return Part(name, (_digest(_leaves(one)), _digest(_leaves(other))), difference)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its path, in the tree's order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def _digest(leaves: Iterator[tuple[str, Any]]) -> str:
    total = hashlib.sha256()
    for path, value in leaves:
        if isinstance(value, torch.Tensor):
            total.update(f"{path} {value.dtype} {tuple(value.shape)} ".encode())
            total.update(_bytes(value).numpy().data)
        else:
            total.update(f"{path} {value!r} ".encode())
    return total.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _difference(one: tuple[str, Any] | None, other: tuple[str, Any] | None) -> str | None:
    """How two leaves differ, with their path; None where they are the same to the bit."""
    if one is None or other is None or one[0] != other[0]:
        return f"one has {(one or other or ('',))[0]}, and the other does not at that place"
    (path, left), (_, right) = one, other
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return None if repr(left) == repr(right) else f"{path}: {left!r} and {right!r}"
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return f"{path}: {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
    if torch.equal(_bytes(left), _bytes(right)):
        return None
    left, right = left.double(), right.double()
    largest = float((left - right).abs().max())
    return f"{path}: {int((left != right).sum()):,} of {left.numel():,} elements, by {largest:.3g} at the most"


def _table(parts: list[Part]) -> Table:
    table = Table("", "never stopped", "killed and resumed", "", title="SHA-256 of what the two runs end with")
    for part in parts:
        table.add_row(part.name, *(digest[:16] for digest in part.digests), "differs" if part.difference else "equal")
    return table
