"""Which files a source with a path stands for, and which of those there are left out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steep.data.sources import SUPPORTED_SUFFIXES, Source, file_format
from steep.errors import UserError

_WILDCARD = re.compile(r"[*?\[]")
_NAMED_KINDS = 5  # suffixes that the warning lists


@dataclass(frozen=True)
class Files:
    """The files at a path, sorted by name; one that links lead to twice is there once.

    Attributes:
        read: those of a format that steep reads.
        left_out: the others.
    """

    read: list[Path]
    left_out: list[Path]

    def warning(self, field: str) -> str | None:
        """What was left out, for the user; None if nothing was."""
        if not self.left_out:
            return None
        kinds = sorted({file.suffix.lower() or "no suffix" for file in self.left_out})
        named = ", ".join(kinds[:_NAMED_KINDS]) + (", ..." if len(kinds) > _NAMED_KINDS else "")
        one = len(self.left_out) == 1
        files, were = ("1 file is", "it was") if one else (f"{len(self.left_out):,} files are", "they were")
        return f"{field}: {files} of a kind that steep does not read ({named}): {were} left out"


def find_files(source: Source, field: str) -> Files:
    """The files of a source with a path. A folder stands for all in it and its subfolders but hidden ones; a glob for
    the files that match, and for those in the folders that match. Links are followed.

    Args:
        source: a source with `path`.
        field: where the source stands in the run file, e.g. "data.sources[0]"; error messages start with it.

    Raises:
        UserError: the path does not exist, a folder cannot be listed, or no file of a supported format is there.
    """
    path = Path(source.location).expanduser()
    if path.exists():
        places = [path]
    elif _WILDCARD.search(source.location):
        places = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not places:
            raise UserError(f"{field}.path", f"no file matches {source.location}", "Check the pattern")
    else:
        raise UserError(
            f"{field}.path",
            f"{path} does not exist",
            f"Check the spelling; relative paths start at the working folder, here {Path.cwd()}",
        )
    visited: set[str] = set()
    try:
        found = [file for place in sorted(places) for file in _files_at(place, visited)]
    except OSError as error:
        raise UserError(f"{field}.path", f"a folder cannot be listed ({error})", "Check its permissions") from error
    files = Files(
        _unique(file for file in found if file_format(file)), _unique(file for file in found if not file_format(file))
    )
    if not files.read:
        problem = f"{source.location} holds no file that steep reads ({len(files.left_out)} other files there)"
        raise UserError(f"{field}.path", problem, f"Supported suffixes: {' '.join(SUPPORTED_SUFFIXES)}")
    return files


def _files_at(place: Path, visited: set[str]) -> Iterator[Path]:
    """`place` itself, or the visible files below it; a folder in `visited` is passed over, so links may run in circles.

    A link that leads nowhere counts as a file: opening it fails and names it, where passing over it would lose text.
    """
    if not place.is_dir():
        if place.is_file() or (place.is_symlink() and not place.exists()):
            yield place
        return
    real = os.path.realpath(place)
    if real in visited:
        return
    visited.add(real)
    for entry in sorted(place.iterdir()):
        if not entry.name.startswith("."):
            yield from _files_at(entry, visited)


def _unique(files: Iterable[Path]) -> list[Path]:
    by_place: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: file.as_posix()):
        by_place.setdefault(os.path.realpath(file), file)
    return list(by_place.values())
