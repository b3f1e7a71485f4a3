"""Arms of `benchmarks.ablation` as an SVG that reads in light and in dark: how the loss falls, and what is kept.

All that is drawn is of the seeds that all shown arms share: a mean over other rows is none to hold against. Above
stands the training loss against tokens, and beside it the same less the first arm's on the same rows: they are drawn
alike, so that what single rows cost falls out. Below, each arm's held-out text: what was learned to the left, what
was forgotten upwards, with the seeds' 95 % intervals. Replay has no curve, since a loss on other text is none of the
same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from benchmarks.ablation_arms import ARMS, CORE, arm_over
from benchmarks.ablation_table import COMMON, LANGUAGE, OWN, Ladder, Named, bits, label, ladders
from benchmarks.estimate import Estimate
from steep.report.curves import smooth, smoothing_span
from steep.report.figures import short

WIDTH, HEIGHT = 860, 760
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")
DASHES = ("", "7 3", "2 3")
SHOWN_FROM = 0.05  # share of the steps that is left out: the warm-up's fall would flatten the rest
STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
    .head { font-size: 16px; font-weight: 600; }
    .note { font-size: 12px; fill: #57606a; }
    .axis { stroke: #d0d7de; stroke-width: 1; }
    .curve, .mark { fill: none; stroke-width: 1.6; }
    .mark { stroke-dasharray: none; }
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .note { fill: #9198a1; } .axis { stroke: #3d444d; } }
  """

Rows = Sequence[dict[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]  # tokens, nats


@dataclasses.dataclass(frozen=True)
class Panel:
    """A pair of axes: where they stand, in pixels, and what they span."""

    left: float
    top: float
    width: float
    height: float
    across: tuple[float, float]
    up: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.across[0]) / (self.across[1] - self.across[0])

    def y(self, value: float) -> float:
        return self.top + self.height * (self.up[1] - value) / (self.up[1] - self.up[0])

    def frame(self, head: str, below: str, name: Any) -> Iterator[str]:
        """Axes with round numbers; `name` writes those below."""
        bottom = self.top + self.height
        yield f'<text x="{self.left}" y="{self.top - 14}">{escape(head)}</text>'
        yield _line(self.left, bottom, self.left + self.width, bottom)
        yield _line(self.left, self.top, self.left, bottom)
        for value in ticks(*self.up):
            yield _note(self.left - 8, self.y(value) + 4, f"{value:.4g}", "end")
        for value in ticks(*self.across):
            yield _note(self.x(value), bottom + 18, name(value), "middle")
        yield _note(self.left, bottom + 38, below, "start")

    def curve(self, look: str, curve: Curve) -> str:
        points = " ".join(f"{self.x(count):.1f},{self.y(loss):.1f}" for count, loss in zip(*curve, strict=True))
        return f'<polyline class="curve" {look} points="{points}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, look: str = 'class="axis"') -> str:
    return f'<line {look} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _note(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="note" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within the range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * step for size in (1, 2, 5, 10) if (high - low) / (size * step) <= 9)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(max(values), min(values) + 1e-6)
    return low - margin * (high - low), high + margin * (high - low)


def mean_curve(rows: Rows, less: Rows | None = None) -> Curve:
    """The smoothed loss, mean over the seeds; steps that some seed has no finite loss of are left out.

    Args:
        less: runs of the same seeds, in the same order, whose losses are taken off, step by step.
    """
    curves = []
    for row, other in zip(rows, less or [None] * len(rows), strict=True):
        losses = _losses(row)
        if other is not None:
            taken = _losses(other)
            losses = {count: losses[count] - taken[count] for count in losses.keys() & taken.keys()}
        curves.append(losses)
    tokens = sorted(set.intersection(*(set(losses) for losses in curves)))
    losses = np.mean([[losses[count] for count in tokens] for losses in curves], axis=0)
    smoothed = smooth(losses.tolist(), smoothing_span(len(tokens)))
    first = math.ceil(SHOWN_FROM * len(tokens))
    return np.array(tokens[first:]), np.array(smoothed[first:], float)


def _losses(row: dict[str, Any]) -> dict[int, float]:
    return dict(zip(row["curve"]["tokens"], row["curve"]["loss"], strict=True))


def runs_of(ladder: Ladder, arms: Collection[str]) -> tuple[str, dict[Named, Rows]]:
    """Runs of the arms of the seeds that all have, by seed: at their own rates where all that have runs have such, else
    at the common one."""
    shown = [name for name in ladder.names if name[0] in arms]
    way = OWN if all(ladder.by_seed(name, OWN) for name in shown) else COMMON
    found = {name: runs for name in shown if (runs := ladder.by_seed(name, way))}
    shared = sorted(set.intersection(*(set(runs) for runs in found.values()))) if found else []
    return way, {name: [runs[seed] for seed in shared] for name, runs in found.items()}


