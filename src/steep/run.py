"""A run from its file to its folder: train, evaluate, generate. Each command of the CLI is one of these functions."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from steep.config import RunConfig, parse_config
from steep.errors import RunError, UserError
from steep.evaluation.adapters import base_model
from steep.evaluation.board import board
from steep.evaluation.perplexity import evaluate
from steep.evaluation.score import DomainScore
from steep.generation import generate_side_by_side, sample
from steep.model.adapters import add_adapters, load_adapter_weights
from steep.model.load import DTYPES, load_resolved, resolve_compute_dtype
from steep.model.resolve import ResolvedModel, read_tokenizer, resolve
from steep.plan import Plan, embedding_rate, plan_run, uses_checkpointing
from steep.run_folder import RunFolder, environment
from steep.storage import published
from steep.terminal import Terminal, plan_tables
from steep.training.arguments import TrainingArguments
from steep.training.checkpoint import checkpoints
from steep.training.trainer import Trainer


def train_run(config: RunConfig, *, resume: bool = False, terminal: Terminal | None = None) -> dict[str, Any]:
    """Train what the run file says, into its run folder.

    Args:
        resume: go on from the newest checkpoint of the run folder.
        terminal: where to show plan, progress and the board; default: nowhere.

    Returns:
        ``{"steps", "loss", "before", "after"}``: steps done, mean training loss, scores by domain.

    Raises:
        UserError: an input is wrong, or the folder holds another run; nothing is lost.
        RunError: a tensor did not train, the loss stayed not finite, or the ledger does not add up.
    """
    terminal = terminal or Terminal(quiet=True)
    folder = RunFolder(config.training.output_dir)
    checkpoint = _newest_checkpoint(folder, config) if resume else None
    if not resume:
        _refuse_other_run(folder)
    with terminal.tokenising() as progress:
        plan = plan_run(config, progress)
    for table in plan_tables(plan.as_dict()):
        terminal.show(table)
    for warning in plan.warnings:
        terminal.warn(warning)
    if checkpoint is None:
        folder.claim()
        folder.write_text("run.yaml", config.to_yaml())
        folder.write_json("plan.json", plan.as_dict())
    folder.write_json("environment.json", environment())
    transformers.set_seed(config.training.seed)  # adapters are drawn at random
    terminal.say(f"loading {config.model.name}")
    model, tokenizer = load_for(config, plan.resolved, plan.tokenizer), plan.tokenizer
    trainer = _trainer(config, plan, model, folder)
    if checkpoint is None:
        _measure(trainer, folder, config, tokenizer)
    else:
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        folder.rewind(step)
        terminal.say(f"going on from {checkpoint}")
    done = 0 if checkpoint is None else step
    with terminal.training(plan.steps, done) as show:
        trainer.add_callback(_Recorder(trainer, folder, plan, show))
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    measured = folder.read_lines("evaluation.jsonl")
    if not measured or measured[-1]["step"] != trainer.state.global_step:
        _measure(trainer, folder, config, tokenizer)
    assert trainer.proof is not None
    proof, ledger = trainer.proof.report(), plan.corpus.ledger(trainer.times_trained.numpy())
    folder.write_json("proof.json", proof)
    folder.write_json("ledger.json", ledger)
    if not ledger["adds_up"]:
        raise RunError(
            f"the token ledger does not add up: {'; '.join(ledger['problems'])}. See {folder / 'ledger.json'}"
        )
    with published(folder.final) as staging:
        trainer.save_model(str(staging))
    before, after = _first_and_last(folder)
    if before:
        terminal.show(board(before, after, plan.corpus.roles))
    terminal.say(_proof_line(proof))
    terminal.say(f"result: {folder.final}")
    return {"steps": output.global_step, "loss": output.training_loss, "before": before, "after": after}


def evaluate_run(
    run_dir: str | Path, *, terminal: Terminal | None = None
) -> tuple[list[DomainScore], list[DomainScore]]:
    """Score the held-out text of a finished run with its base model and with the trained one.

    Returns:
        Scores by domain: base, trained.

    Raises:
        UserError: the folder holds no finished run.
    """
    terminal = terminal or Terminal(quiet=True)
    config, folder = _finished(run_dir)
    with terminal.tokenising() as progress:
        plan = plan_run(config, progress)
    model = load_for(config, plan.resolved, plan.tokenizer)
    load_adapter_weights(model, folder.final, "run folder")
    score = partial(
        evaluate,
        model,
        plan.corpus.heldout,
        max_length=config.data.max_length,
        stride=config.evaluation.stride,
        max_tokens=config.evaluation.max_tokens,
        autocast_dtype=mixed_precision(config),
    )
    with base_model(model):
        base = score()
    trained = score(step=plan.steps)
    terminal.show(board(base, trained, plan.corpus.roles))
    return base, trained


def generate_run(
    run_dir: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, stream: Any = None
) -> dict[str, str]:
    """Complete `prompt` with the base model of a finished run and with the trained one.

    Args:
        stream: called with (``base`` or ``trained``, piece of text) as text comes.

    Returns:
        ``{"base": ..., "trained": ...}``.
    """
    config, folder = _finished(run_dir)
    settings = config.model
    resolved = resolve(settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    tokenizer = read_tokenizer(resolved)
    model = load_for(config, resolved, tokenizer)
    load_adapter_weights(model, folder.final, "run folder")
    return generate_side_by_side(
        model, tokenizer, prompt, stream=stream, max_new_tokens=max_new_tokens, temperature=temperature
    )


def load_for(config: RunConfig, resolved: ResolvedModel, tokenizer: Any) -> Any:
    """The base model of a run, with fresh adapters."""
    settings = config.model
    model = load_resolved(
        resolved,
        tokenizer,
        base=settings.base,
        compute_dtype=settings.compute_dtype,
        attn_implementation=settings.attn_implementation,
    )
    return add_adapters(model, **config.adapter.model_dump(), trained_dtype=settings.trained_dtype)


def mixed_precision(config: RunConfig) -> torch.dtype | None:
    """The dtype that autocast runs products in, or None where all tensors have one dtype already.

    Trained tensors in fp32 over products in 16 bit need it; a run wholly in bf16, or wholly in fp32, does not.
    """
    compute = resolve_compute_dtype(config.model.compute_dtype)
    uniform = config.model.trained_dtype == compute and config.model.base in ("auto", "nf4", "int8", compute)
    return None if uniform or compute == "fp32" else DTYPES[compute]


def training_arguments(config: RunConfig, folder: RunFolder) -> TrainingArguments:
    """The run file's `training` section as `steep.TrainingArguments`."""
    training, precision = config.training, mixed_precision(config)
    given = training.model_dump(exclude={"gradient_checkpointing", *training.further})
    evaluates = training.eval_steps is not None
    names = TrainingArguments.__dataclass_fields__
    # transformers 5.23 renames gradient to activation checkpointing; 5.17 knows only the old name.
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    settings = {
        f"{prefix}_checkpointing": uses_checkpointing(config),
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": False} if uses_checkpointing(config) else None,
        "embedding_learning_rate": embedding_rate(config) if config.adapter.modules_to_save else None,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_stride": config.evaluation.stride,
        "eval_max_tokens": config.evaluation.max_tokens,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "output_dir": str(folder.path),
    }
    return TrainingArguments(**{**given, **settings, **training.further})


