"""Ledger and proof in a few rows: where every document and token went, and which tensors trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

MOST_NAMES = 50  # names listed of what failed; the page says how many more there are
FATES = {
    "trained": "trained",
    "skipped": "skipped",
    "not_reached": "not reached",
    "held_out": "held out",
    "duplicates": "duplicates",
    "too_short": "too short",
}


@dataclass(frozen=True)
class Account:
    """Where the documents or tokens of one source, or of all, went.

    Attributes:
        parts: of each of `FATES`, how many.
    """

    name: str
    domain: str
    role: str
    read: int
    parts: dict[str, int]

    @property
    def adds_up(self) -> bool:
        return sum(self.parts.values()) == self.read

    def share(self, fate: str) -> float:
        return self.parts[fate] / self.read if self.read else 0.0


def accounts(ledger: Mapping[str, Any], unit: str) -> list[Account]:
    """One for each source, and one for all of them where there are several.

    Args:
        ledger: `ledger.json`.
        unit: "documents" or "tokens".
    """
    found = [
        Account(
            source.get("name", ""),
            source.get("domain", ""),
            source.get("role", ""),
            source[unit].get("read", 0),
            {fate: source[unit].get(fate, 0) for fate in FATES},
        )
        for source in ledger.get("sources", [])
    ]
    if len(found) > 1:
        parts = {fate: sum(account.parts[fate] for account in found) for fate in FATES}
        found.append(Account("all sources", "", "", sum(account.read for account in found), parts))
    return found


OUTCOMES = {
    "refused": "not applied",
    "ended": "the run ended",
    "warn": "applied",
    "recurs": "applied, as a kind of text",
    "leaner": "computed again with less kept",
    "skip": "not applied",
    "rollback": "gone back before, and passed over",
}


def incident_line(incident: Mapping[str, Any]) -> str:
    """What was out of the ordinary in a step, in words: a line of `incidents.jsonl`."""
    kind, median = incident["kind"], incident.get("median")
    value = incident["grad_norm" if "gradient" in kind else "loss"]
    if median is None or value is None:
        return kind
    return f"{kind}: {value:.4g} where {median:.4g} was usual"


def incident_texts(incident: Mapping[str, Any]) -> list[str]:
    """Where each row of a step comes from, and how its text begins."""
    firsts = [row["pieces"][0] for row in incident["rows"] if row["pieces"]]
    return [f"{first['source']}, document {first['document']}: {first['text'] or ''}" for first in firsts]


@dataclass(frozen=True)
class ProofGroup:
    """The trained tensors of one parameter group.

    Attributes:
        tensors, trained: how many are meant to train, and did.
        updates: fewest and most updates of a tensor.
        changed: least and median share of the watched elements that moved.
    """

    name: str
    tensors: int
    trained: int
    elements: int
    learning_rate: float
    updates: tuple[int, int]
    changed: tuple[float, float]


def proof_groups(proof: Mapping[str, Any]) -> list[ProofGroup]:
    """The records of `proof.json` by group."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in proof.get("trained", {}).values():
        groups.setdefault(record["group"], []).append(record)
    return [
        ProofGroup(
            name.replace("_", " "),
            len(records),
            sum(record["trained"] for record in records),
            sum(record["elements"] for record in records),
            max(record["learning_rate"] for record in records),
            (min(record["updates"] for record in records), max(record["updates"] for record in records)),
            (
                min(record["changed_share"] for record in records),
                median(record["changed_share"] for record in records),
            ),
        )
        for name, records in groups.items()
    ]


def not_trained(proof: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that did not train, or have not yet."""
    return [name for name, record in proof.get("trained", {}).items() if not record["trained"]]


def proof_line(proof: Mapping[str, Any]) -> tuple[str, str]:
    """``good``, ``bad`` or ``open``, and the proof in one sentence."""
    if not proof:
        return "open", "The proof is written at the end."
    records, failed, changed = proof["trained"], not_trained(proof), proof["frozen_changed"]
    if changed:
        return "bad", f"{len(changed):,} of {proof['frozen_tensors']:,} frozen tensors changed."
    if not proof["complete"]:
        moved = len(records) - len(failed)
        return "open", f"Too short to judge: {moved:,} of {len(records):,} tensors have moved."
    if failed:
        return "bad", f"{len(failed):,} of {len(records):,} tensors that are meant to train did not."
    return "good", f"All {len(records):,} tensors trained; {proof['frozen_tensors']:,} frozen ones are unchanged."


def ledger_line(ledger: Mapping[str, Any]) -> tuple[str, str]:
    """``good``, ``bad`` or ``open``, and the ledger in one sentence. The sums are added up here again."""
    if not ledger:
        return "open", "The ledger is written at each checkpoint and at the end."
    every = [account for unit in ("documents", "tokens") for account in accounts(ledger, unit)]
    if not ledger["adds_up"] or not all(account.adds_up for account in every):
        return "bad", "The ledger does not add up."
    tokens = accounts(ledger, "tokens")[-1]
    return "good", f"All {tokens.read:,} tokens are accounted for."
