"""The run folder and processes that were killed: what they leave, what they held, and how a run goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.errors import UserError
from steep.result import evaluate_run
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.training.checkpoint import checkpoints
from steep.training.trainer import Trainer
from tests.test_changes import listening
from tests.test_run import lines, run_file
from tests.training.helpers import contents

# --- the lock ----------------------------------------------------------------------------------------------------

_HOLDER = (
    "import sys, time; from steep.run_folder import RunFolder\n"
    "with RunFolder(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"
)
_SECOND = (
    "import sys; from steep.run_folder import RunFolder\n"
    "with RunFolder(sys.argv[1]).locked(): print('held', flush=True)"
)


def test_the_lock_of_a_process_dies_with_it(tmp_path: Path) -> None:
    """Two real processes, and kill -9."""

    def second() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", _SECOND, str(tmp_path)], capture_output=True, text=True)

    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        refused = second()
        assert refused.stdout == "" and f"another process trains in {tmp_path}" in refused.stderr
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert second().stdout == "held\n"


def test_the_lock_does_not_live_on_in_a_forked_process(tmp_path: Path) -> None:
    """Workers that read rows outlive their parent by seconds. That they end does not end the lock of a parent."""
    fork = (
        "import os, sys, time; from steep.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n"
        "    ending = os.fork()\n"
        "    if not ending: sys.exit()\n"
        "    os.waitpid(ending, 0)\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(UserError, match="another process trains"), RunFolder(tmp_path).locked():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunFolder(tmp_path).locked():
            os.kill(child, signal.SIGKILL)


def test_a_lock_that_is_given_back_closes_nothing_in_a_forked_process(tmp_path: Path) -> None:
    """Its number may be another file's by then."""
    with RunFolder(tmp_path).locked():
        pass
    file = os.open(tmp_path, os.O_RDONLY)  # gets the lowest number that is free
    child = os.fork()
    if child == 0:
        os.fstat(file)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(file)


def test_an_error_within_is_not_the_locks(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="of something else"), RunFolder(tmp_path).locked():
        raise BlockingIOError(11, "of something else")


# --- what a killed process leaves ----------------------------------------------------------------------------------


