"""Learning-rate schedules for continued pretraining; those that are not listed here are transformers' own.

A schedule is one factor that multiplies the peak rate of every parameter group, so the embeddings keep their ratio. All
of them are one line of phases:

    warm-up (linear)  ·  cool-down (half a cosine)  ·  stable  ·  decay (linear, cosine or 1-sqrt)

`linear` and `cosine` (Loshchilov & Hutter 2016) decay from the warm-up on. `warmup_stable_decay` (Hu et al. 2024;
Hägele et al. 2024) decays in its last steps only. `constant_with_warmup` never does, and with a cool-down is the
infinite schedule of Ibrahim et al. 2024. A branch begins at the factor that its parent's checkpoint had reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler

from steep.errors import UserError

if TYPE_CHECKING:
    from steep.training.arguments import TrainingArguments

WSD = "warmup_stable_decay"
DECAY_STEPS, DECAY_TYPE = 0.2, "1-sqrt"  # Hägele et al. 2024: a fifth of the steps, and the best of their shapes

# Which fields mean something for which schedule. A schedule that is not here knows nothing of steep's fields.
TAKES: dict[str, frozenset[str]] = {
    "linear": frozenset({"warmup_lr_rate", "min_lr_rate"}),
    "cosine": frozenset({"warmup_lr_rate", "min_lr_rate"}),
    WSD: frozenset({"warmup_lr_rate", "cooldown_steps", "stable_lr_rate", "decay_steps", "decay_type", "min_lr_rate"}),
    "constant_with_warmup": frozenset({"warmup_lr_rate", "cooldown_steps", "stable_lr_rate"}),
    "constant": frozenset(),
}
FIELDS = ("warmup_lr_rate", "cooldown_steps", "stable_lr_rate", "decay_steps", "decay_type", "min_lr_rate")

# How much of a fall is done at `progress` in [0, 1].
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1 - math.cos(math.pi * progress)),
    "1-sqrt": math.sqrt,
}


@dataclass(frozen=True)
class Schedule:
    """The factor at each step: `Schedule(...)(step)`. Torch keeps the fields in a checkpoint's `schedule.json`.

    Attributes:
        num_steps: steps of the run, or of the branch.
        start, top: factor at step 0, and after the warm-up.
        warmup_steps, cooldown_steps: length of the first two phases.
        stable: factor between cool-down and decay.
        decay_steps, decay_type: length and shape of the last phase.
        end: factor that the decay reaches after the last step.
    """

    num_steps: int
    start: float
    top: float
    warmup_steps: int
    cooldown_steps: int
    stable: float
    decay_steps: int
    decay_type: str
    end: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (self.top - self.start) * step / self.warmup_steps
        cooled = step - self.warmup_steps
        if cooled < self.cooldown_steps:
            return _fallen(self.top, self.stable, "cosine", cooled / self.cooldown_steps)
        decayed = step - (self.num_steps - self.decay_steps)
        if decayed < 0 or not self.decay_steps:
            return self.stable
        return _fallen(self.stable, self.end, self.decay_type, min(1.0, decayed / self.decay_steps))

    def describe(self) -> str:
        """The phases in words, factors as shares of the peak rates."""
        constant = self.num_steps - self.warmup_steps - self.cooldown_steps - self.decay_steps
        parts = [
            f"{self.start:g} → {self.top:g} in {self.warmup_steps} steps" if self.warmup_steps else "",
            f"{self.top:g} → {self.stable:g} in {self.cooldown_steps} (cosine)" if self.cooldown_steps else "",
            f"{self.stable:g} for {constant}" if constant > 0 else "",
            f"{self.stable:g} → {self.end:g} in {self.decay_steps} ({self.decay_type})" if self.decay_steps else "",
        ]
        return ", ".join(part for part in parts if part)


def _fallen(high: float, low: float, shape: str, progress: float) -> float:
    return low if progress >= 1 else high - (high - low) * FALLS[shape](progress)  # exactly: a branch begins there


def check_schedule(args: TrainingArguments, *, branch: bool = False, section: str = "") -> None:
    """Check that the schedule's fields belong together, as far as that is known without the number of steps.

    Args:
        branch: the schedule begins at a checkpoint's rate.
        section: what stands before a field's name in messages, such as ``training.``.

    Raises:
        UserError: a field that has no meaning for the schedule, or two that contradict each other.
    """
    kind, given = kind_of_schedule(args), _given(args)
    for name in given:
        if name not in TAKES.get(kind, ()):
            takers = " or ".join(known for known, names in TAKES.items() if name in names)
            raise UserError(
                f"{section}{name}",
                f"{getattr(args, name)} has no meaning for lr_scheduler_type {kind}",
                f"Leave it out, or set lr_scheduler_type: {takers}.",
            )
    if branch and kind not in TAKES:
        raise UserError(
            f"{section}lr_scheduler_type",
            f"{kind} cannot begin at the rate of a checkpoint",
            f"Give one of {', '.join(TAKES)}.",
        )
    if args.lr_scheduler_kwargs and (given or branch):
        raise UserError(
            f"{section}lr_scheduler_kwargs",
            f"they belong to transformers' own {kind}, and "
            + (f"{given[0]} is {getattr(args, given[0])}" if given else "a branch has a schedule of steep's"),
            f"Leave them out{', or set min_lr_rate: 0' if given == ['min_lr_rate'] and not branch else ''}.",
        )
    for one, other in (("cooldown_steps", "stable_lr_rate"), ("stable_lr_rate", "cooldown_steps")):
        if one in given and other not in given:
            raise UserError(
                f"{section}{one}", f"it is set and {other} is not", "A cool-down needs both: its length and its end."
            )
    if args.stable_lr_rate is not None and args.stable_lr_rate < args.min_lr_rate:
        raise UserError(
            f"{section}stable_lr_rate",
            f"{args.stable_lr_rate} is below min_lr_rate {args.min_lr_rate}: the decay would raise the rate",
            "Raise it, or lower min_lr_rate.",
        )
    if args.warmup_lr_rate is not None and (branch or not args.warmup_steps):
        raise UserError(
            f"{section}warmup_lr_rate",
            "a branch warms up from the rate of its checkpoint" if branch else "there is no warm-up: warmup_steps is 0",
            "Leave it out.",
        )


def schedule_of(
    args: TrainingArguments, num_steps: int, *, start: float | None = None, section: str = ""
) -> Schedule | None:
    """The schedule that `args` ask for, or None where it is transformers' own.

    Args:
        num_steps: steps of the run, or of the branch.
        start: for a branch, the factor that the checkpoint had reached. The warm-up then rises from it, and without
            one it is where everything begins; a warm-up or a cool-down that the checkpoint has behind it is left out.
        section: as for `check_schedule`.

    Raises:
        UserError: fields that contradict each other, the number of steps, or the rate of the checkpoint.
    """
    branch = start is not None
    check_schedule(args, branch=branch, section=section)
    kind = kind_of_schedule(args)
    own = branch or bool(_given(args)) or (kind == WSD and not args.lr_scheduler_kwargs)
    warmup = 0 if kind == "constant" else _in_steps(args.warmup_steps, num_steps)
    if not own:
        _transformers_own(args, kind, warmup, num_steps, section)
        return None
    if start is None:
        start, top = args.warmup_lr_rate or 0.0, 1.0
    else:
        warmup = 0 if start >= 1 else warmup
        top = 1.0 if warmup else start
    cooldown, stable = 0, top
    if args.stable_lr_rate is not None and args.stable_lr_rate < top:
        cooldown, stable = _in_steps(args.cooldown_steps or 0, num_steps), args.stable_lr_rate
    left = num_steps - warmup - cooldown
    if cooldown and left < 0:
        raise UserError(
            f"{section}cooldown_steps",
            f"the phases are longer than the {num_steps} steps there are: warm-up {warmup}, cool-down {cooldown}",
            "Shorten one of them, or train more steps.",
        )
    left = max(0, left)
    if kind != WSD:
        decay, shape = (left, kind) if kind in ("linear", "cosine") else (0, DECAY_TYPE)
    else:
        shape = args.decay_type or DECAY_TYPE
        # The stable part of a branch is its parent.
        decay = left if branch and args.decay_steps is None else _in_steps(args.decay_steps or DECAY_STEPS, num_steps)
        if decay > left or not decay:
            raise UserError(
                f"{section}decay_steps",
                f"the phases are longer than the {num_steps} steps there are: warm-up {warmup}, cool-down {cooldown}, "
                f"decay {decay}",
                "Shorten one of them, or train more steps.",
            )
    if branch and stable <= 0:
        raise UserError(
            "--branch", "the rate of the checkpoint is 0", f"Warm up again: set {section}warmup_steps, such as 0.05."
        )
    if decay and stable < args.min_lr_rate * (1 - 1e-9):  # transformers' own schedules end within rounding
        raise UserError(
            f"{section}min_lr_rate",
            f"the decay would raise the rate: it begins at {stable:g} of the peak and ends at {args.min_lr_rate:g}",
            "Lower it, or warm up again with warmup_steps.",
        )
    return Schedule(num_steps, start, top, warmup, cooldown, stable, decay, shape, args.min_lr_rate)


def factor_of(
    args: TrainingArguments, num_steps: int, *, start: float | None = None, section: str = ""
) -> Callable[[int], float] | None:
    """What multiplies the peak rates at each step, whether the schedule is steep's or transformers' own; None where it
    follows from more than the step. Arguments and errors are those of `schedule_of`."""
    schedule = schedule_of(args, num_steps, start=start, section=section)
    if schedule is not None:
        return schedule
    kind = kind_of_schedule(args)
    warmup = 0 if kind == "constant" else _in_steps(args.warmup_steps, num_steps)
    factors = getattr(_transformers_own(args, kind, warmup, num_steps, section), "lr_lambdas", None)
    return factors[0] if factors else None


def _transformers_own(args: TrainingArguments, kind: str, warmup: int, num_steps: int, section: str) -> Any:
    """One of transformers' schedules over an optimizer of no account: only that shows what it wants.

    Raises:
        UserError: its `lr_scheduler_kwargs` are wrong or missing.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    given: Any = args.lr_scheduler_kwargs
    try:
        return get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(given or {}),
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{section}lr_scheduler_kwargs",
            f"transformers' {kind} refuses them: {str(error).splitlines()[0]}",
            f"See transformers.get_scheduler, or take one of {', '.join(TAKES)}.",
        ) from error


def kind_of_schedule(args: TrainingArguments) -> str:
    """`lr_scheduler_type` as text; transformers makes it a member of an enumeration."""
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def _given(args: TrainingArguments) -> list[str]:
    """The fields of steep that are set; a `min_lr_rate` of 0 is what every schedule ends at."""
    values = {name: getattr(args, name) for name in FIELDS}
    return [name for name, value in values.items() if value is not None and (name, value) != ("min_lr_rate", 0)]


def _in_steps(value: float, num_steps: int) -> int:
    """Steps, as transformers counts those of the warm-up: below 1 a share of all, rounded up."""
    return int(value) if value >= 1 else math.ceil(num_steps * value)
