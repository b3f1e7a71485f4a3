"""What users and hostile testers hand in. Each row: one line that names field, value and remedy, exit code 2, no
traceback, before the model is loaded; and everything on the disk is as it was."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from steep.config import load_config
from steep.data import readers
from steep.run import train_run
from tests.bad_input.damage import Scene, make_scene
from tests.bad_input.model import MODEL
from tests.bad_input.mutation import mutate
from tests.bad_input.places import PLACES
from tests.bad_input.run_file import RUN_FILE
from tests.bad_input.runs import RUNS, RunRow
from tests.bad_input.settings import SETTINGS
from tests.bad_input.table import Row
from tests.bad_input.text import A_TEXT_MANY_TIMES, TEXT
from tests.command_line import Steep, assert_one_error_line

ROWS = [*RUN_FILE, *SETTINGS, *TEXT, *MODEL, *PLACES]


def refuse_to_load(*given: object, **settings: object) -> None:
    raise AssertionError("the model is loaded")


@pytest.fixture
def scene(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A run in order, whose model must not be loaded."""
    folder = tmp_path / "scene"
    folder.mkdir()
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "cache"))

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse_to_load)
    return make_scene(folder, llama_folder)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_wrong_input_is_one_line(row: Row, scene: Scene, steep: Steep) -> None:
    def here(word: str) -> str:
        return word.replace("FOLDER", str(scene.folder))

    row.spoil(scene)
    scene.finish()
    before = scene.contents()
    words = [here(word) for word in row.words]
    if words[:1] != [here("FOLDER/none.yaml")]:
        words.insert(0, str(scene.file))
    for command in dict.fromkeys((row.command, "train")):  # what plan finds, train finds too, and as early
        assert_one_error_line(steep(command, *words), f"error: {here(row.field)}: ", *map(here, row.says))
        assert scene.contents() == before
    cache = scene.folder.parent / "cache"
    assert [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".arrow"] == []


def test_a_text_many_times_is_a_bomb(scene: Scene, steep: Steep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which none of its pages is. Of any file 64 MiB are read, whose tokens would take long, so that the limit
    is lower here; other rows meet it itself."""
    monkeypatch.setattr(readers, "_ALWAYS_UNPACKED", 4 * 2**20)
    test_a_wrong_input_is_one_line(A_TEXT_MANY_TIMES, scene, steep)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Scene:
    """A run that went well. Not to be written to."""
    scene = make_scene(tmp_path_factory.mktemp("finished"), llama_folder)
    scene.finish()
    train_run(load_config(scene.file))
    return scene


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.name)
def test_a_finished_run_asked_for_what_it_cannot_give(
    row: RunRow, finished: Scene, steep: Steep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row.words.startswith("train"):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse_to_load)
    run, file = shutil.copytree(finished.run, tmp_path / "run"), tmp_path / "file.yaml"
    tree = {**finished.tree, "training": {**finished.tree["training"], "output_dir": str(run)}}
    for place in (file, run / "run.yaml"):
        place.write_text(yaml.safe_dump(tree), encoding="utf-8")
    row.spoil(run)
    scene = Scene(tmp_path, finished.model, finished.text)
    before = scene.contents()
    places = {"RUN": str(run), "FILE": str(file), "FOLDER": str(tmp_path)}
    words = [re.sub("RUN|FILE|FOLDER", lambda found: places[found[0]], word) for word in row.words.split(" ")]
    assert_one_error_line(steep(*words), f"error: {row.field}: ", *row.says)
    assert scene.contents() == before


@pytest.mark.parametrize("command", ["report RUN", "train FILE --resume", "eval RUN"])
def test_a_run_folder_with_any_damage_is_read_or_refused(
    command: str, finished: Scene, steep: Steep, tmp_path: Path
) -> None:
    """A file of it cut off, changed, gone, or with a value of another kind in any place: never a bug or a traceback."""
    chance, codes = random.Random(command), []
    for number in range({"report": 20, "train": 8, "eval": 4}[command.split(" ")[0]]):
        run, file = shutil.copytree(finished.run, tmp_path / str(number)), tmp_path / f"{number}.yaml"
        tree = {**finished.tree, "training": {**finished.tree["training"], "output_dir": str(run)}}
        for place in (file, run / "run.yaml"):
            place.write_text(yaml.safe_dump(tree), encoding="utf-8")
        more_files(run)
        harm = mutate(run, chance)
        said = steep(*command.replace("RUN", str(run)).replace("FILE", str(file)).split(" "))
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert said.code in (0, 1, 2) and len(errors) == bool(said.code), f"{number}: {harm}: {said.err}"
        assert "Traceback" not in said.err
        codes.append(said.code)
    assert 0 in codes and (2 in codes or command == "eval RUN")  # which reads few of the files


def more_files(run: Path) -> None:
    """What only some runs have."""
    incident = {"step": 1, "kind": "spike in loss", "action": "skip", "loss": 9.0, "grad_norm": 1.0, "median": 2.0}
    piece = {"source": "a", "domain": "a", "role": "train", "document": 1, "first_token": 0, "tokens": 5, "text": "b"}
    lines = {
        "incidents.jsonl": {**incident, "z": 9.0, "rows": [{"row": 1, "pieces": [piece]}]},
        "changes.jsonl": {"step": 1, "field": "training.weight_decay", "old": 0.0, "new": 0.1},
        "samples.jsonl": {"step": 0, "prompt": "the river", "completion": " runs"},
    }
    for name, line in lines.items():
        (run / name).write_text(json.dumps(line) + "\n", encoding="utf-8")


def test_the_table_is_long_enough() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60
