"""A small run with everything that it needs, and the ways in which its inputs come to harm."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig

from tests.tiny import documents


@dataclass
class Scene:
    """A folder with a model, a text and a run file, which a row of the table may spoil before the command runs.

    Attributes:
        tree: the run file, written by `finish`; a row may write `file` itself.
    """

    folder: Path
    model: Path
    text: Path
    tree: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def named(self, value: Any) -> Any:
        """`value`, with FOLDER in a text replaced by this one."""
        return value.replace("FOLDER", str(self.folder)) if isinstance(value, str) else value

    def finish(self) -> None:
        if not self.file.exists():
            self.file.write_text(yaml.safe_dump(self.tree, allow_unicode=True), encoding="utf-8")

    def contents(self) -> dict[str, str]:
        """Every path in the folder, with a digest of what it holds."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(self.folder.rglob("*"))
        }


Spoil = Callable[[Scene], object]


def make_scene(folder: Path, llama: Path) -> Scene:
    """Everything in order."""
    model, text = shutil.copytree(llama, folder / "model"), folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in documents("en", 40)), encoding="utf-8")
    tree = {
        "model": {"name": str(model), "base": "fp32"},
        "adapter": {"r": 8},
        "data": {"sources": [{"path": str(text)}], "max_length": 64, "holdout": 0.1},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
        },
    }
    return Scene(folder, model, text, tree)


# --- the run file ---------------------------------------------------------------------------------------------


def setting(path: str, given: Any) -> Spoil:
    """`path` in the run file, such as ``data.sources.0.weight``, gets `given`; FOLDER in it is the scene's."""

    def spoil(scene: Scene) -> None:
        value = scene.named(given)
        node: Any = scene.tree
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[last] = value

    return spoil


def raw_file(content: bytes | str) -> Spoil:
    """The run file is `content`, whatever that is."""

    def spoil(scene: Scene) -> None:
        scene.file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def replaced(old: str, new: str) -> Spoil:
    """The run file in order, with `old` replaced in its text; FOLDER in `new` is the scene's."""

    def spoil(scene: Scene) -> None:
        text = yaml.safe_dump(scene.tree)
        assert old in text, text
        scene.file.write_text(text.replace(old, new.replace("FOLDER", str(scene.folder))), encoding="utf-8")

    return spoil


# --- the text -------------------------------------------------------------------------------------------------


def text_file(content: bytes | str, name: str = "text.jsonl") -> Spoil:
    """The text is one file of that name."""

    def spoil(scene: Scene) -> None:
        scene.text.unlink()
        scene.text = scene.folder / name
        scene.text.write_bytes(content if isinstance(content, bytes) else content.encode())
        scene.tree["data"]["sources"][0]["path"] = str(scene.text)

    return spoil


def line(content: str) -> Spoil:
    """A line 41 behind 40 good ones."""

    def spoil(scene: Scene) -> None:
        with scene.text.open("a", encoding="utf-8") as stream:
            stream.write(content + "\n")

    return spoil


def sources(*given: Mapping[str, Any]) -> Spoil:
    """The run file has these sources; FOLDER in a path is the scene's. korean.jsonl is there
    too, the same as other/text.jsonl, and copy.jsonl, which is text.jsonl once more."""

    def spoil(scene: Scene) -> None:
        korean = "".join(json.dumps({"text": line}) + "\n" for line in documents("ko", 5))
        (scene.folder / "other").mkdir()
        for name in ("korean.jsonl", "other/text.jsonl"):
            (scene.folder / name).write_text(korean, encoding="utf-8")
        shutil.copy(scene.text, scene.folder / "copy.jsonl")
        scene.tree["data"]["sources"] = [
            {**source, "path": source["path"].replace("FOLDER", str(scene.folder))} for source in given
        ]

    return spoil


def text_folder(*names: str) -> Spoil:
    """The text is a folder with empty files of these names."""

    def spoil(scene: Scene) -> None:
        place = scene.folder / "texts"
        place.mkdir()
        for name in names:
            (place / name).touch()
        scene.tree["data"]["sources"][0]["path"] = str(place)

    return spoil


