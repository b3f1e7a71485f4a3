"""What commands write into the repository from the results is what they would write now, to the byte.

The pages are copied, with nothing between their marks and without the figures, and each command of the documents runs
on the copies. No library draws: figures are lines that `benchmarks.ablation_figure` writes itself, to a tenth of a
pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import ablation, bases, planned, table

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- (benchmarks\.[\w, ]+): begin -->\n).*?(<!-- \2: end -->)", re.DOTALL)
PAGES = (
    (ablation, "README"), (ablation, "DOCS"), (bases, "DOCS"), (bases, "RECIPE"), (planned, "PAGE"), (table, "README"),
)  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"
ABLATION = ["--summary", str(RESULTS / "2026-11-29-h200-ablation.jsonl")]
COMMANDS: list[tuple[Callable[[list[str]], None], list[str]]] = [
    (table.main, []),
    (planned.main, []),
    (bases.main, ["--summary", *map(str, sorted(RESULTS.glob("*-bases.jsonl"))), "--docs"]),
    (ablation.main, [*ABLATION, "--docs", "--figure", "docs/evidence.svg"]),
    (ablation.main, [*ABLATION, "--figure", "docs/lean.svg", "--arms", "rslora", "lean"]),
]
FIGURES = ("docs/evidence.svg", "docs/lean.svg")


def test_what_is_written_is_in_step_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: (ROOT / name).read_text(encoding="utf-8") for name in FIGURES}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if PART.search(text):
            kept[str(page.relative_to(ROOT))] = text
    (tmp_path / "docs").mkdir()
    for name, text in kept.items():
        if name not in FIGURES:
            (tmp_path / name).write_text(PART.sub(r"\1\3", text), encoding="utf-8")
    for module, name in PAGES:
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(ROOT))
    monkeypatch.chdir(tmp_path)  # figures go where the command says
    for main, words in COMMANDS:
        main(words)
    for name, text in kept.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text, f"{name}: run the command that writes it"
