"""Where the curves and bars of the page lie: read back from a real browser and held against the files of the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from steep.report.page import write_report
from tests.report.browser import NARROW, opening, wait_until
from tests.report.drawing import NEAR, Drawing, Line, Recorded, assert_drawn, read_drawings
from tests.report.runs import DOMAINS, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

STEPS, GAP, SPIKE = 200, 120, 3_333
# Chart, curve and field of what is drawn as it was logged.
LOGGED = [
    ("Training loss", "as logged", "loss"),
    ("Gradient norm", "as logged", "grad_norm"),
    ("Speed", "as logged", "tokens_per_second"),
    ("Peak memory", "measured", "peak_memory_bytes"),
    ("Learning rates", "adapters a", "learning_rate_adapters_a"),
    ("Learning rates", "adapters b", "learning_rate_adapters_b"),
    ("Learning rates", "embeddings", "learning_rate_embeddings"),
]
SMOOTHED = [("Training loss", "loss"), ("Gradient norm", "grad_norm"), ("Speed", "tokens_per_second")]
VIEWS = ("steps", "tokens", "closer", "narrow")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def change_metrics(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [row | change(row) for row in lines_of(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def value_of(row: Mapping[str, Any], field: str) -> float | None:
    return row[field] / 2**30 if field == "peak_memory_bytes" else row[field]


def logged(folder: Path, field: str, over: str = "step") -> Recorded:
    return [(row[over], value_of(row, field)) for row in lines_of(folder / "metrics.jsonl")]


def scores(folder: Path, domain: str) -> list[tuple[int, float]]:
    rows = lines_of(folder / "evaluation.jsonl")
    return [(row["step"], row["bits_per_byte"]) for row in rows if row["domain"] == domain]


def mean_before(values: list[float | None], index: int, span: int) -> float:
    """The newest value weighs most, the one before it less by a factor, and so on to the first; gaps weigh nothing."""
    keep = 1 - 2 / (span + 1)
    there = [value for value in values[index::-1] if value is not None]
    return sum(keep**age * value for age, value in enumerate(there)) / sum(keep**age for age in range(len(there)))


def within(recorded: Recorded, drawing: Drawing) -> Recorded:
    """What is between the ends of the axis, with one neighbour on either side."""
    left, _, right, _ = drawing.frame
    low, high = (drawing.x.value(pixel) for pixel in (left, right))
    slack = (high - low) * 1e-6
    inside = [i for i, (x, _) in enumerate(recorded) if low - slack <= x <= high + slack]
    return recorded[max(0, inside[0] - 1) : inside[-1] + 2]


@dataclass(frozen=True)
class Seen:
    """A page of one run as it was read.

    Attributes:
        views: the charts by title, of each of `VIEWS`.
        told: what the cursor of the loss says where the mouse stands at a step, what the legend says beside "as
            logged", and how far the cursor stands from the mouse.
        dragged: where the mouse was pressed and released for the closer view, on the loss.
        tables: for each row of a table with bars its first cell and its bars: [class, colour, left, width].
        rooms: left and width of what holds the bars, by table.
    """

    folder: Path
    views: dict[str, dict[str, Drawing]]
    told: dict[int, tuple[str | None, str, float]]
    dragged: tuple[float, float]
    tables: dict[str, list[tuple[str, list[Any]]]]
    rooms: dict[str, tuple[float, float]]

    def recorded(self, view: str, field: str) -> Recorded:
        return logged(self.folder, field, "tokens" if view == "tokens" else "step")


BARS = """tables => tables.map(table => ({kind: table.className,
    room: (box => [box.left, box.width])(table.querySelector(".pair, .stack").getBoundingClientRect()),
    rows: [...table.querySelectorAll("tr")].filter(row => row.querySelector("b")).map(row => [
        row.querySelector("th").firstChild.textContent.trim(), [...row.querySelectorAll("b")].map(bar => {
            const box = bar.getBoundingClientRect();
            return [bar.className, getComputedStyle(bar).backgroundColor, box.left, box.width];
        })])}))"""


def point_at(page: Page, drawing: Drawing, step: int) -> tuple[str | None, str, float]:
    page.locator('[data-chart="loss"] .plot').scroll_into_view_if_needed()
    top = page.locator('[data-chart="loss"] .role-scope .background').first.bounding_box()
    assert top
    page.mouse.move(drawing.x.pixel(step), top["y"] + 40)
    cursor = page.locator('[data-chart="loss"] .cursor')
    box = cursor.bounding_box()
    assert box
    output = page.locator('[data-chart="loss"] output').first.text_content()
    return cursor.get_attribute("data-at"), output or "", box["x"] + box["width"] / 2 - drawing.x.pixel(step)


def drag(page: Page, start: float, end: float) -> tuple[float, float]:
    """Press and release the mouse on the loss, at shares of its width; returns where, in pixels."""
    plot = page.locator('[data-chart="loss"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    pressed, released = (round(box["x"] + share * box["width"]) for share in (start, end))
    page.mouse.move(pressed, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(released, box["y"] + 90, steps=3)
    page.mouse.up()
    return pressed, released


@pytest.fixture(scope="module")
def seen(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A run with three rates and one loss that is not finite, looked at in four ways."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "ko", steps=STEPS, eval_every=20)
    change_metrics(
        folder,
        lambda row: {
            "learning_rate_adapters_b": 2 * row["learning_rate_adapters_b"],
            "loss": None if row["step"] == GAP else row["loss"],
            "tokens": 5_000 * row["step"] + 100 * row["step"] ** 2,  # not in proportion to steps
        },
    )
    with opening(browser) as go:
        page = go(write_report([folder]).as_uri())
        tables = page.eval_on_selector_all("table.domains, table.memory, table.ledger", BARS)
        views = {"steps": read_drawings(page)}
        told = {step: point_at(page, views["steps"]["Training loss"], step) for step in (25, 140)}
        page.get_by_text("tokens", exact=True).first.click()
        views["tokens"] = read_drawings(page)
        page.get_by_text("steps", exact=True).first.click()
        dragged = drag(page, 0.3, 0.65)
        views["closer"] = read_drawings(page)
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": NARROW, "height": 900})
        marks = "[...document.querySelectorAll('svg.marks')]"
        wait_until(page, f"{marks}.every(svg => svg.getAttribute('width') < {NARROW})")
        views["narrow"] = read_drawings(page)
    assert tuple(views) == VIEWS
    return Seen(
        folder,
        views,
        told,
        dragged,
        {table["kind"]: [(name, bars) for name, bars in table["rows"]] for table in reversed(tables)},
        {table["kind"]: table["room"] for table in reversed(tables)},
    )


def test_a_twentieth_of_a_step_or_a_thousandth_of_a_loss_is_found(seen: Seen) -> None:
    drawing, recorded = seen.views["steps"]["Training loss"], seen.recorded("steps", "loss")
    line = drawing.named("as logged")
    for across, up in ((0.05, 1.0), (0.0, 1.001)):
        elsewhere: Recorded = [(x + across, None if y is None else y * up) for x, y in recorded]
        with pytest.raises(AssertionError):
            assert_drawn(drawing, line, elsewhere)


@pytest.mark.parametrize("view", VIEWS)
def test_every_logged_value_stands_at_its_place(view: str, seen: Seen) -> None:
    for title, name, field in LOGGED:
        drawing = seen.views[view][title]
        assert_drawn(drawing, drawing.named(name), within(seen.recorded(view, field), drawing))
    whole = seen.views["steps"]["Training loss"]
    assert [len(piece) for piece in whole.named("as logged").pieces] == [GAP - 1, STEPS - GAP]


@pytest.mark.parametrize("view", VIEWS)
def test_smoothed_curves_are_the_means_of_what_came_before(view: str, seen: Seen) -> None:
    for title, field in SMOOTHED:
        drawing, recorded = seen.views[view][title], seen.recorded(view, field)
        values = [value for _, value in recorded]
        means = [
            (x, None if value is None else mean_before(values, index, 5)) for index, (x, value) in enumerate(recorded)
        ]
        assert_drawn(drawing, drawing.named("smoothed"), within(means, drawing))


@pytest.mark.parametrize("view", VIEWS)
def test_each_domain_has_its_scores_and_the_base_models(view: str, seen: Seen) -> None:
    tokens = {0: 0} | {row["step"]: row["tokens"] for row in lines_of(seen.folder / "metrics.jsonl")}
    for domain in DOMAINS:
        drawing, recorded = seen.views[view][domain], scores(seen.folder, domain)
        base = recorded[0][1]
        place = tokens.__getitem__ if view == "tokens" else int
        trained: Recorded = [(place(step), bits) for step, bits in recorded]
        assert_drawn(drawing, drawing.named("trained"), within(trained, drawing))
        assert_drawn(drawing, drawing.named("base model"), [(0, base), (place(STEPS), base)])
        left, _, right, _ = drawing.frame
        line = drawing.named("trained")
        marked = [(x, y) for x, y in line.points if left - NEAR <= x <= right + NEAR]
        for axis in (0, 1):
            dots = [point[axis] for point, _ in drawing.dots]
            assert dots == pytest.approx([point[axis] for point in marked], abs=NEAR)
        assert {colour for _, colour in drawing.dots} == {line.look[0]}
    planned = json.loads((seen.folder / "plan.json").read_text(encoding="utf-8"))["memory_bytes"]["total"] / 2**30
    drawing = seen.views[view]["Peak memory"]
    assert_drawn(drawing, drawing.named("planned"), [(0, planned), (place(STEPS), planned)])


def test_what_falls_goes_down_the_page(seen: Seen) -> None:
    for view in ("steps", "tokens", "narrow"):
        charts = seen.views[view]
        assert charts["Training loss"].named("smoothed").rises < -50
        assert charts["korean"].named("trained").rises < -50 < 5 < charts["english"].named("trained").rises
        assert charts["Peak memory"].named("measured").rises > 1
        for domain in DOMAINS:
            (start, end) = charts[domain].named("base model").points
            assert start[1] == end[1] and start[0] < end[0]


def test_the_axes_begin_and_end_where_the_run_does(seen: Seen) -> None:
    for view in VIEWS:
        for drawing in seen.views[view].values():
            left, top, right, bottom = drawing.frame
            end = 5_000 * STEPS + 100 * STEPS**2 if view == "tokens" else STEPS
            if view != "closer":
                assert [drawing.x.pixel(0), drawing.x.pixel(end)] == pytest.approx([left, right], abs=NEAR)
            assert all(top - NEAR <= y <= bottom + NEAR for line in drawing.lines for _, y in line.points)
            if drawing.title in ("Learning rates", "Gradient norm", "Speed", "Peak memory"):
                assert drawing.y.pixel(0) == pytest.approx(bottom, abs=NEAR)


def test_dragging_looks_at_what_was_dragged_across(seen: Seen) -> None:
    asked = [seen.views["steps"]["Training loss"].x.value(pixel) for pixel in seen.dragged]
    for drawing in seen.views["closer"].values():
        left, _, right, _ = drawing.frame
        assert [drawing.x.value(left), drawing.x.value(right)] == pytest.approx(asked, abs=0.001)


def test_the_cursor_stands_at_the_mouse_and_tells_what_is_drawn_there(seen: Seen) -> None:
    losses = dict(seen.recorded("steps", "loss"))
    for step, (place, value, away) in seen.told.items():
        assert place == f"step {step}" and abs(away) < 1
        assert float(value) == pytest.approx(losses[step], rel=5e-4)  # four digits are told


def test_bars_are_as_long_as_what_they_stand_for(seen: Seen) -> None:
    found = dict(seen.tables["domains"])
    left, room = seen.rooms["domains"]
    assert list(found) == list(DOMAINS)
    most = max(max(base, now) for _, base, now in DOMAINS.values())
    signs = {"korean": "better", "english": "worse", "code": "same"}
    colours = {}
    for domain, (_, base, now) in DOMAINS.items():
        before, after = found[domain]
        assert (before[0], after[0]) == ("from", signs[domain])
        assert before[2] == after[2] == left
        # They are given in tenths of a percent.
        assert [before[3] / room, after[3] / room] == pytest.approx([base / most, now / most], abs=0.001)
        assert (after[3] > before[3]) - (after[3] < before[3]) == (now > base) - (now < base)
        colours[domain] = after[1]
    good, bad, neither = (colours[domain] for domain in DOMAINS)
    assert (good, bad, neither) == ("rgb(11, 107, 69)", "rgb(176, 38, 28)", found["code"][0][1])

    items = json.loads((seen.folder / "plan.json").read_text(encoding="utf-8"))["memory_bytes"]
    total, (left, room) = items.pop("total"), seen.rooms["memory"]
    found = dict(seen.tables["memory"])
    assert {name: bars[0][3] / room for name, bars in found.items()} == pytest.approx(
        {name: count / total for name, count in items.items()}, abs=0.001
    )
    assert all(bars[0][2] == left for bars in found.values())


def test_the_ledgers_bars_are_the_shares_of_its_tokens(seen: Seen) -> None:
    sources = json.loads((seen.folder / "ledger.json").read_text(encoding="utf-8"))["sources"]
    found, (left, room) = dict(seen.tables["ledger"]), seen.rooms["ledger"]
    for source in sources:
        tokens, bars = source["tokens"], found[source["name"]]
        assert [bar[0] for bar in bars] == [
            fate
            for fate in ("trained", "skipped", "not_reached", "held_out", "duplicates", "too_short")
            if tokens.get(fate)
        ]
        assert bars[0][2] == left and bars[-1][2] + bars[-1][3] == pytest.approx(left + room, abs=0.1)
        for fate, _, _, width in bars:
            # Two pixels lie between bars, and a bar has two at the least.
            assert width == pytest.approx(tokens[fate] / tokens["read"] * room, abs=2 * len(bars) + 2)


def test_thinned_curves_lie_on_recorded_values(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=5_000, eval_every=1_000)
    change_metrics(folder, lambda row: {"loss": 3.5 if row["step"] == SPIKE else row["loss"]})
    with opening(browser) as go:
        page = go(write_report([folder]).as_uri())
        by_steps = read_drawings(page)
        page.get_by_text("tokens", exact=True).first.click()
        by_tokens = read_drawings(page)
    for charts, over, each in ((by_steps, "step", 1), (by_tokens, "tokens", 32_640)):
        for title, name, field in [*LOGGED[:3], *((title, "smoothed", field) for title, field in SMOOTHED)]:
            drawing, recorded = charts[title], logged(folder, field, over)
            line, values = drawing.named(name), [value for _, value in recorded]
            assert len(line.pieces) == 1 and 600 < len(line.points) < 2_500
            indices = [round(drawing.x.value(x) / each) - 1 for x, _ in line.points]
            assert (indices[0], indices[-1]) == (0, 4_999) and indices == sorted(set(indices))
            assert SPIKE - 1 in indices or field != "loss"
            if name == "smoothed":  # a mean of thousands of values: some of the points
                line = Line(line.look, [line.points[::50]])
                means = [(recorded[i][0], mean_before(values, i, 100)) for i in indices[::50]]
                assert_drawn(drawing, line, [*means])
            else:
                assert_drawn(drawing, line, [recorded[i] for i in indices])


def test_each_run_has_its_own_curves(browser: Browser, tmp_path: Path) -> None:
    """A name's colour in a legend, in the tables and in every chart belongs to the same run."""
    domains = {"korean": ("train", 2.56, 1.5), "code": ("heldout", 0.8, 0.9)}
    folders = {
        "low": write_run(tmp_path / "low", learning_rate=1e-5),
        "high": write_run(tmp_path / "high", learning_rate=2e-4, steps=80, seed=1, domains=domains),
    }
    with opening(browser) as go:
        page = go(write_report([*folders.values()], tmp_path / "both.html").as_uri())
        charts = read_drawings(page)
        swatches = page.eval_on_selector_all(
            ".runs th[scope=row], .settings th:has(.swatch)",
            """cells => cells.map(cell => [cell.innerText.trim().split("\\n")[0].trim(),
                getComputedStyle(cell.querySelector(".swatch")).backgroundColor])""",
        )
    loss = charts["Training loss"]
    assert sorted(swatches) == sorted(2 * [[name, loss.legend[name][0]] for name in folders])
    assert loss.legend["low"] != loss.legend["high"]
    for name, folder in folders.items():
        for title, field in SMOOTHED:
            drawing, recorded = charts[title], logged(folder, field)
            values = [value for _, value in recorded]
            means: Recorded = [(x, mean_before(values, index, 5)) for index, (x, _) in enumerate(recorded)]
            assert_drawn(drawing, drawing.behind(name), recorded)
            assert_drawn(drawing, drawing.named(name), means)
        rates = charts["Learning rates"]
        for group, field in (("adapters a, adapters b", "adapters_a"), ("embeddings", "embeddings")):
            assert_drawn(rates, rates.named(f"{name} · {group}"), logged(folder, f"learning_rate_{field}"))
        memory = charts["Peak memory"]
        assert_drawn(memory, memory.named(f"{name} · measured"), logged(folder, "peak_memory_bytes"))
        for domain in domains:
            drawing, recorded = charts[domain], scores(folder, domain)
            assert_drawn(drawing, drawing.named(name), [*recorded])
    english = charts["english"]  # of one run only
    assert_drawn(english, english.named("low"), [*scores(folders["low"], "english")])
    assert len(english.lines) == 2 and "high" not in english.legend
