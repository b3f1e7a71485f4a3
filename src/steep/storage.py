"""Folders on disk that are either whole or not there, and the place of the cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAGING = ".writing-"
_RETIRED = ".retired-"


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write into; it becomes `folder` by one rename when the block ends without an error."""
    staging = folder.with_name(f"{_STAGING}{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # on a full disk its room is needed
        raise
    files = [path for path in staging.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(staging.stat().st_mode & 0o666)  # as the umask has it: safetensors writes for the owner alone
    for path in [*files, staging]:
        _sync(path)
    if folder.exists():
        retired = folder.with_name(f"{_RETIRED}{folder.name}")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        staging.rename(folder)
        shutil.rmtree(retired)
    else:
        staging.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where tokenised text and converted models are kept: ``$STEEP_CACHE``, or ``steep`` in the user's cache folder."""
    given = os.environ.get("STEEP_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "steep"
    return folder.expanduser()
