"""The page as text: whole, without addresses, safe against the text of a run, and small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steep.errors import UserError
from steep.report import page
from steep.report.page import page_data, render_page, write_report
from steep.report.read import read_run, read_runs
from steep.run import train_run
from tests.report.runs import write_run
from tests.test_run import run_file


def own(html: str) -> str:
    """The page without the plot library, which holds pieces of HTML itself."""
    return html.replace(page.plot_library(), "")


EVIL = "</script><script>alert('evil')</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_page(read_runs([write_run(tmp_path_factory.mktemp("runs") / "ko")]))


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    elements = Elements(html).found
    assert [tag for tag, given in elements if "src" in given or "srcset" in given] == []
    assert {tag for tag, _ in elements} & {"iframe", "object", "embed", "img", "form", "base"} == set()
    assert [given["href"] for tag, given in elements if tag == "link"] == ["data:,"]
    links = [given["href"] or "" for tag, given in elements if tag == "a"]
    assert links and all(link.startswith("#") for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_its_policy_names_its_scripts_and_forbids_the_network(html: str) -> None:
    found = Elements(html)
    (policy,) = (given["content"] for _, given in found.found if given.get("http-equiv") == "Content-Security-Policy")
    data, *scripts = found.scripts
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy is not None and "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert re.findall(r"'sha256-([^']+)'", policy) == digests and len(digests) == 2
    assert "unsafe-eval" not in policy
    assert json.loads(data)["live"] is False


def test_the_plot_library_is_there_once(html: str) -> None:
    assert html.count(page.plot_library()) == 1
    assert len(html) < 2_000_000


def test_everything_is_on_it(html: str) -> None:
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", own(html))
    assert headings == list(page.PARTS.values())
    for text in (
        "Learned korean. Forgot some of english.", "−0.880", "34 % fewer bits", "+0.020", "forgotten",
        "법률이 정하는 바에 의하여", "learning_rate: 5.0e-05", "NVIDIA H100", "transformers <b>5.23.0</b>",
        "All 114 tensors trained", "All 7,404,000 tokens", "the tokenizer spends 1.84 tokens",
    ):  # fmt: skip
        assert text in html, text


def test_what_is_reserved_beyond_the_peak_is_told(html: str) -> None:
    assert re.search(r"fragmentation, reserved beyond it at the most</th><td class=\"number\">1\.58 GiB</td>", html)


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "ko<b>",
        domains={EVIL: ("train", 2.5, 1.5), "english": ("replay", 1.0, 1.0)},
        prompts={EVIL: (EVIL, f"{EVIL}\u2028")},
    )
    pieces = [{"source": EVIL, "document": 7, "text": EVIL}]
    write_incident(folder, action="skip", rows=[{"row": 3, "pieces": pieces}])
    for runs in ([folder], [folder, write_run(tmp_path / "other")]):
        html = render_page(read_runs(runs))
        assert all(text not in own(html) for text in (EVIL, "<img", "ko<b>"))
        found = Elements(html)
        assert len(found.scripts) == 3
        data = json.loads(found.scripts[0])
        assert EVIL in [chart["title"] for chart in data["charts"]]


def write_incident(folder: Path, **fields: Any) -> None:
    given = {"step": 41, "kind": "spike in loss", "action": "warn", "loss": 9.25, "grad_norm": 2.0, "median": 2.5,
             "z": 31.0, "rows": []}  # fmt: skip
    with (folder / "incidents.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(given | fields) + "\n")


def test_steps_out_of_the_ordinary_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    assert "Steps out of the ordinary" not in render_page(read_runs([folder]))
    row = {"row": 3, "pieces": [{"source": "korean.jsonl", "document": 1234, "text": "강물이 건넌다"}]}
    write_incident(folder, rows=[row, {"row": 4, "pieces": []}])
    write_incident(folder, kind="spike in gradient norm", action="rollback", grad_norm=17.0, step=42)
    write_incident(folder, kind="loss not finite", action="refused", loss=None, median=None, z=None, step=43)
    html = render_page(read_runs([folder]))
    for text in (
        "Steps out of the ordinary",
        "spike in loss: 9.25 where 2.5 was usual",
        "korean.jsonl, document 1234: 강물이 건넌다",
        "spike in gradient norm: 17 where 2.5 was usual",
        "gone back before, and passed over",
        "loss not finite",
    ):
        assert text in html, text
    for step in range(60):
        write_incident(folder, step=100 + step)
    assert "13 more stand in incidents.jsonl" in render_page(read_runs([folder]))


def test_skipped_steps_are_told_from_those_that_were_not_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    assert "steps were skipped" not in page_data([read_run(folder)])["parts"]["verdict"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[-1]["steps_skipped"] = 3
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part = page_data([read_run(folder)])["parts"]["verdict"]
    assert "3 steps were skipped" in part and "not finite" not in part


def test_a_folder_half_done(tmp_path: Path) -> None:
    html = render_page(read_runs([write_run(tmp_path / "ko", steps=100, done=30)]))
    assert "not finished: step 30 of 100 (30 %)" in html and "So far: learned korean." in html
    assert "The proof is written at the end." in html and "is written at the end" in html


@pytest.mark.parametrize(
    "missing", ["plan.json", "environment.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "final"]
)
def test_any_file_may_be_missing(missing: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    file = folder / missing
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    alone = page_data(read_runs([folder]))
    assert "verdict" not in alone["empty"] and alone["finished"] is (missing != "final")
    assert ("samples" in alone["empty"]) is (missing == "samples.jsonl")
    page_data(read_runs([folder, write_run(tmp_path / "whole")]))


def test_a_run_that_is_not_there_waits(tmp_path: Path) -> None:
    data = page_data([read_run(tmp_path / "ko")])
    assert data["empty"] == [name for name in page.PARTS if name != "verdict"]
    assert "Waiting for the run to begin." in data["parts"]["verdict"] and data["written"] is None


def test_failures_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    for record in list(proof["trained"].values())[:60]:
        record["trained"] = False
    proof["frozen_changed"] = ["model.norm.weight"]
    (folder / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    part = page_data([read_run(folder)])["parts"]["proof"]
    assert part.count("<li><code>model.layers") == page.MOST_NAMES
    assert "and 10 more in proof.json" in part and "model.norm.weight" in part
    assert "1 of 291 frozen tensors changed." in part


def test_several_runs_beside_each_other(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", domains={"korean": ("train", 2.5, 1.5), "english": ("replay", 1.0, 1.1)})
    b = write_run(tmp_path / "b", domains={"korean": ("train", 2.5, 1.6)}, learning_rate=1e-5)
    html = render_page(read_runs([a, b]))
    assert "a learned korean best." in html and "★ best" in html
    assert "<code>training.learning_rate</code></th><td>5e-05</td><td>1e-05</td>" in html


def test_a_long_run_stays_small_and_says_that_it_is_thinned(tmp_path: Path) -> None:
    prompts = {f"prompt {number}": ("x" * 9_000, "y" * 9_000) for number in range(60)}
    html = render_page(read_runs([write_run(tmp_path / "ko", steps=100_000, eval_every=100, prompts=prompts)]))
    assert len(html.encode()) < 2_000_000
    assert "Curves are thinned" in html and "The longest has 100,000" in html
    assert "5,000 more characters" in html and "20 more prompts stand in samples.jsonl" in html


def test_a_real_run(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder))
    written = write_report([folder])
    assert written == folder / "report.html"
    html = written.read_text(encoding="utf-8")
    assert re.search(r"<h1>Learned corpus\d*\. ", html) and "finished" in html and "강물이" in html
    assert "tensors trained" in html and "tokens are accounted for" in html
    assert {chart.id for chart in page.charts(read_runs([folder]))[0]} >= {"loss", "domain-0", "learning-rates"}


def test_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert write_report([a]) == a / "report.html"
    assert write_report([a, b]) == Path("report.html")
    assert write_report([a], tmp_path / "new" / "x.html").is_file()
    for output, problem in ((a / "run.yaml", "not the name of a page"), (a / "run.yaml" / "x.html", "is a file")):
        with pytest.raises(UserError, match=f"-o: .*{problem}"):
            write_report([a], output)
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path / "none"])


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.setattr(page, "plot_library", page.plot_library.__wrapped__)  # not the one that is bundled already
    with pytest.raises(UserError, match=r"vl_convert is not installed. Install it: pip install 'steep\[report\]'"):
        write_report([write_run(tmp_path / "ko")])
    assert not (tmp_path / "ko" / "report.html").exists()
