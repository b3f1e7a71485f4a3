"""What stands on the page, read back: a drawn point is taken to its value through the labels of its axes.

Nothing of the page's script or its data is asked, only the picture: where the labels and the lines are in the window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

Point = tuple[float, float]
Recorded = list[tuple[float, float | None]]  # values over steps or tokens; None is a gap

# Pixels. The page has values with six digits and Vega writes paths with three decimals: that makes 0.001. One step of
# the longest run of these tests is a fifth of a pixel.
NEAR = 0.01
# Vega moves axes by half a pixel, so that their lines are sharp, and marks not.
AXES_MOVED = 0.5
# Vega rounds grid lines to whole pixels. Labels of the horizontal axis stand where they belong.
GRID_ROUNDED = 0.5
PREFIXES = {"": 1.0, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9}

READ = """figures => figures.map(figure => {
    const find = (selector) => [...figure.querySelectorAll(selector)];
    const place = (node) => { const m = node.getScreenCTM(); return [m.a, m.d, m.e, m.f, m.b, m.c]; };
    const look = (node) => {
        const style = getComputedStyle(node);
        return {colour: style.stroke, dashes: node.getAttribute("stroke-dasharray") ?? "",
                thin: parseFloat(style.strokeWidth) <= 1};
    };
    const labels = (axis) => find(`.role-axis[aria-label^="${axis}-axis"] .role-axis-label text`)
        .map(text => ({text: text.textContent, place: place(text)}));
    const frame = figure.querySelector(".role-scope .background").getBoundingClientRect();
    return {
        title: figure.querySelector("h3").firstChild.textContent.trim(),
        frame: [frame.left, frame.top, frame.right, frame.bottom],
        x: labels("X"),
        y: labels("Y"),
        grid: find(".role-axis-grid line").map(place),
        legend: find(".legend button").map(button => ({
            name: button.querySelector("span").textContent, ...look(button.querySelector("svg line"))})),
        lines: find(".mark-line path").map(path => ({path: path.getAttribute("d"), place: place(path), ...look(path)})),
        dots: find(".mark-symbol path").map(path => ({place: place(path), colour: getComputedStyle(path).fill})),
    };
})"""


def number(label: str) -> float:
    """``1,500``, ``2.5M`` and ``5e-5`` as numbers."""
    found = re.fullmatch(r"([−\d.,]+(?:e[−-]?\d+)?)([µmkMG]?)", label)
    assert found, label
    return float(found[1].replace(",", "").replace("−", "-")) * PREFIXES[found[2]]


@dataclass(frozen=True)
class Axis:
    """An axis by its labels: values, and the pixels of the window where they stand."""

    ticks: list[tuple[float, float]]

    def pixel(self, value: float) -> float:
        (low, start), (high, end) = self.ticks[0], self.ticks[-1]
        return start + (value - low) / (high - low) * (end - start)

    def value(self, pixel: float) -> float:
        (low, start), (high, end) = self.ticks[0], self.ticks[-1]
        return low + (pixel - start) / (end - start) * (high - low)


@dataclass(frozen=True)
class Line:
    """A drawn line, in pixels of the window; between two pieces of it is a gap."""

    look: tuple[str, str, bool]  # colour, dashes, whether it is thin
    pieces: list[list[Point]]

    @property
    def points(self) -> list[Point]:
        return [point for piece in self.pieces for point in piece]

    @property
    def rises(self) -> float:
        """By how many pixels its end stands above its start. The window's pixels count downwards."""
        return self.points[0][1] - self.points[-1][1]


