"""One random harm to one file of a run folder: cut off, a byte turned round, or a value of another kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from steep.manifest import MANIFEST, write_manifest

_VALUES = (None, [], {}, "", -1, 1e30, "x", 0, True, [1], {"a": None}, 2**70)
_TAKEN_OUT = object()


def mutate(run: Path, chance: random.Random) -> str:
    """Harm one file of `run`, and say how. The manifest of a checkpoint is made to fit, most of the time: what it finds
    has tests of its own."""
    file = chance.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".md"))
    name, content = file.relative_to(run), file.read_bytes()
    kind = chance.choice(("value", "value", "value", "value", "cut", "flip", "delete"))
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: chance.randrange(len(content) + 1)])
    elif kind == "flip" or not (said := _other_value(file, chance)):
        kind, place = "flip", chance.randrange(max(1, len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
    else:
        kind = said
    checkpoint = next((parent for parent in file.parents if parent.name.startswith("checkpoint-")), None)
    if checkpoint is not None and file.name != MANIFEST and chance.random() < 0.9:
        write_manifest(checkpoint)
    return f"{name}: {kind}"


def _other_value(file: Path, chance: random.Random) -> str | None:
    """Put a value of another kind somewhere into the tree, the lines or the tensors of a file."""
    if file.suffix in (".json", ".yaml"):
        text = file.read_text(encoding="utf-8")
        tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        tree, said = _changed(tree, chance)
        file.write_text(json.dumps(tree) if file.suffix == ".json" else yaml.safe_dump(tree), encoding="utf-8")
        return said
    if file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8").splitlines()
        number = chance.randrange(len(lines))
        tree, said = _changed(json.loads(lines[number]), chance)
        lines[number] = json.dumps(tree)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"line {number + 1}{said}"
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except SafetensorError:
            return None
        if not tensors:
            return None
        name = chance.choice(sorted(tensors))
        how: dict[str, Callable[[Any], Any]] = {
            "one number less": lambda tensor: tensor.flatten()[:-1].clone(),
            "another shape": lambda tensor: tensor[None].clone(),
            "fp64": lambda tensor: tensor.double(),
            "bool": lambda tensor: tensor.bool(),
        }
        said = chance.choice([*how, "gone", "renamed"])
        tensor = tensors.pop(name)
        if said in how:
            tensors[name] = how[said](tensor)
        elif said == "renamed":
            tensors[f"{name}.x"] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        return f"{name} {said}"
    return None


def _changed(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """`tree` with one node replaced or taken out, and where. Every depth has its turn, however long the lists are."""
    path, above, node = [], None, tree
    while isinstance(node, dict | list) and node and chance.random() < 0.8:
        path.append(chance.choice(sorted(node)) if isinstance(node, dict) else chance.randrange(len(node)))
        above, node = node, node[path[-1]]
    value = chance.choice(_VALUES if above is None else (*_VALUES, _TAKEN_OUT))
    where = "".join(f"[{key!r}]" for key in path)
    if above is None:
        tree = value
    elif value is _TAKEN_OUT:
        del above[path[-1]]
        return tree, f"{where} taken out"
    else:
        above[path[-1]] = value
    return tree, f"{where} = {value!r}"
