"""What pydantic finds wrong with a tree of plain values, in the words of a `UserError`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from steep.errors import UserError, did_you_mean, shown

FieldsAt = Callable[[Sequence[int | str]], Sequence[str]]


def explained(error: ValidationError, fields_at: FieldsAt, within: Sequence[int | str] = ()) -> UserError:
    """The first thing that is wrong, with the number of further ones.

    Args:
        fields_at: the fields that there are at a place in the tree that was validated.
        within: the place of that tree in the run file, for messages.
    """
    errors = error.errors()
    # A misspelt name first: it may be what another one is missing for.
    first = next((each for each in errors if _meant(each, fields_at)), errors[0])
    # Union members stand in the location too ("list[str]"): names of types, not of fields.
    location = [part for part in (*within, *first["loc"]) if isinstance(part, int) or part.isidentifier()]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    left = len(errors) - 1
    more = f" ({left} more {'problem' if left == 1 else 'problems'} after this one.)" if left else ""
    if first["type"] == "extra_forbidden":
        hint = _meant(first, fields_at) or f"Known here: {', '.join(fields_at(first['loc'][:-1]))}."
        return UserError(field, "it is not a field of the run file", hint + more)
    if first["type"] == "missing":
        return UserError(field, "it is missing", f"Add it to the run file.{more}")
    given, message = first.get("input"), first["msg"].removeprefix("Value error, ")
    remedy = _remedy(first)
    if remedy is None:  # the message is all there is to say
        return UserError(field, f"{shown(given)} is not valid", f"{message[0].upper()}{message[1:]}.{more}")
    return UserError(field, f"{shown(given)} is not valid", f"{remedy}{more}")


_REMEDIES = {
    "greater_than": "Give a number above {gt}.",
    "greater_than_equal": "Give {ge} or more.",
    "less_than": "Give a number below {lt}.",
    "less_than_equal": "Give {le} or less.",
    "literal_error": "Give one of {expected}.",
    "finite_number": "Give a finite number.",
    "too_short": "Give at least {min_length}.",
    "string_too_short": "Give a text.",
    "list_type": "Write a list: [{given}].",
    "model_type": "Write a section: its fields in lines of their own, indented.",
    "int_type": "Give a whole number.",
    "int_parsing": "Give a whole number.",
    "int_from_float": "Give a whole number.",
    "float_type": "Give a number.",
    "float_parsing": "Give a number.",
    "string_type": "Give a text.",
    "string_unicode": "Give a text in Unicode.",
    "bool_type": "Write true or false.",
    "bool_parsing": "Write true or false.",
}


def _remedy(error: Any) -> str | None:
    remedy = _REMEDIES.get(error["type"])
    given = error.get("input")
    return remedy and remedy.format(**error.get("ctx", {}), given=given if isinstance(given, str) else shown(given))


def _meant(error: Any, fields_at: FieldsAt) -> str:
    """Which field an unknown one was probably meant to be."""
    if error["type"] != "extra_forbidden":
        return ""
    *section, name = error["loc"]
    return did_you_mean(str(name), fields_at(section))
