"""What a run will do and need, worked out before any weight is loaded; every input error is found here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steep import ranks
from steep.data.packing import Corpus, pack
from steep.data.token_file import Progress
from steep.errors import UserError
from steep.generation import prompt_ids_of
from steep.model.adapters import check_embeddings, check_rank
from steep.model.choices import Choices
from steep.model.embeddings import untie
from steep.model.empty import check_computes, empty_model
from steep.model.load import DTYPES, check_4bit_rows, resolve_base
from steep.model.machine import Card, card_here
from steep.model.new_tokens import check_trained, rows_for
from steep.model.positions import check_length
from steep.model.quantisable import quantisable
from steep.model.resolve import ResolvedModel, read_tokenizer, resolve
from steep.model.stored_weights import check_stored
from steep.model.weight_error import weight_errors
from steep.planning.advice import advice
from steep.planning.bases import Base, bases_of, with_base
from steep.planning.calibration import measured_here, with_attention
from steep.planning.computation import Ground
from steep.planning.duration import Duration, Pace
from steep.planning.fitting import Shortfall, changed, forwards_of, shortfall_of
from steep.planning.fp8_choice import dequantised
from steep.planning.fusing import check_adapters, decide
from steep.planning.memory import Shape, gaps
from steep.planning.micro_batch import with_micro_batch
from steep.planning.rates import rates_of
from steep.planning.sizes import disk_bytes, host_bytes
from steep.planning.vram import check_host, host_budget, host_limit, remarks, remarks_on_gaps, vram_budget
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.settings import (
    check_batch,
    check_evaluation,
    check_optimizer,
    check_stride,
    check_warmup,
    choose_best_metric,
    embedding_rate,
    mixed_precision,
    planned_epochs,
    planned_steps,
    rows_per_step,
    training_arguments,
)
from steep.trackers import check_login
from steep.training.arguments import TrainingArguments
from steep.training.branch import Branch
from steep.training.deterministic import prepare_cublas
from steep.training.schedules import Schedule, schedule_of
from steep.vocabulary import Vocabulary, grown, warnings


@dataclass
class Plan:
    """A run worked out. `resolved`, `tokenizer`, `arguments` and `corpus` are what `train_run` goes on with.

    Attributes:
        branch: where the run leaves its parent, if it is a branch.
        schedule: the learning rates' factor by step; None where the schedule is transformers' own.
        base, compute: the automatic choices made: storage of frozen weights, dtype of products.
        base_reason: why it is that base, where `model.base: auto` had a choice.
        batch_reason: why a forward has so many rows, where `training.rows_per_step` left that to the plan.
        choices: those that the run keeps for good, and that a resumed one takes over.
        not_fused: why the steps are not fused; None where they are.
        card: that it is planned for; None: there is none, and nothing is planned for one but an amount of memory.
        rows, steps, tokens, targets: rows an epoch, optimizer steps, tokens and targets an epoch.
        vocabulary: the grown tokenizer, where there are new tokens; `tokenizer` is then the same.
        new_tokens: its figures.
        memory, host, disk: bytes by item, on the card (the host without one), on the host beside it, and on the disk.
        duration: what it will take; None: not known, as on a CPU, of a run that is not fused, or of several processes.
        shortfall: how the memory of the card falls short of a step; None: it does not.
        bases: what the run would need and how long it would take over each.
        warnings: what a user should know before the run.
    """

    config: RunConfig
    resolved: ResolvedModel
    tokenizer: Any
    arguments: TrainingArguments
    corpus: Corpus
    shape: Shape
    base: str
    compute: str
    choices: Choices
    not_fused: str | None
    card: Card | None
    steps: int
    memory: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    branch: Branch | None = None
    schedule: Schedule | None = None
    vocabulary: Vocabulary | None = None
    new_tokens: dict[str, Any] | None = None
    shortfall: Shortfall | None = None
    duration: Duration | None = None
    bases: dict[str, Base] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    base_reason: str | None = None
    batch_reason: str | None = None

    @property
    def fused(self) -> bool:
        return self.choices.fused

    @property
    def trained_dtype(self) -> str:
        return self.choices.trained_dtype

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype that autocast runs products in, or None."""
        return mixed_precision(self.base, self.compute, self.trained_dtype)

    @property
    def first_step(self) -> int:
        """Steps before the first one of this run."""
        return self.branch.step if self.branch else 0

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps

    @property
    def _tile(self) -> int | None:
        """Tokens that a fused layer computes at a time; None: all."""
        tile, config = self.choices.tile, self.config
        tokens = config.training.per_device_train_batch_size * config.data.max_length
        return tile if tile is not None and tile < tokens else None

    @property
    def fragmentation(self) -> dict[str, Any] | None:
        """Bytes reserved beyond the peak of a step, and those that the card has beside it; None: not known."""
        if not self.fused or "libraries' workspaces" not in self.memory:
            return None
        left = None if self.card is None else max(0, self.card.memory - sum(self.memory.values()))
        return {"bytes": gaps(self.memory), "left_bytes": left}

    def as_dict(self) -> dict[str, Any]:
        """`plan.json`."""
        training, shape = self.config.training, self.shape
        return {
            "model": self.config.model.name,
            "base": self.base,
            "base_reason": self.base_reason,
            "compute_dtype": self.compute,
            "trained_dtype": self.trained_dtype,
            "fused": self.fused,
            "fused_reason": self.not_fused,
            "levels": self.choices.levels,
            "places": self.choices.places,
            "loss_way": self.choices.loss_way,
            "tile": self._tile,
            "fp8_products": self.choices.fp8_products,
            "parameters": {
                "frozen": shape.linear + shape.embeddings + shape.other,
                "adapters": shape.lora,
                "adapters_frozen": shape.lora_start,
                "trained_embeddings": shape.trained_embeddings,
                "trained": shape.trained,
            },
            "data": {**self.corpus.statistics, "mixing": self.corpus.mixing, "fingerprint": self.corpus.fingerprint},
            "first_step": self.first_step,
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "rows_per_step": rows_per_step(self.config),
            "per_device_train_batch_size": training.per_device_train_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "batch_reason": self.batch_reason,
            "processes": ranks.world_size(),
            "epochs": planned_epochs(self.config, len(self.corpus.train)),
            "learning_rate": training.learning_rate,
            "embedding_learning_rate": embedding_rate(self.config),
            "lr_scheduler_type": training.lr_scheduler_type,
            "schedule": self.schedule.describe() if self.schedule else None,
            "card": self.card.as_dict() if self.card else None,
            "memory_bytes": {**self.memory, "total": sum(self.memory.values())},
            "fragmentation": self.fragmentation,
            "shortfall": self.shortfall.as_dict() if self.shortfall else None,
            "duration": self.duration.as_dict() if self.duration else None,
            "bases": {name: base.as_dict() for name, base in self.bases.items()},
            "host_bytes": self.host,
            "disk_bytes": {**self.disk, "total": sum(self.disk.values())},
            "warnings": self.warnings,
        }


