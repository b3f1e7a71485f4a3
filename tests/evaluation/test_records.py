from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from steep.evaluation.records import append_scores
from steep.evaluation.score import DomainScore


def test_a_line_a_score_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    scores = [
        DomainScore.from_nats(30.0, step=3, domain="한국어", tokens=10, num_bytes=20, documents=2),
        DomainScore.from_nats(math.nan, step=3, domain="en", tokens=10, num_bytes=20, documents=2),
    ]
    roles = {"한국어": "train", "en": "heldout"}
    append_scores(path, scores, roles, "base")
    append_scores(path, scores[:1], roles, "trained")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(record["domain"], record["model"]) for record in records] == [
        ("한국어", "base"),
        ("en", "base"),
        ("한국어", "trained"),
    ]
    assert "한국어" in lines[0]
    assert records[0] == {
        "step": 3,
        "domain": "한국어",
        "role": "train",
        "loss": 3.0,
        "perplexity": math.exp(3.0),
        "bits_per_byte": 30 / math.log(2) / 20,
        "tokens": 10,
        "bytes": 20,
        "documents": 2,
        "model": "base",
    }
    assert records[1]["loss"] is records[1]["perplexity"] is records[1]["bits_per_byte"] is None


def test_perplexity_may_overflow() -> None:
    score = DomainScore.from_nats(8000.0, step=0, domain="d", tokens=10, num_bytes=1, documents=1)
    assert score.perplexity == math.inf
    assert score.as_dict()["perplexity"] is None
    assert score.as_dict()["loss"] == 800.0


def test_a_domain_needs_a_role(tmp_path: Path) -> None:
    score = DomainScore.from_nats(1.0, step=0, domain="d", tokens=1, num_bytes=1, documents=1)
    with pytest.raises(KeyError):
        append_scores(tmp_path / "evaluation.jsonl", [score], {}, "base")
    assert not (tmp_path / "evaluation.jsonl").exists()
