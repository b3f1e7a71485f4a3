"""Which checkpoint a run goes on from, and which stay."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from steep.errors import UserError
from steep.manifest import Damaged, write_manifest
from steep.model.choices import Choices
from steep.training.checkpoint import (
    CHOICES_FILE,
    FORMAT,
    FORMAT_FILE,
    STATES,
    checkpoints,
    choose,
    format_text,
    given,
    inspect,
    newest_valid,
)
from steep.training.retention import Retention

NAMES = [
    "adapter_model.safetensors",
    "training_args.json",
    *(f"{n}.{e}" for n in STATES for e in ("json", "safetensors")),
]


def write(run_dir: Path, step: int, name: str | None = None) -> Path:
    """A folder that is a checkpoint by its manifest."""
    folder = run_dir / (name or f"checkpoint-{step}")
    folder.mkdir(parents=True)
    for file in NAMES:
        (folder / file).write_text(f"{file} of {step}")
    (folder / "training_args.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / FORMAT_FILE).write_text(format_text())
    (folder / CHOICES_FILE).write_text(json.dumps(asdict(Choices(False, "fp32"))))
    write_manifest(folder)
    return folder


def damage(folder: Path) -> None:
    (folder / "optimizer.safetensors").write_text("x")


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("trainer_state.json", "[]", "it is []"),
        ("trainer_state.json", '{"global_step": "3"}', "global_step is '3'"),
        ("trainer_state.json", '{"global_step": 3, "log_history": [5]}', "log_history[0] is 5"),
        ("training_args.json", '{"metric_for_best_model": 5}', "metric_for_best_model is 5"),
        ("training_args.json", "[" * 100_000, "nested too deeply"),
        ("choices.json", '{"fused": true}', "it has no trained_dtype"),
    ],
)
def test_a_file_of_another_shape_is_damage(name: str, content: str, says: str, tmp_path: Path) -> None:
    """Also where the manifest was written for it."""
    folder = write(tmp_path, 3)
    inspect(folder)
    (folder / name).write_text(content)
    write_manifest(folder)
    with pytest.raises(Damaged, match=rf"{name} cannot be read: .*{re.escape(says)}"):
        inspect(folder)


# --- the choice ------------------------------------------------------------------------------------------------


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    """By number: 100 is after 20."""
    for step in (5, 20, 100):
        write(tmp_path, step)
    assert newest_valid(tmp_path).checkpoint == inspect(tmp_path / "checkpoint-100")
    damage(tmp_path / "checkpoint-100")
    choice = newest_valid(tmp_path)
    assert choice.checkpoint is not None and choice.checkpoint.step == 20
    (passed_over,) = choice.passed_over
    assert passed_over[0].name == "checkpoint-100" and passed_over[1].startswith("optimizer.safetensors has 1 bytes")
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]  # nothing is deleted


def test_it_looks_no_further_than_it_is_told(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    choice = newest_valid(tmp_path, up_to=25)
    assert choice.checkpoint is not None and choice.checkpoint.step == 20 and not choice.passed_over


def test_what_bears_no_name_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    for name in (
        ".writing-host-1-0",
        "checkpoint-x",
        "checkpoint-07",
        "checkpoint-7.old",
        "checkpoint-",
        "checkpoint-٣",
    ):
        write(tmp_path, 7, name)
    assert checkpoints(tmp_path) == [] and choose(tmp_path) is None
    assert choose(tmp_path / "none") is None


def test_reasons_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "adapter_model.bin").write_text("x")
    write(tmp_path, 20).rename(tmp_path / "checkpoint-25")
    (write(tmp_path, 30) / "random.json").unlink()
    (tmp_path / "checkpoint-40").symlink_to(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-50").write_text("x")
    (tmp_path / "checkpoint-60").symlink_to("nowhere")
    (tmp_path / "checkpoint-70").mkdir()
    with caplog.at_level(logging.WARNING, "steep"):
        found = choose(tmp_path)
    assert found is not None and found.step == 10 and found.extra == ("adapter_model.bin",)
    assert [message.removeprefix(f"{tmp_path}/") for message in caplog.messages] == [
        "checkpoint-70 is passed over: it has no manifest.json. It is left as it is",
        "checkpoint-60 is passed over: it is a symbolic link. It is left as it is",
        "checkpoint-50 is passed over: it is no folder. It is left as it is",
        "checkpoint-40 is passed over: it is a symbolic link. It is left as it is",
        "checkpoint-30 is passed over: random.json is missing. It is left as it is",
        "checkpoint-25 is passed over: it holds step 20. It is left as it is",
        "checkpoint-10 holds 'adapter_model.bin', which was not saved with it; it is not read",
    ]


def test_a_run_does_not_begin_anew_because_all_are_damaged(tmp_path: Path) -> None:
    for step in (10, 20):
        damage(write(tmp_path, step))
    with pytest.raises(UserError, match=r"^--resume: no checkpoint of .* \(checkpoint-20: opti.*; checkpoint-10: opti"):
        choose(tmp_path)


@pytest.mark.parametrize("missing", [*NAMES, "trainer_state.json"])
def test_a_manifest_that_does_not_name_all_is_of_no_checkpoint(missing: str, tmp_path: Path) -> None:
    """The file is there, and would be read."""
    folder = write(tmp_path, 10)
    content = (folder / missing).read_bytes()
    (folder / missing).unlink()
    write_manifest(folder)
    (folder / missing).write_bytes(content)
    with pytest.raises(Damaged, match="it lacks"):
        inspect(folder)


@pytest.mark.parametrize(
    ("name", "number"),
    [("manifest.json", errno.EACCES), ("optimizer.safetensors", errno.EACCES), ("random.json", errno.EIO)],
)
def test_what_cannot_be_read_is_not_damaged(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: an older one would train for days what is done already."""
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    opened = Path.open

    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(number, os.strerror(number))  # the kernel names no file when it reads

    def refused(self: Path, *given: Any, **named: Any) -> Any:
        if self != folder / name:
            return opened(self, *given, **named)
        if number == errno.EIO:
            return Broken()
        raise PermissionError(number, os.strerror(number), str(self))  # root may read all

    monkeypatch.setattr(Path, "open", refused)
    told = (
        rf"{folder / name} cannot be read \({os.strerror(number)}\), so whether checkpoint-20 is whole is not known\. "
    )
    with pytest.raises(UserError, match=f"^--resume: {told}Mend its permissions or the disk"):
        choose(tmp_path)
    with pytest.raises(UserError, match=f"^--branch: {told}.* or move {folder} away"):
        given(folder, "--branch")
    with pytest.raises(OSError, match=os.strerror(number)):
        inspect(folder)
    Retention(tmp_path).apply(1, step=20, best=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]  # it does not push out a whole one, and stays


