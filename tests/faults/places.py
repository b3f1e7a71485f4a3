"""Places that are full or may not be written: a small disk of one's own, and root without its right to write anywhere.

A small disk is a tmpfs in a private mount namespace: nothing outside sees it, and it goes with its processes. Root
writes through 0500 without an error, by two capabilities; `setpriv` takes them from a command, which then stops at
permissions as any user does and still reads an environment below /root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

NAMESPACE = ("unshare", "--mount")
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@cache
def has_namespaces() -> bool:
    return _succeeds([*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"])


@cache
def has_setpriv() -> bool:
    return os.geteuid() == 0 and _succeeds(
        [*UNPRIVILEGED, "sh", "-c", 'd=$(mktemp -d) && chmod 500 "$d" && ! touch "$d/x"']
    )


@cache
def has_strace() -> bool:
    return _succeeds(["strace", "-f", "-o", os.devnull, "true"])


def _succeeds(words: list[str]) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


class SmallDisk:
    """A folder with a disk of its own, as the processes of a namespace see it.

    Args:
        pid: a process of the namespace.
        path: where it is mounted; an empty folder.
        kibibytes: its size.
    """

    def __init__(self, pid: int, path: Path, kibibytes: int) -> None:
        path.mkdir(parents=True)
        self._pid = pid
        self.path = path
        self.seen = Path(f"/proc/{pid}/root{path}")  # the same place for a process outside
        subprocess.run(
            ["nsenter", "-t", str(pid), "-m", "mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(path)],
            check=True,
        )

    def fill(self, but_kibibytes: int) -> None:
        """Take all of its room but so much."""
        free = shutil.disk_usage(self.seen).free - 1024 * but_kibibytes
        with (self.seen / "filler").open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), max(free, 1))

    def make_room(self) -> None:
        (self.seen / "filler").unlink()
