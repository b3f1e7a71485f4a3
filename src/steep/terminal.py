"""What a person sees while a run goes on. Results go to stdout; progress, notes and warnings to stderr.

On a terminal there are live bars; in a pipe or a file, plain lines without control characters.
"""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from steep.amounts import human_bytes, human_seconds
from steep.errors import one_line

if TYPE_CHECKING:  # this file is imported before the libraries
    from steep.data.token_file import Budget
    from steep.data.token_file import Progress as Tokenised

_PLAIN_SECONDS = 10  # between two progress lines in a pipe


def why_no_loss(row: Mapping[str, Any]) -> str:
    """What it means that a line of metrics.jsonl has no loss: nothing was trained, or nothing was finite."""
    return "loss not finite" if row.get("tokens_per_second") else "passed over"


class Terminal:
    """Where a run shows itself.

    Args:
        quiet: show nothing (the default of the Python functions).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = Console(quiet=quiet, soft_wrap=True)
        self.err = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._progress: Progress | None = None

    def attach(self) -> None:
        """Send steep's log lines here, and keep the libraries' bars and notes out of the way. For the command line,
        before they are imported: some speak at import."""
        logger = logging.getLogger("steep")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [_Lines(self)]
        # Said on every machine without a package that is not needed, or at every call by PEFT to transformers.
        for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # What may change between a run and its resumption was compared before.
        for name in ("transformers.trainer", "transformers.trainer_utils"):
            logging.getLogger(name).addFilter(lambda record: "do not match the ones in the" not in record.getMessage())
        warnings.filterwarnings("ignore", category=FutureWarning)
        os.environ["TQDM_DISABLE"] = "1"  # transformers' bars; those of downloads ask the terminal themselves

    def say(self, text: str) -> None:
        """A note on what happens now."""
        self.err.print(escape(one_line(_from_here(text))), highlight=False)

    def warn(self, text: str) -> None:
        """A warning in plain words."""
        self.err.print(f"[yellow]warning:[/] {escape(one_line(_from_here(text)))}", highlight=False)

    def show(self, table: Table) -> None:
        """A result."""
        self.out.print(table)

    @contextmanager
    def tokenising(self) -> Iterator[Tokenised]:
        """Gives a callback for documents and bytes done so far, and the budget of the source that is read."""
        begun = before = started = time.monotonic()  # the budget under way, the last call, all of it
        tokens = 0
        with self._counting("tokenising") as show:

            def progress(documents: int, num_bytes: int, budget: Budget | None) -> None:
                nonlocal begun, before, tokens
                now = time.monotonic()
                rate = num_bytes / 1e6 / max(now - started, 1e-9)
                text = f"{documents:,} documents, {num_bytes / 1e6:.1f} MB, {rate:.1f} MB/s"
                if budget is None or not 0 < tokens <= budget.tokens:  # another source
                    begun = before
                before, tokens = now, 0 if budget is None else budget.tokens
                if budget is not None:
                    left = (budget.limit - tokens) * (now - begun) / tokens
                    text += f", {tokens:,} of {budget.limit:,} tokens, about {left:.0f} s left"
                show(text)

            yield progress

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Gives a callback for the metrics of each log line."""
        smoothed: float | None = None
        started, last = time.monotonic(), 0.0
        with self._bar("training", steps, done) as update:

            def progress(row: Mapping[str, Any]) -> None:
                nonlocal smoothed, last
                loss = row["loss"]
                if loss is not None:
                    smoothed = loss if smoothed is None else 0.9 * smoothed + 0.1 * loss
                parts = [
                    f"loss {loss:.4f}" if loss is not None else why_no_loss(row),
                    f"smoothed {smoothed:.4f}" if smoothed is not None else "",
                    f"{row['tokens_per_second']:,.0f} tokens/s",
                    f"rate {row['learning_rate']:.2e}" if row["learning_rate"] is not None else "",
                    f"embeddings' rate {row['embedding_learning_rate']:.2e}"
                    if row["embedding_learning_rate"] is not None
                    else "",
                    f"peak {human_bytes(row['peak_memory_bytes'])}",
                ]
                text = " · ".join(part for part in parts if part)
                if update is not None:
                    update(text, row["step"])
                elif time.monotonic() - last > _PLAIN_SECONDS or row["step"] in (done + 1, steps):
                    last = time.monotonic()
                    left = (steps - row["step"]) * (last - started) / max(1, row["step"] - done)
                    self.say(f"step {row['step']}/{steps} · {text} · about {left:.0f} s left")

            yield progress

    @contextmanager
    def checking(self) -> Iterator[Callable[[int, int], None]]:
        """Gives a callback for the bytes read so far, and all that there are."""
        with self._counting("checking") as show:
            yield lambda done, total: show(f"{human_bytes(done)} of {human_bytes(total)}")

    @contextmanager
    def loading(self) -> Iterator[Callable[[int, int], None]]:
        """Gives a callback for the tensors loaded so far, and all that there are."""
        with self._counting("loading") as show:
            yield lambda done, total: show(f"{done:,} of {total:,} tensors")

    @contextmanager
    def merging(self) -> Iterator[Callable[[int, int], None]]:
        """Gives a callback for the bytes written so far, and all that will be."""
        with self._counting("merging") as show:
            yield lambda done, total: show(f"{human_bytes(done)} of {human_bytes(total)}")

    @contextmanager
    def _counting(self, name: str) -> Iterator[Callable[[str], None]]:
        """Gives a callback for a text that says how far something has come."""
        last = time.monotonic()
        with self._bar(name, None) as update:

            def show(text: str) -> None:
                nonlocal last
                if update is not None:
                    update(text, None)
                elif time.monotonic() - last > _PLAIN_SECONDS:
                    last = time.monotonic()
                    self.say(f"{name}: {text}")

            yield show

    @contextmanager
    def _bar(self, name: str, total: int | None, done: int = 0) -> Iterator[Callable[[str, int | None], None] | None]:
        if self.err.quiet or not _is_real_terminal(self.err.file):
            yield None
            return
        columns = [SpinnerColumn(), TextColumn(name)]
        columns += [BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()] if total else []
        with Progress(*columns, TextColumn("{task.description}"), console=self.err, transient=total is None) as bar:
            task = bar.add_task("", total=total, completed=done)

            def update(text: str, completed: int | None) -> None:
                bar.update(task, description=escape(text), completed=completed)

            yield update


