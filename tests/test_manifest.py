"""What the manifest of a folder finds."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steep.manifest import MANIFEST, Damaged, verify, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them within a folder, and their manifest."""
    place = tmp_path / "folder"
    (place / "inner").mkdir(parents=True)
    (place / "a.safetensors").write_bytes(bytes(range(100)))
    (place / "inner" / "b.json").write_text("{}")
    write_manifest(place)
    return place


def test_a_folder_as_it_was_written(folder: Path) -> None:
    manifest, extra = verify(folder)
    assert extra == []
    assert manifest.files == {
        "a.safetensors": (100, hashlib.sha256(bytes(range(100))).hexdigest()),
        "inner/b.json": (2, hashlib.sha256(b"{}").hexdigest()),
    }
    assert manifest.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def test_files_that_came_later_are_named_and_are_no_damage(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")
    (folder / "inner" / "note\n.txt").write_text("x")
    (folder / "empty").mkdir()
    assert verify(folder)[1] == ["adapter_model.bin", "inner/note\n.txt"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place: flip(place / "a.safetensors"), r"a\.safetensors is not what was written \(SHA-256\)"),
        (lambda place: flip(place / "inner" / "b.json"), r"inner/b\.json is not what was written"),
        (lambda place: os.truncate(place / "a.safetensors", 60), r"a\.safetensors has 60 bytes, and .* with 100"),
        (lambda place: os.truncate(place / "a.safetensors", 0), r"a\.safetensors has 0 bytes"),
        (lambda place: os.truncate(place / "a.safetensors", 101), r"a\.safetensors has 101 bytes"),
        (lambda place: (place / "a.safetensors").unlink(), r"a\.safetensors is missing"),
        (lambda place: (place / "inner" / "b.json").rename(place / "b.json"), r"inner/b\.json is missing"),
        (lambda place: as_link(place / "a.safetensors"), r"'a\.safetensors' is a symbolic link"),
        (lambda place: as_link(place / "inner"), r"'inner' is a symbolic link"),
        (lambda place: (place / "extra").symlink_to("/etc/passwd"), r"'extra' is a symbolic link"),
        (lambda place: (place / "extra").symlink_to("/nowhere"), r"'extra' is a symbolic link"),
        (lambda place: as_folder(place / "a.safetensors"), r"a\.safetensors is no plain file"),
        (lambda place: as_fifo(place / "a.safetensors"), r"a\.safetensors is no plain file"),
        (lambda place: (place / MANIFEST).unlink(), r"it has no manifest\.json"),
        (lambda place: as_link(place / MANIFEST), r"manifest\.json is no plain file"),
        (lambda place: as_fifo(place / MANIFEST), r"manifest\.json is no plain file"),
        (lambda place: os.truncate(place / MANIFEST, 30), r"manifest\.json is no JSON"),
        (lambda place: os.truncate(place / MANIFEST, 2**25), r"manifest\.json is too large"),
        (lambda place: (place / MANIFEST).write_bytes(b"\xff"), r"manifest\.json is no JSON"),
        (lambda place: (place / MANIFEST).write_text("[" * 100_000), r"manifest\.json is no JSON"),
    ],
)
def test_damage_is_found(damage: Callable[[Path], object], reason: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(Damaged, match=reason):
        verify(folder)


def test_a_stranger_that_is_no_file_is_not_opened(folder: Path) -> None:
    """Reading a pipe would wait for ever."""
    as_socket(folder / "socket")
    os.mkfifo(folder / "pipe")
    assert verify(folder)[1] == ["pipe", "socket"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "inner/../a", "./a", "a//b", "", "a\0b", "..", "inner/"])
def test_a_manifest_does_not_climb(name: str, folder: Path) -> None:
    """Also where the file is there, of that size and digest."""
    (folder.parent / "outside").write_bytes(bytes(range(100)))
    tree = json.loads((folder / MANIFEST).read_text())
    tree["files"][name] = tree["files"]["a.safetensors"]
    (folder / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(Damaged, match="which is no place in the folder"):
        verify(folder)


_ENTRY = {"bytes": 100, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "tree",
    [
        [],
        None,
        {},
        {"version": 2, "files": {}},
        {"version": 1, "files": []},
        {"version": 1, "files": {"a.safetensors": None}},
        {"version": 1, "files": {"a.safetensors": {**_ENTRY, "bytes": "100"}}},
        {"version": 1, "files": {"a.safetensors": {**_ENTRY, "sha256": "0" * 63}}},
        {"version": 1, "files": {"a.safetensors": {**_ENTRY, "sha256": "0" * 63 + "G"}}},
        {"version": 1, "files": {"a.safetensors": {"bytes": 100}}},
    ],
)
def test_a_manifest_of_another_shape(tree: Any, folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(Damaged, match=r"manifest\.json (is no manifest of version 1|has no size and SHA-256 of)"):
        verify(folder)


def test_the_folder_itself(folder: Path) -> None:
    with pytest.raises(Damaged, match="it is no folder"):
        verify(folder / "a.safetensors")
    with pytest.raises(Damaged, match="it is not there"):
        verify(folder / "none")
    (folder.parent / "link").symlink_to(folder)
    with pytest.raises(Damaged, match="it is a symbolic link"):
        verify(folder.parent / "link")
