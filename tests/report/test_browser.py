"""The page in a real browser: what is drawn, at two widths, light and dark, and while a run goes on."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from steep.report import watch
from steep.report.page import PARTS, write_report
from steep.report.watch import make_server
from tests.report.browser import NARROW, WIDE, Open, wait_until
from tests.report.drawing import assert_drawn, read_drawings
from tests.report.runs import write_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

# The lines of a chart as they are drawn.
LINES = """figure => [...figure.querySelectorAll(".mark-line path")].map(path => ({
    colour: path.getAttribute("stroke"), width: path.getAttribute("stroke-width"),
    dashes: path.getAttribute("stroke-dasharray"),
    points: (path.getAttribute("d").match(/[ML]/g) ?? []).length}))"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "ko", steps=200, eval_every=20)]).as_uri()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "low", learning_rate=1e-5),
        write_run(folder / "high", learning_rate=2e-4, seed=1, domains={"korean": ("train", 2.56, 1.5)}),
    ]
    return write_report(runs, folder / "both.html").as_uri()


def lines(page: Page, chart: str) -> list[dict[str, Any]]:
    return page.eval_on_selector(f'figure[data-chart="{chart}"]', LINES)


def texts(page: Page, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_text_contents()]


def wide_as_window(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth === window.innerWidth")


def test_the_first_screen_is_the_verdict(open_page: Open, one: str) -> None:
    page = open_page(one)
    assert texts(page, "h1") == ["Learned korean. Forgot some of english."]
    assert texts(page, ".card .big") == ["−0.880", "+0.020", "0.000"]
    assert texts(page, ".card .word") == ["▼ learned, 34 % fewer bits", "▲ forgotten, 1.9 % more bits", "= kept"]
    for element in (*page.locator(".card").all(), page.locator(".facts").first):
        box = element.bounding_box()
        assert box and box["y"] + box["height"] < 900
    assert texts(page, "section:not([hidden]) > h2") == list(PARTS.values())


def test_what_is_drawn(open_page: Open, one: str) -> None:
    page = open_page(one)
    raw, smoothed = lines(page, "loss")
    assert (raw["points"], smoothed["points"]) == (200, 200) and raw["width"] < smoothed["width"]
    base, trained = lines(page, "domain-0")
    assert (base["points"], trained["points"]) == (2, 11) and base["dashes"] and not trained["dashes"]
    assert page.locator('[data-chart="domain-0"] .mark-symbol path').count() == 11
    assert [line["points"] for line in lines(page, "learning-rates")] == [200, 200]
    assert [line["points"] for line in lines(page, "memory")] == [200, 2]
    assert page.locator("figure").count() == 8
    labels = texts(page, '[data-chart="loss"] .role-axis-label text')
    assert "100" in labels and any(re.fullmatch(r"2\.\d", label) for label in labels)


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (NARROW, "light"), (NARROW, "dark"), (WIDE, "dark"), (1600, "light")]
)
def test_it_fits_and_follows_the_colour_scheme(width: int, scheme: str, open_page: Open, one: str) -> None:
    page = open_page(one, width, scheme)
    assert wide_as_window(page)
    paper, ink, line = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector('[data-chart=loss] .mark-line path')).stroke]"""
    )
    light, dark = (
        ("rgb(247, 247, 245)", "rgb(28, 30, 33)", "rgb(31, 95, 191)"),
        ("rgb(19, 21, 25)", "rgb(232, 233, 235)", "rgb(110, 168, 254)"),
    )
    assert (paper, ink, line) == (light if scheme == "light" else dark)
    for chart in page.locator("figure").all():
        plot, svg = chart.locator(".plot").bounding_box(), chart.locator("svg.marks").bounding_box()
        assert plot and svg and svg["width"] <= plot["width"] + 1 and svg["height"] > 150
        # At its own size: the style sheet would shrink what is too wide, and blur its lines.
        assert chart.locator("svg.marks").get_attribute("width") == f"{svg['width']:g}"


def test_axis_labels_are_not_cut_off(open_page: Open, one: str) -> None:
    cut = """() => [...document.querySelectorAll(".role-axis-label text")].filter(text => {
        const box = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
        return text.textContent && (box.left < svg.left - 1 || box.right > svg.right + 1)}).map(t => t.textContent)"""
    assert open_page(one, NARROW).evaluate(cut) == []


def test_a_narrow_window_is_drawn_anew(open_page: Open, one: str) -> None:
    page = open_page(one)
    page.set_viewport_size({"width": NARROW, "height": 900})
    wait_until(page, "document.querySelector('[data-chart=loss] svg.marks').getAttribute('width') < 390")
    assert wide_as_window(page)


def test_dragging_looks_closer_at_all_charts(open_page: Open, one: str) -> None:
    page = open_page(one)
    plot = page.locator('[data-chart="loss"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 80, steps=3)
    page.mouse.up()
    assert 40 < lines(page, "loss")[0]["points"] < 80
    assert 40 < lines(page, "speed")[0]["points"] < 80
    page.keyboard.press("Escape")
    assert lines(page, "loss")[0]["points"] == 200


def test_the_cursor_tells_the_values_of_every_chart(open_page: Open, one: str) -> None:
    page = open_page(one)
    plot = page.locator('[data-chart="loss"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 80)
    assert page.locator('[data-chart="loss"] .cursor').get_attribute("data-at") in ("step 199", "step 200")
    assert texts(page, '[data-chart="domain-0"] output') == ["2.56", "1.68"]
    assert texts(page, '[data-chart="learning-rates"] output') == ["5e-6", "5e-7"]
    page.mouse.move(0, 0)
    assert texts(page, '[data-chart="domain-0"] output') == ["", ""]


def test_steps_or_tokens(open_page: Open, one: str) -> None:
    page = open_page(one)
    page.get_by_text("tokens", exact=True).first.click()
    assert "2M" in texts(page, '[data-chart="loss"] .role-axis-label text')
    assert lines(page, "loss")[0]["points"] == 200


def test_a_legend_hides_its_curve(open_page: Open, one: str) -> None:
    page = open_page(one)
    page.get_by_role("button", name="as logged").first.click()
    (left,) = lines(page, "loss")
    assert left["width"] == "2"


def test_several_runs(open_page: Open, several: str) -> None:
    page = open_page(several)
    assert texts(page, "h1") == ["high learned korean best."]
    smoothed = [line for line in lines(page, "loss") if line["width"] == "2"]
    assert [(line["colour"], bool(line["dashes"])) for line in smoothed] == [("var(--s1)", False), ("var(--s2)", True)]
    assert texts(page, '[data-chart="loss"] .legend button') == ["low", "high"]
    assert len(lines(page, "domain-0")) == 3 and len(lines(page, "domain-1")) == 2
    assert texts(page, ".settings tbody th") == ["data.sources[1].path", "data.sources[1].role", "data.sources[2].path",
        "data.sources[2].role", "training.learning_rate", "training.seed"]  # fmt: skip
    assert wide_as_window(open_page(several, NARROW))


def test_text_of_a_run_runs_nothing(open_page: Open, tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"
    folder = write_run(tmp_path / "ko", domains={evil: ("train", 2.5, 1.5)}, prompts={evil: (evil, evil)})
    page = open_page(write_report([folder]).as_uri())
    assert page.title() == "ko · steep"
    assert texts(page, '[data-chart="domain-0"] h3')[0].startswith(evil)
    assert texts(page, ".prompt") == [evil]


def test_while_a_run_goes_on(open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page fills, follows and ends without being loaded again, and stays where its reader left it."""
    monkeypatch.setattr(watch, "_REST", 0)
    server = make_server([tmp_path / "ko"])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        page = open_page(f"http://127.0.0.1:{server.server_port}/")
        page.get_by_text("Waiting for the run: its folder is not there yet").wait_for()
        page.evaluate("window.loadedOnce = true")
        assert page.locator("figure").count() == 0

        write_run(tmp_path / "ko", steps=100, done=30)
        page.get_by_text("not finished: step 30 of 100").wait_for()
        assert lines(page, "loss")[0]["points"] == 30
        page.get_by_text("Live: last written").wait_for()
        page.evaluate("document.querySelector('#training').scrollIntoView()")
        page.locator("#memory-1 summary").evaluate("summary => summary.click()")  # closes what was open
        place = page.evaluate("scrollY")
        assert place > 500

        write_run(tmp_path / "ko", steps=100)
        page.get_by_text("The run has finished.").wait_for()
        assert lines(page, "loss")[0]["points"] == 100
        losses = [json.loads(line) for line in (tmp_path / "ko" / "metrics.jsonl").read_text("utf-8").splitlines()]
        drawing = read_drawings(page)["Training loss"]
        assert_drawn(drawing, drawing.named("as logged"), [(row["step"], row["loss"]) for row in losses])
        assert page.evaluate("scrollY") == pytest.approx(place, abs=200)
        assert page.locator("#memory-1").get_attribute("open") is None
        assert page.evaluate("window.loadedOnce") is True
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
