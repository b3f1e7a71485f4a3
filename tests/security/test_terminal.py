"""What a terminal shows of names and texts of others: never an escape sequence, a markup of rich, or a secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steep import cli
from steep.data.sources import Source
from steep.errors import UserError, one_line, without_controls
from steep.evaluation.board import board, gate_table
from steep.evaluation.score import DomainScore
from steep.plan import plan_run
from steep.terminal import Terminal, plan_tables
from tests.command_line import Steep
from tests.test_run import run_file

EVIL = "\x1b]0;title\x07\x1b[2J[red]\u202e\x9b31m\r"


def assert_harmless(said: str) -> None:
    assert not set(said) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}, repr(said)


def test_the_name_of_a_file_in_an_error(steep: Steep, tmp_path: Path) -> None:
    file = tmp_path / f"ko{EVIL}.yaml"
    said = steep("plan", file)
    assert said.code == 2 and r"\x1b]0;title\x07\x1b[2J[red]" in said.err
    assert_harmless(said.err)
    file.write_text(f"{EVIL.encode('unicode_escape').decode()}: 1\nmodel: {{name: x}}\n", encoding="utf-8")
    assert_harmless(steep("plan", file, "--debug").err)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_error_does_not_say_a_secret(
    debug: list[str], steep: Steep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, password = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH", "password1"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")

    def refused(*_: Any, **__: Any) -> None:
        try:
            raise OSError(f"401 for https://ada:{password}@proxy/x with {secret}")
        except OSError as error:
            key = os.environ["WANDB_API_KEY"]
            raise UserError("model.name", f"{error} {key}", f"Log in.{EVIL}") from error

    monkeypatch.setattr("steep.config.load_config", refused)
    said = steep("plan", tmp_path / "ko.yaml", *debug)
    assert said.code == 2 and "401 for https://***@proxy/x with *** ***. Log in." in said.err
    assert ("Traceback" in said.err) is bool(debug)
    assert_harmless(said.err)
    for part in (secret, password, "0123456789abcdef"):
        assert part not in said.err


def shown(*tables: Any) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def test_names_in_tables(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    name = f"[/nothing]{EVIL}"  # markup that rich would stumble over
    source = Source(path=str(korean_corpus), domain=name).model_dump()
    plan = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", data={"sources": [source]})).as_dict()
    text = shown(*plan_tables(plan | {"model": name}))
    score = DomainScore(0, name, 1.0, 2.7, 1.0, 10, 20, 1)
    text += shown(board([score], [score], {name: "train"}, title=name), gate_table([score], {"original": [score]}))
    assert text.count(r"[/nothing]\x1b]0;title\x07") == 5
    assert_harmless(text)


def test_notes_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.say(EVIL)
    terminal.warn(EVIL)
    said = capsys.readouterr().err
    assert said.count(r"\x1b]0;title\x07") == 2
    assert_harmless(said)


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_what_a_model_writes(
    on_a_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A terminal gets its control characters escaped, a pipe the text as it is."""
    monkeypatch.setattr(
        "steep.result.generate_run", lambda run, prompt, *, stream, **_: stream("base", f"한국어\n\t{EVIL}")
    )
    monkeypatch.setattr(sys, "argv", ["steep", "generate", str(tmp_path), "the river"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_a_terminal)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert "the river한국어\n\t" in said and (EVIL in said) is not on_a_terminal
    if on_a_terminal:
        assert_harmless(said.replace("\u202e", ""))


def test_control_characters_are_escaped_and_nothing_else() -> None:
    assert one_line("a\nb\ud800 한국어\u202e") == r"a\nb\ud800 한국어\u202e"
    persian = "می\u200cخواهم\n\tx"  # holds a joiner that is no control character
    assert without_controls(persian) == persian and without_controls("\x1b[2J\ud800\r") == r"\x1b[2J\ud800\r"
