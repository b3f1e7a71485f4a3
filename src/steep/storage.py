"""Files and folders on disk that are either whole or not there, and the place of the cache.

The order is always: write, flush the files, flush their folders, rename, flush the folder of the new name. So neither a
kill nor a power cut at any moment leaves half of something under its name.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Existing = Literal["replace", "keep", "refuse"]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def published(folder: Path, existing: Existing = "replace") -> Iterator[Path]:
    """Give a temporary folder to write into; it becomes `folder` by one rename when the block ends without an error.

    Args:
        existing: what becomes of a folder that stands there by then, perhaps since another process was quicker. In the
            cache both hold the same, so the first is kept.

    Raises:
        OSError: the disk is full; with ``refuse``, there is a folder with something in it.
    """
    staging = stage(folder)
    try:
        with naming(folder):
            yield staging
            publish(staging, folder, existing)
    finally:
        discard(staging)


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Let an error of the disk name this place, where it names none, or a hidden one that is gone when it is read."""
    try:
        yield
    except shutil.Error as error:  # of copytree: all that failed, as text
        code = re.search(r"\[Errno (\d+)\]", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(place)) from error
    except OSError as error:
        if error.filename is None or any(map(_is_hidden, Path(os.fsdecode(error.filename)).parts)):
            error.filename = str(place)
        raise


def stage(folder: Path) -> Path:
    """A new hidden folder beside `folder`, for `publish` or `discard`; what killed processes left there is deleted."""
    make_folder(folder.parent)
    remove_stale(folder.parent)
    staging = temporary_name(folder)
    staging.mkdir()
    return staging


def publish(staging: Path, folder: Path, existing: Existing = "replace") -> None:
    """Give the staged folder its name, once all of it is on the disk."""
    flush(staging)
    give_name(staging, folder, existing)


def flush(staging: Path) -> None:
    """Wait until a staged folder is on the disk."""
    mode = staging.stat().st_mode & 0o666  # as the umask has it: safetensors writes for the owner alone
    for place, _, files in os.walk(staging, topdown=False):
        for name in files:
            Path(place, name).chmod(mode)
            sync(Path(place, name))
        sync(Path(place))


def give_name(staging: Path, folder: Path, existing: Existing = "replace") -> None:
    """The last step of `publish`, after `flush`."""
    if existing == "replace" and os.path.lexists(folder):
        _exchange(staging, folder)
    else:
        try:
            staging.rename(folder)
        except OSError:
            if existing == "refuse" or not folder.exists():
                raise
    sync(folder.parent)


def discard(staging: Path) -> None:
    """Delete what still stands under the name of a staged folder: on a full disk its room is needed."""
    if staging.is_dir() and not staging.is_symlink():
        shutil.rmtree(staging, ignore_errors=True)
    else:  # published; what it was exchanged with may have been no folder
        staging.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a folder or a file. Its name goes first, so that a kill leaves no half of it behind under that name."""
    hidden = temporary_name(path)
    path.rename(hidden)
    sync(path.parent)
    _delete(hidden)


def write_file(path: Path, text: str) -> None:
    """Replace a text file by one rename."""
    temporary = temporary_name(path)
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes, and from which `remove_stale` knows its owner."""
    return path.with_name(f"{_prefix()}{os.getpid()}-{uuid.uuid4().hex[:16]}")


def is_temporary(path: Path) -> bool:
    """Whether the name is a `temporary_name`, of any process on any host."""
    return _is_hidden(path.name)


def remove_stale(folder: Path) -> None:
    """Delete what processes of this host left under a `temporary_name` when they were killed; those that still run are
    left alone."""
    for path in folder.glob(f"{glob.escape(_prefix())}*"):
        process = _owner(path)
        if process is not None and not _is_running(process):
            _delete(path)


def remove_leftovers(folder: Path) -> None:
    """The same for a folder that this process has locked and has written nothing into yet.

    What bears this process's own number is then left over too (a container that starts again gives the same numbers
    out), and so is what another host left; nothing else tells whether that one still runs.
    """
    for path in folder.iterdir():
        if is_temporary(path):
            process = _owner(path)
            if process is None or process == os.getpid() or not _is_running(process):
                _delete(path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".writing-")


def _prefix() -> str:
    return f".writing-{socket.gethostname()}-"


def _owner(path: Path) -> int | None:
    """The number of the process that took a temporary name; None if it was not one of this host."""
    process = path.name.removeprefix(_prefix()).split("-")[0]
    return int(process) if process.isdecimal() else None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        return True
    return True


def _delete(path: Path) -> None:
    with suppress(FileNotFoundError):  # another process may clear the same
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _exchange(staging: Path, folder: Path) -> None:
    """Swap two names in one step, so that `folder` is never missing (renameat2 of Linux).

    Where the file system cannot do that (NFS, some FUSE), by two renames. A kill between them leaves no `folder`: for a
    checkpoint, the one before it then counts.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = [os.fsencode(path.absolute()) for path in (staging, folder)]
    if renameat2 is not None and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    between = temporary_name(folder)
    folder.rename(between)
    staging.rename(folder)
    between.rename(staging)


def cache_folder() -> Path:
    """Where tokenised text and converted models are kept: ``$STEEP_CACHE``, or ``steep`` in the user's cache folder."""
    given = os.environ.get("STEEP_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "steep"
    return folder.expanduser()
