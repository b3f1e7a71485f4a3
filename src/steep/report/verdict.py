"""What a run learned and what it forgot: its held-out scores against those of the base model, in words.

A trained domain should lose bits per byte; a replay or held-out domain should not gain any. The words follow the
sign of the difference as it is shown, with three decimals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steep.evaluation.score import scored_otherwise
from steep.report.read import Run

LEARNED_ROLES = ("train",)


@dataclass(frozen=True)
class Change:
    """One domain, first against newest measurement.

    Attributes:
        first, now: lines of `evaluation.jsonl`; the same one where there is only one.
        from_base: whether the first is the base model's (step 0).
    """

    domain: str
    role: str
    first: dict[str, Any]
    now: dict[str, Any]

    @property
    def from_base(self) -> bool:
        return self.first["step"] == 0

    @property
    def measured(self) -> bool:
        """Whether there is a second measurement."""
        return self.now["step"] != self.first["step"]

    @property
    def difference(self) -> float:
        """Bits per byte, newest minus first; NaN where one of them is not a number."""
        before, after = self.first["bits_per_byte"], self.now["bits_per_byte"]
        return math.nan if before is None or after is None else after - before

    @property
    def share(self) -> float:
        """The difference as a share of the first."""
        return self.difference / self.first["bits_per_byte"] if self.first["bits_per_byte"] else math.nan

    @property
    def learns(self) -> bool:
        """Whether it is text to learn, and not text to keep."""
        return self.role in LEARNED_ROLES

    @property
    def sign(self) -> str:
        """``better``, ``same``, ``worse``, or ``unknown``."""
        if not self.measured or math.isnan(self.difference):
            return "unknown"
        if abs(self.difference) < 0.0005:
            return "same"
        return "better" if self.difference < 0 else "worse"

    @property
    def word(self) -> str:
        """``learned``, ``forgotten`` and so on: the sign in the terms of the role."""
        if not self.measured:
            return "to be learned" if self.learns else "to be kept"
        learning = {"better": "learned", "same": "not learned", "worse": "got worse", "unknown": "not a number"}
        keeping = {"better": "kept, and better", "same": "kept", "worse": "forgotten", "unknown": "not a number"}
        return (learning if self.learns else keeping)[self.sign]

    @property
    def arrow(self) -> str:
        return {"better": "▼", "same": "=", "worse": "▲", "unknown": "?"}[self.sign]


def changes(run: Run) -> list[Change]:
    """The domains of a run: what it should learn first, then what it should keep."""
    found = [Change(domain, rows[-1].get("role", "heldout"), rows[0], rows[-1]) for domain, rows in run.domains.items()]
    return sorted(found, key=lambda change: not change.learns)


def headline(run: Run) -> str:
    """The verdict in one or two sentences."""
    if not run.begun:
        return "Waiting for the run to begin."
    found = changes(run)
    measured = [change for change in found if change.measured]
    if not found:
        if run.finished:
            return "Trained. Nothing was held out, so what it learned was not measured."
        return "Not measured yet."
    if not measured:
        if run.finished:
            return "Trained. The held-out text was scored only once, so there is nothing to compare."
        return "The base model is measured, the trained one not yet."
    learned = [change for change in measured if change.learns]
    kept = [change for change in measured if not change.learns]
    sentences = _sentences(learned, ("better", "Learned"), ("same", "Did not learn"), ("worse", "Got worse at"))
    if not kept:
        sentences.append("What it forgot was not measured.")
    elif all(change.sign in ("better", "same") for change in kept):
        sentences.append("Forgot nothing that was measured.")
    else:
        sentences += _sentences(kept, ("worse", "Forgot some of"))
    if any(change.sign == "unknown" for change in measured):
        sentences.append("Some scores are not a number.")
    if note := scored_otherwise(run.evaluation):
        sentences.append(note)
    text = " ".join(sentences)
    return text if run.finished else f"So far: {text[0].lower()}{text[1:]}"


def _sentences(found: Sequence[Change], *kinds: tuple[str, str]) -> list[str]:
    sentences = []
    for sign, verb in kinds:
        names = [change.domain for change in found if change.sign == sign]
        if len(names) > 3:
            sentences.append(f"{verb} {len(names)} of {len(found)} domains.")
        elif names:
            sentences.append(f"{verb} {' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}.")
    return sentences
