"""`steep train`: a run from its file to its folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import transformers

from steep import ranks
from steep.changes import Change
from steep.errors import RunError, UserError
from steep.evaluation.adapters import base_model
from steep.evaluation.board import board
from steep.evaluation.score import DomainScore, scored_otherwise
from steep.generation import sample
from steep.model.adapters import add_adapters, load_adapter_weights
from steep.model.choices import Choices, take_over
from steep.model.install import install
from steep.model.new_rows import NEW_ROWS, new_rows_of
from steep.opening import write_readme
from steep.out_of_memory import memory_told
from steep.plan import Plan, plan_run
from steep.result import check_base, documents_of_the_base, first_and_last, load_base, scores_at, untouched_base
from steep.resume import (
    accept_changes,
    begin_branch,
    begun_rows,
    begun_tokenizer,
    branch_of,
    changed_ground,
    commits_of_parent,
    record_changes,
    refuse_no_run,
    refuse_other_base,
    refuse_other_inputs,
    refuse_unlike_parent,
    streamed_commits,
    with_choices,
)
from steep.run_folder import FolderOfAnother, RunFolder, environment
from steep.schema import RunConfig
from steep.stopping import Stop
from steep.storage import published
from steep.tensor_files import system_errors
from steep.terminal import Terminal, duration_line, fused_line, plan_tables
from steep.training.branch import Branch
from steep.training.checkpoint import Checkpoint, choose, read_choices
from steep.training.checkpoint_writer import CheckpointCallback
from steep.training.trainer import Trainer


@ranks.joined()
def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    branch: str | Path | None = None,
    allow: Collection[str] = (),
    terminal: Terminal | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train what the run file says, into its run folder.

    Under `torchrun` every process calls it; the first one writes the folder.

    Args:
        resume: go on from the newest checkpoint of the run folder.
        branch: begin at this checkpoint of another run, such as ``runs/ko/checkpoint-300``: its weights, optimizer
            states and random generators go on, its rows too where the text is the same. `max_steps` and the schedule
            are the branch's own.
        allow: fields of the run file that a resumed run may change from its checkpoint on, such as
            ``training.learning_rate``.
        terminal: where to show plan, progress and the board; default: nowhere.
        stop: lets signals end the run after a step (`steep.heed_signals`); default: they do what they do to the script.

    Returns:
        ``{"steps", "loss", "before", "after"}``: steps done, mean training loss, scores by domain.

    Raises:
        UserError: an input is wrong, or the folder holds another run; nothing is lost.
        RunError: a tensor did not train, the loss stayed not finite, memory ran out, or the ledger does not add up.
        Stopped: it was asked to end; the last step is saved, and `final/` is not written.
    """
    terminal = terminal or Terminal(quiet=True)
    folder = (RunFolder if ranks.is_main() else FolderOfAnother)(config.training.output_dir)
    if resume:
        if branch is not None:
            raise UserError("--branch", "it begins a run, and --resume goes on with one", "Give one of the two.")
        refuse_no_run(folder)
        with folder.locked():
            return _resume(config, folder, allow, terminal, stop)
    if allow:
        raise UserError("--allow", "it is of a run that goes on", "Give --resume too, or leave it out.")
    parent = begin_branch(branch, config) if branch is not None else None
    if parent is not None:
        config = with_choices(config, RunFolder(Path(parent.checkpoint).parent), "--branch")
    folder.refuse_data(config.data.sources)  # which nobody should be told to empty
    folder.refuse_contents(branch=parent is not None)
    commits = commits_of_parent(parent, config) if parent is not None else {}
    begun = begun_tokenizer(config, None, parent)
    plan = _plan(config, terminal, parent, begun, commits, _choices_so_far(None, parent))
    if parent is not None:
        refuse_unlike_parent(plan)
    for table in plan_tables(plan.as_dict()):
        terminal.show(table)
    for warning in plan.warnings:
        terminal.warn(warning)
    terminal.say(f"checking the files of {config.model.name}")
    with terminal.checking() as progress:
        check_base(config, plan.resolved, plan.tokenizer, progress)
    folder.make()
    with folder.locked():
        folder.refuse_contents(branch=parent is not None)
        folder.clear(resumed=False)
        with memory_told(plan):
            return _train(plan, folder, terminal, stop)


