"""Loss against tokens of the arms of `benchmarks.ablation`, as an SVG that reads in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from benchmarks.ablation_arms import CORE
from benchmarks.ablation_table import COMMON, OWN, Ladder, Named, label, ladders
from steep.report.curves import smooth, smoothing_span
from steep.report.figures import short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 64, 250, 52, 52
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")
DASHES = ("", "7 3", "2 3")
SHOWN_FROM = 0.05  # share of the steps that is left out: the warm-up's fall would flatten the rest
STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
    .head { font-size: 16px; font-weight: 600; }
    .note { font-size: 12px; fill: #57606a; }
    .axis { stroke: #d0d7de; stroke-width: 1; }
    .curve { fill: none; stroke-width: 1.6; }
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .note { fill: #9198a1; } .axis { stroke: #3d444d; } }
  """


def mean_curve(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the smoothed loss, mean over the seeds; steps that some seed has no finite loss of are left out."""
    by_step = [dict(zip(row["curve"]["tokens"], row["curve"]["loss"], strict=True)) for row in rows]
    tokens = sorted(set.intersection(*(set(losses) for losses in by_step)))
    losses = np.mean([[losses[count] for count in tokens] for losses in by_step], axis=0)
    smoothed = smooth(losses.tolist(), smoothing_span(len(tokens)))
    first = math.ceil(SHOWN_FROM * len(tokens))
    return np.array(tokens[first:]), np.array(smoothed[first:], float)


def curves_of(ladder: Ladder) -> Iterator[tuple[Named, str, int, np.ndarray, np.ndarray]]:
    """Arms of the core: at their own rates where all that have runs have such, else at the common one."""
    core = [name for name in ladder.names if name[0] in CORE]
    way = OWN if all(ladder.by_seed(name, OWN) for name in core) else COMMON
    for name in core:
        rows = list(ladder.by_seed(name, way).values())
        if rows:
            tokens, losses = mean_curve(rows)
            if len(tokens):
                yield name, way, len(rows), tokens, losses


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers within the range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * step for size in (1, 2, 5, 10) if (high - low) / (size * step) <= 9)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def figure(lines: Sequence[dict[str, Any]], common: float) -> str:
    """The SVG of the first work of the lines.

    Raises:
        SystemExit: no arm of the core has runs.
    """
    found = ladders(lines, common)
    curves = list(curves_of(found[0])) if found else []
    if not curves:
        raise SystemExit("--figure: the file has no runs of the core's arms.")
    work, way = found[0].work, curves[0][1]
    tokens, losses = (np.concatenate([curve[part] for curve in curves]) for part in (3, 4))
    low, high = float(losses.min()), max(float(losses.max()), float(losses.min()) + 1e-6)
    most = float(tokens.max())

    def x(count: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * count / most

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    head = f"{work.model} learns {work.text}: training loss, {way}"
    said = [f"{label(name)}: {losses[-1]:.3f} at the end (n = {n})" for name, _, n, _, losses in curves]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="t d">',
        f'<title id="t">{escape(head)}</title>',
        f'<desc id="d">{escape("; ".join(said))}.</desc>',
        f"<style>{STYLE}</style>",
        f'<text class="head" x="16" y="28">{escape(head)}</text>',
        f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{HEIGHT - BOTTOM}"/>',
    ]
    for loss in ticks(low, high):
        parts.append(f'<text class="note" x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.4g}</text>')
    for count in ticks(0, most):
        parts.append(
            f'<text class="note" x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{short(count)}</text>"
        )
    parts.append(
        f'<text class="note" x="{LEFT}" y="{HEIGHT - 12}">tokens; nats a token, exponential mean, averaged over n '
        f"seeds; the first {SHOWN_FROM:.0%} of the steps are left out</text>"
    )
    for number, (name, _, n, counts, values) in enumerate(curves):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        look = f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        points = " ".join(f"{x(count):.1f},{y(loss):.1f}" for count, loss in zip(counts, values, strict=True))
        parts.append(f'<polyline class="curve" {look} points="{points}"/>')
        line, left = TOP + 14 + 22 * number, WIDTH - RIGHT + 16
        parts.append(f'<line class="curve" {look} x1="{left}" y1="{line}" x2="{left + 26}" y2="{line}"/>')
        parts.append(f'<text x="{left + 34}" y="{line + 4}">{escape(label(name))} (n = {n})</text>')
    return "\n".join([*parts, "</svg>", ""])
