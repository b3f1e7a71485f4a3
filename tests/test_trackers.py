"""Trackers that a run cannot report to are found before its model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from steep.config import load_config
from steep.errors import UserError
from steep.plan import plan_run
from steep.trackers import check_login
from steep.verify_resume import _shortened
from tests.bad_input.damage import make_scene


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody is logged in, and wandb has read nothing yet."""
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


@pytest.mark.parametrize("given", ["wandb", ["tensorboard", "wandb"]])
def test_wandb_without_a_key_is_refused(given: str | list[str]) -> None:
    with pytest.raises(UserError, match=r"training\.report_to: wandb has no key for [a-z.]+\. Log in with"):
        check_login(given)
    check_login(["tensorboard"])
    check_login("none")


def test_a_key_that_cannot_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"training\.report_to: wandb cannot log in: .*WANDB_API_KEY"):
        check_login("wandb")


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_MODE", "dryrun")],
)
def test_a_key_or_an_offline_mode_is_enough(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    check_login("wandb")


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_what_wandb_itself_has_written(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:8080")
    (home / name).write_text(f"machine localhost:8080\n  login user\n  password {'k' * 40}\n")
    (home / name).chmod(0o600)
    check_login("wandb")
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9090")
    with pytest.raises(UserError, match=r"no key for localhost:9090"):
        check_login("wandb")


def test_settings_of_the_folder_and_of_a_script(home: Path) -> None:
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_login("wandb")
    (home / "wandb" / "settings").unlink()
    wandb.teardown()
    wandb.setup(settings=wandb.Settings(mode="offline"))
    check_login("wandb")


def test_a_plan_says_so_and_a_finished_run_needs_none(home: Path, llama_folder: Path) -> None:
    scene = make_scene(home, llama_folder)
    scene.tree["training"]["report_to"] = "wandb"
    scene.finish()
    config = load_config(scene.file)
    with pytest.raises(UserError, match="wandb has no key"):
        plan_run(config)
    plan_run(config, to_train=False)
    assert _shortened(config, 4, quiet=True)[0].training.report_to == "none"  # verify-resume reports to nobody