def plan_run(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    branch: Branch | None = None,
    commits: Mapping[int, str] | None = None,
    grown_tokenizer: Path | None = None,
    choices: Choices | None = None,
    card: Card | None = None,
    to_train: bool = True,
    refuses: bool = False,
    measures: bool = False,
) -> Plan:
    """Work out a run: check every input, tokenise the text (once, into the cache), count, and estimate memory and disk.

    Of several processes the first one does this; then the others find its work in the cache.

    Args:
        progress: called with documents, bytes and budget while text is tokenised.
        branch: where the run leaves its parent, if it is a branch.
        commits: of streamed sources, by number, to take in place of what their revision names today.
        grown_tokenizer: the folder of the tokenizer that a begun run has, if it has new tokens.
        choices: what was chosen for the steps before, if the run goes on: it stays.
        card: that it is planned for, in place of the one that is here.
        to_train: whether steps are still to come, so that the disk has to hold their checkpoints.
        refuses: what does not fit the card, the host or the disk is an error; else it is said in a warning.
        measures: how fast the card is, if it is here: up to 3 s for the time of a step, and for what layers may keep in
            host memory. Else the maker's figures are taken.

    Raises:
        UserError: anything that is wrong with the model, the adapter, the data or the settings.
    """
    work_out = partial(
        _work_out,
        progress=progress,
        branch=branch,
        grown_tokenizer=grown_tokenizer,
        before=choices,
        card=card or card_here(),
        to_train=to_train,
        refuses=refuses,
        measures=measures,
    )
    plan = work_out(config, commits or {}) if ranks.is_main() else None
    read, chosen = ranks.from_main(lambda: _first_found(plan))
    if plan is None:
        same = {int(index): commit for index, commit in read.items()}
        plan = work_out(changed(config, chosen), same)
    if len(set(ranks.gathered_bytes(plan.corpus.fingerprint.encode()))) > 1:
        raise UserError(
            "data.sources", "the processes have not read the same text", "Give all of them the same files and model."
        )
    # Each has seen its card and the host at a moment of its own, and sums round by how layers are cut.
    plan.choices = Choices(**ranks.from_main(lambda: asdict(plan.choices)))
    return plan


