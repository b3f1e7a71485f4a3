"""One file of a checkpoint, by name: in a folder, in the hub's cache, or on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from steep.errors import UserError
from steep.foreign import reason

logger = logging.getLogger("steep")

# Models, by name and revision, of which the cache is taken as it is, and why the hub could not be asked: to find that
# out takes half a minute for each file.
_as_it_is: dict[tuple[str, str | None], BaseException] = {}


def find(
    name: str, file: str, *, revision: str | None = None, field: str = "model.name", download: bool = True
) -> Path | None:
    """Where `file` of the checkpoint `name` lies, downloaded if need be; None if the checkpoint has no such file.

    Where the hub is off (HF_HUB_OFFLINE), or `download` is False, the cache is all there is of a checkpoint. So it is,
    with a warning, where the hub does not answer and the cache has the model: a download leaves no word there on what
    the hub does not have.

    Args:
        name: folder or hub name.

    Raises:
        UserError: the hub does not answer and the cache does not have the model, or the hub does not give the file.
        OSError: it cannot be written into the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    only_cache = is_offline_mode() or not download or is_taken_as_it_is(name, revision)
    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=only_cache))
    except EntryNotFoundError as error:
        # A local one means that the hub could not be asked; that it once said no is kept in the cache.
        if only_cache or not isinstance(error, LocalEntryNotFoundError) or _hub_said_no(name, file, revision):
            return None
        cause = error.__cause__ or error
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise _unreachable(name, file, field, cause) from error
        logger.warning(
            "the hub (%s) cannot be asked for %s of %s (%s): of this model, what is in the local cache is all there is",
            constants.ENDPOINT, file, name, reason(cause),
        )  # fmt: skip
        _as_it_is[name, revision] = cause
        return None
    except HfHubHTTPError as error:
        if _hub_said_no(name, file, revision):
            return None
        raise UserError(
            field,
            f"the hub does not give {file} of {name}: {reason(error)}",
            "Check the name and your access to it (hf auth login), or give a local folder.",
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's
        raise _unreachable(name, file, field, error) from error


def is_taken_as_it_is(name: str, revision: str | None) -> bool:
    """Whether the hub could not be asked about this model, and its cache is all there is."""
    return (name, revision) in _as_it_is


def refuse_unasked(name: str, file: str, *, revision: str | None, field: str) -> None:
    """Say of a file that is needed and was not found where that leaves a doubt; the next time the hub is asked again.

    Raises:
        UserError: the hub could not be asked for it.
    """
    cause = _as_it_is.pop((name, revision), None)
    if cause is not None:
        raise _unreachable(name, file, field, cause) from cause


def _hub_said_no(name: str, file: str, revision: str | None) -> bool:
    return try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST


def _unreachable(name: str, file: str, field: str, error: BaseException) -> UserError:
    return UserError(
        field,
        f"the hub ({constants.ENDPOINT}) cannot be reached to look for {file} of {name}: {reason(error)}",
        "Check the network; or set HF_HUB_OFFLINE=1 to take what is in the local cache, or give a local folder.",
    )
