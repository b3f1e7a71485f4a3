"""Files and folders on disk that are either whole or not there, and the place of the cache."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


@contextmanager
def published(folder: Path, existing: Literal["replace", "keep", "refuse"] = "replace") -> Iterator[Path]:
    """Give a temporary folder to write into; it becomes `folder` by one rename when the block ends without an error.

    Args:
        existing: what becomes of a folder that stands there by then, perhaps since another process was quicker. In the
            cache both hold the same, so the first is kept.

    Raises:
        OSError: the disk is full; with ``refuse``, there is a folder with something in it.
    """
    remove_stale(folder.parent)
    staging = temporary_name(folder)
    staging.mkdir(parents=True)
    try:
        yield staging
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in files:
            path.chmod(staging.stat().st_mode & 0o666)  # as the umask has it: safetensors writes for the owner alone
        for path in [*files, staging]:
            _sync(path)
        if existing == "replace" and folder.exists():
            retired = temporary_name(folder)
            folder.rename(retired)
            staging.rename(folder)
            shutil.rmtree(retired)
        else:
            try:
                staging.rename(folder)
            except OSError:
                if existing == "refuse" or not folder.exists():
                    raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone if it was published; on a full disk its room is needed
    _sync(folder.parent)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes, and from which `remove_stale` knows its owner."""
    return path.with_name(f"{_prefix()}{os.getpid()}-{uuid.uuid4().hex[:16]}")


def remove_stale(folder: Path) -> None:
    """Delete what processes of this host left under a `temporary_name` when they were killed; those that still run are
    left alone."""
    for path in folder.glob(f"{glob.escape(_prefix())}*"):
        process = path.name.removeprefix(_prefix()).split("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _prefix() -> str:
    return f".writing-{socket.gethostname()}-"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        return True
    return True


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
