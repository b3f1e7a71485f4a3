"""Checkpoints are written while training goes on, and nothing of that is lost on the way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steep.data.packing import Corpus
from steep.errors import RunError, UserError
from steep.model.adapters import WEIGHTS
from steep.stopping import Interrupted
from steep.storage import give_name
from steep.training import exact_checkpoints
from steep.training.checkpoint import newest_valid, rng_states
from steep.training.checkpoint_writer import CheckpointCallback, CheckpointWriter
from steep.training.guard import GoBack
from steep.training.trainer import Trainer
from tests.tiny import tiny_model
from tests.training.helpers import AtStep, adapted, arguments, contents, trained_weights, trainer_for
from tests.training.test_resume import assert_same
from tests.trees import tree_differences

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim": "adamw_8bit"}


class Gate(CheckpointCallback):
    """Holds the writer back until it is opened, at the latest in 30 s."""

    def __init__(self) -> None:
        self.reached, self.open, self.at = threading.Event(), threading.Event(), []

    def before_publishing(self) -> None:
        self.at.append(threading.current_thread())
        self.reached.set()
        assert self.open.wait(30)


# --- the thread ------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(corpus: Corpus, tmp_path: Path) -> None:
    """And the checkpoint is that of its step, as one that training waited for."""
    whole = trainer_for(adapted(), corpus, tmp_path / "whole", **SAVING)
    whole.train()
    gate, seen = Gate(), []

    def end(step: int) -> None:
        if step == 3:
            assert gate.reached.wait(30)
            seen.append((tmp_path / "held" / "checkpoint-2").exists())
            gate.open.set()

    held = trainer_for(adapted(), corpus, tmp_path / "held", **SAVING)
    held.add_callback(gate)
    held.add_callback(AtStep(end=end))
    held.train()
    assert seen == [False] and threading.main_thread() not in gate.at
    assert_same(whole, held)
    for step in (2, 4, 6):
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "optimizer.json"):
            one, two = (tmp_path / run / f"checkpoint-{step}" / name for run in ("whole", "held"))
            assert one.read_bytes() == two.read_bytes()
    resumed = trainer_for(adapted(), corpus, tmp_path / "resumed", **SAVING)
    resumed.train(resume_from_checkpoint=tmp_path / "held" / "checkpoint-2")
    assert_same(whole, resumed)


def test_the_random_generators_are_left_alone(corpus: Corpus, tmp_path: Path) -> None:
    """Of runs that save and do not, all random numbers are the same."""
    states = []
    for name, settings in (("saves", SAVING), ("does not", {**SAVING, "save_strategy": "no"})):
        torch.manual_seed(3)
        trainer_for(adapted(lora_dropout=0.1), corpus, tmp_path / name, **settings).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_it_is_said_how_long_it_took(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, **SAVING)
    with caplog.at_level(logging.INFO, "steep"):
        trainer.train()
    said = [message for message in caplog.messages if "checkpoint-" in message]
    assert said[0] == "saving checkpoint-2" and len(said) == 6
    assert re.fullmatch(r"checkpoint-2 is saved: \d+\.\d MiB in \d+\.\d\d s, training waited \d+\.\d\d s", said[1])
    rows = [row for row in trainer.state.log_history if "save_seconds" in row]
    assert [row["save_seconds"] > 0 for row in rows] == [False, False, True, False, True, False]
    assert sum(row["save_seconds"] for row in rows) < trainer.seconds_saving


class Uploads(transformers.TrainerCallback):
    """A tracker's: looks at the folder when it is told that a checkpoint was saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found: list[list[str]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(sorted(path.name for path in (self._folder / f"checkpoint-{state.global_step}").iterdir()))


def test_somebody_elses_callback_finds_the_folder(corpus: Corpus, tmp_path: Path) -> None:
    tracker = Uploads(tmp_path)
    trainer = trainer_for(adapted(), corpus, tmp_path, **SAVING)
    trainer.add_callback(tracker)
    trainer.train()
    assert len(tracker.found) == 3 and all("manifest.json" in found for found in tracker.found)


# --- failures --------------------------------------------------------------------------------------------------


