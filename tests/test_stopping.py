"""Ctrl-C and SIGTERM: a run ends after its step and goes on to the same bits; a second signal ends it at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from steep import heed_signals, run
from steep.errors import Stopped
from steep.stopping import Interrupted
from steep.training.exact_checkpoints import ExactCheckpoints
from steep.training.guard import GoBack, Guard
from steep.training.trainer import Trainer
from tests.command_line import Said, Steep
from tests.faults.command import ForkServer
from tests.test_cli import run_file  # noqa: F401
from tests.test_run import lines
from tests.test_verify_resume import children_of, runs

OF_THE_CLOCK = ("tokens_per_second", "peak_memory_bytes", "save_seconds")


def traces(folder: Path) -> dict[str, Any]:
    """What a run left, but for the clock: its lines, its ledger and proof, and digests of what it ended with."""
    (*_, last) = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    weights = [folder / "final" / "adapter_model.safetensors"]
    states = [
        last / f"{name}.{kind}" for name in ("optimizer", "random", "schedule") for kind in ("safetensors", "json")
    ]
    found: dict[str, Any] = {
        f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in weights + states
    }
    found["metrics"] = [
        {key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in lines(folder / "metrics.jsonl")
    ]
    found |= {name: lines(folder / f"{name}.jsonl") for name in ("evaluation", "samples")}
    return found | {name: json.loads((folder / f"{name}.json").read_text()) for name in ("ledger", "proof")}


def dropout_run(file: Path, folder: Path, **training: Any) -> Path:
    """A copy of a run file for another folder: dropout, accumulation, evaluations, samples."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["adapter"]["lora_dropout"] = 0.1
    tree["training"] |= {"max_steps": 7, "gradient_accumulation_steps": 3, "eval_steps": 2, "save_steps": 3, **training}
    tree["training"]["output_dir"] = str(folder / "run")
    tree["evaluation"] = {"prompts": ["the river"], "max_new_tokens": 4}
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "run.yaml"


