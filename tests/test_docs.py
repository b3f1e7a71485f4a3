"""What the documents promise: the two commands of the README, links that lead somewhere, no path of one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"""\]\(\s*<?([^)\s>]+)|\b(?:href|src|srcset)="([^"]+)\"""")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)

# An absolute path into one machine's folders; the slash may not be the middle of a longer path or address.
MACHINE_FOLDERS = ("work", "farm", "root")
MACHINE_PATH = re.compile(rf"(?<![\w.:/~*}}-])/(?:{'|'.join(MACHINE_FOLDERS)})/")


def relative_links(text: str) -> list[str]:
    """The targets of Markdown and HTML links outside code that are neither addresses nor anchors of the same page."""
    targets = ["".join(found) for found in LINK.findall(FENCED.sub("", text))]
    paths = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    return [path for path in paths if path]


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_names_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = relative_links(page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_links_are_found() -> None:
    text = """[a](docs/a.md) ![b](b.png "title") [c](https://x.org/c.md) [d](#d) [e](e.md#part) <img src="f.svg">
```bash
echo [g](g.md)
```
[h](h.md)"""
    assert relative_links(text) == ["docs/a.md", "b.png", "e.md", "f.svg", "h.md"]


def test_no_file_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()]
    assert names, "git lists no file here"
    assert [name for name in names if MACHINE_PATH.search((ROOT / name).read_text("utf-8", errors="ignore"))] == []


def test_machine_paths_are_found() -> None:
    name = "work"
    assert all(MACHINE_PATH.search(text) for text in [f"/{name}/a", f"see '/{name}/a'", f"x=/{name}/", f"\n/{name}/b"])
    assert not any(
        MACHINE_PATH.search(text) for text in [f"a/{name}/b", f"https://x.org/{name}/", f"{name}/a", "./root/"]
    )
