"""The ladder of advice, step by step: what a model learns of a new text, and what it forgets, arm by arm.

    python -m benchmarks.ablation --model FOLDER --data FOLDER [--whole | --grid] [--arms lora gate ...] [--seeds 3]
                                  [--first-seed 0] [--tokens 1000000] [--jobs N] [--out FILE]
    python -m benchmarks.ablation --summary FILE [--docs] [--figure FILE.svg [--arms ...]]

The arms are in `benchmarks/ablation_arms.py`; without --arms they are those of the core. They share rows and their
order (of a seed), schedule, optimizer, held-out documents and the number of tokens, which each run's ledger shows.

--grid trains every arm at a few rates, with the first seed and half the tokens. An arm's own rate is the one with the
lowest training loss over the last quarter of these steps: on rows that no step has seen before, so no held-out text
takes part in the choice. Without --grid each arm trains at --learning-rate, the common one, and at its own where the
file has its grid; full finetuning at its own alone. --whole does the grid and then the runs.

--data holds NAME.train.jsonl.gz and NAME.heldout.jsonl.gz of the text that is learned (--text) and of en-books; where
en-wiki.heldout.jsonl.gz is there too, it is scored and never replayed. A run appends one line of JSON to --out, by
default `benchmarks/results/DATE-GPU-ablation.jsonl`; one whose line is there is not done again. --jobs processes share
the card; each imports once, and takes run after run. --summary says what the lines come to
(`benchmarks/ablation_table.py`); with --docs it writes that into docs/evidence.md, and a table of the core into the
README.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.ablation_arms import ARMS, CORE, FULL, LADDER, RECIPE, arm_over
from benchmarks.ablation_figure import figure
from benchmarks.ablation_run import (
    GRID,
    NEW_TEXTS,
    RUN,
    Job,
    Work,
    check,
    data_name,
    files,
    one_run,
    run_config,
    weights_name,
)
from benchmarks.ablation_table import in_docs, in_readme, own_rate, tell
from benchmarks.measuring import append, command, gpu_name, lines_of, results_file
from benchmarks.real_runs import tokenise_once
from steep.errors import UserError
from steep.export.gate import free_memory

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs" / "evidence.md"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model in 16 bits")
    parser.add_argument("--data", type=Path, help="folder of the corpora")
    parser.add_argument("--text", choices=NEW_TEXTS, default="ko-tech", help="what is learned")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: those of the core")
    parser.add_argument("--over", choices=LADDER, default=RECIPE, help="the rung that options and replay stand on")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of a run, rounded down to whole steps")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--grid", action="store_true", help="find each arm's rate: one seed, half the tokens")
    parts.add_argument("--whole", action="store_true", help="do the grid, then the runs")
    parser.add_argument("--rates", type=float, nargs="+", help="of the grid; default: the arm's own")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="the common one")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--seq", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--untied", action="store_true", help="with a head of its own, for the arms that train one")
    parser.add_argument("--heldout-tokens", type=int, default=100_000, help="scored of each text at the most")
    parser.add_argument("--vram", default="24GiB", help="what a run may fill of the card: others may be on it")
    parser.add_argument("--jobs", type=int, default=1, help="processes on the card at once")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-ablation.jsonl")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="say what a file's lines come to, and run nothing")
    parser.add_argument("--docs", action="store_true", help="write it into docs/evidence.md and the README too")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write the curves of --arms as an SVG")
    arguments = parser.parse_args(words)
    if arguments.summary is None and not (arguments.model and arguments.data):
        parser.error("give --model and --data, or --summary")
    if arguments.summary is None and (arguments.docs or arguments.figure):
        parser.error("--docs and --figure are of a --summary")
    if arguments.rates and not (arguments.grid or arguments.whole):
        parser.error("--rates are of --grid or --whole")
    for name in ("jobs", "seeds", "batch", "seq", "r", "heldout_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: give 1 or more")
    if arguments.first_seed < 0:
        parser.error("--first-seed: give 0 or more")
    if not all(0 < rate < math.inf for rate in (arguments.learning_rate, *(arguments.rates or ()))):
        parser.error("--learning-rate, --rates: give numbers above 0")
    return arguments


def refuse(arguments: argparse.Namespace) -> None:
    """
    Raises:
        SystemExit: a file is not there; fewer than two steps are asked for, or a head of its own for an arm that trains
            none.
    """
    if not (arguments.model / "config.json").is_file() or not any(arguments.model.glob("*.safetensors")):
        raise SystemExit(f"--model: {arguments.model} holds no config.json with 16-bit weights in safetensors.")
    absent = [file.name for file in files(arguments.data, arguments.text).values() if not file.is_file()]
    if absent:
        raise SystemExit(f"--data: {arguments.data} lacks {', '.join(absent)}.")
    has_grid = arguments.grid or arguments.whole
    least = 2 * arguments.batch * arguments.seq * (2 if has_grid else 1)
    if arguments.tokens < least:  # a warm-up begins with a step that trains nothing
        raise SystemExit(
            f"--tokens: {arguments.tokens:,} are less than two steps{' of a grid' * has_grid}, which take {least:,}."
        )
    headless = [name for name in arms_of(arguments) if not has_head(arguments, name)]
    if arguments.untied and headless:
        raise SystemExit(f"--untied: {', '.join(headless)} trains no head of its own.")


def has_head(arguments: argparse.Namespace, name: str) -> bool:
    arm = arm_over(name, arguments.over)
    return not arm.whole and "lm_head" in arm.saved


def arms_of(arguments: argparse.Namespace) -> list[str]:
    if arguments.arms:
        return arguments.arms
    return [name for name in CORE if not arguments.untied or has_head(arguments, name)]


def work_of(arguments: argparse.Namespace, tokens: int) -> Work:
    step = arguments.batch * arguments.seq
    return Work(
        arguments.model.resolve().name, arguments.text, data_name(arguments.data, arguments.text),
        tokens // step * step, arguments.batch, arguments.seq, arguments.r, arguments.untied,
        arguments.heldout_tokens, gpu_name(),
    )  # fmt: skip


def jobs_of(arguments: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """All runs that were asked for, done or not; seed after seed, so that what is cut short has whole ladders."""
    work = work_of(arguments, arguments.tokens)
    grid, called = work.of_grid, command()
    first = Job(
        GRID if arguments.grid else RUN, "", "", arguments.first_seed, arguments.learning_rate,
        grid if arguments.grid else work, arguments.model.resolve(), arguments.data.resolve(), arguments.vram, called,
        arguments.jobs, weights_name(arguments.model),
    )  # fmt: skip
    over_of = {name: arguments.over if ARMS[name].on_top else "" for name in arms_of(arguments)}
    own_of = {name: own_rate(lines, grid, name, over) for name, over in over_of.items()}
    if not arguments.grid and (unknown := [name for name, own in own_of.items() if own is None]):
        print(f"Not at their own rates: {', '.join(unknown)}. For these the file has not two rates of a grid (--grid).")
    seeds = 1 if arguments.grid else arguments.seeds
    for seed in range(arguments.first_seed, arguments.first_seed + seeds):
        for name, over in over_of.items():
            own = own_of[name]
            if arguments.grid:
                rates = arguments.rates or ARMS[name].rates
            else:
                rates = [rate for rate in (None if name == FULL else arguments.learning_rate, own) if rate is not None]
            for rate in dict.fromkeys(rates):
                yield replace(first, arm=name, over=over, seed=seed, learning_rate=rate)


def is_done(job: Job, lines: Sequence[dict[str, Any]]) -> bool:
    return any(job.key.items() <= line.items() for line in lines)


def do(job: Job, out: Path) -> str:
    """Do a run, append its line, and say it in short."""
    row = one_run(job)
    append(out, row)
    scores = (
        f"{domain} {row['before'][domain]['bits_per_byte']:.4f} → {row['after'][domain]['bits_per_byte']:.4f}"
        for domain in row["after"]
    )
    return f"{', '.join(scores)} bits a byte; {row['seconds']:.0f} s"


def begin_process(processes: int) -> None:
    """Of a pool: a share of the cores, and an end with the process that began it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    leave_out_notes()


