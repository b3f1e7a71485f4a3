"""Tokens and passwords: a run file with one is refused, since it is copied into the run folder and shown in the report;
in what is printed they are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from steep.errors import UserError

# What is looked for, here and in docs/security.md. A name that only begins like one (sk-corpus-2024) is none.
_RANDOM = r"(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{20,}"  # a run of letters and digits, of both
_OF_BOTH_CASES = r"(?=[A-Za-z0-9]*[0-9])(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{20,}"  # no name of a file
_FORMS = re.compile(
    "|".join(
        (
            r"\bhf_[A-Za-z0-9]{20,}",  # the hub
            r"\bgh[oprsu]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
            r"\bglpat-[A-Za-z0-9_.-]{20,}",  # GitLab
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
            r"\bwandb_v1_[A-Za-z0-9_]{20,}",  # Weights & Biases; its older keys are plain hex, known by what is before
            r"(?i:\bwandb(?:_api_key\W{1,3}| login )[0-9a-f]{40}\b)",
            rf"\bsk-{_OF_BOTH_CASES}",  # OpenAI and others, and with a mark of the maker's:
            rf"\bsk-(?:proj|svcacct|admin|ant|or|lf)-(?:[A-Za-z0-9]{{1,19}}[-_]){{0,6}}{_RANDOM}[A-Za-z0-9_-]*",
            r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)",  # a password in an address
            rf"(?<=://){_RANDOM}(?=@)",  # a token in the place of the user
        )
    )
)
_VARIABLES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_SHORTEST = 16  # of a variable's value that is taken for a secret: shorter ones are parts of plain words
_HIDDEN = "***"


def hide(text: str) -> str:
    """`text` without what looks like a token or a password, and without the values of variables that hold one."""
    for value in _of_the_environment():
        text = text.replace(value, _HIDDEN)
    return _FORMS.sub(_HIDDEN, text)


def refuse_credentials(tree: Any) -> None:
    """Check every text in a tree of plain values, its keys too.

    Raises:
        UserError: one holds a token or a password; the message names the field and not the value.
    """
    waiting: list[tuple[str, Any]] = [("", tree)]
    seen: set[int] = set()  # aliases of YAML let a list stand in many places, and in itself
    while waiting:
        field, node = waiting.pop()
        if isinstance(node, str) and hide(node) != node:
            raise UserError(
                field,
                "it holds a token or a password, which would be read by whoever gets the run folder or its report",
                "Take it out: for the hub set HF_TOKEN or use hf auth login; trackers have variables of their own.",
            )
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Mapping):
            waiting += [(field or "run file", key) for key in node]
            waiting += [(f"{field}.{key}".lstrip("."), value) for key, value in node.items()]
        elif isinstance(node, list):
            waiting += [(f"{field}[{number}]", value) for number, value in enumerate(node)]


def _of_the_environment() -> list[str]:
    found = {value for name, value in os.environ.items() if _VARIABLES.search(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if not value.startswith("/")), key=len, reverse=True)