def _resume(
    config: RunConfig, folder: RunFolder, allow: Collection[str], terminal: Terminal, stop: Stop | None
) -> dict[str, Any]:
    folder.clear(resumed=True)
    folder.refuse_damage()
    config = with_choices(config, folder, "--resume")
    found = choose(folder.path)
    if found is None and folder.final.is_dir():
        raise UserError(
            "--resume",
            f"{folder.final} is a result, and no checkpoint is left to go on from: the run would begin anew",
            "Put a checkpoint back, or start a new run with another training.output_dir.",
        )
    changes = accept_changes(folder, config, found.step if found else 0, allow)
    parent = branch_of(folder)
    if parent is not None and found is None:
        parent.verify()
    choices = _choices_so_far(found, parent)
    if choices is not None and any(change.field == "training.gradient_checkpointing" for change in changes):
        choices = replace(choices, levels=None)
    plan = _plan(config, terminal, parent, begun_tokenizer(config, folder, parent), streamed_commits(folder), choices)
    figures = plan.as_dict()
    terminal.say(f"fused: {fused_line(figures)}")
    if plan.duration is not None:
        terminal.say(f"time: {duration_line(figures['duration'])}")
    terminal.say(f"checking the files of {config.model.name}")
    with terminal.checking() as progress:
        check_base(config, plan.resolved, plan.tokenizer, progress)
    refuse_other_inputs(folder, plan)
    with memory_told(plan):
        return _train(plan, folder, terminal, stop, resume=True, found=found, changes=changes)


def _choices_so_far(found: Checkpoint | None, parent: Branch | None) -> Choices | None:
    """What was chosen for the steps before: of this run, or where it begins at its parent's; None before the first."""
    if found is not None:
        return read_choices(found.path)
    if parent is not None:  # whose batch may have been another, for which its levels, and its loss's way, were chosen
        return replace(read_choices(Path(parent.checkpoint), "--branch"), levels=None)
    return None


def _plan(
    config: RunConfig,
    terminal: Terminal,
    parent: Branch | None,
    begun: Path | None,
    commits: Mapping[int, str],
    choices: Choices | None,
) -> Plan:
    with terminal.tokenising() as progress:
        return plan_run(
            config,
            progress,
            branch=parent,
            commits=commits,
            grown_tokenizer=begun,
            choices=choices,
            refuses=True,
            measures=True,
        )


