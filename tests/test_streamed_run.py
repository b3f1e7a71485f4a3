"""A run over a streamed data set: the same text when it goes on, though the data set has changed or is out of reach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import config

from steep import terminal
from steep.config import parse_config
from steep.data.token_file import Budget
from steep.errors import UserError
from steep.plan import plan_run
from steep.result import evaluate_run
from steep.run import train_run
from steep.schema import RunConfig
from tests.hub import NAME, Hub
from tests.tiny import documents


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "downloads")
    return Hub(tmp_path / "hub", monkeypatch)


def run_file(model: Path, folder: Path, **source: Any) -> RunConfig:
    sources = [{"hub": NAME, "stream": True, "max_tokens": 4_000, "domain": "ko", **source}]
    return parse_config(
        {
            "model": {"name": str(model), "base": "fp32"},
            "adapter": {"r": 8},
            "data": {"sources": sources, "max_length": 64, "holdout": 0.1, "cache_dir": str(folder / "cache")},
            "training": {
                "output_dir": str(folder / "run"),
                "max_steps": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2,
                "save_steps": 2,
            },
        }
    )


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": text} for text in documents("ko", count)]


def test_a_run_and_its_branch_go_on_with_the_commit_it_began_with(hub: Hub, llama_folder: Path, tmp_path: Path) -> None:
    began = hub.commit(rows(100))
    config = run_file(llama_folder, tmp_path)
    whole = train_run(config)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["sources"][0]["revision"] == began
    assert json.loads((tmp_path / "run" / "ledger.json").read_text())["sources"][0]["revision"] == began

    hub.commit(rows(60))  # the data set has other text now
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "final")
    resumed = train_run(config, resume=True)
    assert [score.loss for score in resumed["after"]] == [score.loss for score in whole["after"]]
    assert hub.opened == 1
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["sources"][0]["revision"] == began

    training = config.training.model_copy(update={"output_dir": str(tmp_path / "branch"), "max_steps": 1})
    train_run(config.model_copy(update={"training": training}), branch=tmp_path / "run" / "checkpoint-2")
    plan = json.loads((tmp_path / "branch" / "plan.json").read_text())
    assert plan["data"]["sources"][0]["revision"] == began

    hub.offline = True
    _, trained = evaluate_run(tmp_path / "run")
    assert [score.loss for score in trained] == [score.loss for score in whole["after"]]
    hub.offline = False
    assert plan_run(config).corpus.sources[0].source.revision == hub.head  # a new run takes what is there today


def test_another_budget_is_another_run(hub: Hub, llama_folder: Path, tmp_path: Path) -> None:
    hub.commit(rows(100))
    train_run(run_file(llama_folder, tmp_path))
    with pytest.raises(UserError, match=r"data\.sources\.0\.max_tokens: 4000 → 5000"):
        train_run(run_file(llama_folder, tmp_path, max_tokens=5_000), resume=True)


def test_a_stream_without_a_budget_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Stream needs max_tokens") as caught:
        run_file(llama_folder, tmp_path, max_tokens=None)
    assert caught.value.field == "data.sources[0]"


def test_progress_has_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal, "_PLAIN_SECONDS", -1)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.Terminal().tokenising() as progress:
        for second, documents_done, budget in (
            (10, 1, None),
            (20, 2, Budget(1_000, 100)),
            (40, 3, Budget(1_000, 300)),
            (50, 4, Budget(400, 100)),  # the next source
        ):
            clock[0] = second
            progress(documents_done, 10**6 * documents_done, budget)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tokenising: 1 documents, 1.0 MB, 0.1 MB/s",
        "tokenising: 2 documents, 2.0 MB, 0.1 MB/s, 100 of 1,000 tokens, about 90 s left",
        "tokenising: 3 documents, 3.0 MB, 0.1 MB/s, 300 of 1,000 tokens, about 70 s left",
        "tokenising: 4 documents, 4.0 MB, 0.1 MB/s, 100 of 400 tokens, about 30 s left",
    ]