class Breaks(CheckpointCallback):
    """Spoils the place of a checkpoint when it is all but published."""

    def __init__(self, folder: Path, how: str, begin: int = 4) -> None:
        self._folder, self._how, self._begin = folder, how, begin
        self.done = threading.Event()

    def before_publishing(self) -> None:
        (staging,) = self._folder.glob(".writing-*")
        if json.loads((staging / "trainer_state.json").read_text())["global_step"] < self._begin:
            return
        self.done.set()
        if self._how == "gone":
            shutil.rmtree(staging)
        elif self._how == "bug":
            raise ValueError("a bug")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("gone", OSError, r"No such file"),
        ("bug", RunError, r"^checkpoint-4 could not be written \(ValueError: a bug\)\. The checkpoints before it are"),
    ],
)
def test_a_save_that_fails_ends_the_run_at_the_next_step(
    how: str, error: type[Exception], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    whole = trainer_for(adapted(), corpus, tmp_path / "whole", **SAVING)
    whole.train()
    folder, ended = tmp_path / "run", []
    trainer, breaks = trainer_for(adapted(), corpus, folder, **SAVING), Breaks(folder, how)

    def end(step: int) -> None:
        ended.append(step)
        if step == 5:
            assert breaks.done.wait(30)
            thread = trainer._writer._thread
            assert thread is not None
            thread.join()

    trainer.add_callback(breaks)
    trainer.add_callback(AtStep(end=end))
    with pytest.raises(error, match=message) as raised:
        trainer.train()
    if isinstance(raised.value, OSError):
        assert raised.value.errno and raised.value.filename
    assert ended[-1] == 5
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(folder.glob(".*"))
    resumed = trainer_for(adapted(), corpus, folder, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same(whole, resumed)


def test_a_last_save_that_fails_is_no_silent_miss(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, **SAVING)
    trainer.add_callback(Breaks(tmp_path, "gone", begin=6))
    with pytest.raises(OSError, match="No such file"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_no_folder_can_be_made(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path / "run", **SAVING)
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("x")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        trainer.train()


def test_what_is_being_written_is_still_saved_when_training_fails(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error of training is the one that is raised; a second one of the writer is said."""
    for how, saved in (("well", True), ("bug", False)):
        folder, gate = tmp_path / how, Gate()

        def fail(step: int, gate: Gate = gate) -> None:
            if step == 3:
                threading.Timer(0.1, gate.open.set).start()
                raise RunError("something else")

        trainer = trainer_for(adapted(), corpus, folder, **SAVING)
        trainer.add_callback(gate)
        trainer.add_callback(Breaks(folder, how, begin=2))
        trainer.add_callback(AtStep(end=fail))
        with pytest.raises(RunError, match=r"^something else$"):
            trainer.train()
        assert (folder / "checkpoint-2").exists() == saved
    assert "checkpoint-2 was not saved either: checkpoint-2 could not be written (ValueError: a bug)" in caplog.text


def test_what_is_being_written_when_all_ends_at_once_is_not_published(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script may catch it, and the run folder be another process's by then. The writer's memory stays its own."""
    trainer, gate = trainer_for(adapted(), corpus, tmp_path, **SAVING), Gate()
    released: list[bool] = []
    monkeypatch.setattr(trainer._host_memory, "release", lambda: released.append(trainer._writer.works))

    def interrupt(step: int) -> None:
        if step == 3:
            assert gate.reached.wait(30)
            raise Interrupted(signal.SIGINT)

    trainer.add_callback(gate)
    trainer.add_callback(AtStep(end=interrupt))
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer._writer.works and released == []
    gate.open.set()
    trainer.finish_saving()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["well", "gone"])
def test_a_run_that_goes_back_waits_for_the_checkpoint_on_its_way(
    how: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not go back behind one that failed without a word."""
    trainer, gate = trainer_for(adapted(), corpus, tmp_path, **SAVING), Gate()
    begun: list[int] = []
    judge, spikes = trainer.guard.judge, iter([5])

    def judged(step: int, *given: Any) -> Any:
        if step == 5 and next(spikes, None) is not None:
            threading.Timer(0.2, gate.open.set).start()
            raise GoBack(step)
        if step == 4:
            gate.open.clear()
        elif step != 5:
            gate.open.set()
        return judge(step, *given)

    monkeypatch.setattr(trainer.guard, "judge", judged)
    trainer.add_callback(gate)
    trainer.add_callback(Breaks(tmp_path, how))
    trainer.add_callback(AtStep(begin=begun.append))
    if how == "gone":
        with pytest.raises(OSError, match="No such file"):
            trainer.train()
        assert begun == [1, 2, 3, 4, 5]
    else:
        trainer.train()
        assert begun == [1, 2, 3, 4, 5, 5, 6]


def test_a_failure_is_raised_once() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device", "there")

    writer = CheckpointWriter()
    writer.start("checkpoint-1", fail)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.check()
    writer.wait()
    done: list[int] = []
    writer.start("checkpoint-2", lambda: done.append(1))
    writer.wait()
    assert done == [1]


def test_a_failure_is_not_waited_for() -> None:
    """The end of a step looks; it does not wait."""
    go_on = threading.Event()
    writer = CheckpointWriter()
    writer.start("checkpoint-1", lambda: [go_on.wait(30)].clear())
    begun = time.monotonic()
    writer.check()
    assert time.monotonic() - begun < 5
    go_on.set()
    writer.wait()


# --- what is loaded ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saving") / "run"
    trainer = trainer_for(adapted(), corpus, folder, **SAVING)
    trainer.train()
    return trainer, folder


FILES = [
    f"{name}.{ending}"
    for name in ("optimizer", "schedule", "random", "observations")
    for ending in ("json", "safetensors")
]


@pytest.mark.parametrize(
    "file",
    [*FILES, *(f"{name}.json" for name in ("adapter_config", "trainer_state", "training_args")), WEIGHTS, "README.md"],
)
def test_a_flipped_byte_in_any_file_is_passed_over(
    file: str, run: tuple[Trainer, Path], corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    content = bytearray((folder / "checkpoint-6" / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "checkpoint-6" / file).write_bytes(content)
    size = (folder / "checkpoint-4" / file).stat().st_size
    os.truncate(folder / "checkpoint-4" / file, size - 1)
    choice = newest_valid(folder)
    assert choice.checkpoint is not None and choice.checkpoint.path == folder / "checkpoint-2"
    assert [reason for _, reason in choice.passed_over] == [
        f"{file} is not what was written (SHA-256)",
        f"{file} has {size - 1:,} bytes, and was written with {size:,}",
    ]
    if file != "optimizer.json":
        return
    resumed = trainer_for(adapted(), corpus, folder, **SAVING, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same(run[0], resumed)
    assert "checkpoint-6 is passed over: optimizer.json is not what was written (SHA-256). It is left" in caplog.text
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    choice = newest_valid(folder)
    assert choice.checkpoint is not None and not choice.passed_over


STRANGERS = {
    "adapter_model.bin": b"not a pickle",
    "pytorch_model.bin": b"not a pickle",
    "pytorch_model_fsdp.bin": b"x",
    "scaler.json": b"{",
    "optimizer.pt": b"x",
    "rng_state.pth": b"x",
    "chat_template.jinja": b"{{ x }}",
    "added_tokens.json": b"{",
    "config.json": b"{",
    "default/adapter_model.safetensors": b"x",
}


def test_an_extra_file_is_named_and_changes_nothing(
    run: tuple[Trainer, Path], corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "checkpoint-2"
    shutil.copytree(run[1] / "checkpoint-2", place)
    for name, content in STRANGERS.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    resumed = trainer_for(adapted(), corpus, tmp_path / "run", **SAVING)
    resumed.train(resume_from_checkpoint=str(place))
    assert_same(run[0], resumed)
    for name in STRANGERS:
        assert f"holds '{name}', which was not saved with it; it is not read" in caplog.text


def test_a_given_path_is_verified(run: tuple[Trainer, Path], corpus: Corpus, tmp_path: Path) -> None:
    place = shutil.copytree(run[1] / "checkpoint-2", tmp_path / "checkpoint-2")
    (place / "random.json").write_text("{}")
    trainer = trainer_for(adapted(), corpus, tmp_path / "run", **SAVING)
    with pytest.raises(
        UserError, match=r"^resume_from_checkpoint: .*checkpoint-2 is no whole checkpoint: random\.json"
    ):
        trainer.train(resume_from_checkpoint=str(place))
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: .*none is no whole checkpoint: it is not there"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: .*run has no checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_model_without_adapters_resumes_from_what_the_manifest_names(corpus: Corpus, tmp_path: Path) -> None:
    def trainer(folder: Path) -> Trainer:
        model = tiny_model("llama")
        model.config.use_cache = False
        args = arguments(folder, **{**SAVING, "max_steps": 4, "learning_rate": 1e-3, "optim": "adamw_torch"})
        return Trainer(model=model, args=args, train_dataset=corpus)

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    place = tmp_path / "whole" / "checkpoint-2"
    (place / "pytorch_model.bin").write_bytes(b"not a pickle")
    resumed.train(resume_from_checkpoint=place)
    assert tree_differences(trained_weights(whole.model), trained_weights(resumed.model)) == []
    assert_same(whole, resumed)


# --- the best so far ---------------------------------------------------------------------------------------------

DOMAIN = "small0"
BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": f"eval_{DOMAIN}_bits_per_byte", **SAVING}


def with_scores(trainer: Trainer, by_step: dict[int, float]) -> Trainer:
    """Let evaluations say what the test says."""
    evaluate = trainer.evaluate

    def said(*given: Any, **named: Any) -> Any:
        return evaluate(*given, **named) | {f"eval_{DOMAIN}_bits_per_byte": by_step[trainer.state.global_step]}

    trainer.evaluate = said
    return trainer


def test_the_best_stays_beside_the_newest(corpus: Corpus, tmp_path: Path) -> None:
    """The best of all is step 3, which is not saved: of those that are, it is 2."""
    trainer = with_scores(
        trainer_for(adapted(), corpus, tmp_path, **{**BEST, "max_steps": 10}, save_total_limit=1),
        {1: 3, 2: 2, 3: 1, 4: 2.5, 5: 1.5, 6: float("nan"), 7: 1.2, 8: 2.1, 9: 1, 10: 2.2},
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (2, 2)
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert trainer.args.greater_is_better is False


def test_the_best_so_far_survives_a_resume(corpus: Corpus, tmp_path: Path) -> None:
    """Also of a run whose folder was moved; and it still is not deleted."""
    by_step: dict[int, float] = {1: 3, 2: 2, 3: 1, 4: 2.5, 5: 1.5, 6: 2.3, 7: 1, 8: 2.1}
    made = {**BEST, "max_steps": 8, "save_total_limit": 1}
    whole = with_scores(trainer_for(adapted(), corpus, tmp_path / "whole", **made), by_step)
    whole.train()
    first = with_scores(trainer_for(adapted(), corpus, tmp_path / "first", **{**made, "max_steps": 4}), by_step)
    first.train()
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = with_scores(trainer_for(adapted(), corpus, tmp_path / "moved", **made), by_step)
    resumed.train(resume_from_checkpoint=True)
    assert_same_best(whole, resumed, tmp_path / "whole", tmp_path / "moved")
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["checkpoint-2", "checkpoint-8"]


def assert_same_best(whole: Trainer, resumed: Trainer, one: Path, two: Path) -> None:
    for trainer, folder in ((whole, one), (resumed, two)):
        assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, 2)
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")


def test_the_best_by_another_measure_begins_anew(corpus: Corpus, tmp_path: Path) -> None:
    with_scores(trainer_for(adapted(), corpus, tmp_path, **{**BEST, "max_steps": 4}), {1: 0, 2: 0, 3: 0, 4: 0}).train()
    resumed = trainer_for(adapted(), corpus, tmp_path, **{**BEST, "metric_for_best_model": f"eval_{DOMAIN}_loss"})
    resumed.train(resume_from_checkpoint=True)
    best = resumed.state.best_metric
    assert resumed.state.best_global_step == 6 and best is not None and best > 1


def test_the_best_is_what_is_loaded_at_the_end(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still being written when the next one is saved."""

    def late(staging: Path, folder: Path) -> None:
        time.sleep(0.5)
        give_name(staging, folder)

    monkeypatch.setattr(exact_checkpoints, "give_name", late)
    made = {**BEST, "eval_steps": 2, "load_best_model_at_end": True}
    trainer = with_scores(trainer_for(adapted(), corpus, tmp_path, **made), {2: 2, 4: 1, 6: 3})
    trainer.train()
    (tmp_path / "now").mkdir()
    trainer._snapshot(tmp_path / "now", rng_states()).write(tmp_path / "now")
    weights = contents(tmp_path / "checkpoint-4")["adapter_model.safetensors"]
    assert contents(tmp_path / "now")["adapter_model.safetensors"] == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"metric_for_best_model": "eval_smal_bits_per_byte"},
            r"no held-out domain has .*'eval_small0_bits_per_byte'.*Known",
        ),
        ({"eval_strategy": "no"}, r"nothing is scored during training.*Set eval_steps"),
    ],
)
def test_a_measure_that_no_evaluation_gives(
    settings: dict[str, Any], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, **{**BEST, **settings})
    with pytest.raises(UserError, match=rf"^metric_for_best_model: {message}"):
        trainer.train()
