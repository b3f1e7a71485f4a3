"""Ledger and proof are summed up, and a fault in them is said."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from steep.report.accounts import accounts, ledger_line, not_trained, proof_groups, proof_line
from tests.report.runs import write_run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_run(tmp_path_factory.mktemp("run"))
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("ledger", "proof")}


def test_accounts_of_each_source_and_of_all(files: dict[str, Any]) -> None:
    *sources, total = accounts(files["ledger"], "documents")
    assert [account.name for account in sources] == ["korean.jsonl", "english.jsonl", "code.jsonl"]
    assert total.read == 6_000 == sum(total.parts.values())
    assert sources[0].parts == {
        "trained": 898,
        "skipped": 0,
        "not_reached": 60,
        "held_out": 10,
        "duplicates": 30,
        "too_short": 2,
    }
    assert sources[2].share("held_out") == 1.0


def test_a_ledger_that_adds_up(files: dict[str, Any]) -> None:
    assert ledger_line(files["ledger"]) == ("good", "All 7,404,000 tokens are accounted for.")
    assert ledger_line({})[0] == "open"


def test_a_lost_token_is_found_here_too(files: dict[str, Any]) -> None:
    ledger = copy.deepcopy(files["ledger"])
    ledger["sources"][1]["tokens"]["trained"] -= 1
    assert ledger["adds_up"] and ledger_line(ledger)[0] == "bad"
    assert [account.adds_up for account in accounts(ledger, "tokens")] == [True, False, True, False]


def test_what_the_ledger_itself_found_is_kept(files: dict[str, Any]) -> None:
    assert ledger_line(files["ledger"] | {"adds_up": False})[0] == "bad"


def test_the_proof_by_group(files: dict[str, Any]) -> None:
    groups = {group.name: group for group in proof_groups(files["proof"])}
    assert {name: (group.tensors, group.trained) for name, group in groups.items()} == {
        "adapters a": (56, 56),
        "adapters b": (56, 56),
        "embeddings": (2, 2),
    }
    assert (groups["embeddings"].learning_rate, groups["embeddings"].updates) == (5e-6, (60, 60))
    assert proof_line(files["proof"]) == ("good", "All 114 tensors trained; 291 frozen ones are unchanged.")


def test_a_tensor_that_did_not_train(files: dict[str, Any]) -> None:
    proof = copy.deepcopy(files["proof"])
    proof["trained"]["model.lm_head.weight"] |= {"trained": False, "changed_share": 0.0}
    assert proof_line(proof) == ("bad", "1 of 114 tensors that are meant to train did not.")
    assert not_trained(proof) == ["model.lm_head.weight"]
    assert [(group.trained, group.changed[0]) for group in proof_groups(proof)][-1] == (1, 0.0)


def test_a_frozen_tensor_that_changed(files: dict[str, Any]) -> None:
    assert proof_line(files["proof"] | {"frozen_changed": ["a"]}) == ("bad", "1 of 291 frozen tensors changed.")


def test_a_proof_that_is_not_there_yet(files: dict[str, Any]) -> None:
    assert proof_line({})[0] == "open"
    assert proof_line(files["proof"] | {"complete": False})[0] == "open"
