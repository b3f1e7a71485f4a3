"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from steep import ranks
from steep.allocator import let_segments_grow
from steep.credentials import hide
from steep.errors import RunError, Stopped, UserError, one_line, without_controls
from steep.stopping import Interrupted, heed_signals

app = typer.Typer(
    name="steep",
    help="Continue the pretraining of open LLMs in a new language or domain: QLoRA on every layer plus the "
    "embeddings.\n\nA run is one YAML file: write it with `init`, check it with `plan`, start it with `train`. "
    "Any field can be overridden: `steep train ko.yaml --training.learning_rate 3e-5`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_MISUSE: Any = typer.BadParameter.__mro__[
    1
]  # an option or a word that is wrong: click's UsageError, of typer's own click
BUG = 70  # sysexits' EX_SOFTWARE
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run file.", show_default=False)]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let RUN's run.yaml say that Python code which comes with its model is run."
    ),
]


def _attached_terminal() -> Any:
    """Comes before every other import of a command: some libraries speak when they are imported."""
    from steep.terminal import Terminal

    terminal = Terminal(quiet=not ranks.is_main())
    terminal.attach()
    return terminal


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"steep {version('steep')}")
        raise typer.Exit


@app.callback()
def _steep(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error too; goes anywhere before --.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Hub name, folder or .gguf file of the base model.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(help="Text to learn: file, folder, glob or hub:NAME. Repeatable.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The run file to write.")] = Path("run.yaml"),
    replay: Annotated[
        list[str] | None, typer.Option(help="General text in the old language, against forgetting.")
    ] = None,
) -> None:
    """Write a commented run file with good defaults."""
    from steep.initialise import init_run

    path = init_run(model, data, output, replay=replay or [])
    print(f"wrote {one_line(str(path))}\nnext: steep plan {one_line(shlex.quote(str(path)))}")


