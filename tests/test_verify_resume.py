"""`steep verify-resume`: equal where a run resumes to the bit, and a difference found and named where it does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep import verify_resume
from steep.errors import UserError
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.verify_resume import _place_beside, compare
from tests.command_line import Steep, assert_one_error_line
from tests.faults.command import ForkServer, torchrun
from tests.test_cli import run_file  # noqa: F401
from tests.test_run import run_file as config_of

PARTS = ["adapters", "optimizer", "schedule", "random", "observations", "losses", "held-out scores", "ledger"]


@pytest.fixture(scope="module")
def one(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(config_of(llama_folder, korean_corpus, folder, model={"base": "nf4"}, training={"max_steps": 4}))
    return folder


def differences(one: Path, other: Path) -> dict[str, str]:
    parts = compare(RunFolder(one), RunFolder(other))
    assert [part.name for part in parts] == PARTS
    assert all((part.digests[0] == part.digests[1]) == (part.difference is None) for part in parts)
    return {part.name: part.difference for part in parts if part.difference}


def test_another_seed_is_another_run(one: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    training = {"max_steps": 4, "seed": 7}
    train_run(config_of(llama_folder, korean_corpus, tmp_path / "ko", model={"base": "nf4"}, training=training))
    found = differences(one, tmp_path / "ko")
    assert found["adapters"].startswith("base_model.model.") and " elements, by 0." in found["adapters"]
    assert found["losses"].startswith("[0].loss: ")
    assert "ledger" in found and "schedule" not in found


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "random", "observations"])
def test_a_single_bit_is_found(name: str, one: Path, tmp_path: Path) -> None:
    folder = copytree(one, tmp_path / "ko")
    assert differences(one, folder) == {}
    file = folder / "checkpoint-4" / f"{name}.safetensors"
    tensors = load_file(file)
    key = max(tensors, key=lambda key: tensors[key].numel())
    tensors[key].view(-1)[-1:].view(torch.uint8)[0] ^= 1
    save_file(tensors, file)
    part = {"adapter_model": "adapters"}.get(name, name)
    found = differences(one, folder)
    assert list(found) == [part]
    assert f": 1 of {tensors[key].numel():,} elements, by " in found[part]


def test_lines_and_counts_are_compared_too(one: Path, tmp_path: Path) -> None:
    folder = copytree(one, tmp_path / "ko")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[1] |= {"tokens_per_second": 1.0, "save_seconds": 1.0}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert differences(one, folder) == {}
    (folder / "metrics.jsonl").write_text(text[: text.rindex("{")], encoding="utf-8")
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    ledger["rows_trained"] += 1
    (folder / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
    found = differences(one, folder)
    assert found["losses"].startswith("one has [3].step, and the other does not")
    assert found["ledger"] == f"rows_trained: {ledger['rows_trained'] - 1} and {ledger['rows_trained']}"


# --- the command


def start_in_forks(patch: pytest.MonkeyPatch, server: ForkServer, *program: str, real: int = 0) -> None:
    """Plan in this process, and start runs in forks: of `program` in the place of ``-m steep``; the first `real` as
    always."""

    def start(command: list[str], *, stdout: int, stderr: Any, stdin: int) -> Any:
        nonlocal real
        assert command[:3] == [sys.executable, "-m", "steep"]
        real -= 1
        if real >= 0:
            return subprocess.Popen(command, stdout=stdout, stderr=stderr, stdin=stdin)
        return server.process([*program, *command[3:]], stderr.name)

    patch.setattr(verify_resume, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    patch.setattr(verify_resume, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))


def dropout(file: Path) -> Path:
    text = file.read_text(encoding="utf-8").replace("adapter:\n", "adapter:\n  lora_dropout: 0.1\n")
    assert "lora_dropout" in text
    file.write_text(text, encoding="utf-8")
    return file


def test_a_run_that_resumes_is_equal(
    steep: Steep,
    run_file: Path,  # noqa: F811
    quick: ForkServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also though the one is a process of its own and the other a fork: with another order of sets."""
    start_in_forks(monkeypatch, quick, "-m", "steep", real=1)
    before = sorted(run_file.parent.iterdir())
    best = ("--training.eval_steps", "2", "--training.metric_for_best_model", "loss")
    said = steep("verify-resume", dropout(run_file), "--steps", "4", *best)
    assert said.code == 0, said.err
    assert said.out.count("equal") == len(PARTS) and "differs" not in said.out
    for line in (
        "1/3 a run that is never stopped",
        "2/3 a run that is killed",
        "going on from checkpoint-2",
        "same bits",
    ):
        assert line in said.err
    assert sorted(run_file.parent.iterdir()) == before