class _Lines(logging.Handler):
    """steep's log lines as notes and warnings of a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        show = self._terminal.warn if record.levelno >= logging.WARNING else self._terminal.say
        show(record.getMessage())


def _is_real_terminal(stream: Any) -> bool:
    """Where bars can move; rich also says yes for FORCE_COLOR, which notebooks set."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a program's own stream, or one that is closed
        return False


def _from_here(text: str) -> str:
    """The text with places below the working folder as one names them there; a run file has them as absolute paths."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(here)}/(?=[^/\s])", "", text) if here != "/" else text


def _last_part(name: str) -> str:
    """The end of a long path, which is what tells models apart."""
    return name if len(name) <= 50 else f"…{name[-49:]}"


def _cell(text: str) -> Text:
    """A name as it is: no markup of rich, and nothing that a terminal would act on."""
    return Text(one_line(text))


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """`plan.json` for the eye: the run, its text, memory, host memory and disk by item."""
    run = Table(title="plan", show_header=False)
    parameters, data, card = plan["parameters"], plan["data"], plan["card"]
    model = _last_part(_from_here(plan["model"]))
    for name, value in {
        "model": f"{model}, frozen in {base_of(plan)}, computed in {plan['compute_dtype']}",
        "parameters": f"{parameters['frozen']:,} frozen, {parameters['trained']:,} trained in {plan['trained_dtype']} "
        f"({parameters['adapters']:,} adapters, {parameters['trained_embeddings']:,} embeddings)",
        "card": f"{card['name']}, {human_bytes(card['memory_bytes'])}" if card else "none",
        "fused": fused_line(plan),
        "rates": f"adapters {plan['learning_rate']:g}, embeddings {plan['embedding_learning_rate']:g}",
        "schedule": f"{plan['lr_scheduler_type']}{': ' + plan['schedule'] if plan['schedule'] else ''}",
        "rows": f"{data['rows']:,} of {data['max_length']} tokens, {data['targets']:,} targets",
        "steps": f"{plan['steps']:,} of {plan['rows_per_step']} rows ({plan['epochs']:.2f} epochs)"
        + (f", after the {plan['first_step']:,} of the parent" if plan["first_step"] else ""),
        "forwards": forwards_line(plan),
        "time": duration_line(plan.get("duration"), fits=not (plan.get("shortfall") or {}).get("refused")),
    }.items():
        run.add_row(name, _cell(value))
    text = Table("domain", "role", "documents", "tokens", "tokens/character", "held out", title="text")
    for source in data["sources"]:
        text.add_row(
            _cell(source["domain"]),
            source["role"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}" + (" (max_tokens)" if source["stopped"] else ""),
            f"{1 / source['characters_per_token']:.2f}",
            f"{source['held_out']['documents']:,}",
        )
    tables = [run, text]
    if plan["new_tokens"]:
        tables.append(_new_tokens_table(plan["new_tokens"]))
    for kind in ("memory", "host", "disk"):
        table = Table(kind, "estimate")
        for name, count in plan[f"{kind}_bytes"].items():
            if count:
                table.add_row(name, human_bytes(count))
        if kind == "memory" and plan["fragmentation"]:
            table.add_row("fragmentation, beyond the total", _fragmentation_of(plan))
        tables.append(table)
    return tables


def _fragmentation_of(plan: Mapping[str, Any]) -> str:
    """What is reserved beyond what is allocated, and the room for it."""
    found = plan["fragmentation"]
    left = found["left_bytes"]
    room = "" if left is None else f", where the card has {human_bytes(left)}"
    return f"up to {human_bytes(found['bytes'])}{room}"


def forwards_line(plan: Mapping[str, Any]) -> str:
    """Into what a step is cut, and why so where the plan chose it."""
    rows, forwards, processes = (
        plan[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
    )
    of_each = f", in each of {processes} processes" if processes > 1 else ""
    reason = f" ({plan['batch_reason']})" if plan["batch_reason"] else ""
    return f"{forwards:,} a step, of {rows:,} rows{of_each}{reason}"


def duration_line(duration: Mapping[str, Any] | None, *, fits: bool = True) -> str:
    """How long training will take, and how that is known."""
    if duration is None:
        return "not known" if fits else "none: a step does not fit"
    rate = f"{duration['tokens_per_second']:,.0f} tokens/s"
    basis = "measured on this card" if duration["measured"] else "estimated from the maker's figures"
    if duration.get("is_of_host"):
        basis += "; it is the host that takes so long to launch it so"
    in_all = human_seconds(duration["hours"] * 3600)
    return f"about {human_seconds(duration['seconds_per_step'])} a step, {rate}, {in_all} in all, {basis}"


def bases_table(plan: Mapping[str, Any]) -> Table:
    """What the frozen linear weights take in each base and the whole step does, how long it takes, and how far the
    weights then are from the checkpoint's."""
    table = Table(
        "base", "frozen linear weights", "memory of a step", "a step", "relative error of the weights", title="bases"
    )
    cut_otherwise = len({base["rows"] for base in plan["bases"].values() if base["rows"]}) > 1
    for name, base in plan["bases"].items():
        rows = f", {base['rows']} rows a forward" if cut_otherwise and base["rows"] else ""
        peak, seconds, error = base["peak_bytes"], base["seconds_per_step"], base["weight_error"]
        table.add_row(
            "16 bits" if name == "bf16" else name,
            human_bytes(base["bytes"]),
            "–" if peak is None else human_bytes(peak) + rows + (", does not fit" if base["fits"] is False else ""),
            "–" if seconds is None else human_seconds(seconds),
            "–" if error is None else f"{error:.2%}",
        )
    return table


