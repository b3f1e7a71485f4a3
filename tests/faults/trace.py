"""What `strace -f` saw of a run: when files were written, synced, renamed and deleted, and whether in the right order.

SIGKILL cannot show a missing fsync, since the page cache outlives the process; the order of the system's calls can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STRACE = (
    "strace", "-f", "-qq", "-y", "-s", "0", "--seccomp-bpf", "-e",
    "trace=openat,creat,write,pwrite64,writev,pwritev,ftruncate,sendfile,copy_file_range,fsync,fdatasync,rename,"
    "renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat", "-o",
)  # fmt: skip

_WRITES = {"write", "pwrite64", "writev", "pwritev", "ftruncate"}
_COPIES = {"sendfile": 0, "copy_file_range": 2}  # which of the descriptors is written
_SYNCS = {"fsync", "fdatasync"}
_CALL = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<given>.*)\) += (?P<result>-?\d+)")
_BEGUN = re.compile(r"(?P<thread>\d+) +(?P<call>\w+\(.*) <unfinished \.\.\.>$")
_ENDED = re.compile(r"(?P<thread>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<(?P<path>[^>]*)>")


@dataclass(frozen=True)
class Event:
    """A call that succeeded.

    Attributes:
        kind: `write`, `sync`, `create`, `rename`, `delete` or `mkdir`.
        path: of the file or folder; of a rename, the old name.
        begin, end: numbers of the lines on which the call began and returned.
        new: of a rename, the new name.
    """

    kind: str
    path: str
    begin: int
    end: int
    new: str = ""


def read_trace(lines: Iterable[str]) -> list[Event]:
    """The events of a trace, in the order in which they returned. A thread's call may stand on two lines."""
    events: list[Event] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        first = number
        if match := _BEGUN.match(line):
            begun[match["thread"]] = number, match["call"]
            continue
        if match := _ENDED.match(line):
            first, call = begun.pop(match["thread"])
            line = f"{match['thread']} {call}{match['rest']}"
        match = _CALL.match(line)
        if match and int(match["result"]) >= 0 and (event := _event(match["name"], match["given"], first, number)):
            events.append(event)
    return events


def _event(name: str, given: str, begin: int, end: int) -> Event | None:
    descriptors = [match["path"] for match in _DESCRIPTOR.finditer(given)]
    names = re.findall(r'"((?:[^"\\]|\\.)*)"', given)
    if name in _WRITES:
        return Event("write", descriptors[0], begin, end) if descriptors else None
    if name in _COPIES:
        return Event("write", descriptors[_COPIES[name]], begin, end)
    if name in _SYNCS:
        return Event("sync", descriptors[0], begin, end)
    if name == "openat" and "O_CREAT" in given:
        return Event("create", str(Path(descriptors[0], names[0])), begin, end)
    if name in ("rename", "renameat", "renameat2"):
        folders = descriptors if len(descriptors) == 2 else ["", ""]
        old, new = (str(Path(folder, part)) for folder, part in zip(folders, names, strict=True))
        return Event("rename", old, begin, end, new)
    if name in ("unlink", "unlinkat", "rmdir"):
        return Event("delete", str(Path(*descriptors[:1], names[0])), begin, end)
    if name in ("mkdir", "mkdirat"):
        return Event("mkdir", str(Path(*descriptors[:1], names[0])), begin, end)
    return None