def test_a_run_that_does_not_resume_is_found(
    steep: Steep,
    run_file: Path,  # noqa: F811
    tmp_path: Path,
    quick: ForkServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A steep that forgets its random generators when it resumes, in a run with dropout."""
    program = tmp_path / "forgetful.py"
    program.write_text(
        "from steep.cli import main\nfrom steep.training import exact_checkpoints\n"
        "exact_checkpoints.set_rng_state = lambda state: None\nmain()\n",
        encoding="utf-8",
    )
    start_in_forks(monkeypatch, quick, str(program))
    before = sorted(run_file.parent.iterdir())
    said = steep("verify-resume", dropout(run_file), "--steps", "4")
    assert said.code == 1, said.err
    assert "the first difference is in the adapters: base_model" in said.err and "at the most" in said.err
    assert said.out.count("differs") >= 3 and "equal" in said.out  # the schedule is a function of the step
    assert sorted(run_file.parent.iterdir()) == before


def test_a_run_that_was_killed_too_late_is_killed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last checkpoint there it would be resumed without a step."""
    folder = RunFolder(tmp_path / "killed")
    late = [True, True, False]

    class Process:
        returncode = None

        def poll(self) -> int | None:
            return self.returncode

        def wait(self) -> int:
            return -signal.SIGKILL

        def kill(self) -> None:
            if late.pop(0):
                (folder.path / "checkpoint-6").mkdir()

    @contextmanager
    def running(*given: Any) -> Iterator[Process]:
        (folder.path / "checkpoint-3").mkdir(parents=True)
        folder.append("metrics.jsonl", [{"step": step} for step in range(1, 6)])
        yield Process()

    monkeypatch.setattr(verify_resume, "_running", running)
    show: Any = SimpleNamespace(training=lambda steps, done: nullcontext(lambda row: None))
    moment = verify_resume._kill(tmp_path / "run.yaml", folder, tmp_path, 6, [0.0, 0.001], show)
    assert moment.startswith("0.00 s after step ") and late == []
    assert [path.name for path in folder.path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_several_processes_are_refused(run_file: Path, quick: ForkServer) -> None:  # noqa: F811
    command = quick.python(torchrun("-m", "steep", "verify-resume", run_file), run_file.parent)
    assert command.wait() != 0
    (line,) = [line for line in command.lines() if "error: " in line]
    assert "error: steep verify-resume: it starts its runs itself" in line and "Start it without torchrun." in line


def test_what_train_refuses_is_refused(steep: Steep, run_file: Path) -> None:  # noqa: F811
    before = sorted(run_file.parent.iterdir())
    said = steep("verify-resume", run_file, "--training.optim", "adamw8bit")
    assert_one_error_line(said, "training.optim: 'adamw8bit' is unknown", "Did you mean 'adamw_8bit'")
    assert sorted(run_file.parent.iterdir()) == before


def test_two_runs_have_to_fit(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^training\.output_dir: the disk of .* free, and the two short runs need 1024"),
        _place_beside(RunFolder(tmp_path / "runs" / "ko"), 2**40),
    ):
        pass
    with _place_beside(RunFolder(tmp_path / "runs" / "ko"), 1) as place:
        assert place.parent == tmp_path  # there is no runs yet
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(run_file: Path) -> None:  # noqa: F811
    before = sorted(run_file.parent.iterdir())
    command = [sys.executable, "-m", "steep", "verify-resume", str(run_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("1/3"):
                break
        (place,) = set(run_file.parent.iterdir()) - set(before)
        while not (children := children_of(process.pid)):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert place.name.startswith(".verify-resume-")
    assert sorted(run_file.parent.iterdir()) == before
    deadline = time.monotonic() + 20
    while any(runs(pid) for pid in children):  # multiprocessing's own helper ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    found = [file.read_text().split() for file in Path("/proc").glob(f"{pid}/task/*/children")]
    return [int(child) for children in found for child in children]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