def test_a_path_that_was_given_is_verified_too(tmp_path: Path) -> None:
    folder = shutil.copytree(write(tmp_path, 10), tmp_path / "a-copy")
    assert given(folder, "resume_from_checkpoint").step == 10
    damage(folder)
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: .*a-copy is no whole checkpoint: optimizer"):
        given(folder, "resume_from_checkpoint")


OTHERS: list[tuple[str | None, str]] = [
    (None, r"was written by an older steep \(format 0\), and this is steep 0\.\d.*, which reads format \d+\. Go on"),
    ('{"format": 99, "steep": "9.0.1"}', r"was written by steep 9\.0\.1 \(format 99\), and this is steep 0"),
]


def written_by_another(folder: Path, text: str | None) -> None:
    """Make a checkpoint one of another version's, which is as whole."""
    (folder / FORMAT_FILE).unlink()
    if text is not None:
        (folder / FORMAT_FILE).write_text(text)
    write_manifest(folder)


@pytest.mark.parametrize(("text", "problem"), OTHERS)
def test_another_format_is_refused_and_not_passed_over(text: str | None, problem: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    assert inspect(folder).format == FORMAT
    written_by_another(folder, text)
    with pytest.raises(UserError, match=rf"^--resume: .*checkpoint-20 {problem}"):
        choose(tmp_path)
    with pytest.raises(UserError, match=rf"^--branch: .*checkpoint-20 {problem}"):
        given(folder, "--branch")
    assert newest_valid(tmp_path, up_to=10).checkpoint is not None


@pytest.mark.parametrize(
    ("text", "other"),
    [(format_text().replace(version("transformers"), "9.1"), "9.1"), (None, "another version, which environment.json")],
)
def test_a_field_of_another_transformers_is_refused_and_not_passed_over(
    text: str | None, other: str, tmp_path: Path
) -> None:
    """An older checkpoint would be hours back; it is whole all the same, and retention counts it."""
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    state = {"global_step": 20, "of_another_version": 1}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    written_by_another(folder, text or json.dumps({"format": FORMAT, "steep": "0.1"}))
    told = rf"checkpoint-20 was written under transformers {other}.*; here is .* know of_another_version"
    with pytest.raises(UserError, match=rf"^--resume: .*{told}.*\. Go on with the version"):
        choose(tmp_path)
    with pytest.raises(UserError, match=rf"^--branch: .*{told}"):
        given(folder, "--branch")
    Retention(tmp_path).apply(1, step=20, best=None)
    assert names(tmp_path) == ["checkpoint-20"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "x", "steep": "1"}', '{"format": 1}'])
def test_a_format_that_says_nothing_is_damage(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    written_by_another(folder, text)
    with pytest.raises(Damaged, match=r"format\.json cannot be read"):
        inspect(folder)


# --- retention -------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    Retention(tmp_path).apply(2, step=50, best=20)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-40", "checkpoint-50"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_best_may_be_among_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    Retention(tmp_path).apply(2, step=30, best=30)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]
    Retention(tmp_path).apply(None, step=30, best=None)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """A run went on from 20 since 30 and 40 are damaged. 30 was saved anew; with one to keep, it is not the 40."""
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-40")
    retention = Retention(tmp_path)
    retention.saved(tmp_path / "checkpoint-30")
    retention.apply(1, step=30, best=None)
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-40"]
    write(tmp_path, 45)
    retention.apply(2, step=45, best=None)  # it never came by 40: two whole ones stay all the same
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-40", "checkpoint-45"]


def test_a_damaged_one_is_left_to_its_owner(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-10")
    Retention(tmp_path).apply(1, step=30, best=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30"]


def test_later_ones_of_a_run_that_went_back_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    Retention(tmp_path).apply(1, step=20, best=None)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]


def test_each_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes, after each save."""
    write(tmp_path, 10)
    damage(write(tmp_path, 20))
    retention = Retention(tmp_path)
    retention.apply(5, step=20, best=None)
    os.truncate(tmp_path / "checkpoint-10" / "optimizer.safetensors", 0)
    retention.apply(1, step=20, best=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]
