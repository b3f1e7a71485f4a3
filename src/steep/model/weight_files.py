"""Which files hold the weights of a checkpoint: those that transformers would take, each of them there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from huggingface_hub import is_offline_mode

from steep.errors import UserError
from steep.model.look_up import find, refuse_unasked
from steep.model.safety import INDEX, SINGLE, shards_of

_REMEDY = "Give a folder with a whole checkpoint in safetensors (save_pretrained writes one)."


def weight_files(
    name: str, *, revision: str | None = None, field: str = "model.name", download: bool = True
) -> list[Path]:
    """The files with the weights of the model called `name`, in safetensors.

    Args:
        name: folder or hub name.
        download: whether those of a hub model may be downloaded. If not, and some are not in the cache: [].

    Raises:
        UserError: there are none, the index cannot be read, a shard that it names is missing, or the hub cannot be
            asked.
    """
    at = partial(find, name, revision=revision, field=field, download=download)
    if (single := at(SINGLE)) is not None:
        return [single]
    on_hub = not Path(name).is_dir()
    if (index := at(INDEX)) is not None:
        shards = {shard: at(shard) for shard in shards_of(index, field)}
        missing = [shard for shard, file in shards.items() if file is None]
        if missing and not (on_hub and not download):
            refuse_unasked(name, missing[0], revision=revision, field=field)
            raise UserError(field, f"{name} has no {missing[0]}, which its index names", _REMEDY)
        return [] if missing else [file for file in shards.values() if file is not None]
    if on_hub and not download:
        return []
    refuse_unasked(name, SINGLE, revision=revision, field=field)
    if on_hub and is_offline_mode():
        problem = f"the weights of {name} are not in the local cache, and the hub is off (HF_HUB_OFFLINE)"
        raise UserError(field, problem, "Unset HF_HUB_OFFLINE to download them.")
    raise UserError(field, f"{name} has no weights ({SINGLE})", _REMEDY)