@app.command(context_settings=_OVERRIDES)
@ranks.joined()
def plan(
    context: typer.Context,
    file: RunFile,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Plan for this card, which need not be here: T4, L4, 3090, 4090, 5090, A100-40, A100-80, H100, H200, "
            "B200 and others.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a run will do and need, before any weight is loaded: tokens, steps, time, memory, disk, warnings.

    Tokenises the text (once, into the cache) and finds every input error. Override any field: --section.field VALUE.

    A GPU that is here is measured for 2 to 3 s, for the time of a step.

    A step that does not fit the card is said, with the nearest settings that do. train refuses it.

    steep plan ko.yaml --card 4090
    """
    terminal = _attached_terminal()
    from steep.config import load_config

    config = load_config(file, context.args)
    from steep.plan import plan_run
    from steep.planning.cards import card_named
    from steep.terminal import bases_table, plan_tables

    named = card_named(card) if card is not None else None
    with terminal.tokenising() as progress:
        worked_out = plan_run(config, progress, card=named, measures=True)
    figures = worked_out.as_dict()
    for table in (*plan_tables(figures), bases_table(figures)):
        terminal.show(table)
    for warning in worked_out.warnings:
        terminal.warn(warning)


@app.command(context_settings=_OVERRIDES)
@ranks.joined()
def train(
    context: typer.Context,
    file: RunFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    branch: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Begin a new run at a checkpoint of another: its path, or checkpoint-N of the run that FILE itself "
            "names, with another --training.output_dir.",
            show_default=False,
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="With --resume: a field that may differ from the run's, from the checkpoint on, such as "
            "training.learning_rate. Repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a run file: plan, measure, train, measure again, and write the run folder.

    A branch keeps model and adapters, and has a schedule, a length (max_steps) and a folder of its own:
    steep train ko.yaml --branch checkpoint-300 --training.output_dir runs/ko-300 --training.max_steps 60
    --training.lr_scheduler_type warmup_stable_decay.

    A resumed run takes the run file as it was. It may log, save and evaluate otherwise, and be longer where its rates
    so far are the same with that. Rates and the like change where --allow names them; model, adapters, text, batch and
    seed never do: steep train ko.yaml --resume --training.learning_rate 3e-5 --allow training.learning_rate.

    Override any field of the file: --training.learning_rate 3e-5 --data.max_length 4096.

    Ctrl-C and SIGTERM finish the step and save a checkpoint; a second one stops at once.

    Exit codes: 0 done, 1 the run had to stop, 2 wrong input or a fault of disk or permissions, 3 stopped on request,
    with a checkpoint (go on with --resume), 70 a bug of steep, 130 and 143 stopped at once by Ctrl-C and SIGTERM.
    """
    terminal = _attached_terminal()
    let_segments_grow()
    from steep.config import load_config

    config = load_config(file, context.args)
    from steep.run import train_run

    if branch is not None and not branch.exists() and branch.parent == Path():
        branch = Path(load_config(file).training.output_dir) / branch
    # With overrides the file alone is another run; the folder holds this one's.
    again = Path(config.training.output_dir) / "run.yaml" if context.args else file
    command = f"steep train {shlex.quote(str(again))} --resume"
    try:
        train_run(config, resume=resume, branch=branch, allow=allow or [], terminal=terminal, stop=context.obj)
    except Stopped as end:
        terminal.say(f"{end}; go on with: {command}")
        raise typer.Exit(end.exit_code) from None
    except Interrupted as end:
        run_dir = Path(config.training.output_dir)
        if (run_dir / "run.yaml").is_file():  # else the text that was tokenised is kept
            how = "go on from the newest checkpoint" if any(run_dir.glob("checkpoint-*")) else "begin again"
            end.go_on = f"{how} with: {command}"
        raise


@app.command("verify-resume", context_settings=_OVERRIDES)
@ranks.joined()
def verify_resume(
    context: typer.Context,
    file: RunFile,
    steps: Annotated[int, typer.Option(help="Length of each run; it saves half way.", min=4)] = 6,
) -> None:
    """Try whether a killed and resumed run ends as one that was never stopped: here, with this model and this text.

    Trains a few steps three times: a run that goes through; one that is killed (SIGKILL) after its first checkpoint, in
    the middle of a step drawn by chance; and its resumption. Then adapters, optimizer, schedule, random generators,
    losses, scores and ledger of the two are compared to the bit, and their digests shown. All is written beside
    output_dir and deleted again; output_dir itself is not touched.

    On a GPU rounding differs from run to run, unless --training.deterministic true makes it the same.

    Exit codes: 0 equal, 1 different (the first tensor that differs is named) or a run failed, 2 what train refuses.

    steep verify-resume ko.yaml --steps 10 --training.deterministic true
    """
    terminal = _attached_terminal()
    from steep.config import load_config
    from steep.verify_resume import verify_resume

    if any(part.difference for part in verify_resume(load_config(file, context.args), steps=steps, terminal=terminal)):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(run: RunDir, trust_remote_code: TrustRemoteCode = False) -> None:
    """Score held-out text with the base model and the trained one: perplexity and bits per byte, by domain."""
    terminal = _attached_terminal()
    from steep.result import evaluate_run

    evaluate_run(run, trust_remote_code=trust_remote_code, terminal=terminal)


@app.command()
def generate(
    run: RunDir,
    prompt: Annotated[str, typer.Argument(help="Text to complete.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Length of each completion, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Complete a text with the base model and the trained one, as it comes."""
    _attached_terminal()
    from steep.result import generate_run

    shown: list[str] = []

    def stream(which: str, piece: str) -> None:
        if which not in shown:
            print(f"{'' if not shown else chr(10)}--- {which}\n{prompt}", end="")
            shown.append(which)
        # What a model writes is text of others; a pipe gets it as it is.
        print(without_controls(piece) if sys.stdout.isatty() else piece, end="", flush=True)

    generate_run(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        trust_remote_code=trust_remote_code,
        stream=stream,
    )
    print()


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folder of a run, finished or not; several: beside each other."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page; default: report.html in the run folder, or here for several."),
    ] = None,
    live: Annotated[bool, typer.Option("--watch", help="Serve the page to this machine, kept fresh.")] = False,
    port: Annotated[int, typer.Option(help="With --watch: 0 takes a free one.", min=0, max=65535)] = 0,
) -> None:
    """Write what a run learned, forgot, used and proved as one HTML page, or serve it while the run goes on."""
    if live and output is not None:
        raise UserError("-o", "it does not go with --watch, which writes no file", "Leave one of the two out.")
    if live:
        from steep.report.watch import watch

        watch(runs, port, said=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True))
    else:
        from steep.report.page import write_report

        print(one_line(f"wrote {write_report(runs, output)}"))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False) -> None:
    """Say what is installed, what the card can do and what is missing. Exit code 1: steep cannot train here."""
    _attached_terminal()
    from contextlib import redirect_stdout

    from steep.doctor import as_lines, examine

    with redirect_stdout(sys.stderr):  # some libraries speak when they are imported
        report = examine()
    print(json.dumps(report, indent=2) if as_json else "\n".join(as_lines(report)))
    if not report["can_train"]:
        raise typer.Exit(1)


