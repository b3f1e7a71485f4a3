"""What a byte or a value out of place does to the files of a base: it is told as an error of the input, or it changes
nothing that is looked at. Drawn from a seed; a longer run of the same found what the table of wrong inputs holds."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steep.errors import UserError
from steep.model.empty import check_computes, empty_model
from steep.model.positions import positions
from steep.model.resolve import read_tokenizer, resolve
from steep.model.stored_weights import check_finite, check_stored
from tests.tiny import save_tiny

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
VALUES: list[Any] = [None, [], {}, "", -1, 0, 1e30, "x", "x" * 5000, True, 2**70, [None], {"type": "x"}]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) in a JSON tree, of long ones the first few."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree if isinstance(tree, dict) else range(len(tree)))[:40]
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def mutate(file: Path, chance: random.Random) -> str:
    """Change `file` in one way, and say which."""
    data = file.read_bytes()
    how = chance.choice(["value", "value", "cut", "flip"]) if file.suffix == ".json" else chance.choice(["cut", "flip"])
    if how == "value":
        tree = json.loads(data)
        holder, key = chance.choice(places(tree))
        holder[key] = value = chance.choice(VALUES)
        file.write_text(json.dumps(tree))
        return f"{file.name}: {key} is {str(value)[:20]!r}"
    place = chance.randrange(min(len(data), 3000))
    file.write_bytes(data[:place] if how == "cut" else data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    return f"{file.name}: {how} at {place}"


def look(folder: Path) -> str:
    try:
        resolved = resolve(str(folder))
        empty = empty_model(resolved)
        check_computes(empty)
        check_stored(resolved, empty)
        positions(resolved.config)
        read_tokenizer(resolved)
        check_finite(resolved)
    except UserError as error:
        assert str(folder) in str(error), error
        return "refused"
    return "read"


@pytest.mark.parametrize("name", FILES)
def test_a_change_is_told_or_harmless(name: str, tmp_path: Path) -> None:
    chance, base, seen = random.Random(name), save_tiny("llama", tmp_path / "base"), []
    for number in range(16):
        folder = Path(shutil.copytree(base, tmp_path / str(number)))
        what = mutate(folder / name, chance)
        try:
            seen.append(look(folder))
        except BaseException as error:  # a panic of tokenizers is no Exception
            raise AssertionError(what) from error
    assert "refused" in seen


def test_a_family_whose_layers_have_other_names_is_no_fault() -> None:
    """A cache would be made for num_hidden_layers, which BLT's config does not have; its layers are of three kinds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("blt"))
    check_computes(model)