def publishing_faults(
    events: list[Event], folder: Path, *, logs: Iterable[Path] = (), older: Iterable[Path] = ()
) -> list[str]:
    """What is wrong with the order in which `folder` was written and got its name; empty if nothing is.

    Args:
        logs: files whose lines up to the beginning have to be on the disk before the name is given.
        older: folders that have to stand until the new name is on the disk.
    """
    renames = [event for event in events if event.kind == "rename" and event.new == str(folder)]
    if not renames:
        return [f"{folder.name}: no rename gave it its name"]
    rename = renames[-1]
    staging = rename.path
    begun = next((event.begin for event in events if event.kind == "mkdir" and event.path == staging), None)
    if begun is None:
        return [f"{folder.name}: {Path(staging).name} was not made as a folder of its own"]
    inside = [
        event for event in events if Path(staging) in Path(event.path).parents and begun < event.begin < rename.begin
    ]
    later = {
        event.path: event.new for event in inside if event.kind == "rename"
    }  # safetensors writes under another name
    written: dict[str, list[Event]] = {}
    for event in inside:
        if event.kind in ("write", "create"):
            written.setdefault(later.get(event.path, event.path), []).append(event)
    found = [] if written else [f"{folder.name}: nothing was written"]
    for path, changes in sorted(written.items()):
        found += _not_synced(events, path, changes, rename, f"{folder.name}/{Path(path).relative_to(staging)}")
    created = [event for event in inside if event.kind in ("create", "mkdir", "rename")]
    for place in sorted({staging, *(event.path for event in inside if event.kind == "mkdir")}):
        here = [event for event in created if str(Path(event.path).parent) == place]
        found += _not_synced(events, place, here, rename, f"{folder.name}: its folder {Path(place).name}")
    for log in logs:
        lines = [event for event in events if event.kind == "write" and event.path == str(log) and event.end < begun]
        found += _not_synced(events, str(log), lines, rename, f"{folder.name}: {log.name}")
    syncs = [event for event in events if _is_sync(event, str(folder.parent)) and event.begin > rename.end]
    if not syncs:
        return [*found, f"{folder.name}: the folder above is not synced after the rename"]
    for old in older:
        gone = [event for event in events if event.path == str(old) and event.kind in ("rename", "delete")]
        gone += [event for event in events if event.kind == "delete" and old in Path(event.path).parents]
        if any(event.begin < syncs[0].end for event in gone):
            found.append(f"{folder.name}: {old.name} is deleted before the new name is on the disk")
    return found


def replacing_faults(events: list[Event], folder: Path) -> list[str]:
    """What is wrong with the order of each file right below `folder` that got its name by a rename."""
    found: list[str] = []
    for rename in events:
        if rename.kind != "rename" or Path(rename.new).parent != folder:
            continue
        writes = [
            event
            for event in events
            if event.kind == "write" and event.path == rename.path and event.end < rename.begin
        ]
        if writes:
            found += _not_synced(events, rename.path, writes, rename, Path(rename.new).name)
            if not any(_is_sync(event, str(folder)) and event.begin > rename.end for event in events):
                found.append(f"{Path(rename.new).name}: the folder is not synced after the rename")
    return found


def spike_faults(events: list[Event], folder: Path) -> list[str]:
    """What of a step that is gone back for was not on the disk when training went on, which shows in metrics.jsonl: the
    line in incidents.jsonl, which has to be there before the list too, and the list of the steps that are passed over.
    """
    line, listed, metrics = (str(folder / name) for name in ("incidents.jsonl", "skipped_steps.json", "metrics.jsonl"))
    goes_on = [each.begin for each in events if each.kind in ("write", "rename") and metrics in (each.path, each.new)]
    lists = [each for each in events if each.kind == "rename" and each.new == listed]
    made = [each for each in events if each.kind == "create" and each.path == line][:1]
    wanted = [
        *((each, line, "incidents.jsonl") for each in events if each.kind == "write" and each.path == line),
        *((each, str(folder), "the name incidents.jsonl") for each in made),
        *((each, str(folder), "the name skipped_steps.json") for each in lists),
    ]
    found = [] if lists and made else ["no line and no list were written"]
    for change, place, name in wanted:
        before = min((at for at in [*goes_on, *(event.begin for event in lists)] if at > change.end), default=None)
        if before is None:
            found.append(f"{name}: training did not go on")
        elif not any(_is_sync(event, place) and change.end < event.begin and event.end < before for event in events):
            found.append(f"{name} is not on the disk when the run goes on")
    return found


def _is_sync(event: Event, path: str) -> bool:
    return event.kind == "sync" and event.path == path


def _not_synced(events: list[Event], path: str, changes: list[Event], rename: Event, name: str) -> list[str]:
    """Whether a sync of `path` begins after all its changes and returns before the rename."""
    changed = max((event.end for event in changes if event.kind != "sync"), default=-1)
    synced = any(_is_sync(event, path) and changed < event.begin and event.end < rename.begin for event in events)
    return [] if synced else [f"{name} is not synced between its last change and the rename"]
