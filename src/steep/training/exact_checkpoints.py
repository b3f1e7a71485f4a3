"""The saving and loading half of the Trainer: no pickle, published by one rename, restored to the bit."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import ExportableState

from steep.model.adapters import load_adapter_weights, save_adapter
from steep.storage import published
from steep.training.checkpoint import retain, rng_state, set_rng_state
from steep.training.state_files import load_state, save_state

# What the arguments say of a parameter group; all else in it may be a state of the optimizer's.
_SETTINGS = frozenset({"lr", "initial_lr", "weight_decay", "betas", "eps"})


class ExactCheckpoints(transformers.Trainer):
    """`transformers.Trainer` whose checkpoints are safetensors and JSON.

    A checkpoint holds the adapter (PEFT's own files), the tokenizer, ``training_args.json``, ``trainer_state.json``,
    and as pairs of ``.safetensors`` and ``.json``: ``optimizer``, ``schedule``, ``random``, ``scaler`` (fp16),
    ``observations``.
    """

    # transformers declares these as unions over every backend it knows.
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    resumed_state: dict[str, Any] | None = None

    def observations(self) -> dict[str, Any]:
        """What the subclass wants kept beside transformers' own state."""
        raise NotImplementedError

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.args.should_save:
            return
        self.store_flos()
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        if self.state.best_global_step and (best := run_dir / f"checkpoint-{self.state.best_global_step}").exists():
            self.state.best_model_checkpoint = str(best)
        with published(run_dir / f"checkpoint-{step}") as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                save_state(self.optimizer.state_dict(), folder, "optimizer")
                save_state(self.lr_scheduler.state_dict(), folder, "schedule")
                save_state(rng_state(), folder, "random")
                save_state(self.observations(), folder, "observations")
                if self.accelerator.scaler is not None:
                    save_state(self.accelerator.scaler.state_dict(), folder, "scaler")
            stateful: dict[str, Any] = self.state.stateful_callbacks  # pyright: ignore[reportAssignmentType]
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    stateful[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
        retain(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            save_adapter(model, folder, state_dict)
        else:
            model.save_pretrained(str(folder), state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))  # pyright: ignore[reportAttributeAccessIssue]
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if not isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapter_weights(model, Path(resume_from_checkpoint), "resume_from_checkpoint")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """States come from the checkpoint; rates, decay, betas and the schedule are those that this run asks for."""
        if checkpoint is None:
            return
        by_args = self._created_lr_scheduler and isinstance(self.lr_scheduler, LambdaLR)
        settings = _SETTINGS if by_args else _SETTINGS - {"lr", "initial_lr"}  # a schedule of the caller's moves them
        load_optimizer(self.optimizer, load_state(Path(checkpoint), "optimizer"), own=settings)
        saved = load_state(Path(checkpoint), "schedule")
        if by_args:
            go_on_at(self.lr_scheduler, saved)
        else:
            self.lr_scheduler.load_state_dict(saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(load_state(Path(checkpoint), "random"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))


def load_optimizer(optimizer: Any, saved: dict[str, Any], own: Collection[str] = ()) -> None:
    """`load_state_dict`, but with the states as they were saved: it rounds them to the dtype of their parameter, and
    Adafactor keeps fp32 ones of bf16 weights.

    Args:
        own: settings of the groups that stay what they are, where `load_state_dict` would bring the saved ones.
    """
    kept = [{key: group[key] for key in own if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            state = optimizer.state[parameter]
            if isinstance(value, torch.Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


def go_on_at(schedule: LambdaLR, saved: dict[str, Any]) -> None:
    """Put a schedule where a saved one was: at that step, but with its own peak rates, shape and length."""
    step = saved["last_epoch"]
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    place = {"last_epoch": step, "_step_count": saved["_step_count"], "_last_lr": rates}
    schedule.load_state_dict({**place, "lr_lambdas": []})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
