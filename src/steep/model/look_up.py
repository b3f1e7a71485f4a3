"""One file of a checkpoint, by name: in a folder, in the hub's cache, or on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from steep.errors import UserError
from steep.foreign import reason


def find(
    name: str, file: str, *, revision: str | None = None, field: str = "model.name", download: bool = True
) -> Path | None:
    """Where `file` of the checkpoint `name` lies, downloaded if need be; None if the checkpoint has no such file.

    Where the hub is off (HF_HUB_OFFLINE), or `download` is False, the cache is all there is of a checkpoint.

    Args:
        name: folder or hub name.

    Raises:
        UserError: the hub does not answer and the cache does not know, or the hub does not give it.
        OSError: it cannot be written into the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    only_cache = is_offline_mode() or not download
    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=only_cache))
    except EntryNotFoundError as error:
        # A local one means that the hub could not be asked; that it once said no is kept in the cache.
        if only_cache or not isinstance(error, LocalEntryNotFoundError):
            return None
        if try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST:
            return None
        raise _unreachable(name, file, field, error.__cause__ or error) from error
    except HfHubHTTPError as error:
        raise UserError(
            field,
            f"the hub does not give {file} of {name}: {reason(error)}",
            "Check the name and your access to it (hf auth login), or give a local folder.",
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's
        raise _unreachable(name, file, field, error) from error


def _unreachable(name: str, file: str, field: str, error: BaseException) -> UserError:
    return UserError(
        field,
        f"the hub ({constants.ENDPOINT}) cannot be reached to look for {file} of {name}: {reason(error)}",
        "Check the network; or set HF_HUB_OFFLINE=1 to take what is in the local cache, or give a local folder.",
    )
