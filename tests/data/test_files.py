"""Which files a path stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from steep.data.files import Files, find_files
from steep.data.sources import Source
from steep.errors import UserError


def names(path: Path | str, root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in find_files(Source(path=str(path)), "s").read]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/d.json", ".hidden/e.txt", ".f.txt", "g.jsonl.zst", "h.txt.bz2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_folder_is_read_recursively_sorted_and_without_hidden_files(folder: Path):
    assert names(folder, folder) == ["a.md", "b.txt", "g.jsonl.zst", "sub/c.TXT"]


def test_glob_and_single_file(folder: Path):
    assert names(f"{folder}/*.t*", folder) == ["b.txt"]
    assert names(f"{folder}/**/*.[tT][xX][tT]", folder) == ["b.txt", "sub/c.TXT"]
    assert names(folder / "b.txt", folder) == ["b.txt"]


def test_a_file_with_wildcards_in_its_name_is_that_file(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt", tmp_path) == ["a[1].txt"]


def test_a_glob_takes_the_files_of_the_folders_that_match(folder: Path):
    assert names(f"{folder}/s*", folder) == ["sub/c.TXT"]
    assert names(f"{folder}/*", folder) == names(f"{folder}/**/*", folder) == names(folder, folder)


def test_links_to_folders_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "deep").mkdir()
    (elsewhere / "deep" / "x.txt").write_text("x")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    (folder / "again").symlink_to(folder / "sub")  # the same files under another name
    expected = ["a.md", "again/c.TXT", "b.txt", "g.jsonl.zst", "link/deep/x.txt"]
    assert names(folder, folder) == expected
    assert names(f"{folder}/*", folder) == expected


def test_a_file_with_two_names_is_read_once(folder: Path):
    (folder / "z.txt").symlink_to(folder / "b.txt")
    (folder / "y.txt").symlink_to(folder / "sub" / "d.json")  # a name that says how to read it
    assert names(folder, folder) == ["a.md", "b.txt", "g.jsonl.zst", "sub/c.TXT", "y.txt"]


def test_a_link_that_leads_nowhere_is_not_passed_over(folder: Path):
    (folder / "lost.txt").symlink_to(folder / "nowhere.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    assert {"lost.txt", "circle.txt"} < set(names(folder, folder))


def test_a_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"a folder cannot be listed .*sub"):
        find_files(Source(path=str(folder)), "s")


def test_what_was_left_out(folder: Path):
    files = find_files(Source(path=str(folder)), "s")
    assert [file.name for file in files.left_out] == ["h.txt.bz2", "d.json"]
    expected = "s: 2 files are of a kind that steep does not read (.bz2, .json): they were left out"
    assert files.warning("s") == expected
    assert find_files(Source(path=f"{folder}/*.t*t"), "s").warning("s") is None


@pytest.mark.parametrize(
    ("left_out", "warning"),
    [
        (["README"], "s: 1 file is of a kind that steep does not read (no suffix): it was left out"),
        (
            [f"{number}.{kind}" for number in range(500) for kind in ("a", "B", "c", "d", "e", "f")],
            "s: 3,000 files are of a kind that steep does not read (.a, .b, .c, .d, .e, ...): they were left out",
        ),
    ],
)
def test_wording_of_the_warning(left_out: list[str], warning: str):
    assert Files([], [Path(name) for name in left_out]).warning("s") == warning


@pytest.mark.parametrize(
    ("path", "problem", "remedy"),
    [
        ("nowhere", "nowhere does not exist", "relative paths start at the working folder"),
        ("*.parquet", "no file matches", "Check the pattern"),
        ("sub/d.json", "no file that steep reads", ".jsonl.gz"),
        ("sub/*.json", "no file that steep reads", ".parquet"),
    ],
)
def test_nothing_to_read(folder: Path, path: str, problem: str, remedy: str):
    with pytest.raises(UserError) as caught:
        find_files(Source(path=str(folder / path)), "data.sources[3]")
    assert caught.value.field == "data.sources[3].path"
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
