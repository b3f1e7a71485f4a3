"""A run that goes back for a spike is killed, at every stage of it, and ends in the bits of one that was not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.command import ForkServer, start_wrapped
from tests.faults.compare import differences, lines_lost_or_doubled
from tests.faults.runs import Run, finished
from tests.faults.trace import STRACE, read_trace, replacing_faults, spike_faults
from tests.test_run import lines
from tests.test_torchrun import run as by_torchrun
from tests.tiny import save_tiny
from tests.training.test_guard import NOISE, Planted, planted  # noqa: F401


class Noise:
    """Sentences with a document of noise among them, as a scene that runs are made of."""

    def __init__(self, planted: Planted, folder: Path) -> None:  # noqa: F811
        self.planted = planted
        self._text = planted.corpus.sources[0].source.location
        self._model = save_tiny("llama", folder / "model")

    def write(self, place: Path, kind: str, **sections: dict[str, Any]) -> Path:
        tree = {
            "model": {"name": str(self._model), "base": "fp32"},
            "adapter": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": False},
            "data": {
                "sources": [{"path": self._text, "domain": "sentences"}],
                "max_length": 64,
                "holdout": 0.0,
                "packing": "best_fit",
            },
            "training": {
                "output_dir": str(place / "run"),
                "max_steps": self.planted.steps,
                "data_seed": self.planted.seed,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "embedding_learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "optim": "adamw_torch",
                "save_steps": 15,
                "spike_action": "rollback",
                "spike_window": 64,
                **sections.get("training", {}),
            },
        }
        file = place / "run.yaml"
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return file


@pytest.fixture(scope="module")
def noise(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Noise:  # noqa: F811
    return Noise(planted, tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def whole(noise: Noise, quick: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(noise, tmp_path_factory.mktemp("whole") / "place", quick)  # pyright: ignore[reportArgumentType]
    said = finished(run.go()).text()
    assert f"going back to {run.folder.name}/checkpoint-{(spike(run) - 1) // 15 * 15}" in said  # as seen from beside it
    return run


def spike(run: Run) -> int:
    """The step that the run went back for."""
    (incident,) = run.rows("incidents.jsonl")
    assert incident["action"] == "rollback"
    assert NOISE in [piece["document"] for row in incident["rows"] for piece in row["pieces"]]
    return incident["step"]


def has_list(run: Run) -> bool:
    return (run.folder / "skipped_steps.json").exists()


def last_step(run: Run) -> int:
    rows = run.rows("metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def test_the_run_folder_says_what_was_skipped(whole: Run, noise: Noise) -> None:
    step = spike(whole)
    assert step > 32  # two checkpoints lie before it, beside the first
    rows = whole.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, noise.planted.steps + 1))
    assert rows[step - 1]["loss"] is None and rows[step - 1]["grad_norm"] is None
    assert [row["steps_skipped"] for row in rows] == [int(row["step"] >= step) for row in rows]
    ledger = json.loads((whole.folder / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["adds_up"] and ledger["rows_skipped"] == 2 and ledger["sources"][0]["tokens"]["skipped"] > 100
    assert json.loads((whole.folder / "proof.json").read_text(encoding="utf-8"))["ok"]


@pytest.mark.strace
def test_what_is_skipped_is_on_the_disk_before_training_goes_on(noise: Noise, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def traced(words: Any, folder: Path, further: Any) -> Any:
        return start_wrapped([*STRACE, str(trace)], words, folder, further)

    run = Run(noise, tmp_path / "place", traced)  # pyright: ignore[reportArgumentType]
    run.finish()
    assert has_list(run) and spike(run)
    events = read_trace(trace.read_text(encoding="utf-8", errors="replace").splitlines())
    assert spike_faults(events, run.folder) == []
    assert replacing_faults(events, run.folder) == []


def test_two_processes_go_back_together(whole: Run, noise: Noise, quick: ForkServer, tmp_path: Path) -> None:
    """To the step and the rows of one process; from there on with the bits of a run that knew of it."""
    place = tmp_path / "place"
    place.mkdir()
    file = noise.write(place, "", training={"gradient_accumulation_steps": 1, "save_total_limit": None})
    assert finished(by_torchrun(quick, file)).log.count("going back to") == 1
    folder = place / "run"
    (incident,), step = lines(folder / "incidents.jsonl"), spike(whole)
    assert (incident["step"], incident["action"]) == (step, "rollback")
    assert (folder / "ledger.json").read_bytes() == (whole.folder / "ledger.json").read_bytes()

    first = tmp_path / "first"
    shutil.copytree(folder, first)
    shutil.rmtree(folder / "final")
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) >= step:
            shutil.rmtree(path)
    finished(by_torchrun(quick, file, "--resume"))
    ends = (f"checkpoint-{noise.planted.steps}/*.safetensors", "final/*.safetensors", "incidents.jsonl", "ledger.json")
    for path in (path for names in ends for path in first.glob(names)):
        assert path.read_bytes() == (folder / path.relative_to(first)).read_bytes(), path


@pytest.mark.parametrize("stage", ["list", "back", "retraining", "passed over", "anywhere"])
def test_a_kill_at_any_time_ends_in_the_same_bits(
    stage: str, whole: Run, noise: Noise, quick: ForkServer, tmp_path: Path
) -> None:
    step = spike(whole)
    somewhere = random.SystemRandom().randrange(step - 10, step)
    run = Run(noise, tmp_path / "place", quick)  # pyright: ignore[reportArgumentType]
    command = run.go()
    reached = {
        "list": lambda: has_list(run),
        "back": lambda: has_list(run) and any("going back to" in line for line in command.lines()),
        "retraining": lambda: has_list(run) and step - 15 < last_step(run) < step,
        "passed over": lambda: has_list(run) and last_step(run) >= step,
        "anywhere": lambda: last_step(run) >= somewhere,
    }[stage]
    assert command.until(reached), command.text()
    command.kill()
    assert command.code == -9 and not (run.folder / "final").exists()
    if stage != "anywhere":
        assert has_list(run)
    run.finish()
    assert differences(whole.folder, run.folder) == []
    assert lines_lost_or_doubled(whole.folder, run.folder) == 0