def at_call(number: int, act: Callable[[], None], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner`, with `act` right before its call of that number."""
    calls = 0

    def wrapped(*given: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return inner(*given, **settings)

    return wrapped


def send(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def last_line(said: Said) -> str:
    assert "Traceback" not in said.err + said.out, said.err
    return said.err.rstrip().splitlines()[-1]


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with heed_signals() as stop:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [stop.on_signal] * 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_steps_and_elsewhere(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with heed_signals() as stop, stop.finishing_steps():
        send(number)()
        assert stop.asked and "once more stops at once" in capfd.readouterr().err
        with pytest.raises(Interrupted) as raised:
            send(number)()
        assert raised.value.exit_code == code
    with heed_signals() as stop:
        with pytest.raises(Interrupted) as raised:
            send(number)()
        assert raised.value.exit_code == code and not stop.asked


def test_other_threads_have_no_signals() -> None:
    found: list[BaseException] = []

    def heed() -> None:
        try:
            with heed_signals():
                pass
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=heed)
    thread.start()
    thread.join()
    assert len(found) == 1 and "main thread" in str(found[0])


def test_a_dropped_interruption_does_not_hold_up_the_next() -> None:
    """A library that swallows the exception loses one signal; the next one ends the process."""
    code = (
        "import os, signal, steep\n"
        "with steep.heed_signals():\n"
        "    for number in (2, 15):\n"
        "        try: os.kill(os.getpid(), number)\n"
        "        except BaseException: print('dropped', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "dropped\n", "")


def test_a_forked_worker_leaves_ctrl_c_to_its_parent() -> None:
    with heed_signals():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_an_ignored_signal_stays_ignored() -> None:
    """A shell has its background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heed_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminal_that_is_gone_does_not_end_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with heed_signals() as stop, stop.finishing_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked


def test_a_library_call_leaves_signals_alone(steep: Steep, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from steep.config import load_config

    seen: list[Any] = []
    act = lambda: seen.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(Trainer, "training_step", at_call(1, act, Trainer.training_step))
    before = signal.getsignal(signal.SIGINT)
    run.train_run(load_config(run_file))
    assert seen == [before]


def test_stopped_several_times_is_never_stopped(
    steep: Steep,
    run_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a step's first and second part, and within an evaluation: each time the step is finished first."""
    whole, stopped = dropout_run(run_file, tmp_path / "whole"), dropout_run(run_file, tmp_path / "stopped")
    assert steep("train", whole).code == 0
    folder = stopped.parent / "run"
    step, evaluate = Trainer.training_step, Trainer.evaluate
    monkeypatch.setattr(Trainer, "training_step", at_call(2, send(signal.SIGINT), step))
    said = steep("train", stopped)
    assert said.code == 3
    assert last_line(said) == (
        f"stopped after step 1, which is saved as {folder / 'checkpoint-1'}; go on with: steep train {stopped} --resume"
    )
    assert (folder / "checkpoint-1").is_dir() and not (folder / "final").exists()
    monkeypatch.setattr(Trainer, "training_step", step)
    monkeypatch.setattr(Trainer, "evaluate", at_call(1, send(signal.SIGTERM), evaluate))
    said = steep("train", stopped, "--resume")
    assert said.code == 3 and "stopped after step 2," in last_line(said)
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == [0, 2]
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    monkeypatch.setattr(Trainer, "training_step", at_call(9, send(signal.SIGTERM), step))
    said = steep("train", stopped, "--resume")
    assert said.code == 3 and "stopped after step 5," in last_line(said)
    monkeypatch.setattr(Trainer, "training_step", step)
    assert steep("train", stopped, "--resume").code == 0
    assert traces(folder) == traces(whole.parent / "run")


@pytest.mark.parametrize("saves", ["steps", "epoch"])
def test_a_signal_in_the_last_step(
    saves: str,
    steep: Steep,
    run_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends there as in any other; the result is written when it goes on."""
    whole, stopped = (dropout_run(run_file, tmp_path / name, save_strategy=saves) for name in ("whole", "stopped"))
    assert steep("train", whole).code == 0
    folder = stopped.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", at_call(21, send(signal.SIGTERM), Trainer.training_step))
        said = steep("train", stopped)
    assert said.code == 3 and "stopped after step 7, which is saved as" in last_line(said)
    assert (folder / "checkpoint-7").is_dir() and not (folder / "final").exists()
    with monkeypatch.context() as patch:  # while what there is is loaded
        patch.setattr(Trainer, "_prepare_for_training", at_call(1, send(signal.SIGTERM), Trainer._prepare_for_training))
        said = steep("train", stopped, "--resume")
    assert said.code == 3 and "stopped after step 7, which is saved as" in last_line(said)
    said = steep("train", stopped, "--resume")
    assert said.code == 0 and "all 7 steps are done already" in said.err
    assert traces(folder) == traces(whole.parent / "run")


def test_a_signal_after_the_last_step_ends_it_at_once(
    steep: Steep,
    run_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody would look at a wish any more."""
    with monkeypatch.context() as patch:
        end = ExactCheckpoints._finalize_training
        patch.setattr(ExactCheckpoints, "_finalize_training", at_call(1, send(signal.SIGTERM), end))
        said = steep("train", run_file)
    assert said.code == 143 and "stopped at once; go on from the newest checkpoint" in last_line(said)
    assert steep("train", run_file, "--resume").code == 0


@pytest.mark.parametrize("at_its_end", [False, True])
def test_an_epoch_that_is_left_does_not_end(
    at_its_end: bool,
    steep: Steep,
    run_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is done at an epoch's end is done once, there."""
    once = {"max_steps": -1, "num_train_epochs": 2, "eval_steps": None, "eval_strategy": "epoch",
            "save_strategy": "epoch", "logging_strategy": "epoch", "per_device_train_batch_size": 10}  # fmt: skip
    whole, stopped = dropout_run(run_file, tmp_path / "a", **once), dropout_run(run_file, tmp_path / "b", **once)
    said = steep("train", whole)
    assert said.code == 0, said
    folder = stopped.parent / "run"
    rows = json.loads((whole.parent / "run" / "plan.json").read_text(encoding="utf-8"))["data"]["rows"]
    steps = [row["step"] for row in lines(whole.parent / "run" / "evaluation.jsonl")]
    batches = -(-rows // 10)
    assert batches > 3 and steps == [0, -(-batches // 3), 2 * -(-batches // 3)]
    with monkeypatch.context() as patch:
        at = batches if at_its_end else 2
        patch.setattr(Trainer, "training_step", at_call(at, send(signal.SIGTERM), Trainer.training_step))
        assert steep("train", stopped).code == 3
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == steps[: 1 + at_its_end]
    assert steep("train", stopped, "--resume").code == 0
    assert traces(folder) == traces(whole.parent / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_run_at_once(
    number: int,
    code: int,
    steep: Steep,
    run_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run_file.parent / "run"

    def act() -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("writes "):  # the exit does not wait for it, and would take the tests with it
                thread.join()
        send(number, number)()

    monkeypatch.setattr(Trainer, "training_step", at_call(3, act, Trainer.training_step))
    said = steep("train", run_file)
    assert said.code == code
    assert last_line(said) == (
        f"stopped at once; go on from the newest checkpoint with: steep train {run_file} --resume"
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"] and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [
        ("plan_run", signal.SIGINT, 130),
        ("load_base", signal.SIGTERM, 143),
        ("sample", signal.SIGINT, 130),
        ("write_readme", signal.SIGTERM, 143),
    ],
)
def test_outside_of_training_one_signal_ends_it(
    phase: str,
    number: int,
    code: int,
    steep: Steep,
    run_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["train", run_file, "--evaluation.prompts", "[the river]", "--evaluation.max_new_tokens", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(run, phase, at_call(1, send(number), getattr(run, phase)))
        said = steep(*words)
    assert said.code == code
    folder = run_file.parent / "run"
    begun = (folder / "run.yaml").is_file()
    assert begun == (phase in ("sample", "write_readme"))
    expected = {"sample": "begin again with: steep train", "write_readme": "go on from the newest checkpoint with: "}
    assert expected.get(phase, "start the same command again") in last_line(said)
    assert not list(folder.glob(".*")) and not (folder / "final").exists()
    again = steep(*words, *["--resume"] * begun)
    assert again.code == 0, again
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == [0, 4]


def test_a_trainer_in_a_script(steep: Steep, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from steep.config import load_config

    monkeypatch.setattr(Trainer, "training_step", at_call(3, send(signal.SIGTERM), Trainer.training_step))
    with heed_signals() as stop, pytest.raises(Stopped, match="stopped after step 3") as raised:
        run.train_run(load_config(run_file), stop=stop)
    assert raised.value.step == 3 and raised.value.checkpoint.is_dir()


def test_a_signal_to_all_processes(steep: Steep, run_file: Path, tmp_path: Path, quick: ForkServer) -> None:  # noqa: F811
    """As a terminal, `timeout` and batch systems send it: workers that read rows leave it to the one that trains.
    Ctrl-C first, and SIGTERM to the run that goes on."""
    settings = {"max_steps": 40, "save_steps": 100, "eval_steps": 40, "dataloader_num_workers": 2}
    whole, stopped = (dropout_run(run_file, tmp_path / name, **settings) for name in ("whole", "stopped"))
    assert steep("train", whole).code == 0
    folder, step = stopped.parent / "run", 0
    for number, words in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        command = quick(["train", str(stopped), *words], stopped.parent, {})
        assert command.until(lambda: last_step(folder) > step), command.text()  # noqa: B023 - asked in this round
        workers = children_of(command.pid)
        assert len(workers) == 2
        command.signal(number)
        assert command.wait(60) == 3 and "Traceback" not in command.log, command.text()
        assert last_step(folder) > step
        step = last_step(folder)
        assert (folder / f"checkpoint-{step}").is_dir()
        assert not any(runs(worker) for worker in workers)
    assert steep("train", stopped, "--resume").code == 0
    assert traces(folder) == traces(whole.parent / "run")


def last_step(folder: Path) -> int:
    """That of the last whole line of its log."""
    log = folder / "metrics.jsonl"
    *_, last = ["", *log.read_text(encoding="utf-8").split("\n")[:-1]] if log.exists() else [""]
    return json.loads(last)["step"] if last else 0


def test_a_second_signal_does_not_wait_for_a_checkpoint(
    steep: Steep,
    run_file: Path,  # noqa: F811
    quick: ForkServer,
    tmp_path: Path,
) -> None:
    """A steep whose disk takes a minute for each."""
    program = tmp_path / "slow.py"
    program.write_text(
        "import time\nfrom steep.cli import main\nfrom steep.training.snapshot import Snapshot\n"
        "Snapshot.write = lambda self, folder: time.sleep(60)\nmain()\n",
        encoding="utf-8",
    )
    command = quick.python([str(program), "train", str(run_file)], tmp_path)
    for awaited in ("saving checkpoint-2", "stopping after this step"):
        assert command.until(lambda: any(awaited in line for line in command.lines())), command.text()  # noqa: B023
        command.signal(signal.SIGTERM)
    began = time.monotonic()
    assert command.wait(50) == 143 and time.monotonic() - began < 20
    (last,) = (line for line in command.lines() if "stopped at once" in line)
    assert last == f"stopped at once; begin again with: steep train {run_file} --resume" == command.lines()[-1]
    assert not list((run_file.parent / "run").glob("checkpoint-*"))
    assert steep("train", run_file, "--resume").code == 0


@pytest.mark.parametrize("place", ["_where_to_begin", "_load_rng_state"])
def test_a_signal_while_a_run_goes_back(
    place: str,
    steep: Steep,
    run_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in any other moment of the training: a step is trained, and saved."""
    judge, gone_back = Guard.judge, []

    def spike_at_5(self: Guard, step: int, *given: Any) -> Any:
        if step == 5 and not gone_back:
            gone_back.append(step)
            load = at_call(1, send(signal.SIGTERM), getattr(Trainer, place))
            monkeypatch.setattr(Trainer, place, load)
            raise GoBack(step)
        return judge(self, step, *given)

    monkeypatch.setattr(Guard, "judge", spike_at_5)
    file = dropout_run(run_file, tmp_path / "run", spike_action="rollback")
    said = steep("train", file)
    assert gone_back and said.code == 3 and "stopped after step 4," in last_line(said), said
    assert steep("train", file, "--resume").code == 0


def test_a_process_that_is_told_to_end(steep: Steep, run_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """The real command and a real SIGTERM, at a moment of the training that nobody chose."""
    settings = {"max_steps": 40, "save_steps": 15, "eval_steps": 15, "gradient_accumulation_steps": 1}
    whole, stopped = (dropout_run(run_file, tmp_path / name, **settings) for name in ("whole", "stopped"))
    assert steep("train", whole).code == 0
    folder = stopped.parent / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "steep", "train", str(stopped)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3 * random.SystemRandom().random())  # of some 2 s
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "Traceback" not in err, err
    assert f"go on with: steep train {stopped} --resume" in err
    assert steep("train", stopped, "--resume").code == 0
    assert traces(folder) == traces(whole.parent / "run")