def _train(
    plan: Plan,
    folder: RunFolder,
    terminal: Terminal,
    stop: Stop | None,
    *,
    resume: bool = False,
    found: Checkpoint | None = None,
    changes: Sequence[Change] = (),
) -> dict[str, Any]:
    config = plan.config
    if resume and (ground := changed_ground(folder)):
        terminal.warn(f"the run goes on, but not surely to the same bits: {'; '.join(ground)}")
    rows = begun_rows(plan, folder if resume else None, found)
    transformers.set_seed(config.training.seed)  # adapters are drawn at random
    terminal.say(f"loading {config.model.name}")
    settings = {**config.adapter.model_dump(), "trained_dtype": plan.trained_dtype}
    with memory_told(plan, loading=True), terminal.loading() as progress:
        base = load_base(config, plan.resolved, plan.tokenizer, progress, rows)
        goes_on = found is not None or plan.branch is not None
        model = add_adapters(base, **settings, resumed=goes_on, offloads=True)
    model.peft_config["default"].revision = config.model.revision  # where PEFT looks for the base's
    _check_trainable(model, plan)
    if plan.fused:
        install(model)
        take_over(model, plan.choices)
    trainer = _trainer(plan, model, stop)
    if found is not None:
        refuse_other_base(trainer.model, found.path, "--resume")
    elif plan.branch is not None:
        refuse_other_base(trainer.model, Path(plan.branch.checkpoint), "--branch")
    if plan.branch is not None:  # before run.yaml, from which on the folder holds a run
        folder.write_json("parent.json", asdict(plan.branch))
    if ranks.is_main() and plan.vocabulary is not None and (rows is None or plan.vocabulary.folder != folder.tokenizer):
        with published(folder.tokenizer) as staging:
            shutil.copytree(plan.vocabulary.folder, staging, dirs_exist_ok=True)
            begun = new_rows_of(model)
            assert begun is not None
            (staging / NEW_ROWS).write_bytes(begun.to_bytes())
    done = found.step if found else plan.first_step
    if done < plan.last_step and folder.drop_result():  # before run.yaml, whose result it is not
        terminal.say(f"steps are still to come: {folder.final}, the result so far, is removed")
    record_changes(folder, changes, config, done)
    folder.write_text("run.yaml", _as_it_was_begun(config).to_yaml())
    folder.write_json("plan.json", plan.as_dict())
    folder.write_json("environment.json", environment())
    if resume:
        if not found:
            folder.rewind(-1)  # nothing is trained yet: the base is measured anew, as things are now
        for change in changes:
            terminal.say(f"from step {done + 1} on {change}")
        if done == plan.last_step:
            terminal.say(f"all {plan.steps} steps are done already: only the result is written again")
        else:
            terminal.say(
                f"going on from {found.path}" if found else f"there is no checkpoint yet: starting at step {done}"
            )
    if not found:
        terminal.say("scoring held-out text with the base model")
        _measure(trainer, folder, plan)
        if plan.branch is not None:
            _measure_parent(trainer, folder, plan, terminal)
    with terminal.training(plan.last_step, done) as show:
        trainer.add_callback(_Recorder(trainer, folder, plan, show))
        try:
            output = trainer.train(resume_from_checkpoint=found)
        except RunError:
            if trainer.proof is not None:  # it may say why
                _account(trainer, folder)
            raise
    proof, ledger = _account(trainer, folder)
    terminal.say("scoring held-out text with the trained model")
    _measure(trainer, folder, plan)
    if not ledger["adds_up"]:
        raise RunError(
            f"the token ledger does not add up: {'; '.join(ledger['problems'])}. See {folder / 'ledger.json'}"
        )
    folder.sync_lines()
    if ranks.is_main():
        with published(folder.final) as staging, system_errors(folder.final):
            trainer.save_model(str(staging))
            write_readme(staging, plan, model, folder.final)
    scores = ranks.from_main(lambda: folder.read_lines("evaluation.jsonl"))
    before, after = first_and_last(scores)
    if before:
        terminal.show(board(before, after, plan.corpus.roles))
        if note := scored_otherwise(scores):
            terminal.warn(note)
        if plan.branch is not None:
            at_parent = scores_at(scores, plan.first_step)
            terminal.show(board(at_parent, after, plan.corpus.roles, title=f"{plan.branch.name} → branch"))
    terminal.say(_proof_line(proof))
    terminal.say(f"result: {folder.final}")
    return {
        "steps": output.global_step - plan.first_step,
        "loss": output.training_loss,
        "before": before,
        "after": after,
    }


def _as_it_was_begun(config: RunConfig) -> RunConfig:
    """`config` with the folder of the run as an absolute path, as those of model and text are; and with the forwards
    that a step was cut into in place of its rows, as with the base: a run keeps what was chosen."""
    place = str(Path(config.training.output_dir).absolute())
    found = {"output_dir": place, "rows_per_step": None}
    return config.model_copy(update={"training": config.training.model_copy(update=found)})


