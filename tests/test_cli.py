"""The command line as a user meets it: one error line and a code, no traceback, and plain text in a pipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from steep.allocator import let_segments_grow
from tests.command_line import Steep, assert_one_error_line
from tests.faults.command import ForkServer
from tests.report.runs import write_run as write_report_run
from tests.tiny import documents


def write_run(folder: Path, model: Path, corpus: Path) -> Path:
    tree = {
        "model": {"name": str(model), "base": "fp32"},
        "adapter": {"r": 8},
        "data": {"sources": [{"path": str(corpus)}], "max_length": 64, "holdout": 0.1},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "save_steps": 2,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


@pytest.fixture
def run_file(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path, llama_folder, korean_corpus)


def test_help_is_quick() -> None:
    """By what it loads: how long that takes depends on what else the machine does."""

    def loaded(first: str) -> list[str]:
        code = (
            f"{first}\nimport sys; from steep import cli; sys.argv = ['steep', '--help']\n"
            "try: cli.main()\nexcept SystemExit: pass\nprint(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for command in ("init", "plan", "train", "eval", "generate", "report", "doctor"):
            assert re.search(rf"\b{command}\b", done.stdout)
        return done.stdout.splitlines()[-1].split(" ")

    slow, modules = {"torch", "transformers", "numpy", "peft", "pydantic", "yaml"}, loaded("")
    assert slow.isdisjoint(modules) and len(modules) < 500
    assert not slow.isdisjoint(loaded("import numpy"))  # so it would be seen


def test_words_that_a_command_does_not_have(steep: Steep, tmp_path: Path) -> None:
    for words, says in (
        (["report", "RUN", "--wach"], ("error: steep report: ", "--wach", "See steep report --help.")),
        (["train"], ("error: steep train: ", "FILE", "See steep train --help.")),
        (["verify-resume", "a.yaml", "--steps", "x"], ("error: steep verify-resume: ", "--steps", "integer")),
        (["verify-resume", "a.yaml", "--steps", "1"], ("error: steep verify-resume: ", "--steps", "4")),
        (["tarin", "a.yaml"], ("error: steep: ", "tarin", "See steep --help.")),
        (["--nothing"], ("error: steep: ", "--nothing")),
    ):
        assert_one_error_line(steep(*words), *says)
    said = steep()
    assert said.code == 2 and "verify-resume" in said.out


def test_debug_is_an_option_and_behind_two_dashes_a_word(
    steep: Steep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("steep.result.generate_run", lambda run, prompt, **settings: asked.append(prompt))
    assert steep("generate", tmp_path, "--", "--debug").code == 0 and asked == ["--debug"]
    assert "Traceback" not in steep("eval", "--", tmp_path / "none").err
    for words in (["eval", "--debug", tmp_path / "none"], ["--debug", "eval", tmp_path / "none"]):
        said = steep(*words)
        assert said.code == 2 and "Traceback" in said.err and said.err.splitlines()[-1].startswith("error: run folder")


def test_init_writes_a_file_that_plans(steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    file, replay = tmp_path / "my ko.yaml", shutil.copytree(korean_corpus, tmp_path / "english")
    said = steep("init", "--model", llama_folder, "--data", korean_corpus, "--replay", replay, "-o", file)
    assert said.code == 0, said
    assert f"wrote {file}" in said.out and f"next: steep plan '{file}'" in said.out
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert [source["role"] for source in tree["data"]["sources"]] == ["train", "replay"]
    planned = steep("plan", file, "--data.max_length", "64", "--training.output_dir", tmp_path / "run")
    assert planned.code == 0, planned
    assert not (tmp_path / "run").exists()
    before = file.read_bytes()
    assert_one_error_line(steep("init", "--model", "x", "--data", "y", "-o", file), "exists already")
    assert file.read_bytes() == before


def test_train_eval_and_generate(steep: Steep, run_file: Path) -> None:
    said = steep("train", run_file)
    assert said.code == 0, said
    run = run_file.parent / "run"
    assert f"result: {run / 'final'}" in " ".join((said.out + said.err).split())
    scored = steep("eval", run)
    assert scored.code == 0, scored
    assert "corpus" in scored.out
    said = steep("generate", run, "the river", "--max-new-tokens", 4)
    assert said.code == 0, said
    assert said.out.count("the river") == 2
    assert "--- base" in said.out and "--- trained" in said.out
    assert_one_error_line(steep("train", run_file), "training.output_dir", "holds another run")
    resumed = steep("train", run_file, "--resume")
    assert resumed.code == 0, resumed


def test_an_override_reaches_the_run(steep: Steep, run_file: Path) -> None:
    said = steep("train", run_file, "--training.max_steps", 3, "--adapter.r=4")
    assert said.code == 0, said
    saved = yaml.safe_load((run_file.parent / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert (saved["training"]["max_steps"], saved["adapter"]["r"]) == (3, 4)


def test_what_is_no_terminal_gets_plain_text(
    run_file: Path, quick: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    command = quick(["train", str(run_file)], run_file.parent, {})
    assert command.wait() == 0, command.text()
    for stream in (command.out.read_bytes(), command.err.read_bytes()):
        assert stream and b"\x1b" not in stream and b"\r" not in stream
    assert "Traceback" not in command.log


def test_a_run_that_stops_has_code_1(steep: Steep, llama_folder: Path, tmp_path: Path) -> None:
    """At a rate beyond all bounds the loss is not finite."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("en", 60)), encoding="utf-8")
    file = write_run(tmp_path, llama_folder, corpus)
    said = steep("train", file, "--training.learning_rate", "1e30", "--training.max_steps", "9")
    assert said.code == 1, said
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "not finite in 3 steps in a row" in errors[0]
    assert "Traceback" not in said.err


