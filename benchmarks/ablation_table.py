"""What the lines of `benchmarks.ablation` come to: tables, intervals, and where a step is not what the advice says.

A mean is over seeds, with a 95 % interval by Student's t. A step of the ladder is the mean of differences between an
arm and the one that it stands on, seed by seed: these had the same rows in the same order. Each figure says how many
runs it is of; of one there is no interval.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.ablation_arms import ARMS, BESIDE, CORE, FULL, NEW, OLD, UNSEEN, Arm, arm_over
from benchmarks.ablation_run import GRID, NEW_TEXTS, OLD_DOMAIN, RUN, UNSEEN_DOMAIN, Work
from benchmarks.estimate import Estimate
from benchmarks.pages import markdown, with_part

Row = dict[str, Any]
Named = tuple[str, str]  # an arm, and the rung that it stands on or ""

BEGIN, END = "<!-- benchmarks.ablation: begin -->", "<!-- benchmarks.ablation: end -->"
LANGUAGE = {"ko": "Korean", "med": "medicine", OLD_DOMAIN: "English", UNSEEN_DOMAIN: "English Wikipedia"}
COMMON, OWN = "at the common rate", "each at its own rate"
WORK = [field.name for field in dataclasses.fields(Work)]


# ---- rates


def settled_loss(row: Row) -> float:
    """Mean training loss of the last quarter of a run's steps."""
    losses = row["curve"]["loss"]
    if len(losses) < row["steps"]:
        return float("inf")  # some were not finite
    return float(np.mean(losses[-max(1, len(losses) // 4) :]))


def grid_of(lines: Iterable[Row], grid: Work, arm: str, over: str) -> dict[float, Row]:
    """Rate → the arm's line of the grid; the lowest rate first.

    Raises:
        SystemExit: they are of several seeds, whose losses are of other rows.
    """
    wanted = {**dataclasses.asdict(grid), "part": GRID, "arm": arm, "over": over}
    found = [row for row in lines if wanted.items() <= row.items()]
    if len(seeds := sorted({row["seed"] for row in found})) > 1:
        raise SystemExit(f"The grid of {arm} has the seeds {', '.join(map(str, seeds))}: a rate is chosen on one.")
    return {row["learning_rate"]: row for row in sorted(found, key=lambda row: row["learning_rate"])}


def own_rate(lines: Iterable[Row], grid: Work, arm: str, over: str) -> float | None:
    """The arm's best rate; None where its grid has not two lines, or no loss of them is finite."""
    losses = {rate: settled_loss(row) for rate, row in grid_of(lines, grid, arm, over).items()}
    best = min(losses, key=losses.__getitem__) if len(losses) > 1 else None
    return None if best is None or math.isinf(losses[best]) else best


# ---- the lines of one work


class Ladder:
    """The runs of one work, and its grid.

    Raises:
        SystemExit: runs that should share rows or held-out text do not, or two arms computed the same.
    """

    def __init__(self, work: Work, lines: Sequence[Row], common: float) -> None:
        self.work, self.lines, self.common = work, lines, common
        self.new, self.old = NEW_TEXTS[work.text], OLD_DOMAIN
        mine = dataclasses.asdict(work)
        self.runs = [row for row in lines if row["part"] == RUN and mine.items() <= row.items()]
        grid = dataclasses.asdict(work.of_grid)
        self.grid_runs = [row for row in lines if row["part"] == GRID and grid.items() <= row.items()]
        order = list(ARMS)
        names = {(row["arm"], row["over"]) for row in [*self.runs, *self.grid_runs]}
        self.names: list[Named] = sorted(names, key=lambda name: (order.index(name[0]), name[1]))
        self._refuse_unlike()

    def _refuse_unlike(self) -> None:
        rows_of: dict[tuple[int, float], Row] = {}
        curves: dict[tuple[int, str], Row] = {}
        for row in self.runs:
            shared = row["heldout"].keys() & self.runs[0]["heldout"].keys()
            if any(row["heldout"][domain] != self.runs[0]["heldout"][domain] for domain in shared):
                raise SystemExit(f"{row['arm']} and {self.runs[0]['arm']} were scored on other held-out text.")
            other = rows_of.setdefault((row["seed"], row["replay_share"]), row)
            if row["targets"] != other["targets"]:
                raise SystemExit(f"{row['arm']} and {other['arm']} had other rows (seed {row['seed']}).")
            other = curves.setdefault((row["seed"], json.dumps(row["curve"]["loss"])), row)
            if (row["arm"], row["over"], row["learning_rate"]) != (other["arm"], other["over"], other["learning_rate"]):
                raise SystemExit(
                    f"{other['arm']} and {row['arm']} have the same losses to the last digit (seed {row['seed']}): "
                    "they computed the same, and one of them is not what it says."
                )

    def rate(self, name: Named, way: str) -> float | None:
        if way == OWN:
            return own_rate(self.lines, self.work.of_grid, *name)
        return None if name[0] == FULL else self.common

    def by_seed(self, name: Named, way: str) -> dict[int, Row]:
        rate = self.rate(name, way)
        found = (row for row in self.runs if (row["arm"], row["over"]) == name and row["learning_rate"] == rate)
        return {row["seed"]: row for row in found}

    def domain(self, text: str) -> str:
        return {NEW: self.new, OLD: self.old, UNSEEN: UNSEEN_DOMAIN}[text]

    @property
    def texts(self) -> list[str]:
        """That all runs were scored on; the first ones do not have the last."""
        return [NEW, OLD, *([UNSEEN] if all(UNSEEN_DOMAIN in row["after"] for row in self.runs) else [])]

    @property
    def forgotten(self) -> str:
        """The text that forgetting is judged by: the one that is never replayed, where there is one."""
        return self.texts[-1]

    def judged_by(self, arm: Arm) -> str:
        return NEW if arm.by == NEW else self.forgotten

    def below(self, name: Named) -> Named | None:
        """What an arm stands on."""
        on = arm_over(*name).on
        return None if on is None else (on, name[1] if ARMS[on].on_top else "")

    def pairs(self) -> Iterator[tuple[Named, Named]]:
        """Each arm with what it is held against: the one below it, and one beside the ladder."""
        for name in self.names:
            if (below := self.below(name)) is not None:
                yield name, below
            if name[0] in BESIDE:
                yield name, (BESIDE[name[0]], "")

    def differences(self, name: Named, other: Named, way: str, text: str) -> list[float]:
        """Bits a byte of the arm minus those of another, of each seed that both have."""
        ours, theirs = self.by_seed(name, way), self.by_seed(other, way)
        domain = self.domain(text)
        return [bits(ours[seed], domain) - bits(theirs[seed], domain) for seed in sorted(ours.keys() & theirs.keys())]


def bits(row: Row, domain: str, when: str = "after") -> float:
    return row[when][domain]["bits_per_byte"]


def ladders(lines: Sequence[Row], common: float) -> list[Ladder]:
    """Each work of the lines that has runs, in their order."""
    works = dict.fromkeys(Work(**{name: row[name] for name in WORK}) for row in lines if row["part"] == RUN)
    return [Ladder(work, lines, common) for work in works]


# ---- what is said


def verdict(change: Estimate, better: bool | None) -> str:
    """Whether a step of bits a byte, of which fewer are better, is what the advice says."""
    sure = "" if change.clear else "one seed, no interval" if change.half is None else "its interval holds zero"
    found = "better" if change.mean < 0 else "worse" if change.mean > 0 else "the same"
    if better is None:
        return f"{found}{f', but {sure}' if sure else ''}"
    if (change.mean < 0) == better and change.mean:
        return f"as the advice says{f', but {sure}' if sure else ''}"
    return "CONTRADICTS the advice" if change.clear else f"NOT in the order of the advice, but {sure}"


def label(name: Named) -> str:
    return f"{name[0]} (on {name[1]})" if name[1] else name[0]


def step_label(name: Named, other: Named) -> str:
    return f"{other[0]} → {label(name)}"


def results(ladder: Ladder, way: str) -> list[str]:
    """A line an arm: bits a byte of both texts, before and after."""
    lines = []
    for name in ladder.names:
        rows = list(ladder.by_seed(name, way).values())
        if not rows:
            continue
        cells = []
        for domain in map(ladder.domain, ladder.texts):
            before = float(np.mean([bits(row, domain, "before") for row in rows]))
            cells.append(f"{before:.4f} → {Estimate.of([bits(row, domain) for row in rows]).text()}")
        embedding = rows[0]["embedding_learning_rate"]
        embedding_rate = "–" if embedding is None else f"{embedding:g}"
        rate = f"{rows[0]['learning_rate']:g}"
        lines.append([label(name), arm_over(*name).says, rate, embedding_rate, *cells])
    languages = [LANGUAGE[ladder.domain(text)] for text in ladder.texts]
    head = ["arm", "what it is", "rate", "embeddings' rate", *languages]
    return markdown(head, lines) if lines else []


def steps(ladder: Ladder, way: str) -> tuple[list[str], list[str]]:
    """A line a step, and the steps that are not in the order of the advice, or only seem to be."""
    lines, odd = [], []
    for name, other in ladder.pairs():
        changes = {text: ladder.differences(name, other, way, text) for text in ladder.texts}
        if not changes[NEW]:
            continue
        arm, step = arm_over(*name), step_label(name, other)
        text = ladder.judged_by(arm)
        said = verdict(Estimate.of(changes[text]), arm.better)
        advice = "–" if arm.better is None else f"{LANGUAGE[ladder.domain(text)]} {'better' if arm.better else 'worse'}"
        estimates = [Estimate.of(each).text("+") for each in changes.values()]
        lines.append([step, advice, *estimates, apart(ladder, name, other, way, text), said])
        if arm.better is not None and said != "as the advice says":
            odd.append(f"- {step}, {way}: {said} ({Estimate.of(changes[text]).text('+')} bits a byte).")
    head = ["step", "advice", *(f"{LANGUAGE[ladder.domain(text)]}, change" for text in ladder.texts),
            "intervals of the two", "verdict"]  # fmt: skip
    return (markdown(head, lines) if lines else []), odd


def apart(ladder: Ladder, name: Named, below: Named, way: str, text: str) -> str:
    """Whether the intervals of the two arms' means overlap, which is asked more than that their difference is clear."""
    domain = ladder.domain(text)
    ours, theirs = (
        Estimate.of([bits(row, domain) for row in ladder.by_seed(arm, way).values()]) for arm in (name, below)
    )
    if ours.half is None or theirs.half is None:
        return "–"
    return "apart" if ours.high < theirs.low or theirs.high < ours.low else "overlap"


def grids(ladder: Ladder) -> tuple[list[str], list[str], list[str]]:
    """A line an arm: the settled loss at each rate; the arms whose best rate is at the end of those tried; and those
    whose rates had other rows, so that their losses are of other text."""
    grid = {name: grid_of(ladder.lines, ladder.work.of_grid, *name) for name in ladder.names}
    rates = sorted({rate for found in grid.values() for rate in found})
    lines, at_end, unlike = [], [], []
    for name, found in grid.items():
        best = own_rate(ladder.lines, ladder.work.of_grid, *name)
        if best is None:
            continue
        cells = {rate: f"{settled_loss(found[rate]):.4f}" if rate in found else "" for rate in rates}
        lines.append([label(name), *(f"**{cell}**" if rate == best else cell for rate, cell in cells.items())])
        if best in (min(found), max(found)):
            at_end.append(f"{label(name)} ({best:g})")
        if others := [f"{rate:g}" for rate, row in found.items() if row["targets"] != found[best]["targets"]]:
            unlike.append(f"{label(name)} ({', '.join(others)} beside {best:g})")
    return (markdown(["arm", *(f"{rate:g}" for rate in rates)], lines) if lines else []), at_end, unlike


def gpu_seconds(rows: Sequence[Row]) -> tuple[float, bool]:
    """For how long a run or more was under way on the card, and whether that is an estimate.

    Rows from before they said when they began are put behind each other as they stand in the file: of a call each goes
    to the process that is free first.
    """
    seconds, until = 0.0, float("-inf")
    for row in sorted((row for row in rows if "begun" in row), key=lambda row: row["begun"]):
        seconds += max(0.0, row["ended"] - max(row["begun"], until))
        until = max(until, row["ended"])
    calls: dict[str, list[float]] = {}
    for row in (row for row in rows if "begun" not in row):
        free = calls.setdefault(row["command"], [0.0] * row["at_once"])
        free[free.index(min(free))] += row["seconds"]
    return seconds + sum(map(max, calls.values())), bool(calls)


def short_title(work: Work) -> str:
    return f"{work.model}{' (untied)' if work.untied else ''} on {work.text}"


def title(ladder: Ladder) -> str:
    work, rows = ladder.work, [*ladder.runs, *ladder.grid_runs]
    versions = sorted({", ".join(f"{name} {row['versions'][name]}" for name in ("torch", "transformers", "peft")
                                 if name in row["versions"]) for row in rows})  # fmt: skip
    cost = "" if work.gpu == "none" else f" {_cost(rows)}, {len(ladder.grid_runs)} runs of the grid included."
    heldout = ", ".join(f"{LANGUAGE[domain]} {documents} documents, {tokens:,} tokens"
                        for domain, (documents, tokens) in ladder.runs[0]["heldout"].items()
                        if domain in map(ladder.domain, ladder.texts))  # fmt: skip
    return (
        f"{short_title(work)}, {work.gpu}: {work.tokens:,} tokens in {work.steps:,} steps of {work.batch} × "
        f"{work.seq}, rank {work.r}; {'; '.join(versions)}.{cost} Held out: {heldout}. Bits a byte, fewer are better; "
        "mean ± half of the 95 % interval by Student's t over n seeds."
    )


def _cost(rows: Sequence[Row]) -> str:
    seconds, estimated = gpu_seconds(rows)
    minutes = f"{seconds / 60:.0f} GPU minutes"
    return f"About {minutes} (estimated where rows do not say when they began)" if estimated else minutes


def paragraphs(ladder: Ladder) -> Iterator[list[str]]:
    yield [title(ladder)]
    odd, judged = [], False
    for way in (COMMON, OWN):
        if not (table := results(ladder, way)):
            continue
        yield [f"**{way[0].upper()}{way[1:]}**"]
        yield table
        lines, found = steps(ladder, way)
        if lines:
            judged = True
            yield [f"Differences {way}, seed by seed:"]
            yield lines
        odd += found
    if odd:
        yield ["Not borne out, or not settled:"]
        yield odd
    elif judged:
        yield ["Every step that was measured is in the order of the advice, and no such interval holds zero."]
    lines, at_end, unlike = grids(ladder)
    if lines:
        yield [
            f"The grid: training loss over the last quarter of {ladder.work.of_grid.steps:,} steps (n = 1 a figure)."
        ]
        yield lines
    if unlike:
        yield [f"Rates that had rows in another order, so that their losses are of other text: {', '.join(unlike)}."]
    if at_end:
        yield [f"The best rate is at the end of its grid, and a wider one may have a better: {', '.join(at_end)}."]


def beside(found: Sequence[Ladder], texts: Sequence[str]) -> list[str]:
    """A line a step of the core, with what it changes in each work; `texts`: the one of each that is looked at."""
    heads, pairs, columns = [], dict.fromkeys(pair for each in found for pair in each.pairs()), []
    for ladder, text in zip(found, texts, strict=True):
        heads.append(f"{short_title(ladder.work)}, {ladder.work.tokens:,} tokens: {LANGUAGE[ladder.domain(text)]}")
        columns.append({pair: change_cell(ladder.differences(*pair, OWN, text)) for pair in pairs})
    lines = [
        [step_label(*pair), *(of[pair] for of in columns)]
        for pair in pairs
        if pair[0][0] in CORE and any(of[pair] for of in columns)
    ]
    return markdown(["step", *heads], lines)


def change_cell(differences: Sequence[float]) -> str:
    """Bold where the interval does not hold zero; empty where there are none."""
    if not differences:
        return ""
    change = Estimate.of(differences)
    return f"**{change.text('+')}**" if change.clear else change.text("+")


def in_short(found: Sequence[Ladder]) -> Iterator[list[str]]:
    yield ["### Side by side"]
    yield [
        f"What a step changes of the new text, {OWN}, in bits a byte: below zero it is learned better. **Bold**: the "
        "interval does not hold zero; of one seed (n = 1) there is none."
    ]
    yield beside(found, [NEW] * len(found))
    yield [
        'And of the English that forgetting is judged by: above zero more is forgotten. "English" is books of the '
        "collection that is replayed; English Wikipedia is never replayed."
    ]
    yield beside(found, [ladder.forgotten for ladder in found])


def tell(lines: Sequence[Row], common: float) -> str:
    """Markdown, of every work; of several, first their steps beside each other.

    Raises:
        SystemExit: there are no runs but a grid's; and see `Ladder`.
    """
    found = ladders(lines, common)
    if not found:
        raise SystemExit("--summary: the file has no runs beside a grid's.")
    if len(found) == 1:
        parts = list(paragraphs(found[0]))
    else:
        headed = (([f"### {short_title(ladder.work)}"], *paragraphs(ladder)) for ladder in found)
        parts = [*in_short(found), *itertools.chain.from_iterable(headed)]
    return "\n\n".join("\n".join(part) for part in parts)


def in_docs(text: str, said: str, file: str) -> str:
    """The text of docs/evidence.md with `said` between its marks."""
    return with_part(text, BEGIN, END, f"From `benchmarks/results/{file}`.\n\n{said}")


def in_readme(text: str, lines: Sequence[Row], common: float, file: str) -> str:
    """The README's text with the core of the file's first work between its marks, each arm at its own rate.

    Raises:
        SystemExit: it has no run at its own rate.
    """
    ladder = ladders(lines, common)[0]
    trained = {name: rows for name in ladder.names if name[0] in CORE and (rows := ladder.by_seed(name, OWN))}
    domains, body = (ladder.new, ladder.old), []
    for name, rows in trained.items():
        if not body:
            (first, *_) = rows.values()
            body.append(["–", "not trained", *(f"{bits(first, domain, 'before'):.4f}" for domain in domains)])
        of = [Estimate.of([bits(row, domain) for row in rows.values()]).text() for domain in domains]
        body.append([label(name), arm_over(*name).says, *of])
    if not body:
        raise SystemExit("--docs: the README's table is of runs at each arm's own rate, and the file has none.")
    said = (
        f"{ladder.work.model} on {ladder.work.text}, {ladder.work.tokens:,} tokens a run, each at its own best rate:\n"
        "bits a byte of held-out text, fewer are better; mean ± half of the 95 % interval over n seeds.\n"
        f"`python -m benchmarks.ablation --summary benchmarks/results/{file} --docs`"
    )
    table = markdown(["arm", "what it is", *(LANGUAGE[domain] for domain in domains)], body)
    return with_part(text, BEGIN, END, "\n".join([said, "", *table]))
