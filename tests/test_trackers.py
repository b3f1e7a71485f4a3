"""Trackers that a run cannot report to are found before its model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from steep.config import load_config
from steep.errors import UserError
from steep.plan import plan_run
from steep.trackers import check_login
from tests.bad_input.damage import make_scene


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in."""
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["wandb", ["tensorboard", "wandb"]])
def test_wandb_without_a_key_is_refused(given: str | list[str]) -> None:
    with pytest.raises(UserError, match=r"training\.report_to: wandb has no key for api\.wandb\.ai\. Log in with"):
        check_login(given)
    check_login(["tensorboard"])
    check_login("none")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "k" * 40),
        ("WANDB_MODE", "offline"),
        ("WANDB_MODE", "disabled"),
        ("WANDB_DISABLED", "true"),
        ("WANDB_IDENTITY_TOKEN_FILE", "token"),
    ],
)
def test_a_key_or_an_offline_mode_is_enough(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    check_login("wandb")


def test_what_wandb_itself_has_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = home / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password k\n")
    netrc.chmod(0o600)
    check_login("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    with pytest.raises(UserError, match=r"no key for wandb\.example\.org"):
        check_login("wandb")
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_login("wandb")
    (home / "wandb" / "settings").write_text("mode = offline\n")
    with pytest.raises(UserError, match="the settings of wandb cannot be read"):
        check_login("wandb")


def test_a_plan_says_so_and_a_finished_run_needs_none(
    home: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steep.settings.check_trackers", lambda given: None)  # wandb need not be installed
    scene = make_scene(home, llama_folder)
    scene.tree["training"]["report_to"] = "wandb"
    scene.finish()
    config = load_config(scene.file)
    with pytest.raises(UserError, match="wandb has no key"):
        plan_run(config)
    plan_run(config, to_train=False)
