"""The curves of the page: which there are, smoothed, and thinned to what a screen can show.

Points are thinned in groups of neighbours, of which the lowest and the highest stay: no peak is lost, and no value is
invented. Means are taken over all points before that.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steep.report.read import Run
from steep.terminal import why_no_loss

MAX_POINTS = 12_000  # of all curves together: about 350 kB of the page
FEWEST_POINTS = 60  # of one curve, however many there are
_BASE = {"colour": "base", "dash": 1, "weight": "line"}

Values = list[float | None]


@dataclass
class Curve:
    """A line: y over steps, and over tokens. `None` is a gap.

    Attributes:
        colour: number of a colour, from 1, or ``base``.
        dash: number of a dash pattern; 0 is a whole line. There are four.
        weight: ``raw`` (thin and pale) or ``line``.
    """

    name: str
    steps: list[int]
    tokens: list[float]
    values: Values
    colour: int | str = 1
    dash: int = 0
    weight: str = "line"

    def thinned(self, points: int) -> Curve:
        kept = thin(self.values, points)
        return Curve(
            self.name,
            [self.steps[i] for i in kept],
            [self.tokens[i] for i in kept],
            [self.values[i] for i in kept],
            self.colour,
            self.dash,
            self.weight,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "colour": self.colour,
            "dash": self.dash,
            "weight": self.weight,
            "step": self.steps,
            "tokens": [round(count) for count in self.tokens],
            "y": [None if value is None else float(f"{value:.6g}") for value in self.values],
        }


@dataclass
class Chart:
    """Curves that share a vertical axis.

    Attributes:
        group: the part of the page that it stands in.
        format: d3's number format of the axis; empty for Vega's choice.
        zero: whether the axis begins at zero.
        least: what the axis spans at the least, so that noise does not look like a change.
    """

    id: str
    group: str
    title: str
    unit: str
    format: str = ""
    zero: bool = False
    least: float = 0.0
    note: str = ""
    curves: list[Curve] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        names = ("id", "group", "title", "unit", "format", "zero", "least", "note")
        return {name: getattr(self, name) for name in names} | {"curves": [curve.as_dict() for curve in self.curves]}


def thin(values: Sequence[float | None], points: int) -> list[int]:
    """The numbers of the values that stay: all if there are few; else the first, the last, and of each group of
    neighbours the lowest, the highest and a gap, if it has one. About `points`, never more than half as many again."""
    count = len(values)
    if count <= points:
        return list(range(count))
    groups = max(1, points // 2 - 1)
    kept = {0, count - 1}
    for group in range(groups):
        members = range(group * count // groups, (group + 1) * count // groups)
        there = [(value, i) for i in members if (value := values[i]) is not None]
        if len(there) < len(members):
            kept.add(next(i for i in members if values[i] is None))
        if there:
            kept |= {min(there)[1], max(there)[1]}
    return sorted(kept)


def smoothing_span(count: int) -> int:
    """Log lines that the smoothed loss looks back over: a fiftieth of all, at least 5."""
    return max(5, count // 50)


def smooth(values: Sequence[float | None], span: int) -> Values:
    """Exponential mean with weight 2 / (span + 1) on the newest value, corrected for its start; gaps stay gaps."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result: Values = []
    for value in values:
        if value is None:
            result.append(None)
            continue
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def memory_unit(count: float) -> tuple[str, float]:
    return ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20)


