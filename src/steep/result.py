"""A run's models and scores, and what is done with a finished one: `steep eval` and `steep generate`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from steep.config import recorded_config
from steep.errors import UserError
from steep.evaluation.adapters import base_model
from steep.evaluation.board import board
from steep.evaluation.perplexity import evaluate, within_a_step
from steep.evaluation.score import DomainScore
from steep.generation import check_settings, generate_side_by_side, prompt_ids_of
from steep.model.adapters import open_adapter
from steep.model.choices import Choices
from steep.model.embeddings import untie
from steep.model.empty import empty_model
from steep.model.install import install
from steep.model.load import as_folder, load_resolved, resolve_base, resolve_compute_dtype
from steep.model.loading_progress import Progress
from steep.model.machine import card_here, lacks_fp8_units
from steep.model.new_rows import NEW_ROWS, read_new_rows
from steep.model.new_tokens import grow_embeddings
from steep.model.resolve import ResolvedModel, read_tokenizer, read_tokenizer_folder, resolve
from steep.model.stored_weights import check_finite, check_stored
from steep.out_of_memory import memory_told
from steep.plan import Plan, plan_run
from steep.resume import branch_of, has_other_text, streamed_commits, with_chosen_base
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.settings import mixed_precision
from steep.terminal import Terminal

logger = logging.getLogger("steep")


def finished(run_dir: str | Path, *, trust_remote_code: bool = False) -> tuple[RunConfig, RunFolder]:
    """The run file and the folder of a finished run.

    Args:
        trust_remote_code: let the folder's run.yaml say that code which comes with the checkpoint is run. The folder
            may be somebody else's; for `steep train` the user's own run file says it.

    Raises:
        UserError: the folder holds none, or it wants code to be run.
    """
    folder = RunFolder(run_dir)
    if not (folder / "run.yaml").is_file():
        raise UserError("run folder", f"{folder.path} holds no run", "Give the output_dir of a run, such as runs/ko.")
    folder.refuse_links()
    config = with_chosen_base(recorded_config(folder / "run.yaml"), folder, "run folder")
    if not folder.final.is_dir():
        raise UserError(
            "run folder",
            f"{folder.path} is not finished",
            f"Finish it with: steep train {shlex.quote(str(folder / 'run.yaml'))} --resume",
        )
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            "run folder",
            f"its run.yaml asks to run Python code that comes with {config.model.name}",
            "If you trust both, add --trust-remote-code.",
        )
    return config, folder


def plan_again(config: RunConfig, folder: RunFolder, terminal: Terminal) -> Plan:
    """The plan of a finished run, over the text and the tokenizer that it had."""
    with terminal.tokenising() as progress:
        return plan_run(
            config,
            progress,
            branch=branch_of(folder),
            commits=streamed_commits(folder),
            grown_tokenizer=folder.tokenizer,
            choices=choices_of_run(folder),
            to_train=False,
        )


def evaluate_run(
    run_dir: str | Path, *, trust_remote_code: bool = False, terminal: Terminal | None = None
) -> tuple[list[DomainScore], list[DomainScore]]:
    """Score the held-out text of a finished run with its base model and with the trained one.

    Args:
        trust_remote_code: see `finished`.

    Returns:
        Scores by domain: base, trained.

    Raises:
        UserError: the folder holds no finished run.
    """
    terminal = terminal or Terminal(quiet=True)
    config, folder = finished(run_dir, trust_remote_code=trust_remote_code)
    plan = plan_again(config, folder, terminal)
    if not plan.corpus.heldout:
        raise UserError(
            "data.holdout",
            "the run held no text out, so there is nothing to score",
            "Raise it, or add a source with role: heldout.",
        )
    if has_other_text(folder, plan):
        terminal.warn(
            "the text is not what the run had: other documents may be held out now, and the run may have trained on "
            "some of them. Its own scores are in evaluation.jsonl."
        )
    with memory_told(None):
        model = load_result(config, plan.resolved, plan.tokenizer, folder)
        score = partial(
            evaluate,
            model,
            max_length=config.data.max_length,
            stride=config.evaluation.stride,
            batch_tokens=within_a_step(config.training.per_device_train_batch_size, config.data.max_length),
            autocast_dtype=plan.precision,
        )
        documents, max_tokens = documents_of_the_base(plan)
        with untouched_base(model, plan):
            base = score(documents, max_tokens=max_tokens)
        trained = score(plan.corpus.heldout, max_tokens=config.evaluation.max_tokens, step=plan.last_step)
    terminal.show(board(base, trained, plan.corpus.roles))
    return base, trained


def generate_run(
    run_dir: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    trust_remote_code: bool = False,
    stream: Any = None,
) -> dict[str, str]:
    """Complete `prompt` with the base model of a finished run and with the trained one.

    Args:
        trust_remote_code: see `finished`.
        stream: called with (``base`` or ``trained``, piece of text) as text comes.

    Returns:
        ``{"base": ..., "trained": ...}``.
    """
    check_settings(max_new_tokens, temperature)
    config, folder = finished(run_dir, trust_remote_code=trust_remote_code)
    settings = config.model
    resolved = resolve(
        settings.name,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        rope_scaling=settings.rope_scaling,
    )
    original = tokenizer = read_tokenizer(resolved)
    if settings.new_tokens is not None:
        tokenizer = read_tokenizer_folder(folder.tokenizer)
    prompt_ids_of(original, prompt, rows=resolved.config.get_text_config().vocab_size)
    base = resolve_base(settings.base, resolved)
    compute = resolve_compute_dtype(settings.compute_dtype, base, card_here())
    with memory_told(None):
        model = load_result(config, resolved, tokenizer, folder)
        return generate_side_by_side(
            model,
            tokenizer,
            prompt,
            base_tokenizer=original,
            stream=stream,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            autocast_dtype=mixed_precision(base, compute, choices_of_run(folder).trained_dtype),
        )


def check_base(config: RunConfig, resolved: ResolvedModel, tokenizer: Any, progress: Progress | None = None) -> None:
    """Read the files of the frozen model once, before anything is written or loaded.

    Args:
        progress: called with the bytes read so far, and how many there are.

    Raises:
        UserError: one is missing or damaged, they are not what the config says, or hold NaN.
    """
    original = tokenizer if config.model.new_tokens is None else read_tokenizer(resolved)
    stored = as_folder(resolved, original)
    check_stored(stored, empty_model(stored, config.model.attn_implementation))
    check_finite(stored, progress=progress)


def load_base(
    config: RunConfig,
    resolved: ResolvedModel,
    tokenizer: Any,
    progress: Progress | None = None,
    rows: Path | None = None,
) -> Any:
    """The frozen model that a run trains over.

    Args:
        progress: of `load_resolved`.
        rows: of `grow_embeddings`, where the run has new tokens and has begun.

    Raises:
        UserError: `rows` is not there, damaged, or of another model.
    """
    settings = config.model
    if rows is not None:
        read_new_rows(rows)  # before much is loaded
    original = tokenizer if settings.new_tokens is None else read_tokenizer(resolved)
    model = load_resolved(
        resolved,
        original,
        base=settings.base,
        compute_dtype=settings.compute_dtype,
        attn_implementation=settings.attn_implementation,
        checked=True,  # `check_base`, of the run
        progress=progress,
    )
    if settings.new_tokens is not None:
        grow_embeddings(model, original, tokenizer, rows)
    if settings.untie_embeddings:
        untie(model)
    return model


def load_result(config: RunConfig, resolved: ResolvedModel, tokenizer: Any, folder: RunFolder) -> Any:
    """The model that a finished run trained: `final/` over the base. It computes as it did in training, but for
    products in fp8 on a card that has no units for them, which is said."""
    rows = None if config.model.new_tokens is None else folder.tokenizer / NEW_ROWS
    base, choices = load_base(config, resolved, tokenizer, rows=rows), choices_of_run(folder)
    model = open_adapter(base, folder.final, trained_dtype=choices.trained_dtype, offloads=True)
    if not choices.fused:
        return model
    if not lacks_fp8_units():
        return install(model, fp8_products=choices.fp8_products)
    if choices.fp8_products == "both":  # those of the backward pass are not computed here
        logger.warning(
            "the run was trained with products in fp8, and this card has no units for them: it computes in 16 bit, so "
            "scores are not quite those of the run"
        )
    return install(model, fp8_products="none")


def choices_of_run(folder: RunFolder) -> Choices:
    """What was chosen for a run, from its plan."""
    plan = folder.read_json("plan.json")
    return Choices(
        plan.get("fused", False),
        plan.get("trained_dtype", "fp32"),
        levels=plan.get("levels"),
        places=plan.get("places"),
        loss_way=plan.get("loss_way"),
        tile=plan.get("tile"),
        fp8_products=plan.get("fp8_products"),
    )


def untouched_base(model: Any, plan: Plan, *, untrained: bool = False) -> AbstractContextManager[None]:
    """Lets `model` compute what the base does, without the rows of new tokens."""
    vocabulary = None if plan.vocabulary is None else plan.vocabulary.ids_before
    return base_model(model, vocabulary, untrained=untrained)


def documents_of_the_base(plan: Plan) -> tuple[Mapping[str, Sequence[Any]], int | None]:
    """What the untouched base is scored on, and how many tokens of each domain: with new tokens the same documents, as
    its own tokenizer reads them."""
    max_tokens = plan.config.evaluation.max_tokens
    if plan.vocabulary is None:
        return plan.corpus.heldout, max_tokens
    return plan.vocabulary.base_documents(plan.corpus, max_tokens), None


def first_and_last(rows: Sequence[Mapping[str, Any]]) -> tuple[list[DomainScore], list[DomainScore]]:
    """The held-out scores before and after training, of `evaluation.jsonl`; empty if the run held nothing out."""
    return (scores_at(rows, rows[0]["step"]), scores_at(rows, rows[-1]["step"])) if rows else ([], [])


def scores_at(rows: Sequence[Mapping[str, Any]], step: int) -> list[DomainScore]:
    return [DomainScore.from_dict(row) for row in rows if row["step"] == step]
