"""The real command under torchrun: two processes on gloo train what one does, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from examples import two_lines
from steep.run import train_run
from steep.training.checkpoint import checkpoints, step_of
from tests.faults.command import Command, ForkServer, assert_one_error, environment, torchrun
from tests.faults.compare import differences
from tests.faults.runs import finished
from tests.test_run import lines, run_file
from tests.tiny import documents, write_corpus


def run(quick: ForkServer, file: Path, *words: str, processes: int = 2) -> Command:
    """`torchrun -m steep train FILE`, in forks, to its end."""
    return quick.python(torchrun("-m", "steep", "train", file, *words, processes=processes), streams(file))


def streams(file: Path) -> Path:
    """The folder for what the commands on a run file say."""
    folder = file.with_suffix(".said")
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def files(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus that makes 59 rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_corpus(folder / "corpus", 37)
    return folder


def write_run_file(model: Path, folder: Path, name: str, /, **sections: dict[str, Any]) -> Path:
    config = run_file(model, folder / "corpus", folder / name, **sections)
    file = folder / f"{name}.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    return file


def processes_of(launcher: Command) -> dict[int, int]:
    """The process id of each rank that the launcher's server has started."""
    seen = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                name, _, rest = (place / "stat").read_text().partition("(")[2].rpartition(")")
                seen[int(place.name)] = name, int(rest.split()[1])
    return {
        int(name.removeprefix("rank ")): pid
        for pid, (name, parent) in seen.items()
        if name.startswith("rank ") and seen.get(parent, ("", 0))[1] == launcher.pid
    }


def signalled(
    quick: ForkServer, file: Path, *words: str, rank: int, number: signal.Signals, at_step: int
) -> tuple[str, float]:
    """Start a run, send one rank a signal when step `at_step` is logged; what it said, and the seconds it then took."""
    log = Path(yaml.safe_load(file.read_text(encoding="utf-8"))["training"]["output_dir"]) / "metrics.jsonl"
    command = quick.python(torchrun("-m", "steep", "train", file, *words), streams(file))
    assert command.until(lambda: log.exists() and any(row["step"] >= at_step for row in lines_so_far(log))), (
        command.text()
    )
    os.kill(processes_of(command)[rank], number)
    began = time.monotonic()
    command.wait(120)
    return command.log, time.monotonic() - began


def lines_so_far(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]


EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 100, "eval_steps": 4, "learning_rate": 5e-3}


def test_two_processes_train_what_one_does(llama_folder: Path, files: Path) -> None:
    """59 rows at 12 a step: the last step of an epoch has 11, and a filler. fp32, no dropout. By torchrun as it
    is, without forks, so that sets have another order in each process."""
    two = {**EPOCHS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    file = write_run_file(llama_folder, files, "two", training=two)
    words = torchrun("-m", "steep", "train", file)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240, env=environment({}), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base → trained") == 1  # one process speaks
    assert done.stderr.count("scoring held-out text with the base model") == 1

    one = {**two, "gradient_accumulation_steps": 6}
    train_run(run_file(llama_folder, files / "corpus", files / "one", training=one))

    plan, alone = (json.loads((files / name / "plan.json").read_text(encoding="utf-8")) for name in ("two", "one"))
    assert (plan["processes"], alone["processes"]) == (2, 1) and plan["data"]["rows"] == 59
    for name in ("rows_per_step", "steps", "epochs"):
        assert plan[name] == alone[name]

    ledger = (files / "two" / "ledger.json").read_text(encoding="utf-8")
    assert ledger == (files / "one" / "ledger.json").read_text(encoding="utf-8")
    rows, expected = lines(files / "two" / "metrics.jsonl"), lines(files / "one" / "metrics.jsonl")
    assert len(rows) == len(expected) == 10
    for row, other in zip(rows, expected, strict=True):
        for field in ("step", "epoch", "tokens", "learning_rate", "steps_not_finite"):
            assert row[field] == other[field]
        # A mean over each process's own targets instead of all would be off by 1e-4 and more: a step's rows hold
        # different numbers of them, and one holds none.
        assert abs(row["loss"] - other["loss"]) < 2e-6
        assert abs(row["grad_norm"] - other["grad_norm"]) < 1e-5 * other["grad_norm"]
    scores, others = lines(files / "two" / "evaluation.jsonl"), lines(files / "one" / "evaluation.jsonl")
    assert [(row["step"], row["domain"]) for row in scores] == [(row["step"], row["domain"]) for row in others]
    assert scores[0] == others[0]  # the base model's, to the bit
    assert all(abs(row["loss"] - other["loss"]) < 1e-6 for row, other in zip(scores, others, strict=True))
    weights, right = (load_file(files / name / "final" / "adapter_model.safetensors") for name in ("two", "one"))
    for name, tensor in right.items():
        assert torch.linalg.vector_norm(weights[name] - tensor) < 1e-5 * torch.linalg.vector_norm(tensor)


def test_stopped_and_killed_runs_end_in_the_same_bits(llama_folder: Path, files: Path, quick: ForkServer) -> None:
    """QLoRA with dropout, 8-bit Adam, accumulation 3 and fillers, over 8 epochs."""
    sections: dict[str, Any] = {
        "model": {"base": "nf4"},
        "adapter": {"r": 64, "lora_dropout": 0.1},
        "training": {
            "max_steps": 40,
            "save_steps": 10,
            "eval_steps": 15,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "learning_rate": 5e-3,
        },
        "evaluation": {"prompts": []},
    }
    finished(run(quick, write_run_file(llama_folder, files, "whole", **sections)))
    file = write_run_file(llama_folder, files, "again", **sections)
    folder = files / "again"

    said, _ = signalled(quick, file, rank=1, number=signal.SIGTERM, at_step=3)
    assert said.count("stopped after step") == 1 and said.count("exitcode  : 3") == 2, said
    (stopped,) = checkpoints(folder)
    step = step_of(stopped)
    assert 3 <= step < 10

    said, seconds = signalled(quick, file, "--resume", rank=0, number=signal.SIGKILL, at_step=step + 14)
    assert seconds < 30
    assert said.count("error: lost another process of the run") == 1 and "exitcode  : 1 " in said, said
    saved = [step_of(path) for path in checkpoints(folder)]
    assert saved in ([step, 10], [step, 10, 20], [10, 20])  # of the intervals: nothing was saved on the way out

    assert_one_error(
        quick(["train", str(file), "--resume"], streams(file), {}), "the run trained in 2 processes, and here are 1"
    )

    finished(run(quick, file, "--resume"))
    assert differences(files / "whole", folder) == []


_KILLED_IN_A_PAUSE = """
import os, signal, sys, time
from steep import cli, ranks

def heard(connection, hears=ranks._heard):
    what = hears(connection)
    time.sleep(1)  # a machine so busy that SIGTERM is there before the watcher has had its turn
    return what

ranks._heard = heard

@cli.app.command("pause")
@ranks.joined()
def pause():
    ranks.wait_for_all()
    if ranks.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

sys.argv = ["steep", "pause"]
cli.main()
"""


def test_a_process_that_torchrun_ends_says_that_another_was_killed(quick: ForkServer, tmp_path: Path) -> None:
    """torchrun sends SIGTERM as soon as one process is gone, and that must not pass for somebody's wish to stop."""
    script = tmp_path / "killed.py"
    script.write_text(_KILLED_IN_A_PAUSE, encoding="utf-8")
    command = quick.python(torchrun(script), tmp_path)
    began = time.monotonic()
    assert command.wait(60) == 1 and time.monotonic() - began < 30
    assert "exitcode: -9" in command.log, command.log
    assert command.log.count("error: lost another process of the run") == 1 and "exitcode  : 1 " in command.log


def test_three_processes_go_on_in_the_same_bits(llama_folder: Path, files: Path, quick: ForkServer) -> None:
    """DDP sorts its buckets anew after a process's first step, and the order of a sum of three numbers shows."""
    training = {"max_steps": 6, "save_steps": 3, "learning_rate": 5e-3}
    file = write_run_file(llama_folder, files, "three", training=training, evaluation={"prompts": []})
    finished(run(quick, file, processes=3))
    whole, folder = files / "three-whole", files / "three"
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "final")
    assert "checkpoint-3" in finished(run(quick, file, "--resume", processes=3)).log
    assert differences(folder, whole, named=folder) == []