def figure(lines: Rows, common: float, arms: Collection[str] = CORE) -> str:
    """The SVG of the first work of the lines.

    Raises:
        SystemExit: none of the arms has runs, or no seed is one of all that have.
    """
    found = ladders(lines, common)
    way, runs = runs_of(found[0], arms) if found else (COMMON, {})
    if not runs:
        whose = "the core's arms" if arms is CORE else ", ".join(arms)
        raise SystemExit(f"--figure: the file has no runs of {whose}.")
    if not all(runs.values()):
        raise SystemExit(f"--figure: {', '.join(map(label, runs))} share no seed: leave one out of --arms.")
    ladder = found[0]
    looks = {name: _look(number) for number, name in enumerate(runs)}
    head = f"{ladder.work.model} learns {ladder.work.text}, {way}"
    said = [f"{label(name)}: {_scores(ladder, rows)} (n = {len(rows)})" for name, rows in runs.items()]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="t d">',
        f'<title id="t">{escape(head)}</title>',
        f'<desc id="d">{escape("; ".join(said))}.</desc>',
        f"<style>{STYLE}</style>",
        f'<text class="head" x="16" y="28">{escape(head)}</text>',
        *_loss(runs, looks),
        *_learned(ladder, runs, looks),
        *_legend(runs, looks),
        "</svg>",
        "",
    ])  # fmt: skip


def _look(number: int) -> str:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _scores(ladder: Ladder, rows: Rows) -> str:
    return ", ".join(
        f"{LANGUAGE[domain]} {Estimate.of([bits(row, domain) for row in rows]).mean:.3f} bits a byte"
        for domain in (ladder.new, ladder.old)
    )


def _loss(runs: Mapping[Named, Rows], looks: Mapping[Named, str]) -> Iterator[str]:
    """Two panels: the loss, and the loss less the first arm's."""
    alike = {name: rows for name, rows in runs.items() if not ARMS[name[0]].replay}
    if not alike:
        return
    first = next(iter(alike))
    curves = {name: mean_curve(rows) for name, rows in alike.items()}
    less = {name: mean_curve(rows, alike[first]) for name, rows in alike.items() if name != first}
    for kind, drawn, left, title in (
        ("loss", curves, 64, "Training loss, nats a token"),
        ("difference", less, 494, f"Less that of {label(first)} on the same rows"),
    ):
        yield f'<g id="{kind}">'
        drawn = {name: curve for name, curve in drawn.items() if len(curve[0])}  # the rest has no finite loss
        if drawn:
            tokens, losses = (np.concatenate([curve[part] for curve in drawn.values()]) for part in (0, 1))
            panel = Panel(left, 80, 350, 250, (0, float(tokens.max())), span(losses.tolist(), 0.02))
            below = f"tokens; exponential mean, without the first {SHOWN_FROM:.0%} of the steps"
            yield from panel.frame(title, below, short)
            yield from (panel.curve(looks[name], curve) for name, curve in drawn.items())
        yield "</g>"


def _learned(ladder: Ladder, runs: Mapping[Named, Rows], looks: Mapping[Named, str]) -> Iterator[str]:
    """One panel: held-out bits a byte of both texts, a cross for each arm, and what the base has of the old text."""
    found = {
        name: tuple(Estimate.of([bits(row, domain) for row in rows]) for domain in (ladder.new, ladder.old))
        for name, rows in runs.items()
    }
    base = float(np.mean([bits(row, ladder.old, "before") for rows in runs.values() for row in rows]))
    across = [end for new, _ in found.values() for end in (new.low, new.high)]
    up = [base, *(end for _, old in found.values() for end in (old.low, old.high))]
    panel = Panel(64, 440, 520, 250, span(across, 0.05), span(up, 0.05))
    new, old = LANGUAGE[ladder.new], LANGUAGE[ladder.old]
    yield '<g id="learned">'
    bars = (
        "Bars: 95 % intervals" if any(part.half is not None for pair in found.values() for part in pair) else "One seed"
    )
    below = f"{new}, bits a byte: fewer are better. {bars}; dashed: what the base has of {old}"
    yield from panel.frame(f"Held out: {old}, bits a byte", below, lambda value: f"{value:.4g}")
    yield _line(
        panel.left, panel.y(base), panel.left + panel.width, panel.y(base), 'class="axis" stroke-dasharray="5 4"'
    )
    placed: list[tuple[float, float]] = []
    for name, (learned, kept) in found.items():
        x, y = panel.x(learned.mean), panel.y(kept.mean)
        look = f'class="curve" {looks[name]}'
        yield _line(panel.x(learned.low), y, panel.x(learned.high), y, look)
        yield _line(x, panel.y(kept.low), x, panel.y(kept.high), look)
        yield f'<circle class="mark" {looks[name]} cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        beside = x + 7, y + _first_free(x, y, placed)
        placed.append(beside)
        yield _note(*beside, name[0], "start")
    yield "</g>"


def _first_free(x: float, y: float, placed: Sequence[tuple[float, float]]) -> float:
    """How far below a mark its name stands: where no other of those `placed` is in the way, or else right above."""
    offsets = (-6.0, 16.0, -20.0, 30.0, -34.0)
    return next(
        (down for down in offsets if all(abs(x + 7 - left) > 60 or abs(y + down - line) > 12 for left, line in placed)),
        offsets[0],
    )


def _legend(runs: Mapping[Named, Rows], looks: Mapping[Named, str]) -> Iterator[str]:
    left = 620
    for number, (name, rows) in enumerate(runs.items()):
        line = 450 + 22 * number
        yield _line(left, line, left + 26, line, f'class="curve" {looks[name]}')
        yield f'<text x="{left + 34}" y="{line + 4}">{escape(label(name))} (n = {len(rows)})</text>'
    if any(arm_over(*name).replay for name in runs):
        yield _note(left, 450 + 22 * len(runs), "replay has no curve: its text is other", "start")