def charts(runs: Sequence[Run]) -> tuple[list[Chart], str]:
    """All charts that have something to show, thinned, and what is to be said about that; empty if nothing was."""
    found = [
        _loss(runs),
        *_domains(runs),
        _rates(runs),
        _gradient_norm(runs),
        _speed(runs),
        _memory(runs),
    ]
    found = [chart for chart in found if any(v is not None for curve in chart.curves for v in curve.values)]
    number = max(1, sum(len(curve.values) > FEWEST_POINTS for chart in found for curve in chart.curves))
    points = max(FEWEST_POINTS, MAX_POINTS // number)
    longest = max((len(curve.values) for chart in found for curve in chart.curves), default=0)
    for chart in found:
        chart.curves = [curve.thinned(points) for curve in chart.curves]
    if longest <= points:
        return found, ""
    share = math.ceil(longest / max(1, points // 2 - 1))
    return found, (
        f"Curves are thinned to about {points:,} points. The longest has {longest:,}: of each {share:,} neighbours the "
        "lowest and the highest value are drawn, so no peak is hidden. Smoothed curves are means over all points."
    )


def _named(run: Run, runs: Sequence[Run], name: str) -> str:
    return name if len(runs) == 1 else f"{run.label} · {name}"


def _look(number: int) -> dict[str, Any]:
    """Colour and dashes of a run: colour alone would not tell runs apart for everybody, nor in print."""
    return {"colour": number, "dash": number - 1}


def _over(run: Run, values: Values, name: str, **look: Any) -> Curve:
    return Curve(name, *run.logged, values, **look)


def _column(run: Run, key: str) -> Values:
    return [row.get(key) for row in run.metrics]


def _loss(runs: Sequence[Run]) -> Chart:
    chart = Chart("loss", "training", "Training loss", "nats a token")
    _add_smoothed(chart, runs, "loss")
    gaps = Counter(why_no_loss(row) for run in runs for row in run.metrics if row.get("loss") is None)
    if gaps:
        chart.note += f" Gaps: {', '.join(f'{word} ({count:,} log lines)' for word, count in sorted(gaps.items()))}."
    return chart


def _add_smoothed(chart: Chart, runs: Sequence[Run], key: str) -> None:
    """Each run's values as logged, and their mean. Of several runs both have one name, so that one click hides both."""
    for number, run in enumerate(runs, 1):
        values = _column(run, key)
        span = smoothing_span(len(values))
        several = len(runs) > 1
        raw = _over(run, values, run.label if several else "as logged", colour=number, weight="raw")
        mean = _over(run, smooth(values, span), run.label if several else "smoothed", **_look(number))
        chart.curves += [raw, mean]
        lines = "a fiftieth of a run's" if several else f"{span:,}"
        chart.note = f"Smoothed: exponential mean over about {lines} log lines."


def _rates(runs: Sequence[Run]) -> Chart:
    """A curve for each group of parameters. Groups with the same rates share one, since one would hide the other."""
    chart = Chart("learning-rates", "training", "Learning rates", "by group", "~e", zero=True)
    for number, run in enumerate(runs, 1):
        prefix = "learning_rate_"
        keys = list(dict.fromkeys(key for row in run.metrics for key in row if key.startswith(prefix)))
        groups: list[tuple[list[str], Values]] = []
        for key in keys or ["learning_rate", "embedding_learning_rate"]:
            values = _column(run, key)
            name = key.removeprefix(prefix).replace("_", " ")
            twin = next((names for names, others in groups if others == values), None)
            if twin is None:
                groups.append(([name], values))
            else:
                twin.append(name)
        for index, (names, values) in enumerate(groups):
            look = {"colour": index + 1} if len(runs) == 1 else {"colour": number}
            chart.curves.append(_over(run, values, _named(run, runs, ", ".join(names)), dash=index, **look))
    return chart


def _gradient_norm(runs: Sequence[Run]) -> Chart:
    chart = Chart("gradient-norm", "training", "Gradient norm", "before clipping", zero=True)
    _add_smoothed(chart, runs, "grad_norm")
    return chart


def _speed(runs: Sequence[Run]) -> Chart:
    chart = Chart("speed", "machine", "Speed", "tokens/s, evaluating and saving not counted", "~s", zero=True)
    _add_smoothed(chart, runs, "tokens_per_second")
    return chart


def _memory(runs: Sequence[Run]) -> Chart:
    planned = [run.plan.get("memory_bytes", {}).get("total") for run in runs]
    peaks = [run.last.get("peak_memory_bytes") for run in runs]
    unit, size = memory_unit(max((count for count in [*planned, *peaks] if count), default=0))
    chart = Chart("memory", "machine", "Peak memory", f"{unit}, highest so far", zero=True)
    for number, (run, plan) in enumerate(zip(runs, planned, strict=True), 1):
        values: Values = [count / size if count is not None else None for count in _column(run, "peak_memory_bytes")]
        chart.curves.append(_over(run, values, _named(run, runs, "measured"), **_look(number)))
        if plan and run.metrics:
            look = _BASE if len(runs) == 1 else _look(number) | {"weight": "raw"}
            chart.curves.append(_level(run, plan / size, _named(run, runs, "planned"), look))
    return chart


def _level(run: Run, value: float, name: str, look: dict[str, Any]) -> Curve:
    """A level line from the start of the run to where it is."""
    end = max(run.step, 1)
    return Curve(name, [0, end], [0, _tokens_at(run, end)], [value, value], **look)


def _tokens_at(run: Run, step: int) -> float:
    """Tokens that the run had trained at a step; between two log lines in proportion."""
    steps, tokens = run.logged
    after = bisect_right(steps, step)
    if after == len(steps):
        return tokens[-1] if tokens else 0.0
    start, count = (steps[after - 1], tokens[after - 1]) if after else (run.first_step, 0.0)
    if step <= start:  # a branch has scores from before it began
        return count
    return count + (tokens[after] - count) * (step - start) / (steps[after] - start)


def _domains(runs: Sequence[Run]) -> list[Chart]:
    """Bits per byte of each domain over the run, with a level line at the base model's."""
    roles = {domain: rows[-1].get("role", "heldout") for run in runs for domain, rows in run.domains.items()}
    found = []
    for index, (domain, role) in enumerate(sorted(roles.items(), key=lambda item: item[1] != "train")):
        chart = Chart(f"domain-{index}", "domains", domain, f"bits per byte · {role}", least=0.1)
        bases: set[float] = set()
        for number, run in enumerate(runs, 1):
            rows = run.domains.get(domain, [])
            if not rows:
                continue
            values: Values = [row["bits_per_byte"] for row in rows]
            if rows[0]["step"] == 0 and values[0] is not None and values[0] not in bases:
                bases.add(values[0])
                chart.curves.append(_level(run, values[0], _named(run, runs, "base model"), dict(_BASE)))
            steps = [row["step"] for row in rows]
            tokens = [_tokens_at(run, step) for step in steps]
            name = run.label if len(runs) > 1 else "trained"
            chart.curves.append(Curve(name, steps, tokens, values, **_look(number)))
        if len(runs) > 1 and len(bases) == 1:  # one line for all
            next(curve for curve in chart.curves if curve.colour == "base").name = "base model"
        found.append(chart)
    return found