def _first_found(plan: Plan | None) -> tuple[dict[int, str], dict[str, Any]]:
    """The commits that streamed sources were read at, by number, and the base and the forwards: each process has a card
    of its own."""
    assert plan is not None
    training = plan.config.training
    forwards = forwards_of(training.per_device_train_batch_size, training.gradient_accumulation_steps)
    sources = enumerate(plan.corpus.statistics["sources"])
    commits = {index: source["revision"] for index, source in sources if source["streamed"]}
    return commits, {"model.base": plan.base, "training.rows_per_step": None, **forwards}


def _chosen(config: RunConfig, ground: Ground) -> tuple[RunConfig, str | None, str | None]:
    """`config` with the base and the forwards of a step that the run file leaves to the plan, and why those."""
    config, base_reason = with_base(config, ground)
    config, batch_reason = with_micro_batch(config, ground)
    return config, base_reason, batch_reason


def _work_out(
    config: RunConfig,
    commits: Mapping[int, str],
    *,
    progress: Progress | None,
    branch: Branch | None,
    grown_tokenizer: Path | None,
    before: Choices | None,
    card: Card | None,
    to_train: bool,
    refuses: bool,
    measures: bool,
) -> Plan:
    model, data, training = config.model, config.data, config.training
    if training.deterministic:
        prepare_cublas("training.deterministic")
    folder = RunFolder(config.training.output_dir)
    if to_train:  # else nothing is written there, and the run may lie elsewhere now
        folder.check_place()
        folder.refuse_data(config.data.sources)
        check_evaluation(config)
    resolved = resolve(
        model.name,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        rope_scaling=model.rope_scaling,
    )
    empty = empty_model(resolved, model.attn_implementation)
    check_computes(empty)
    budget = vram_budget(config.training.vram, card) if to_train else None
    if budget is None:  # else it is planned for a card
        check_4bit_rows(empty, resolve_base(model.base, resolved))
    stored = check_stored(resolved, empty, download=False)
    if model.untie_embeddings:
        untie(empty)
    check_embeddings(empty, config.adapter.modules_to_save)
    check_rank(empty, config.adapter.target_modules, config.adapter.r)
    check_adapters(config, empty)
    check_length(config.data.max_length, resolved.config)
    check_batch(config)
    layer, not_fused = decide(config, empty, before, card)
    host_memory = host_budget(config.training.host_memory, card) if to_train else 0
    ground = Ground(resolved, empty, layer, card, budget, before, to_train, host_memory)
    as_asked = config
    config, base_reason, batch_reason = _chosen(as_asked, ground)
    training = config.training
    computation = ground.computation(config)
    compute, trained = computation.compute, computation.trained
    tokenizer = read_tokenizer(resolved)
    precision = mixed_precision(computation.base, compute, trained)
    arguments = training_arguments(config, precision, fused=layer is not None, branch=branch is not None)
    if to_train:
        check_login(config.training.report_to)
    check_optimizer(arguments, empty)
    check_stride(config)
    pinned = {index: {"revision": commit} for index, commit in commits.items()}
    sources = [source.model_copy(update=pinned.get(index)) for index, source in enumerate(data.sources)]
    vocabulary = None
    if model.new_tokens is not None:
        check_trained(empty, config.adapter.modules_to_save)
        asked = model.new_tokens if isinstance(model.new_tokens, str) else model.new_tokens.auto
        vocabulary = grown(asked, tokenizer, sources, data, grown_tokenizer, progress)
        tokenizer, sources = vocabulary.tokenizer, [read.source for read in vocabulary.before]
        rows = rows_for(tokenizer, empty.get_input_embeddings().weight.shape[0])
        empty.resize_token_embeddings(rows, mean_resizing=False)
        config, base_reason, batch_reason = _chosen(as_asked, ground)  # of the tables as they have become
        training = config.training
        computation = ground.computation(config)
        arguments = training_arguments(config, precision, fused=layer is not None, branch=branch is not None)
    base = computation.base
    if computation.layers is not None and computation.products != "none":
        stored += dequantised(computation.layers, compute)
    tokens, dtype, measured = training.per_device_train_batch_size * data.max_length, DTYPES[compute], None
    # Time is predicted of fused steps in one process.
    if measures and layer is not None and card is not None and card.is_here and ranks.world_size() == 1:
        measured = measured_here(layer, tokens, dtype, card, stored)
    # no timer has a part in the run's bits
    ground = replace(ground, rates=rates_of(card, None if training.deterministic else measured))
    sizes = ground.sized(config, computation)
    shape, memory = sizes.shape, sizes.memory
    if budget is not None and card is None and model.compute_dtype == "auto":
        stored.append(
            f"there is no GPU here, and of the card that is planned for only training.vram, {training.vram}, is known: "
            f"products are taken to be in {compute}, as on this machine. Name the card (steep plan --card), or give "
            "model.compute_dtype (bf16, if the card has that)."
        )
    shortfall = shortfall_of(config, ground, computation, sizes, is_branch=branch is not None)
    if refuses and shortfall is not None and shortfall.is_refused:
        raise shortfall.error()
    host, goes_on = host_bytes(config, shape, memory, trained, sizes.on_host), before is not None and branch is None
    with _refused_or_told(refuses, stored):
        limit = host_limit(training.host_memory, card, None if goes_on or not to_train else host_memory)
        check_host(host, limit, goes_on=goes_on)
    _check_prompts(config, tokenizer, resolved, shape.vocabulary)
    corpus = pack(
        sources,
        tokenizer,
        max_length=data.max_length,
        strategy=data.packing,
        replay_share=data.replay_share,
        holdout=data.holdout,
        keep_duplicates=data.keep_duplicates,
        seed=training.further.get("data_seed", training.seed),
        vocab_size=shape.vocabulary,
        cache_dir=data.cache_dir,
        progress=progress,
        documents=vocabulary.documents if vocabulary else None,
    )
    if arguments.eval_strategy != "no" and not corpus.heldout:
        raise UserError(
            "training.eval_steps",
            "there is no held-out text to evaluate",
            "Raise data.holdout, add a source with role: heldout, or leave it out.",
        )
    choose_best_metric(arguments, corpus)
    steps = planned_steps(config, len(corpus.train))
    schedule = schedule_of(arguments, steps, start=branch.rate_factor if branch else None, section="training.")
    if branch is None:  # which begins at a rate that it has
        check_warmup(arguments, steps, rows_per_step(config), len(corpus.train))
    if measured is not None and layer is not None:
        batch, of_run = training.per_device_train_batch_size, training.deterministic
        measured = with_attention(measured, layer, corpus.train, batch, dtype, stored, of_run=of_run)
    pace = Pace.of(config, rates_of(card, measured), corpus.train.length)
    disk = disk_bytes(
        config,
        shape,
        memory,
        trained,
        steps,
        rolls_back=arguments.spike_action == "rollback",
        keeps_best=arguments.metric_for_best_model is not None,
    )
    plan = Plan(
        config,
        resolved,
        tokenizer,
        arguments,
        corpus,
        shape,
        base,
        compute,
        sizes.choices,
        not_fused,
        card,
        steps,
        memory,
        host,
        disk,
        branch,
        schedule,
        shortfall=shortfall,
        duration=None if pace is None or (shortfall and shortfall.is_refused) else pace.duration(sizes, steps),
        base_reason=base_reason,
        batch_reason=batch_reason,
    )
    errors = weight_errors(resolved, quantisable(empty)) if to_train else {}
    plan.bases = bases_of(as_asked, ground, sizes, pace, errors, base=base, compute=compute)
    if shortfall is not None:
        of_memory = [str(shortfall)]
    elif (beyond := plan.fragmentation) is not None:
        of_memory = remarks_on_gaps(sum(memory.values()), beyond["bytes"], beyond["left_bytes"])
    else:
        of_memory = []
    plan.warnings = [
        *stored,
        *of_memory,
        *(remarks(training, card, host) if to_train else []),
        *advice(config, resolved, tokenizer, corpus, shape, computation, card),
        *corpus.warnings,
    ]
    if vocabulary is not None:
        plan.vocabulary, plan.new_tokens = vocabulary, vocabulary.figures(corpus)
        plan.warnings += warnings(plan.new_tokens)
    if to_train:
        with _refused_or_told(refuses, plan.warnings):
            folder.check_room(sum(disk.values()))
    return plan


def _check_prompts(config: RunConfig, tokenizer: Any, resolved: ResolvedModel, rows: int) -> None:
    """That each is tokens of the model's `rows`, and no more of them than it has positions for."""
    for index, prompt in enumerate(config.evaluation.prompts):
        ids = prompt_ids_of(tokenizer, prompt, rows=rows, field=f"evaluation.prompts[{index}]")
        check_length(len(ids), resolved.config, f"evaluation.prompts[{index}]")
        check_length(config.evaluation.max_new_tokens, resolved.config, "evaluation.max_new_tokens")


@contextmanager
def _refused_or_told(refuses: bool, told: list[str]) -> Iterator[None]:
    """What this machine lacks: an error for a run that is to begin here, and a warning where it is planned alone."""
    try:
        yield
    except UserError as error:
        if refuses:
            raise
        told.append(f"steep train refuses it: {error}")