@dataclass(frozen=True)
class Drawing:
    """A chart as it is drawn.

    Attributes:
        frame: left, top, right and bottom of what lies between the axes, in pixels of the window.
        legend: the look that each name has in the legend.
        dots: places and colours of the points that are marked.
    """

    title: str
    frame: tuple[float, float, float, float]
    x: Axis
    y: Axis
    legend: dict[str, tuple[str, str, bool]]
    lines: list[Line]
    dots: list[tuple[Point, str]]

    def named(self, name: str) -> Line:
        """The only line that looks as the legend says."""
        (line,) = [line for line in self.lines if line.look == self.legend[name]]
        return line

    def behind(self, name: str) -> Line:
        """The only thin line of the colour of a name."""
        (line,) = [line for line in self.lines if line.look[2] and line.look[0] == self.legend[name][0]]
        return line


def read_drawings(page: Page) -> dict[str, Drawing]:
    """All charts of a page by their titles. The axes are found to be even, and to rise to the right and upwards."""
    found = [_drawing(figure) for figure in page.eval_on_selector_all("figure[data-chart]", READ)]
    assert len({drawing.title for drawing in found}) == len(found) > 0
    return {drawing.title: drawing for drawing in found}


def _drawing(figure: dict[str, Any]) -> Drawing:
    # Where an axis changes, new labels come after those that stay.
    x = Axis(sorted((number(label["text"]), _at(label["place"])[0] - AXES_MOVED) for label in figure["x"]))
    rows = [_at(place)[1] - AXES_MOVED for place in figure["grid"]]
    y = Axis(sorted((number(label["text"]), row) for label, row in zip(figure["y"], rows, strict=True)))
    for label, row in zip(figure["y"], rows, strict=True):  # labels stand beside their lines
        assert _at(label["place"])[1] == pytest.approx(row + 4, abs=2)
    for axis, rounded in ((x, 0), (y, GRID_ROUNDED)):
        assert len(axis.ticks) >= 3
        assert [row for _, row in axis.ticks] == pytest.approx(
            [axis.pixel(value) for value, _ in axis.ticks], abs=rounded + 0.01
        )
        assert len({value for value, _ in axis.ticks}) == len(axis.ticks)
    assert x.ticks[0][1] < x.ticks[-1][1] and y.ticks[0][1] > y.ticks[-1][1]
    return Drawing(
        figure["title"],
        figure["frame"],
        x,
        y,
        {row["name"]: _look(row) for row in figure["legend"]},
        [Line(_look(line), _pieces(line["path"], line["place"])) for line in figure["lines"]],
        [(_at(dot["place"]), dot["colour"]) for dot in figure["dots"]],
    )


def _look(row: dict[str, Any]) -> tuple[str, str, bool]:
    return row["colour"], row["dashes"].replace(",", " "), row["thin"]


def _at(place: list[float], x: float = 0.0, y: float = 0.0) -> Point:
    across, down, left, top, *turned = place
    assert turned == [0, 0] and (across, down) == (1, 1)  # else the style sheet has shrunk it, and blurred its lines
    return left + x, top + y


def _pieces(path: str, place: list[float]) -> list[list[Point]]:
    pieces: list[list[Point]] = []
    for command, given in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        if command == "Z":  # ends a piece of one point
            assert len(pieces[-1]) == 1
            continue
        assert command in "ML", path
        if command == "M":
            pieces.append([])
        x, y = given.split(",")
        pieces[-1].append(_at(place, float(x), float(y)))
    return pieces


def assert_drawn(drawing: Drawing, line: Line, recorded: Recorded) -> None:
    """The line goes through all that is recorded and nothing else, and has its gaps."""
    pieces: list[list[Point]] = [[]]
    for x, y in recorded:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((drawing.x.pixel(x), drawing.y.pixel(y)))
    pieces = [piece for piece in pieces if piece]
    assert [len(piece) for piece in line.pieces] == [len(piece) for piece in pieces]
    for drawn, expected in zip(line.pieces, pieces, strict=True):
        assert [x for x, _ in drawn] == pytest.approx([x for x, _ in expected], abs=NEAR)
        assert [y for _, y in drawn] == pytest.approx([y for _, y in expected], abs=NEAR)
