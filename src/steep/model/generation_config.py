"""generation_config.json of a base: transformers passes over one that it cannot read, and its end tokens are lost."""

from __future__ import annotations

import json

from transformers import GenerationConfig

from steep.errors import UserError, shown
from steep.foreign import fault_of_json, told_as_input
from steep.model.look_up import find

FILE = "generation_config.json"
_REMEDY = "Put it back, or delete it: what it says of sampling is not used."


def check_generation_config(name: str, revision: str | None, field: str) -> None:
    """Check the file, where a folder or the hub's cache has one.

    Raises:
        UserError: it cannot be read, or its end token is none.
    """
    file = find(name, FILE, revision=revision, field=field, download=False)
    if file is None:
        return
    if fault := fault_of_json(file):
        raise UserError(field, f"{file} is damaged: {fault}", _REMEDY)
    with told_as_input(field, f"{file} cannot be read", _REMEDY):
        ends = GenerationConfig(**json.loads(file.read_bytes())).eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or abs(end) >= 2**31):
            raise UserError(field, f"{file} has eos_token_id {shown(ends)}, which is no number of a token", _REMEDY)