def flipped(content: bytes, *places: float) -> bytes:
    """`content` with bytes at these shares of its length turned round."""
    spoiled = bytearray(content)
    for place in places:
        spoiled[int(place * len(spoiled))] ^= 0xFF
    return bytes(spoiled)


# --- the model ------------------------------------------------------------------------------------------------


def config_json(**changes: Any) -> Spoil:
    """config.json with these fields; None takes one out."""

    def spoil(scene: Scene) -> None:
        file = scene.model / "config.json"
        tree = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return spoil


def json_file(name: str, **changes: Any) -> Spoil:
    """A JSON file of the model with these fields, which may be values deep within: ``model__type="x"``."""

    def spoil(scene: Scene) -> None:
        file = scene.model / name
        tree = json.loads(file.read_text())
        for path, value in changes.items():
            *parents, last = path.split("__")
            node = tree
            for part in parents:
                node = node[part]
            node[last] = value
        file.write_text(json.dumps(tree))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """model.safetensors after `change` of its tensors."""

    def spoil(scene: Scene) -> None:
        file = scene.model / "model.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file, metadata={"format": "pt"})

    return spoil


def model_file(name: str, content: bytes | Callable[[bytes], bytes] | None) -> Spoil:
    """A file of the model is `content`, what that makes of it, or gone (None)."""

    def spoil(scene: Scene) -> None:
        file = scene.model / name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content(file.read_bytes()) if callable(content) else content)

    return spoil


def sharded(weight_map: Any = None, *, index: str | None = None, whole: bool = False) -> Spoil:
    """The weights are two shards and an index, of which the second shard is missing unless they are `whole`."""

    def spoil(scene: Scene) -> None:
        file = scene.model / "model.safetensors"
        stored = load_file(file)
        file.unlink()
        names = sorted(stored)
        half = dict.fromkeys(names[:8], "model-00001-of-00002.safetensors")
        save_file({name: stored[name] for name in half}, scene.model / "model-00001-of-00002.safetensors")
        other = dict.fromkeys(names[8:], "model-00002-of-00002.safetensors")
        if whole:
            save_file({name: stored[name] for name in other}, scene.model / "model-00002-of-00002.safetensors")
        tree = json.dumps({"metadata": {}, "weight_map": {**half, **other} if weight_map is None else weight_map})
        (scene.model / "model.safetensors.index.json").write_text(tree if index is None else index)

    return spoil


def no_tokenizer(scene: Scene) -> None:
    for file in scene.model.glob("token*"):
        file.unlink()


def larger_tokenizer(scene: Scene) -> None:
    """50 tokens more than the embeddings have rows, the last one in the text."""
    tokenizer = AutoTokenizer.from_pretrained(scene.model)
    tokenizer.add_tokens([*(f"<{number}>" for number in range(49)), "river"])
    tokenizer.save_pretrained(scene.model)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda stored: stored.pop(name)


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """One value of a tensor."""
    return lambda stored: stored[name].view(-1)[7:8].fill_(value)


def model(path: str) -> Spoil:
    """The model's name; FOLDER is the scene's."""
    return setting("model.name", path)


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    """A tensor in another dtype."""
    return lambda stored: stored.update({name: stored[name].to(dtype)})


def encoder(scene: Scene) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(scene.folder / "bert")
    model("FOLDER/bert")(scene)


def adapter(scene: Scene) -> None:
    """An adapter of another model, with a config.json beside it: transformers alone would load that model."""
    (scene.model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/other", "peft_type": "LORA"}')


# --- places ---------------------------------------------------------------------------------------------------


def into(path: str) -> Spoil:
    """The output folder; FOLDER is the scene's."""
    return setting("training.output_dir", path)


def written(name: str, content: str) -> Spoil:
    """A file of that name is there."""
    return lambda scene: (scene.folder / name).write_text(content, encoding="utf-8")


def standing(*files: str) -> Spoil:
    """These empty files are there."""

    def spoil(scene: Scene) -> None:
        for name in files:
            file = scene.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    return spoil


def both(first: Spoil, then: Spoil) -> Spoil:
    def spoil(scene: Scene) -> None:
        first(scene)
        then(scene)

    return spoil
