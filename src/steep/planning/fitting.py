"""Whether a step fits the card; and where it does not, the nearest settings with which it does.

They are found by planning the memory of other settings, those first that change the result least: a batch in more parts
makes the same step, optimizer states and weights in fewer bits nearly the same; without clipping, gradients need not
wait for each other; shorter rows and a lower rank make another run, and so do embeddings that stay as they are. What
may be in host memory changes no bit of a result; but the host has to have it, and a step takes longer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import torch

from steep import ranks
from steep.amounts import human_bytes
from steep.errors import UserError
from steep.model.block import LEVELS, Place
from steep.model.layer import Layer
from steep.model.machine import Card
from steep.ops.lora import Lora, Projection
from steep.planning.computation import Computation, Ground, Sizes
from steep.planning.memory import GIB
from steep.planning.sizes import host_bytes
from steep.planning.vram import asked_bytes, host_budget, host_lacks, host_limit
from steep.schema import FORWARDS, RunConfig
from steep.settings import MOST_TOKENS, check_update, rows_per_step
from steep.training.adamw8bit import ADAMW_8BIT

SHORTEST, LOWEST_RANK = 256, 8  # that are proposed
MOST = 3

Settings = dict[str, Any]  # fields as on the command line, with their values
Knob = list[Settings]  # what one of the settings, or a pair, is turned to: what changes the result least comes first


@dataclass(frozen=True)
class Alternative:
    """Settings with which a step fits.

    Attributes:
        peak: bytes that it then needs.
        changes: what of the training is another then, where the settings' names do not say it.
    """

    settings: Settings
    peak: float
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.settings.items()}
        named = " with ".join(f"{name}: {value}" for name, value in said.items())
        return f"{named} ({', '.join((human_bytes(self.peak), *self.changes))})"


@dataclass(frozen=True)
class Shortfall:
    """A step that needs more than it may fill.

    Attributes:
        peak: bytes that it needs.
        budget: bytes that it may fill.
        limit: bytes above which the run is refused; None: it never is.
        vram: as in the run file.
        nearest: what fits.
        goes_on: the run was begun before.
        is_branch: or its parent was.
    """

    peak: int
    budget: int
    limit: int | None
    card: Card | None
    vram: str
    nearest: list[Alternative]
    goes_on: bool
    is_branch: bool

    @property
    def is_refused(self) -> bool:
        return self.limit is not None and self.peak > self.limit

    @property
    def problem(self) -> str:
        of_card = "of the card"
        if self.card is not None:
            of_card = f"of the {human_bytes(self.card.memory)} of the {self.card.name}"
            if self.card.is_here:
                of_card += f" ({human_bytes(self.card.free)} are free)"
        needs, may = human_bytes(self.peak), human_bytes(self.budget)
        if needs == may:
            needs += f", {human_bytes(self.peak - self.budget)} too much"
        return f"a step needs about {needs}, and {may} {of_card} may be filled (training.vram: {self.vram})"

    @property
    def remedy(self) -> str:
        if self.nearest:
            allow = f", with --allow {next(iter(self.nearest[0].settings))}" if self.goes_on else ""
            said = f"What fits, nearest first: {'; or '.join(map(str, self.nearest))}{allow}."
        elif self.goes_on or self.is_branch:
            said = "Go on where there is more."
        else:
            more = "" if self.vram == "auto" else " a larger training.vram,"
            said = f"Nothing that is trained otherwise fits: take a smaller model,{more} or a card with more."
        on_card = self.card is None or self.peak <= self.card.memory
        if self.is_refused and on_card and not (self.goes_on or self.is_branch):  # whose training.vram stays
            said += f" To try it all the same: training.vram: {math.ceil(self.peak / GIB)}GiB."
        return said

    def error(self) -> UserError:
        return UserError("training.vram", self.problem, self.remedy)

    def __str__(self) -> str:
        what = ""
        if self.limit is not None:
            begins = "steep train begins all the same, since training.vram says so, and is likely to run out of it"
            what = f", and {'steep train refuses it' if self.is_refused else begins}"
        return f"{self.problem}{what}. {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """In `plan.json`."""
        nearest = [
            {"settings": each.settings, "bytes": each.peak, "changes": list(each.changes)} for each in self.nearest
        ]
        return {"budget_bytes": self.budget, "refused": self.is_refused, "nearest": nearest}


def shortfall_of(
    config: RunConfig, ground: Ground, computation: Computation, sizes: Sizes, *, is_branch: bool
) -> Shortfall | None:
    """How much more a step needs than the budget that it is planned within; None: no more, or there is no budget.

    A run is refused above what it may fill, by `auto` or by an amount, which is taken at its word, also where the card
    has less. One that goes on filled what there was when it began: it is refused above what is free, and above all that
    the card has where an amount was given.
    """
    budget, card, vram = ground.budget, ground.card, config.training.vram
    if budget is None or sizes.peak <= budget:
        return None
    goes_on, limit = ground.before is not None and not is_branch, None
    if card is not None:
        asked = None if vram == "auto" else asked_bytes(vram, card)
        if ground.before is None:
            limit = budget if asked is None else asked
        else:
            limit = card.free if asked is None else max(asked, card.memory)
    if is_branch:
        knobs = [_lengths(config)]
    elif goes_on:
        knobs = [_most_recomputed(config)]
    else:
        knobs = _knobs(config, computation, ground, sizes)
    nearest = _Trials(config, ground, budget, goes_on).nearest(knobs)
    return Shortfall(sizes.peak, budget, limit, card, vram, nearest, goes_on, is_branch)


def one_that_fits(config: RunConfig, ground: Ground, sizes: Sizes, budget: int) -> Alternative | None:
    """By the first of the settings, or pairs, that leave the result as it is; None: by none alone."""
    return _Trials(config, ground, budget).first_alone(_of_the_same_result(config, ground, sizes))


# ---- what may be turned


def _knobs(config: RunConfig, computation: Computation, ground: Ground, sizes: Sizes) -> list[Knob]:
    """Those of a new run, in the order in which they change its result."""
    training, powers = config.training, range((config.adapter.r - 1).bit_length() - 1, -1, -1)
    return [
        *_of_the_same_result(config, ground, sizes),
        [] if training.optim in ADAMW_8BIT else [{"training.optim": "adamw_8bit"}],
        [] if training.master_weights == "none" else [{"training.master_weights": "none"}],
        [] if training.optimizer_states == "8bit" else [{"training.optimizer_states": "8bit"}],
        _sums_in_bf16(config, sizes),
        [] if computation.base == "nf4" else [{"model.base": "nf4"}],
        [] if computation.trained == "bf16" else [{"model.trained_dtype": "bf16"}],
        _lean(config)[1],
        _lengths(config),
        [{"adapter.r": 2**power} for power in powers if 2**power >= LOWEST_RANK],
        _no_embeddings(config),
    ]


def _of_the_same_result(config: RunConfig, ground: Ground, sizes: Sizes) -> list[Knob]:
    """Those that leave it as it is, but for rounding."""
    return [
        [{"training.gradient_checkpointing": None}] if config.training.gradient_checkpointing is False else [],
        _batches(config),
        _lean(config)[0],
        _offloads(config, ground.card),
        _amounts_of_host_memory(config, ground, sizes),
    ]


def _batches(config: RunConfig) -> Knob:
    """The same step in more parts, whose gradients then have to wait for each other."""
    batch, rows = config.training.per_device_train_batch_size, _rows(config)
    waits = {"training.optimizer_in_backward": False}
    return [{**forwards_of(part, rows // part), **waits} for part in range(batch - 1, 0, -1) if rows % part == 0]


def _lean(config: RunConfig) -> tuple[Knob, Knob]:
    """Updates inside backward: where the result stays what it is, the rows of a step in one forward; and where it does
    not, since gradients were clipped, or with fewer rows a step."""
    training, rows = config.training, _rows(config)
    most = min(rows, MOST_TOKENS // config.data.max_length)
    lean: Settings = {"training.optimizer_in_backward": True, "training.max_grad_norm": 0}
    knob = [{**lean, **forwards_of(part, 1)} for part in range(most, 0, -1) if rows % part == 0]
    exact = 1 if training.max_grad_norm == 0 and most == rows else 0
    return knob[:exact], knob[exact:]


def _rows(config: RunConfig) -> int:
    """Of a step of one process."""
    return config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps


def forwards_of(batch: int, forwards: int) -> Settings:
    """How a step is cut: rows of a forward, and how many of these."""
    return {f"training.{name}": value for name, value in zip(FORWARDS, (batch, forwards), strict=True)}


def _sums_in_bf16(config: RunConfig, sizes: Sizes) -> Knob:
    """Gradients of several forwards; with what else is turned there may be some that are summed in fp32."""
    could_be = sizes.step is not None and config.training.grad_accum_dtype == "fp32"
    return [{"training.grad_accum_dtype": "bf16"}] if could_be and rows_per_step(config) > 1 else []


def _offloads(config: RunConfig, card: Card | None) -> Knob:
    """Optimizer states in the memory of the host."""
    training = config.training
    if card is None or training.offload_optimizer == "all":
        return []
    first = config.adapter.modules_to_save and training.offload_optimizer == "none"
    return [{"training.offload_optimizer": whose} for whose in (["embeddings"] if first else []) + ["all"]]


def _amounts_of_host_memory(config: RunConfig, ground: Ground, sizes: Sizes) -> Knob:
    """As much of it as the inputs of all layers need, of one row up to a whole step's, and what else is there or could
    be, if the host of this card has it."""
    if sizes.step is None or ground.card is None:
        return []
    inputs: list[Place] = ["x"] * sizes.shape.layers
    of_forward = sizes.step.in_host_memory([LEVELS[-1]] * sizes.shape.layers, inputs) * ranks.processes_here()
    of_row = of_forward // config.training.per_device_train_batch_size

    def power(of_layers: int, memory: Mapping[str, int]) -> int:
        others = sum(host_bytes(config, sizes.shape, memory, sizes.choices.trained_dtype).values())
        return max(math.ceil(math.log2((of_layers + others) / GIB)), 0)

    least = power(of_row, sizes.memory)
    most = power(of_row * _rows(config), {**sizes.memory, "optimizer states": 0})
    limit = host_limit("auto", ground.card)
    amounts = [2**number for number in range(least, most + 1) if ground.host < 2**number * GIB <= limit]
    return [{"training.host_memory": f"{amount}GiB"} for amount in amounts]


def _lengths(config: RunConfig) -> Knob:
    shortest = max(SHORTEST, (config.evaluation.stride or 0) + 1)
    powers = range((config.data.max_length - 1).bit_length() - 1, -1, -1)
    return [{"data.max_length": 2**power} for power in powers if 2**power >= shortest]


def _no_embeddings(config: RunConfig) -> Knob:
    model, adapter = config.model, config.adapter
    needed = model.new_tokens or model.untie_embeddings or config.training.embedding_learning_rate is not None
    if needed or not adapter.modules_to_save:
        return []
    settings: Settings = {"adapter.modules_to_save": []}
    for name in ("offload_optimizer", "master_weights"):
        if getattr(config.training, name) == "embeddings":
            settings[f"training.{name}"] = "none"
    return [settings]


def _most_recomputed(config: RunConfig) -> Knob:
    return [] if config.training.gradient_checkpointing else [{"training.gradient_checkpointing": True}]


# ---- trying them


@dataclass
class _Trials:
    """The peaks of a run with other settings, each worked out once."""

    config: RunConfig
    ground: Ground
    budget: int
    goes_on: bool = False
    _peaks: dict[str, float] = field(default_factory=dict)

    def nearest(self, knobs: Sequence[Knob]) -> list[Alternative]:
        """What fits, at most three: first that for which the last knob that is turned is the earliest, and turned the
        least, with as few others as can be; where it changes more than its settings say, the first that does not, too;
        then later knobs that do it alone."""
        found: list[Alternative] = []
        plain = [[turned for turned in knob if not self._changes(turned)] for knob in knobs]
        later: list[Knob] = []
        for some in (knobs, plain):
            for number, knob in enumerate(some):
                settings = next(self._fitting(knob, [other for other in some[:number] if other]), None)
                if settings is not None:
                    found.append(self._alternative(settings))
                    later = plain[number + 1 :]
                    break
            if not found or not found[-1].changes:
                break
        alone = (next(self._fitting(knob, []), None) for knob in later)
        return [*found, *(self._alternative(settings) for settings in alone if settings is not None)][:MOST]

    def first_alone(self, knobs: Iterable[Knob]) -> Alternative | None:
        """What fits by one of them."""
        fitting = (settings for knob in knobs for settings in self._fitting(knob, []))
        return next(map(self._alternative, fitting), None)

    def _alternative(self, settings: Settings) -> Alternative:
        """In words, without what is asked for already, and without what the plan chooses by itself."""
        differing = {name: value for name, value in settings.items() if value != _asked(self.config, name)}
        if self.config.training.rows_per_step is not None:
            rows = _rows(changed(self.config, settings)) * ranks.world_size()
            differing = {name: differing[name] for name in differing if name not in forwards_of(1, 1)}
            if rows != self.config.training.rows_per_step:
                differing["training.rows_per_step"] = rows
        return Alternative(differing, self._peak(settings), self._changes(settings))

    def _changes(self, settings: Settings) -> tuple[str, ...]:
        """What the names of the settings do not say."""
        new = changed(self.config, settings)
        changes = ["without clipping"] if self.config.training.max_grad_norm > new.training.max_grad_norm else []
        rows, before = _rows(new), _rows(self.config)
        if rows != before:
            changes.append(f"with {rows} in place of {before} rows a step")
        return tuple(changes)

    def _fitting(self, knob: Knob, others: Sequence[Knob]) -> Iterator[Settings]:
        """Settings that fit, with and without others."""
        for turned in knob:
            for number in range(len(others) + 1):
                for chosen in combinations(others, number):
                    if not self._fits(_merged(*(other[-1] for other in chosen), turned)):
                        continue  # not even with all of each
                    for values in product(*reversed(chosen)):  # the later ones, which change more, vary slowest
                        settings = _merged(*reversed(values), turned)
                        if self._fits(settings):
                            yield settings

    def _fits(self, settings: Settings) -> bool:
        return self._peak(settings) <= self.budget

    def _peak(self, settings: Settings) -> float:
        key = repr(sorted(settings.items()))
        if key not in self._peaks:
            self._peaks[key] = self._planned(settings)
        return self._peaks[key]

    def _planned(self, settings: Settings) -> float:
        """Bytes; infinite where the settings do not go together."""
        config, ground = changed(self.config, settings), self.ground
        if ground.before is not None:
            ground = replace(ground, before=replace(ground.before, levels=None))
        if "training.host_memory" in settings:
            ground = replace(ground, host=host_budget(config.training.host_memory, ground.card))
        if ground.layer is not None and "adapter.r" in settings:
            ground = replace(ground, layer=with_rank(ground.layer, config.adapter.r))
        sizes = tried(config, ground, goes_on=self.goes_on)
        return math.inf if sizes is None else sizes.peak


def tried(config: RunConfig, ground: Ground, *, goes_on: bool = False) -> Sizes | None:
    """A step with those settings; None: they do not go together, or the host has not the memory for them.

    Args:
        goes_on: the run was begun before.
    """
    try:
        computation = ground.computation(config)
        check_update(config, computation.compute)
    except UserError:
        return None
    sizes = ground.sized(config, computation)
    return sizes if _host_has(config, ground.card, sizes, goes_on) else None


def _host_has(config: RunConfig, card: Card | None, sizes: Sizes, goes_on: bool) -> bool:
    """Whether its memory holds what is put there."""
    if card is None:
        return True
    asked = config.training.host_memory
    needed = host_bytes(config, sizes.shape, sizes.memory, sizes.choices.trained_dtype, sizes.on_host)
    limit = host_limit(asked, card, None if goes_on else host_budget(asked, card))
    return not host_lacks(needed, limit)


def changed(config: RunConfig, settings: Settings) -> RunConfig:
    """A copy with other values of some fields."""
    copy = config.model_copy(deep=True)
    for name, value in settings.items():
        section, field_name = name.split(".")
        setattr(getattr(copy, section), field_name, value)
    return copy


def _asked(config: RunConfig, name: str) -> Any:
    section, field_name = name.split(".")
    return getattr(getattr(config, section), field_name)


def with_rank(layer: Layer, rank: int) -> Layer:
    """A layer on the meta device with adapters of another rank, lower where a projection's smaller side is."""

    def lowered(projection: Projection) -> Projection:
        return replace(projection, adapters=tuple(of_rank(lora) for lora in projection.adapters))

    def of_rank(lora: Lora) -> Lora:
        (outputs, _), (_, inputs) = lora.b.shape, lora.a.shape
        own = min(rank, outputs, inputs)
        a, b = torch.empty(own, inputs, dtype=lora.a.dtype), torch.empty(outputs, own, dtype=lora.b.dtype)
        return Lora(a.requires_grad_(lora.a.requires_grad), b.requires_grad_(lora.b.requires_grad), lora.scale)

    with torch.device("meta"):
        return layer.mapped(lowered)


def _merged(*settings: Settings) -> Settings:
    return {name: value for part in settings for name, value in part.items()}
