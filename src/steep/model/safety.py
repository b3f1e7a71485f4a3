"""What a base checkpoint may not hold, however it came here: code by another door than `trust_remote_code`, and names
that lead out of its folder. Found before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.errors import UserError

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
        if kernel and "/" in kernel:
            raise UserError(
                field,
                f"the config.json of {model.name} asks for the attention kernel {kernel}, which is code from the hub",
                "Remove attn_implementation from it.",
            )
    if model.file(_ADAPTER) is not None:
        raise UserError(
            field,
            f"{model.name} holds an adapter ({_ADAPTER}), which transformers would put on the model without a word",
            "Give the base model alone, or merge the adapter into it first.",
        )
    if "gguf_file" in model.arguments:
        return
    if other := getattr(model.config, "transformers_weights", None):
        problem = f"the config.json of {model.name} names {other} as its weights (transformers_weights)"
        raise UserError(field, problem, f"Give a checkpoint whose weights are in {SINGLE} or its shards.")
    folder = Path(model.name)
    if folder.is_dir() and not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        if any((folder / name).is_file() for name in _PICKLED):
            raise _pickled(model, field)
    elif (index := model.file(INDEX)) is not None:
        shards_of(index, field)


def check_weights_in_safetensors(model: ResolvedModel, field: str = "model.name") -> None:
    """The same for a model of the hub, whose weights are downloaded by this: for right before they are loaded. With
    `use_safetensors` alone transformers would ask the hub to convert the model, and wait for it.

    Raises:
        UserError: its weights are in pickle only.
    """
    if not Path(model.name).is_dir() and model.file(INDEX) is None and model.file(SINGLE) is None:
        raise _pickled(model, field)


def shards_of(index: Path, field: str) -> list[str]:
    """The names of the shards that an index lists.

    Raises:
        UserError: it cannot be read, or names what is no plain file name.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(field, f"{index} is damaged: {error!r}", "Download it again.") from error
    if outside:
        raise UserError(
            field, f"{index} names a shard outside of its folder, {outside[0]!r}", "Give a checkpoint that you trust."
        )
    return names


def refuse_link_outside(file: Path, folder: Path, field: str) -> None:
    """Check that a file of a local checkpoint lies in it: what is copied into an export must not come from elsewhere.

    The hub's cache is made of links from ``snapshots/COMMIT`` into ``blobs`` beside it, and is let pass.

    Raises:
        UserError: it is a link to somewhere else.
    """
    place, target = folder.resolve(), file.resolve()
    cache = place.parent.parent if place.parent.name == "snapshots" else place
    if not (target.is_relative_to(place) or target.is_relative_to(cache / "blobs")):
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