def _account(trainer: Trainer, folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write `proof.json` and `ledger.json`."""
    assert trainer.proof is not None
    proof, ledger = trainer.proof.report(), trainer.ledger()
    folder.write_json("proof.json", proof)
    folder.write_json("ledger.json", ledger)
    return proof, ledger


def _check_trainable(model: Any, plan: Plan) -> None:
    """The proof watches what requires a gradient; that this is what the plan says is checked here.

    Raises:
        RunError: more or fewer values would train.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != plan.shape.trained:
        raise RunError(
            f"{trainable:,} values of the model require a gradient, and {plan.shape.trained:,} are meant to train"
        )


def _trainer(plan: Plan, model: Any, stop: Stop | None) -> Trainer:
    trainer = Trainer(
        model=model,
        args=plan.arguments,
        train_dataset=plan.corpus,
        processing_class=plan.tokenizer,
        branch=plan.branch,
        stop=stop,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.planned_bytes = sum(plan.memory.values())
    return trainer


class _Recorder(CheckpointCallback):
    """Writes what the trainer logs into the run folder, and shows it."""

    def __init__(self, trainer: Trainer, folder: RunFolder, plan: Plan, show: Any) -> None:
        self._trainer, self._folder, self._plan, self._show = trainer, folder, plan, show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.rewind(state.global_step)  # also each time that it begins once more, for a spike

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.check_standing()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "tokens" not in logs:
            return
        named = ("loss", "grad_norm", "learning_rate", "embedding_learning_rate")
        row = {"step": state.global_step, **dict.fromkeys(named), **logs}
        self._folder.append("metrics.jsonl", [row])
        self._show(row)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _record_scores(self._folder, self._trainer.evaluations[-1], self._plan)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.write_json("ledger.json", self._trainer.ledger())

    def before_publishing(self) -> None:
        self._folder.sync_lines()  # a checkpoint does not outlive the lines that lead to it


def _measure(trainer: Trainer, folder: RunFolder, plan: Plan) -> None:
    """Score the held-out text and complete the prompts, as the model is now, unless that is recorded already. What a
    killed process has recorded in part is done anew."""
    step, settings = trainer.state.global_step, plan.config.evaluation

    def missing(name: str, key: str, wanted: Iterable[str]) -> bool:
        recorded = ranks.from_main(lambda: [row.get(key) for row in folder.read_lines(name) if row["step"] == step])
        if recorded == list(wanted):
            return False
        folder.rewind(step - 1, [name])  # nothing is recorded behind this step
        return True

    heldout = trainer.corpus.heldout if trainer.corpus is not None else {}
    if heldout and missing("evaluation.jsonl", "domain", heldout):
        # The trained copies of the embeddings equal the frozen ones here, but in fp32 they round differently; `steep
        # eval` has only the base itself to compare with.
        if step > 0:
            trainer.evaluate()
        else:
            with untouched_base(trainer.model, plan, untrained=True):
                trainer.evaluate_documents(*documents_of_the_base(plan))
        if not any(isinstance(callback, _Recorder) for callback in trainer.callback_handler.callbacks):
            _record_scores(folder, trainer.evaluations[-1], plan)
    if settings.prompts and missing("samples.jsonl", "prompt", settings.prompts) and ranks.is_main():
        base = plan.vocabulary if step == 0 else None  # before training, the base as it was without new tokens
        with nullcontext() if base is None else base_model(trainer.model, base.ids_before, untrained=True):
            samples = sample(
                trainer.model,
                plan.tokenizer if base is None else base.original,
                settings.prompts,
                step,
                max_new_tokens=settings.max_new_tokens,
                autocast_dtype=trainer.autocast_dtype,
            )
        folder.append("samples.jsonl", samples)


def _measure_parent(trainer: Trainer, folder: RunFolder, plan: Plan, terminal: Terminal) -> None:
    """Score and complete once more as the checkpoint that a branch begins at does."""
    assert plan.branch is not None
    rows = "go on with the rows it has not had" if trainer.goes_on_with_rows else "begin at the first row of other text"
    terminal.say(f"branching off {plan.branch.checkpoint}: {plan.steps} steps that {rows}; scoring it")
    load_adapter_weights(trainer.model, Path(plan.branch.checkpoint), "--branch")
    trainer.state.global_step = plan.first_step
    _measure(trainer, folder, plan)


def _record_scores(folder: RunFolder, scores: list[DomainScore], plan: Plan) -> None:
    roles, products = plan.corpus.roles, plan.choices.fp8_products
    rows = [{**score.as_dict(), "role": roles[score.domain], "fp8_products": products} for score in scores]
    folder.append("evaluation.jsonl", rows)


def _proof_line(proof: dict[str, Any]) -> str:
    trained = proof["trained"].values()
    moved = sum(record["trained"] for record in trained)
    if not proof["complete"]:
        return f"proof: the run was too short to judge ({moved} of {len(trained)} tensors have moved so far)"
    return (
        f"proof: {moved} of {len(trained)} tensors that are meant to train did; "
        f"{proof['frozen_tensors']} frozen ones are unchanged to the bit"
    )
