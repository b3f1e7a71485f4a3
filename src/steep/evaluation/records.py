"""Scores as lines of `evaluation.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from steep.evaluation.score import DomainScore


def append_scores(
    path: str | os.PathLike[str],
    scores: Sequence[DomainScore],
    roles: Mapping[str, str],
    model: Literal["base", "trained"],
) -> None:
    """Append one JSON object a score and close the file, so that all are on their way to the disk on return.

    Keys: step, domain, role, loss, perplexity, bits_per_byte, tokens, bytes, documents, model. A loss that is not
    finite is null.

    Raises:
        KeyError: a domain without a role.
    """
    lines: list[str] = []
    for score in scores:
        values = score.as_dict()
        record = {"step": values.pop("step"), "domain": values.pop("domain"), "role": roles[score.domain]}
        lines.append(json.dumps({**record, **values, "model": model}, ensure_ascii=False, allow_nan=False) + "\n")
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(lines))