def base_of(plan: Mapping[str, Any]) -> str:
    """What the frozen weights are kept in, and why that is so where `auto` chose it."""
    reason = plan.get("base_reason")
    return f"{plan['base']} ({reason})" if reason else str(plan["base"])


def fused_line(plan: Mapping[str, Any]) -> str:
    """Whether a run's steps are fused, in a line: what layers keep for the backward pass, or why they are not."""
    if not plan["fused"]:
        return f"no: {plan['fused_reason']}"
    counts = Counter(plan["levels"])
    layers = " and ".join(f"{level} in {count} layers" for level, count in sorted(counts.items()))
    products = {"both": ", products in fp8", "backward": ", products of the backward pass in fp8"}
    in_fp8 = products.get(plan.get("fp8_products") or "none", "")
    in_tiles = f", in tiles of {plan['tile']:,} tokens" if plan.get("tile") else ""
    return f"yes, at level {layers} (0 computes least again, 3 most){_on_host(plan)}{in_tiles}{in_fp8}"


def _on_host(plan: Mapping[str, Any]) -> str:
    """What of it is in host memory."""
    counts: Counter[str] = Counter(plan.get("places") or ())
    what = {"x": "the input", "attention": "all but gate and up", "all": "all"}
    said = [f"{name} of {counts[place]} layers" for place, name in what.items() if counts[place]]
    return f", with {' and '.join(said)} in host memory" if said else ""


def _new_tokens_table(figures: Mapping[str, Any]) -> Table:
    title = f"{figures['added']:,} new tokens"
    table = Table("domain", "role", "tokens/character", "documents that tokenise differently", title=title)
    for source in figures["sources"]:
        table.add_row(
            _cell(source["domain"]),
            source["role"],
            f"{source['tokens_per_character_before']:.2f} → {source['tokens_per_character']:.2f}",
            f"{source['share_that_differs']:.1%} of the old language" if source["old_language"] else "",
        )
    return table