def leave_out_notes() -> None:
    """What PEFT asks of transformers, and transformers says of each tokenizer, would be said at every run."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()


def attempt(job: Job, out: Path) -> tuple[str, bool]:
    """What there is to say of a run, and whether it was done. An error is returned, not raised: a process of a pool
    keeps what it raised, with the frames that it went through, and they the model on the card."""
    try:
        return do(job, out), True
    except UserError as error:
        said = str(error)
    except Exception:
        said = traceback.format_exc()
    free_memory()
    return said, False


def do_all(jobs: Sequence[Job], out: Path, at_once: int) -> list[Job]:
    """Those of `jobs` that failed; why is printed."""
    failed: list[Job] = []

    def tell_end(job: Job, said: str, done: bool) -> None:
        if not done:
            print(said, file=sys.stderr)
            failed.append(job)
        said = said if done else "failed"
        print(f"{job.part} {job.arm} seed {job.seed} rate {job.learning_rate:g}: {said}", flush=True)

    if at_once == 1:
        leave_out_notes()
        for job in jobs:
            tell_end(job, *attempt(job, out))
        return failed
    spawn = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    with ProcessPoolExecutor(at_once, spawn, initializer=begin_process, initargs=(at_once,)) as pool:
        under_way = {pool.submit(attempt, job, out): job for job in jobs}
        try:
            for future in as_completed(under_way):
                died = future.exception()  # its process
                tell_end(under_way[future], *((repr(died), False) if died else future.result()))
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


def summarise(arguments: argparse.Namespace) -> None:
    lines, rate = lines_of(arguments.summary), arguments.learning_rate
    if not lines:
        raise SystemExit(f"--summary: {arguments.summary} has no lines.")
    if not all("part" in row for row in lines):
        raise SystemExit(f"--summary: {arguments.summary} is of another benchmark.")
    rates = sorted({row["learning_rate"] for row in lines if row["part"] == RUN and row["arm"] != FULL})
    if rates and rate not in rates:
        raise SystemExit(
            f"--learning-rate: no run was at {rate:g}; the common one is among {', '.join(map('{:g}'.format, rates))}."
        )
    said = tell(lines, rate)
    print(said)
    if arguments.figure:
        drawn = figure(lines, rate, arguments.arms or CORE)
        try:
            arguments.figure.write_text(drawn, encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"--figure: {arguments.figure} cannot be written: {error.strerror}.") from None
    if arguments.docs:
        readme = in_readme(README.read_text(encoding="utf-8"), lines, rate, arguments.summary.name)
        text = in_docs(DOCS.read_text(encoding="utf-8"), said, arguments.summary.name)
        DOCS.write_text(text, encoding="utf-8")
        README.write_text(readme, encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    if arguments.summary:
        summarise(arguments)
        return
    refuse(arguments)
    out = arguments.out or results_file("ablation")
    try:
        for is_grid in (True, False) if arguments.whole else (arguments.grid,):
            arguments.grid = is_grid
            do_what_is_missing(arguments, out)
    except UserError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on with what is not done.") from None


def refuse_another_model(job: Job, lines: Sequence[dict[str, Any]], out: Path) -> None:
    """
    Raises:
        SystemExit: the file has runs of a model of the same name with other weights.
    """
    known = {row["weights"] for row in lines if row["model"] == job.work.model and "weights" in row}
    if known - {job.weights}:
        raise SystemExit(f"--out: {out} has runs of another {job.work.model}, with other weights. Give another file.")


def do_what_is_missing(arguments: argparse.Namespace, out: Path) -> None:
    """The runs that were asked for and have no line in `out`.

    Raises:
        SystemExit: some failed, or cannot be done; or `out` cannot be written.
    """
    lines = lines_of(out)
    asked = list(jobs_of(arguments, lines))
    if asked:
        refuse_another_model(asked[0], lines, out)
    jobs = [job for job in asked if not is_done(job, lines)]
    print(f"{len(asked)} runs, of which {len(asked) - len(jobs)} are done; {arguments.jobs} at once", flush=True)
    if not jobs:
        return
    try:  # before hours of work have no place to go to
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise SystemExit(f"--out: {out} cannot be written: {error.strerror}.") from None
    by_replay = {bool(job.definition.replay): job for job in jobs}  # the text of runs differs in nothing else
    tokenise_once(run_config(job, out.parent) for job in by_replay.values())
    for job in {job.arm: job for job in jobs}.values():
        check(job)
    failed = do_all(jobs, out, arguments.jobs)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; the same command does these again.")


if __name__ == "__main__":
    main()