@app.command()
def export(
    run: RunDir,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; new or empty.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="merged: a whole model. adapter: PEFT's format. gguf: for llama.cpp.")
    ] = "merged",
    base: Annotated[
        str, typer.Option(help="What a run over 4 or 8 bits is merged into. auto: the better of two. original.")
    ] = "auto",
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face hub as a new model, private at first."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Hand the result on: a merged model, the adapter, or GGUF files, with a model card.

    A merged model is opened again by plain transformers and its held-out loss compared with the adapter's. An adapter
    trained over 4 bits has learned to correct them: merged into the 16-bit original it can lose a lot. So auto merges
    it into the dequantised weights and into the original, measures both, and keeps the better.

    steep export runs/ko -o ko-merged

    steep export runs/ko --to gguf -o ko-gguf
    """
    terminal = _attached_terminal()
    from steep.hand_over import export_run, next_step

    export_run(run, output, to=to, base=base, push_to=push, trust_remote_code=trust_remote_code, terminal=terminal)
    print(one_line(next_step(output, to)))


def main() -> None:
    """Entry point: whatever ends a command early is one line on stderr and an exit code (docs/getting-started.md); with
    --debug the traceback of an error stands before it."""
    words, debug = _without_debug(sys.argv[1:])
    code: Any = 0
    try:
        with heed_signals() as stop:
            code = app(args=words or ["--help"], prog_name="steep", standalone_mode=False, obj=stop)
        if not words:
            code = UserError.exit_code
    except Interrupted as end:
        if ranks.is_main():
            print(f"stopped at once; {one_line(end.go_on)}", file=sys.stderr)
        code = end.exit_code
    except SystemExit as end:
        code = end.code
    except Exception as error:
        if debug:
            found = hide("".join(traceback.format_exception(error)))
            print("\n".join(map(one_line, found.split("\n"))), file=sys.stderr, end="")
        line, code = _explained(error)
        print(f"error: {one_line(hide(line))}", file=sys.stderr)
    if isinstance(code, int) and ranks.by_signal(code) and any(map(_is_waited_for, threading.enumerate())):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_waited_for(thread: threading.Thread) -> bool:
    """Whether Python would not end before this thread has, which may write a checkpoint: without its name that is none,
    and the next run clears it away."""
    return not thread.daemon and thread is not threading.main_thread()


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words of a command but for --debug, which goes anywhere, and whether it is there. Behind ``--`` are no
    options: there it is a word like any other."""
    end = words.index("--") if "--" in words else len(words)
    return [word for word in words[:end] if word != "--debug"] + words[end:], "--debug" in words[:end]


def _explained(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, UserError | RunError):
        return str(error), error.exit_code
    if isinstance(error, _MISUSE):
        misuse: Any = error
        command = misuse.ctx.command_path if misuse.ctx else "steep"
        message = misuse.format_message().rstrip(".")
        return f"{command}: {message}{'' if message.endswith('?') else '.'} See {command} --help.", UserError.exit_code
    if isinstance(error, OSError) and error.errno is not None:  # a disk that is full, a folder that may not be read
        where = error.filename or "disk"
        return f"{where}: {error.strerror}. Check path, permissions and free space.", UserError.exit_code
    if isinstance(error, MemoryError):  # in a run it is told better, see steep.out_of_memory
        return "the memory of this machine ran out. Free some of it, or take one that has more.", RunError.exit_code
    if isinstance(error, RuntimeError) and "CUDA" in str(error):
        from steep.machine_faults import place_that_ran_out

        if place_that_ran_out(error) == "GPU":  # before anything of ours is there, others have filled it
            said = "the memory of the card ran out before the run had any: others hold it (nvidia-smi lists them)"
            return f"{said}. Wait for them, or choose another card (CUDA_VISIBLE_DEVICES).", RunError.exit_code
    found = f"{type(error).__name__}: {error}"
    return f"steep did not expect this, so it is a bug: {found}. Please report it with what --debug shows.", BUG