def test_a_script_with_our_trainer_trains_in_two_processes(
    llama_folder: Path, quick: ForkServer, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("ko", 48)), encoding="utf-8")

    def words(output: str, batch_size: int) -> list[str]:
        given = {"model": llama_folder, "data": corpus, "output": tmp_path / output, "batch-size": batch_size}
        given |= {"steps": 4, "max-length": 64, "learning-rate": 5e-3}
        return [f"--{name}={value}" for name, value in given.items()]

    def logged(output: str) -> list[dict[str, Any]]:
        state = json.loads((tmp_path / output / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
        return [row for row in state["log_history"] if "loss" in row]

    script = two_lines.__file__
    finished(quick.python(torchrun(script, *words("two", 3)), tmp_path))
    finished(quick.python([script, *words("one", 6)], tmp_path))
    for row, other in zip(logged("two"), logged("one"), strict=True):
        assert row["tokens"] == other["tokens"]
        assert abs(row["loss"] - other["loss"]) < 2e-6
        assert abs(row["grad_norm"] - other["grad_norm"]) < 1e-5 * other["grad_norm"]


def test_wrong_input_is_one_message_and_ends_all(llama_folder: Path, files: Path, quick: ForkServer) -> None:
    file = write_run_file(llama_folder, files, "wrong", data={"sources": [{"path": str(files / "nowhere")}]})
    command = run(quick, file)
    assert command.wait() != 0
    assert command.log.count("error: ") == 1 and "nowhere" in command.log
    assert command.log.count("exitcode  : 2") == 2
    assert command.log.count("Traceback") == 1 and "src/steep/" not in command.log  # torchrun's own
    assert not (files / "wrong").exists()


def test_an_fp8_base_trains_as_in_one_process(llama_folder: Path, files: Path, quick: ForkServer) -> None:
    """gloo and NCCL can send no number in e4m3: DDP has to leave the frozen weights out. Rows of a step are those of
    all processes."""
    given = {"max_steps": 5, "save_steps": 5, "learning_rate": 5e-3}
    sections: dict[str, Any] = {"model": {"base": "fp8"}, "evaluation": {"prompts": []}}
    of_rows = {**given, "rows_per_step": 4}
    finished(run(quick, write_run_file(llama_folder, files, "fp8-two", training=of_rows, **sections)))
    own = yaml.safe_load((files / "fp8-two" / "run.yaml").read_text(encoding="utf-8"))["training"]
    assert (own["per_device_train_batch_size"], own["gradient_accumulation_steps"]) == (2, 1)
    one = run_file(
        llama_folder,
        files / "corpus",
        files / "fp8-one",
        training={**given, "per_device_train_batch_size": 4},
        **sections,
    )
    train_run(one)
    rows, expected = (lines(files / name / "metrics.jsonl") for name in ("fp8-two", "fp8-one"))
    assert len(rows) == 5
    assert all(abs(row["loss"] - other["loss"]) < 2e-6 for row, other in zip(rows, expected, strict=True))
    assert json.loads((files / "fp8-two" / "proof.json").read_text(encoding="utf-8"))["ok"]
