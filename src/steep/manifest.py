"""The manifest of a folder: size and SHA-256 of each of its files, by which damage is found and strangers are known.

``manifest.json`` is ``{"version": 1, "files": {"name": {"bytes": 12, "sha256": "..."}}}``, with names relative to the
folder and ``/`` between their parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.storage import naming

MANIFEST = "manifest.json"
_LARGEST = 2**24  # bytes; one of ours has a few hundred a file


class Damaged(Exception):
    """A folder that is not as it was written; the message says in which way."""


@dataclass(frozen=True)
class Manifest:
    """What a folder is meant to hold.

    Attributes:
        files: name → (bytes, SHA-256).
        digest: SHA-256 of ``manifest.json`` itself, and through it of every file that it names.
    """

    files: dict[str, tuple[int, str]]
    digest: str


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in `folder`; they are read back for it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """What the manifest of `folder` says; the files are not looked at.

    Raises:
        Damaged: there is none, it is not one, or it names a file outside of the folder.
        OSError: it cannot be read, which says nothing of what it holds.
    """
    file = folder / MANIFEST
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise Damaged(f"{MANIFEST} is no plain file")
        if file.stat().st_size > _LARGEST:
            raise Damaged(f"{MANIFEST} is too large to be one")
        with naming(file):
            content = file.read_bytes()
        tree = json.loads(content)
    except FileNotFoundError as error:
        raise Damaged(f"it has no {MANIFEST}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is no JSON") from error
    if not isinstance(tree, dict) or tree.get("version") != 1 or not isinstance(tree.get("files"), dict):
        raise Damaged(f"{MANIFEST} is no manifest of version 1")
    return Manifest({name: _entry(name, entry) for name, entry in tree["files"].items()}, _sha256(content))


def verify(folder: Path) -> tuple[Manifest, list[str]]:
    """Compare `folder` with its manifest, file by file.

    Returns:
        The manifest, and the names of files that it does not know. Those are to be left unread.

    Raises:
        Damaged: a file is missing, or not as it was written; the folder, or something in it, is a symbolic link.
        OSError: a file is there and cannot be read, for want of permission or by a fault of the disk: it may be whole.
    """
    if folder.is_symlink():
        raise Damaged("it is a symbolic link")
    if not folder.is_dir():
        raise Damaged("it is no folder" if folder.exists() else "it is not there")
    manifest = read_manifest(folder)
    try:
        found = _entries(folder)
        for name, (size, _) in manifest.files.items():
            if name not in found:
                raise Damaged(f"{name} is missing")
            if not stat.S_ISREG(found[name].st_mode):
                raise Damaged(f"{name} is no plain file")
            if found[name].st_size != size:
                raise Damaged(f"{name} has {found[name].st_size:,} bytes, and was written with {size:,}")
        for name, (_, digest) in manifest.files.items():
            if _digest(folder / name) != digest:
                raise Damaged(f"{name} is not what was written (SHA-256)")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} went while it was read") from error
    strangers = sorted(found.keys() - manifest.files.keys() - {MANIFEST})
    return manifest, [name for name in strangers if not stat.S_ISDIR(found[name].st_mode)]


def _entry(name: str, entry: Any) -> tuple[int, str]:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise Damaged(f"{MANIFEST} names {name!r}, which is no place in the folder")
    match entry:
        case {"bytes": int(size), "sha256": str(digest)} if re.fullmatch("[0-9a-f]{64}", digest):
            return size, digest
    raise Damaged(f"{MANIFEST} has no size and SHA-256 of {name!r}")


def _entries(folder: Path) -> dict[str, os.stat_result]:
    """Everything below `folder`, by name."""

    def stop(error: OSError) -> None:  # os.walk would pass over what it cannot open
        raise error

    found: dict[str, os.stat_result] = {}
    for place, folders, files in os.walk(folder, onerror=stop):
        for name in [*folders, *files]:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            found[relative] = path.lstat()
            if stat.S_ISLNK(found[relative].st_mode):
                raise Damaged(f"{relative!r} is a symbolic link")
    return found


def _digest(file: Path) -> str:
    with naming(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
