"""A run over an fp8 base from its file to what is made of it, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steep.run import train_run
from tests.test_run import lines, run_file


def trained(model: Path, corpus: Path, folder: Path, *, fused: str = "off", **training: object) -> Path:
    settings = {"base": "fp8", "fused": fused}
    train_run(run_file(model, corpus, folder, model=settings, training=training))
    return folder


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(llama_folder, korean_corpus, tmp_path_factory.mktemp("fp8") / "run", fused="on")


def test_a_run_trains_and_proves_it(finished: Path) -> None:
    proof = json.loads((finished / "proof.json").read_text(encoding="utf-8"))
    assert proof["ok"] and not proof["frozen_changed"]
    # Codes and scales of seven layers in each of two, and the norms.
    assert proof["frozen_tensors"] >= 2 * 2 * 7 + 5
    losses = [row["loss"] for row in lines(finished / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    plan = json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    assert (plan["base"], plan["fused"]) == ("fp8", True)


def test_losses_are_those_of_the_librarys_forward(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 20, "save_steps": 20, "learning_rate": 1e-3}
    for fused in ("on", "off"):
        trained(llama_folder, korean_corpus, tmp_path / fused, fused=fused, **settings)
    ours, theirs = ([row["loss"] for row in lines(tmp_path / fused / "metrics.jsonl")] for fused in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=2e-5)
