"""Text of others is shown and never acted on: on the page of a run, in a model card, in a README."""

from __future__ import annotations

import ast
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # rich brings it

from steep.export import markdown
from steep.export.card import write_card
from steep.export.story import Base
from steep.opening import readme
from steep.report.page import page_data, plot_library, render_page
from steep.report.read import read_runs
from steep.run import train_run
from tests.export.test_card import HUB, card, gated, story
from tests.report.runs import write_run
from tests.test_run import run_file

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>"
    "\" onload=alert(4) x='<!--<svg onload=alert(5)>{{ 7 * 7 }}\u2028"
)


class Tags(HTMLParser):
    """What a browser makes of a page: its elements, attributes and addresses, its text, headings and code blocks."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.headings: list[str] = []
        self.blocks: list[str] = []
        self._kept: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        kept = {"h1": self.headings, "h2": self.headings, "pre": self.blocks}.get(tag)
        if kept is not None:
            self._kept = kept
            kept.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "pre"):
            self._kept = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._kept is not None:
            self._kept[-1] += data


def with_evil(node: Any) -> Any:
    """A tree with every text in it, and every key of its mappings by name, replaced."""
    if isinstance(node, str):
        return EVIL
    if isinstance(node, list):
        return [with_evil(value) for value in node]
    if isinstance(node, dict):
        return {key: with_evil(value) for key, value in node.items()}
    return node


def evil_run(folder: Path) -> Path:
    """A run in whose files every text is hostile, but where a word decides what is drawn."""
    write_run(
        folder, domains={EVIL: ("train", 2.5, 1.5), "x" + EVIL: ("replay", 1.0, 1.1)}, prompts={EVIL: (EVIL, EVIL)}
    )
    tree = with_evil(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")))
    tree[EVIL] = EVIL
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    for name in ("plan", "environment", "ledger", "proof"):
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        found = with_evil(found)
        if name == "environment":
            found["packages"][EVIL] = EVIL
        if name == "proof":
            found["trained"] = {EVIL + key: record | {"trained": False} for key, record in found["trained"].items()}
            found["frozen_changed"] = [EVIL]
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def test_a_run_of_hostile_text_on_the_page(tmp_path: Path) -> None:
    folder = evil_run(tmp_path / "<u>ko\" onload='x'")
    for runs in ([folder], [folder, evil_run(tmp_path / "other")]):
        text = render_page(read_runs(runs)).replace(plot_library(), "")
        assert text.count(html.escape("<img src=x onerror=alert(2)>")) > 20  # it is really there, as text
        page = Tags(text)
        assert not page.found & {"img", "svg", "u", "iframe", "object", "embed", "form", "base"}
        assert not {name for name in page.attributes if name.startswith("on")}
        assert all(link.startswith(("#", "data:,")) for link in page.links)
        assert text.count("<script") == 3
        # What the live page puts in place by innerHTML.
        parts = Tags("".join(page_data(read_runs(runs))["parts"].values()))
        assert not parts.found & {"script", "img", "svg", "u"} and parts.links <= {"#ledger", "#proof"}
        assert not {name for name in parts.attributes if name.startswith("on")}


HOSTILE = 'a`b|c\n\n# Heading\n![x](http://x/y.png)[z](javascript:alert(1))<script>alert(1)</script>"); import os; ("'


def imports_os(code: str) -> bool:
    return any(isinstance(node, ast.Import) and node.names[0].name == "os" for node in ast.walk(ast.parse(code)))


def test_hostile_names_in_a_card(tmp_path: Path) -> None:
    told: Any = story()
    for source in told.plan["data"]["sources"]:
        source |= {"name": HOSTILE, "domain": HOSTILE, "role": HOSTILE}
    told.settings["data"]["sources"][1]["hub"] = HOSTILE
    told.settings["training"]["optim"] = HOSTILE
    told.ledger["adds_up"], told.ledger["problems"] = False, [HOSTILE]
    told.environment["gpus"], told.environment["packages"] = [HOSTILE], {HOSTILE: HOSTILE}
    base = Base(HOSTILE, False, HOSTILE, None, {"license": "mit\nevil: true", "license_name": HOSTILE})
    forms = [card(tmp_path, base, form, gated("original", 1.75), told) for form in ("merged", "adapter", "gguf")]
    gguf = card(tmp_path, Base(HOSTILE, False, None, "GGUF"), "adapter", None, told)
    for made in [*forms, gguf]:
        front, body = made.data.to_dict(), made.text
        assert "evil" not in front and set(front) <= {
            "license", "license_name", "library_name", "pipeline_tag", "tags", "datasets", "base_model",
        }  # fmt: skip
        rendered = MarkdownIt("commonmark").enable("table").render(body)  # HTML in it is handed through
        page = Tags(rendered)
        assert not AUTOLINK.search(re.sub("<pre>.*?</pre>|<code>.*?</code>|<.*?>", "", rendered, flags=re.S))
        assert page.found <= {
            "h1",
            "h2",
            "p",
            "pre",
            "code",
            "a",
            "strong",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        }
        assert page.links <= {f"https://huggingface.co/{HUB.name}"} and page.text.count("alert(1)") > 5
        assert [heading for heading in page.headings if "Heading" in heading] == []
        assert not any(imports_os(block) for block in page.blocks if "import" in block)


# What GitHub and the hub link although nothing marks it as a link.
AUTOLINK = re.compile(r"https?://|www\.|[\w.+-]+@[\w-]+\.\w|mailto:|xmpp:", re.IGNORECASE)
ADDRESSES = [
    "see http://evil.example/x, or",
    "<http://evil.example>",
    "<a@evil.example>",
    "a|http://evil.example|b",
    "`http://evil.example`",
    "``http://evil.example",
    "HTTPS://evil.example\\",
    "www.evil.example www.evil.example",
    "write to a@evil.example\nmailto:b@evil.example",
    "[x](http://evil.example)",
    "![x](http://evil.example/a.png)",
    "[x]: http://evil.example",
    "http://evil.example/<script>alert(1)</script>",
]


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_is_no_link(text: str) -> None:
    for body in (f"{markdown.inline(text)} and {markdown.inline(text)}", f"| a |\n|---|\n| {markdown.inline(text)} |"):
        rendered = MarkdownIt("commonmark").enable("table").render(body)
        page = Tags(rendered)
        assert page.links == set() and page.found <= {"p", "code", "table", "thead", "tbody", "tr", "th", "td"}
        assert "evil.example" in page.text
        assert not AUTOLINK.search(html.unescape(re.sub("<code>.*?</code>", "", rendered)))
        if "|" not in text:
            assert page.text.split().count(text.split()[0]) >= 1  # as it was


def test_the_name_of_an_export_is_quoted(tmp_path: Path) -> None:
    for form in ("merged", "adapter", "gguf"):
        write_card(tmp_path, HUB, story(), form=form, gated=None, name='ko"); import os; ("$(touch x)')
        text = ModelCard.load(tmp_path / "README.md").text
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
            assert not imports_os(block)
        if form != "adapter":
            assert re.search(r"""(serve|create) 'ko"\); import os; \("\$\(touch x\)'""", text)


@pytest.mark.parametrize("name", ['ko"); import os; ("', "한국어 run\nbase_model: other", "a`b", "back\\slash"])
def test_an_exotic_place_in_the_readme_of_a_result(
    name: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    train_run(run_file(llama_folder, korean_corpus, folder, training={"max_steps": 1, "warmup_steps": 0}))
    made = ModelCard.load(folder / "final" / "README.md")
    assert made.data.to_dict()["base_model"] == str(llama_folder)
    blocks = re.findall(r"```python\n(.*?)```", made.text, flags=re.S)
    strings = [
        node.value
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(blocks) == 3 and strings.count(str(folder / "final")) == 3


def test_a_base_with_a_hostile_name_in_the_readme_of_a_result() -> None:
    name = "a/b\nlicense: evil\n---\n<script>"
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(
            model=SimpleNamespace(revision='main"); import os; ("'), adapter=SimpleNamespace(init_lora_weights=True)
        ),
        base="fp32",
        compute="fp32",
        resolved=SimpleNamespace(
            stored_by=None,
            stretched=None,
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=3)),
        ),
        shape=SimpleNamespace(vocabulary=3),
        tokenizer="abc",
        vocabulary=None,
    )
    adapter = SimpleNamespace(base_model_name_or_path=name, revision=None)
    text = readme(plan, SimpleNamespace(peft_config={"default": adapter}), Path("final"))  # pyright: ignore[reportArgumentType]
    made = ModelCard(text)
    assert made.data.to_dict()["base_model"] == name and "license" not in made.data.to_dict()
    assert "`a/b license: evil --- <script>`" in made.text
    for block in re.findall(r"```python\n(.*?)```", made.text, flags=re.S):
        assert not imports_os(block)


@pytest.mark.parametrize("text", ["plain", "a`b``c", "`", "두 줄\n끝", "\x1b[2J"])
def test_code_spans_and_strings(text: str) -> None:
    span = markdown.code(text)
    fence = re.match("`+", span)
    assert fence is not None and span.endswith(fence.group())
    assert span.count(fence.group()) == 2
    assert "\n" not in span and "\x1b" not in span
    assert ast.literal_eval(markdown.python(text)) == text and markdown.python(text).isprintable()