def leftovers(folder: Path) -> None:
    """What a process leaves that is killed right before it writes run.yaml."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "new_tokens.json").write_text("{}")
    (folder / "parent.json").write_text("{}")
    (folder / ".writing-another.host-7-abc").mkdir()
    (folder / ".writing-another.host-7-def").write_text("x")


def test_what_a_run_left_that_never_began_is_no_run(tmp_path: Path) -> None:
    leftovers(tmp_path)
    folder = RunFolder(tmp_path)
    folder.refuse_contents()
    with folder.locked():
        folder.clear(resumed=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer", "checkpoint-3", "final", ".hidden"])
def test_what_may_be_the_users_is_never_taken(name: str, tmp_path: Path) -> None:
    """A folder called tokenizer is ours only with the record of new tokens in it."""
    (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"^training\.output_dir: .* is not empty"):
        folder.refuse_contents()
    folder.clear(resumed=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_words_that_are_told_can_be_copied(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    place = tmp_path / "my run's"
    place.mkdir()
    (place / "run.yaml").write_text(run_file(llama_folder, korean_corpus, place).to_yaml(), encoding="utf-8")
    with pytest.raises(UserError) as told:
        RunFolder(place).refuse_contents(branch=True)
    option = told.value.remedy.removeprefix("A branch has a folder of its own: ").removesuffix(".")
    assert shlex.split(option) == ["--training.output_dir", f"{place}-branch"]
    with pytest.raises(UserError) as told:
        evaluate_run(place)
    command = told.value.remedy.removeprefix("Finish it with: ")
    assert shlex.split(command) == ["steep", "train", str(place / "run.yaml"), "--resume"]


def test_a_run_that_is_there_keeps_all_its_files(tmp_path: Path) -> None:
    leftovers(tmp_path)
    (tmp_path / "run.yaml").write_text("model: x")
    with pytest.raises(UserError, match=r"holds another run.*--resume"):
        RunFolder(tmp_path).refuse_contents()
    for resumed in (True, False):
        RunFolder(tmp_path).clear(resumed=resumed)
        assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "tokenizer", "parent.json"}


def test_lines_that_were_cut_off_do_not_run_into_the_next(tmp_path: Path) -> None:
    """Also where the first line is the one."""
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1, "모'.encode()[:-1])
    samples = [{"step": step, "prompt": "a", "completion": "b"} for step in (0, 1)]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples) + '{"st')
    folder.rewind(0)
    folder.append("metrics.jsonl", [{"step": 1}])
    folder.append("samples.jsonl", [{**samples[1], "again": True}])
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert lines(tmp_path / "samples.jsonl") == [samples[0], {**samples[1], "again": True}]
    assert not (tmp_path / "evaluation.jsonl").exists()


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, training=SAVING))
    return folder


SAVING = {"save_steps": 2, "save_total_limit": 3}
FIELDS = ("step", "loss", "grad_norm", "learning_rate", "tokens")


def assert_same_run(one: Path, two: Path) -> None:
    for name in ("final/adapter_model.safetensors", "checkpoint-6/optimizer.safetensors", "ledger.json", "proof.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    rows = [[[row[field] for field in FIELDS] for row in lines(folder / "metrics.jsonl")] for folder in (one, two)]
    assert rows[0] == rows[1]
    assert (one / "evaluation.jsonl").read_bytes() == (two / "evaluation.jsonl").read_bytes()
    assert not list(two.glob(".*"))


def test_a_resumed_run_says_what_it_passes_over(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ko"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "final")
    (folder / "checkpoint-6" / "random.safetensors").unlink()
    (folder / "checkpoint-4" / "manifest.json").unlink()
    (folder / "checkpoint-2" / "adapter_model.bin").write_bytes(b"x")
    leftovers = folder / ".writing-another.host-7-abc"
    leftovers.mkdir()
    terminal, said = listening()
    train_run(run_file(llama_folder, korean_corpus, folder, training=SAVING), resume=True, terminal=terminal)
    for text in (
        "checkpoint-6 is passed over: random.safetensors is missing",
        "checkpoint-4 is passed over: it has no manifest.json",
        "checkpoint-2 holds 'adapter_model.bin', which was not saved with it; it is not read",
    ):
        assert text in caplog.text
    assert f"going on from {folder / 'checkpoint-2'}" in said
    assert_same_run(finished, folder)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ko"
    shutil.copytree(finished, folder)
    for path in checkpoints(folder):
        (path / "trainer_state.json").unlink()
    before = contents(folder)
    with pytest.raises(UserError, match=r"^--resume: no checkpoint of .* is whole \(checkpoint-6: trainer_state\.json"):
        train_run(run_file(llama_folder, korean_corpus, folder, training=SAVING), resume=True)
    assert contents(folder) == before


def test_a_run_killed_before_it_began_is_started_again(
    finished: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    leftovers(tmp_path / "ko")
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "ko", training=SAVING))
    assert {path.name for path in (tmp_path / "ko").iterdir()} == {path.name for path in finished.iterdir()}
    assert_same_run(finished, tmp_path / "ko")


def test_lines_are_on_the_disk_before_their_checkpoint(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a checkpoint gets its name, every line up to it was synced: a power cut takes neither alone."""
    folder = tmp_path / "ko"
    synced: dict[str, int] = {}
    seen: list[tuple[str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.path.realpath(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def renamed(self: Path, target: Path) -> Path:
        if target.name.startswith("checkpoint-"):
            content = (folder / "metrics.jsonl").read_bytes()[: synced[str((folder / "metrics.jsonl").resolve())]]
            seen.append((target.name, json.loads(content.splitlines()[-1])["step"]))
            scores = (folder / "evaluation.jsonl").read_bytes()
            assert synced[str((folder / "evaluation.jsonl").resolve())] == len(scores)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    train_run(run_file(llama_folder, korean_corpus, folder, training=SAVING))
    assert [name for name, _ in seen] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(step >= int(name.removeprefix("checkpoint-")) for name, step in seen)


# --- the best by a held-out domain ----------------------------------------------------------------------------------


def best_of(folder: Path) -> dict[str, Any]:
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
    return {key: state[key] for key in ("best_metric", "best_global_step", "best_model_checkpoint")}


def test_the_best_is_by_the_text_that_is_trained(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays beside the newest, whatever comes after it, also in a run that was stopped in between."""
    evaluate = Trainer.evaluate

    def rising(self: Trainer, *given: Any, **named: Any) -> Any:
        metrics = evaluate(self, *given, **named)
        return {key: float(self.state.global_step) for key in metrics}

    monkeypatch.setattr(Trainer, "evaluate", rising)
    training = {"save_steps": 2, "eval_steps": 1, "save_total_limit": 1}
    sources = [{"path": str(korean_corpus), "domain": "한국어"}]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        train_run(run_file(llama_folder, korean_corpus, folder, data={"sources": sources}, training=training))
    assert [path.name for path in checkpoints(whole)] == ["checkpoint-2", "checkpoint-6"]
    assert best_of(whole) == {
        "best_metric": 2.0, "best_global_step": 2, "best_model_checkpoint": str(whole / "checkpoint-2"),
    }  # fmt: skip
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(stopped / name)
    config = run_file(llama_folder, korean_corpus, stopped, data={"sources": sources}, training=training)
    train_run(config, resume=True)
    assert best_of(stopped) == {**best_of(whole), "best_model_checkpoint": str(stopped / "checkpoint-2")}
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"metric_for_best_model": "eval_x_loss", "eval_steps": 2},
            r"no held-out domain has 'eval_x_loss'\..*Known are",
        ),
        ({"metric_for_best_model": "eval_loss"}, r"nothing is scored during training.*Set training\.eval_steps"),
    ],
)
def test_an_unknown_measure_is_refused_before_the_model_is_loaded(
    training: dict[str, Any], message: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^training\.metric_for_best_model: {message}"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "ko", training=training))
    assert not (tmp_path / "ko").exists()
