"""transformers' TrainingArguments with the few fields that continued pretraining needs beside them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import transformers

from steep.errors import UserError
from steep.training.adamw8bit import MASTERS, OFFLOADS, STATES
from steep.training.deterministic import prepare_cublas
from steep.training.schedules import FALLS

GRAD_ACCUM_DTYPES = ("fp32", "bf16")
SPIKE_ACTIONS = ("off", "warn", "skip", "rollback")
MIN_SPIKE_WINDOW, MAX_SPIKE_WINDOW = 8, 100_000  # its median is taken at each step


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Every argument of `transformers.TrainingArguments`, and:

    Args:
        embedding_learning_rate: rate of the fully trained `embed_tokens` and `lm_head`; default: a tenth of
            `learning_rate`.
        loraplus_lr_ratio: LoRA's B matrices train at this multiple of `learning_rate` (LoRA+, Hayou et al. 2024).
        min_lr_rate: the decay (of linear, cosine, warmup_stable_decay) ends at this share of each group's peak rate
            instead of at zero.
        warmup_lr_rate: the warm-up starts at this share of the peak rates instead of at zero.
        decay_steps, decay_type: last steps of warmup_stable_decay, in which the rate falls (below 1: their share of
            all; default: 0.2), and how: "1-sqrt" (default), "linear" or "cosine".
        cooldown_steps, stable_lr_rate: in so many steps after the warm-up (below 1: their share) constant_with_warmup
            and warmup_stable_decay fall from the peak rates to this share of them, and stay there.
        optimizer_in_backward: update each tensor as soon as its gradient is whole, and free the gradient: to the bit
            the update at the end of a step without clipping, in less memory. See `steep.training.in_backward`.
        offload_optimizer: whose optimizer states live in page-locked host memory: of the trained "embeddings", of "all"
            tensors, or of "none". The same update to the bit, with `adamw_8bit`. See `steep.ops.host_states`.
        optimizer_states: "8bit" or "fp32", in what `adamw_8bit` keeps its moments.
        master_weights: whose bf16 weights `adamw_8bit` gives an fp32 master, beside their states: the trained
            "embeddings", "all", or "none", which are rounded stochastically. Weights in fp32 need none and get none.
        grad_accum_dtype: in what the gradients of several forwards of a step are added up, "fp32" or "bf16", where the
            model is fused, its weights are bf16, and `adamw_8bit` updates them in one process. bf16 takes half the
            memory, and rounds the sum at each forward; elsewhere it is the weights' dtype.
        deterministic: on a GPU, train with kernels only that give the same bits each time, so that a resumed run ends
            in those of one never stopped; slower. Sets the variable CUBLAS_WORKSPACE_CONFIG, which stays.
        eval_stride: new tokens that each window of a long held-out document scores; default: half a row.
        eval_max_tokens: held-out tokens scored a domain at the most.
        max_nonfinite_steps: the run stops after so many steps in a row whose loss or gradient was not finite.
        spike_action: what is done with a step whose loss or gradient norm is far above those before it. "off": nothing.
            "warn": it is said, and written into incidents.jsonl. "skip": the step is not applied. "rollback": the run
            goes back to its last checkpoint and passes over the rows of that step.
        spike_threshold, spike_window: robust standard deviations above the median from which on it is far, and the
            steps that median and deviation are taken over; see `steep.training.spikes`.

    Raises:
        UserError: a rate that is negative or not finite, a share outside [0, 1], an unknown decay.
    """

    # transformers logs a number in place of a NaN by default; a loss that was NaN is never shown as a number here.
    logging_nan_inf_filter: bool = field(default=False)
    embedding_learning_rate: float | None = field(default=None)
    loraplus_lr_ratio: float = field(default=1.0)
    min_lr_rate: float = field(default=0.0)
    warmup_lr_rate: float | None = field(default=None)
    cooldown_steps: float | None = field(default=None)
    stable_lr_rate: float | None = field(default=None)
    decay_steps: float | None = field(default=None)
    decay_type: str | None = field(default=None)
    max_nonfinite_steps: int = field(default=3)
    optimizer_in_backward: bool = field(default=False)
    offload_optimizer: str = field(default="none")
    optimizer_states: str = field(default="8bit")
    master_weights: str = field(default="none")
    grad_accum_dtype: str = field(default="fp32")
    deterministic: bool = field(default=False)
    spike_action: str = field(default="warn")
    spike_threshold: float = field(default=6.0)
    spike_window: int = field(default=256)
    eval_stride: int | None = field(default=None)
    eval_max_tokens: int | None = field(default=None)

    def __post_init__(self) -> None:
        if self.deterministic:
            prepare_cublas("deterministic")  # transformers starts CUDA in the call below
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("bits_per_byte"):
            self.greater_is_better = False  # transformers knows it of names that end in loss
        super().__post_init__()
        for name in ("learning_rate", "embedding_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not (isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0):
                raise UserError(name, f"{rate!r} is not a learning rate", "Give a finite number ≥ 0, such as 5e-6.")
        if not (math.isfinite(self.loraplus_lr_ratio) and self.loraplus_lr_ratio > 0):
            raise UserError(
                "loraplus_lr_ratio", f"{self.loraplus_lr_ratio} is no ratio", "Give a number above 0, such as 16."
            )
        for name in ("min_lr_rate", "warmup_lr_rate", "stable_lr_rate"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(name, f"{share} is not a share", "Give a number between 0 and 1.")
        if self.stable_lr_rate == 0:
            raise UserError("stable_lr_rate", "at a rate of 0 nothing trains", "Give a share above 0.")
        for name in ("cooldown_steps", "decay_steps"):
            steps = getattr(self, name)
            if steps is not None and not 0 < steps < math.inf:
                raise UserError(name, f"{steps} is no number of steps", "Give one above 0; below 1 it is a share.")
        if self.decay_type not in (None, *FALLS):
            raise UserError("decay_type", f"{self.decay_type!r} is unknown", f"Give one of {', '.join(FALLS)}.")
        for name, choices in (
            ("offload_optimizer", OFFLOADS),
            ("optimizer_states", STATES),
            ("master_weights", MASTERS),
            ("grad_accum_dtype", GRAD_ACCUM_DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(name, f"{getattr(self, name)!r} is unknown", f"Give {', '.join(choices)}.")
        if self.max_nonfinite_steps < 1:
            raise UserError("max_nonfinite_steps", f"{self.max_nonfinite_steps} is too few", "Give a number ≥ 1.")
        if self.spike_action not in SPIKE_ACTIONS:
            raise UserError("spike_action", f"{self.spike_action!r} is unknown", f"Give {', '.join(SPIKE_ACTIONS)}.")
        if not 0 < self.spike_threshold < math.inf:
            raise UserError("spike_threshold", f"{self.spike_threshold} is no threshold", "Give a number above 0.")
        if self.spike_window < MIN_SPIKE_WINDOW:
            raise UserError(
                "spike_window", f"{self.spike_window} steps say too little", f"Give {MIN_SPIKE_WINDOW} or more."
            )
        if self.spike_window > MAX_SPIKE_WINDOW:
            raise UserError(
                "spike_window", f"{self.spike_window} steps are too many", f"Give {MAX_SPIKE_WINDOW} or less."
            )
        if self.spike_action == "rollback" and self.save_only_model:
            raise UserError(
                "save_only_model",
                "spike_action is rollback, and a run cannot go back to a checkpoint without its optimizer",
                "Leave it out, or set spike_action: skip.",
            )
        if self.n_gpu > 1:
            warnings.warn(f"{self.n_gpu} GPUs are visible; the first one is used", stacklevel=2)
            self._n_gpu = 1
        if self.logging_nan_inf_filter:
            raise UserError(
                "logging_nan_inf_filter",
                "it replaces NaN losses by made-up numbers in the log",
                "Leave it out: a step with a NaN is not applied and is reported as such.",
            )

    @property
    def resolved_embedding_learning_rate(self) -> float:
        """The rate that the embeddings train at: the given one, or a tenth of `learning_rate`."""
        if self.embedding_learning_rate is not None:
            return self.embedding_learning_rate
        return self.learning_rate / 10