def _trainer(config: RunConfig, plan: Plan, model: Any, folder: RunFolder) -> Trainer:
    trainer = Trainer(
        model=model,
        args=training_arguments(config, folder),
        train_dataset=plan.corpus,
        processing_class=plan.tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class _Recorder(transformers.TrainerCallback):
    """Writes what the trainer logs into the run folder, and shows it."""

    def __init__(self, trainer: Trainer, folder: RunFolder, plan: Plan, show: Any) -> None:
        self._trainer, self._folder, self._plan, self._show = trainer, folder, plan, show

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "tokens" not in logs:
            return
        named = ("loss", "grad_norm", "learning_rate", "embedding_learning_rate")
        row = {"step": state.global_step, **dict.fromkeys(named), **logs}
        self._folder.append("metrics.jsonl", [row])
        self._show(row)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _record_scores(self._folder, self._trainer.evaluations[-1], self._plan.corpus.roles)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        assert trainer.proof is not None
        self._folder.write_json("ledger.json", self._plan.corpus.ledger(trainer.times_trained.numpy()))


def _measure(trainer: Trainer, folder: RunFolder, config: RunConfig, tokenizer: Any) -> None:
    """Score the held-out text and complete the prompts, as the model is now."""
    step = trainer.state.global_step
    if trainer.corpus is not None and trainer.corpus.heldout:
        # The trained copies of the embeddings equal the frozen ones here, but in fp32 they round differently; `steep
        # eval` has only the base itself to compare with.
        with base_model(trainer.model) if step == 0 else nullcontext():
            trainer.evaluate()
        if not any(isinstance(callback, _Recorder) for callback in trainer.callback_handler.callbacks):
            _record_scores(folder, trainer.evaluations[-1], trainer.corpus.roles)
    if config.evaluation.prompts:
        prompts, length = config.evaluation.prompts, config.evaluation.max_new_tokens
        folder.append("samples.jsonl", sample(trainer.model, tokenizer, prompts, step, max_new_tokens=length))


def _record_scores(folder: RunFolder, scores: list[DomainScore], roles: Any) -> None:
    folder.append("evaluation.jsonl", [{**score.as_dict(), "role": roles[score.domain]} for score in scores])


def _first_and_last(folder: RunFolder) -> tuple[list[DomainScore], list[DomainScore]]:
    rows = folder.read_lines("evaluation.jsonl")
    if not rows:
        return [], []
    first, last = ([DomainScore.from_dict(row) for row in rows if row["step"] == rows[end]["step"]] for end in (0, -1))
    return first, last


def _newest_checkpoint(folder: RunFolder, config: RunConfig) -> Path:
    found = checkpoints(folder.path)
    if not found:
        raise UserError(
            "--resume",
            f"{folder.path} holds no checkpoint to go on from",
            "Start the run without --resume in a new folder.",
        )
    before = parse_config(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")))
    for section in ("model", "adapter", "data"):
        old, new = (getattr(each, section).model_dump(exclude={"cache_dir"}) for each in (before, config))
        changed = [f"{section}.{key}: {old[key]!r} → {new[key]!r}" for key in new if old[key] != new[key]]
        if changed:
            raise UserError(
                "--resume", f"the run file differs from the run's: {changed[0]}", "Put it back, or start a new run."
            )
    return found[-1]


def _refuse_other_run(folder: RunFolder) -> None:
    if folder.path.exists():
        folder.claim()


def _finished(run_dir: str | Path) -> tuple[RunConfig, RunFolder]:
    folder = RunFolder(run_dir)
    if not (folder / "run.yaml").is_file():
        raise UserError("run folder", f"{folder.path} holds no run", "Give the output_dir of a run, such as runs/ko.")
    if not folder.final.is_dir():
        raise UserError("run folder", f"{folder.path} is not finished", "Finish it with: steep train FILE --resume")
    return parse_config(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))), folder


def _proof_line(proof: dict[str, Any]) -> str:
    trained = proof["trained"].values()
    moved = sum(record["trained"] for record in trained)
    if not proof["complete"]:
        return f"proof: the run was too short to judge ({moved} of {len(trained)} tensors have moved so far)"
    return (
        f"proof: {moved} of {len(trained)} tensors that are meant to train did; "
        f"{proof['frozen_tensors']} frozen ones are unchanged to the bit"
    )