def test_the_version(steep: Steep) -> None:
    assert steep("--version").out == f"steep {version('steep')}\n"


def test_init_looks_for_the_text(steep: Steep, tmp_path: Path) -> None:
    said = steep("init", "--model", "m", "--data", tmp_path / "nope", "-o", tmp_path / "x.yaml")
    assert_one_error_line(said, "there is no '", "Check the spelling")
    assert not (tmp_path / "x.yaml").exists()


def test_damaged_files_are_named(steep: Steep, run_file: Path) -> None:
    assert steep("train", run_file).code == 0
    run = run_file.parent / "run"
    (run / "final" / "adapter_model.safetensors").write_bytes(b"12345678901234567890")
    assert_one_error_line(steep("eval", run), "final/adapter_model.safetensors is damaged")
    (run / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"12345678901234567890")
    shutil.rmtree(run / "final")
    said = steep("train", run_file, "--resume")
    assert said.code == 0, said
    assert "checkpoint-4 is passed over: optimizer.safetensors has 20 bytes" in said.err
    assert f"going on from {run / 'checkpoint-2'}" in said.err


def test_a_report(steep: Steep, tmp_path: Path) -> None:
    folder = write_report_run(tmp_path / "ko")
    said = steep("report", folder)
    assert (said.code, said.out) == (0, f"wrote {folder / 'report.html'}\n")
    assert (folder / "report.html").stat().st_size > 500_000
    assert_one_error_line(steep("report", tmp_path / "none"), "RUN: ", "holds no run", "runs/ko")
    assert_one_error_line(steep("report", folder, "--watch", "-o", "x.html"), "-o: ", "does not go with --watch")


@pytest.mark.parametrize(("name", "value"), [("PYTORCH_ALLOC_CONF", ""), ("PYTORCH_CUDA_ALLOC_CONF", "backend:native")])
def test_torchs_allocator_is_told_to_grow_unless_the_user_did(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    before = dict(os.environ)
    let_segments_grow()
    assert os.environ == before
    monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is put back
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
