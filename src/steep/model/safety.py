"""What a base checkpoint may not hold, however it came here: code by another door than `trust_remote_code`, and names
that lead out of its folder. Found before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.errors import UserError
from steep.foreign import told_as_input
from steep.model.look_up import find, refuse_unasked

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from steep.model.resolve import ResolvedModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"
_CONVERSION = (
    "Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), and the "
    "tokenizer likewise."
)


def check_safe(model: ResolvedModel, field: str) -> None:
    """Check what transformers would take from the checkpoint beside its config and weights.

    Raises:
        UserError: an attention kernel of the hub, an adapter (PEFT imports a module that its config may name), weights
            in pickle only, weights under another name, or a shard outside of the folder.
    """
    for config in _all_configs(model.config):
        kernel = getattr(config, "_attn_implementation", None)
        if "/" in str(kernel):
            raise UserError(
                field,
                f"the config.json of {model.name} asks for the attention kernel {kernel}, which is code from the hub",
                "Remove attn_implementation from it.",
            )
    revision = model.arguments.get("revision")
    if find(model.name, _ADAPTER, revision=revision, field=field) is not None:
        raise UserError(
            field,
            f"{model.name} holds an adapter ({_ADAPTER}), which transformers would put on the model without a word",
            "Give the base model alone, or merge the adapter into it first.",
        )
    if "gguf_file" in model.arguments:
        return
    if (other := getattr(model.config, "transformers_weights", None)) is not None:
        problem = f"the config.json of {model.name} names {other} as its weights (transformers_weights)"
        raise UserError(field, problem, f"Give a checkpoint whose weights are in {SINGLE} or its shards.")
    folder = Path(model.name)
    if folder.is_dir() and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        if any((folder / name).is_file() for name in _PICKLED):
            raise _pickled(model, field)
    elif (index := find(model.name, INDEX, revision=revision, field=field)) is not None:
        shards_of(index, field)


def check_weights_in_safetensors(model: ResolvedModel, field: str = "model.name") -> None:
    """The same for a model of the hub, whose weights are downloaded by this: for right before they are loaded. With
    `use_safetensors` alone transformers would ask the hub to convert the model, and wait for it.

    Raises:
        UserError: its weights are in pickle only; or they are not in the cache, and the hub cannot be asked.
    """
    revision = model.arguments.get("revision")
    if all(find(model.name, name, revision=revision, field=field) is None for name in (INDEX, SINGLE)):
        refuse_unasked(model.name, SINGLE, revision=revision, field=field)
        raise _pickled(model, field)


def shards_of(index: Path, field: str) -> list[str]:
    """The names of the shards that an index lists.

    Raises:
        UserError: it cannot be read, or names what is no plain file name.
    """
    with told_as_input(field, f"{index} is damaged", "Download it again."):
        tree = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(tree["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
        if not names:
            raise ValueError("its weight_map is empty")
        if not isinstance(tree.get("metadata"), dict):
            raise ValueError("it has no metadata, which transformers asks for; {} is enough")
    if outside:
        raise UserError(
            field, f"{index} names a shard outside of its folder, {outside[0]!r}", "Give a checkpoint that you trust."
        )
    return names


def refuse_link_outside(file: Path, folder: Path, field: str) -> None:
    """Check that a file of a local checkpoint lies in it: what is copied into an export must not come from elsewhere.

    A whole checkpoint may be made of links into another folder, where both its config.json and its weights lie. In the
    hub's cache they go from ``snapshots/COMMIT`` into ``blobs``, also where a file of the snapshot was edited in place.

    Raises:
        UserError: it is a link to somewhere else.
    """
    place = folder.resolve()
    homes = {place}
    if place.parent.name == "snapshots":
        homes.add(place.parent.parent / "blobs")  # not resolved: a link under that name would lead anywhere
    elsewhere = (folder / "config.json").resolve().parent
    if any((folder / name).is_file() and (folder / name).resolve().parent == elsewhere for name in (INDEX, SINGLE)):
        homes.add(elsewhere)
    if (target := file.resolve()).parent not in homes:
        raise UserError(field, f"{file} is a link out of its folder, to {target}", "Put the file itself there.")


def _pickled(model: ResolvedModel, field: str) -> UserError:
    return UserError(
        field,
        f"{model.name} has no weights in safetensors ({SINGLE}); pickled ones (.bin) can hold code, and are not read",
        _CONVERSION,
    )


def _all_configs(config: PretrainedConfig) -> list[Any]:
    """A config and those inside it."""
    inner = [getattr(config, name, None) for name in (getattr(config, "sub_configs", None) or {})]
    return [config, *(each for each in inner if each is not None)]
