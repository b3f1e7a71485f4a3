"""The saving and loading half of the Trainer: no pickle, published by one rename, restored to the bit."""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import ExportableState

from steep import ranks
from steep.errors import UserError
from steep.manifest import read_manifest, write_manifest
from steep.model.adapters import (
    WEIGHTS,
    adapter_tensors,
    all_tensors,
    joined,
    load_adapter_weights,
    save_adapter,
)
from steep.model.choices import choices_of
from steep.model.new_rows import NEW_ROWS, new_rows_of
from steep.recorded import parsed
from steep.stopping import Interrupted
from steep.storage import discard, flush, give_name, naming, stage
from steep.tensor_files import system_errors
from steep.training.checkpoint import (
    CHOICES_FILE,
    FORMAT_FILE,
    format_text,
    given,
    own_rng_state,
    rng_states,
    set_rng_state,
)
from steep.training.checkpoint_writer import CheckpointCallback, CheckpointWriter
from steep.training.retention import Retention
from steep.training.snapshot import HostMemory, Snapshot
from steep.training.state_files import load_state, putting_back

logger = logging.getLogger("steep")

# What the arguments say of a parameter group; all else in it may be a state of the optimizer's.
_SETTINGS = frozenset({"lr", "initial_lr", "weight_decay", "betas", "eps"})


class ExactCheckpoints(transformers.Trainer):
    """`transformers.Trainer` whose checkpoints are safetensors and JSON, written in a thread while training goes on.

    A checkpoint holds the adapter (PEFT's own files), the tokenizer, ``training_args.json``, ``trainer_state.json``,
    as pairs of ``.safetensors`` and ``.json``: ``optimizer``, ``schedule``, ``random``, ``scaler`` (fp16),
    ``observations``; ``new_tokens.safetensors``, the rows that new tokens began with, if there are any;
    ``choices.json``, by which a resumed run computes in the same way; ``format.json``, by which another version knows
    it; and ``manifest.json``, by which it is verified before anything of it is read.

    Attributes:
        seconds_saving: how long training has waited for checkpoints so far.
    """

    # transformers declares these as unions over every backend it knows.
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    resumed_state: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds_saving = 0.0
        self._writer = CheckpointWriter()
        self._host_memory = HostMemory()
        self._retention = Retention(Path(self.args.output_dir))
        self._unchanging_files: dict[str, bytes] | None = None

    def observations(self) -> dict[str, Any]:
        """What the subclass wants kept beside transformers' own state."""
        raise NotImplementedError

    # ---- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        random = rng_states()
        self.store_flos()
        waited_before = self.seconds_saving
        self.finish_saving()  # the one before, which may be the best
        self._point_at_best()
        if not self.args.should_save:  # the first of several processes does
            return
        begun = time.perf_counter()
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        folder = run_dir / f"checkpoint-{step}"
        logger.info("saving %s", folder.name)
        best, limit = self.state.best_global_step, self.args.save_total_limit
        callbacks: list[Any] = self.callback_handler.callbacks
        noted = [callback for callback in callbacks if isinstance(callback, CheckpointCallback)]
        staging = stage(folder)
        try:
            snapshot, state = self._snapshot(staging, random), self._frozen_state()
        except BaseException:
            discard(staging)
            raise
        self.seconds_saving += time.perf_counter() - begun
        waited = self.seconds_saving - waited_before

        def write() -> None:
            try:
                with naming(folder):
                    snapshot.write(staging)
                    state.save_to_json(str(staging / "trainer_state.json"))
                    write_manifest(staging)
                    size = sum(path.stat().st_size for path in staging.rglob("*"))
                    for callback in noted:
                        callback.before_publishing()
                    flush(staging)
                    if not self._writer.publish(partial(give_name, staging, folder)):
                        return
            finally:
                discard(staging)
            seconds = time.perf_counter() - begun
            logger.info(
                "%s is saved: %.1f MiB in %.2f s, training waited %.2f s", folder.name, size / 2**20, seconds, waited
            )
            self._retention.saved(folder)
            self._retention.apply(limit, step, best)

        self._writer.start(folder.name, write)
        if any(_awaits_the_folder(callback) for callback in callbacks):
            self.finish_saving()

    def delete_older_checkpoints(self) -> None:
        """Do what a run that was killed right after a save has left to do; after the last one nobody else would."""
        if self.args.should_save:
            self._retention.apply(self.args.save_total_limit, self.state.global_step, self.state.best_global_step)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is published, and raise what kept it from being so.

        Raises:
            OSError: the disk is full, the folder may not be written, ...
            RunError: another failure.
        """
        begun = time.perf_counter()
        try:
            self._writer.wait()
        finally:
            self.seconds_saving += time.perf_counter() - begun

    def _snapshot(self, staging: Path, random: Any) -> Snapshot:
        """The files of a checkpoint as the run is now; a model without adapters is written to `staging` at once."""
        snapshot = Snapshot()
        snapshot.add_text(FORMAT_FILE, format_text())
        model = self.accelerator.unwrap_model(self.model)
        snapshot.add_text(CHOICES_FILE, json.dumps(asdict(choices_of(model))) + "\n")
        if isinstance(model, PeftModel):
            for name, content in self._files_that_stay().items():
                snapshot.add_text(name, content)
            snapshot.add_text("training_args.json", self.args.to_json_string())
            snapshot.add_tensors(WEIGHTS, adapter_tensors(model), joined, {"format": "pt"})
        else:
            with system_errors(staging):
                self._save(str(staging))
        if not self.args.save_only_model:
            for name, state in self._states(random).items():
                snapshot.add_state(name, state)
        snapshot.take(self._host_memory)
        return snapshot

    def _states(self, random: Any) -> dict[str, Any]:
        """What a resumed run takes up again, beside weights and transformers' own state."""
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "random": random,
            "observations": self.observations(),
        }
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler.state_dict()
        return states

    def _frozen_state(self) -> Any:
        """transformers' state as it is now. Rows of the log are only ever added."""
        state = copy.copy(self.state)
        state.log_history = list(state.log_history)
        stateful: Any = copy.copy(state.stateful_callbacks)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stateful[type(callback).__name__] = callback.state()
        state.stateful_callbacks = stateful
        return state

    def _files_that_stay(self) -> dict[str, bytes]:
        """The files beside the adapter's weights, by name: rendered once, since a large tokenizer takes its time."""
        if self._unchanging_files is None:
            model = self.accelerator.unwrap_model(self.model)
            nothing = {name: torch.empty(0, 0) for name in all_tensors(model)}
            with tempfile.TemporaryDirectory() as place:
                self._save(place, nothing)
                (Path(place) / WEIGHTS).unlink()
                self._unchanging_files = {
                    path.relative_to(place).as_posix(): path.read_bytes()
                    for path in Path(place).rglob("*")
                    if path.is_file()
                }
            if (rows := new_rows_of(model)) is not None:
                self._unchanging_files[NEW_ROWS] = rows.to_bytes()
        return self._unchanging_files

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

    # ---- around training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except Interrupted:  # at once; whoever catches it may give the run folder to another process
            self._writer.abandon()
            raise
        except BaseException:
            self._writer.settle()
            raise
        finally:
            if not self._writer.works:  # it reads the memory
                self._host_memory.release()
            self._unchanging_files = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._writer.check()  # the end of each step comes by here
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.finish_saving()
        ranks.wait_for_all()  # the others may read it next
        # With a limit of 1 transformers would now delete all checkpoints but the best, the newest among them.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---- the best so far

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best so far; only one whose step is saved can be, since it has to be kept."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        not_saved = self.args.save_strategy != "best" and not self.control.should_save
        if not_saved or not math.isfinite(metrics.get(name, 0.0)):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _point_at_best(self) -> None:
        """Set transformers' path of the best checkpoint from its step: the run folder may have been moved."""
        step = self.state.best_global_step
        place = Path(self.args.output_dir) / f"checkpoint-{step}"
        there = ranks.from_main(lambda: step is not None and (step == self.state.global_step or place.is_dir()))
        self.state.best_model_checkpoint = str(place) if there else None

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        given(self.state.best_model_checkpoint, "load_best_model_at_end")
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- loading

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begun = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step is not None and self._saved_metric(*args) != self.args.metric_for_best_model:
            self.state.best_metric = self.state.best_global_step = None
        self._point_at_best()
        return begun

    @staticmethod
    def _saved_metric(max_steps: int, per_epoch: int, epochs: int, checkpoint: str, *rest: Any) -> str | None:
        """What the best so far of a checkpoint is the best by."""
        return parsed(Path(checkpoint) / "training_args.json", nan=True).get("metric_for_best_model")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        folder = Path(resume_from_checkpoint)
        if isinstance(model, PeftModel):
            load_adapter_weights(model, folder, "resume_from_checkpoint")
            return
        weights: dict[str, torch.Tensor] = {}
        for name in read_manifest(folder).files:  # transformers would look for other names and pickles too
            if name.startswith("model") and name.endswith(".safetensors"):
                weights |= load_file(folder / name)
        self._issue_warnings_after_load(model.load_state_dict(weights, strict=False))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """States come from the checkpoint; rates, decay, betas and the schedule are those that this run asks for."""
        if checkpoint is None:
            return
        by_args = self._created_lr_scheduler and isinstance(self.lr_scheduler, LambdaLR)
        settings = _SETTINGS if by_args else _SETTINGS - {"lr", "initial_lr"}  # a schedule of the caller's moves them
        folder = Path(checkpoint)
        with putting_back(folder, "optimizer"):
            load_optimizer(self.optimizer, load_state(folder, "optimizer"), own=settings)
        with putting_back(folder, "schedule"):
            saved = load_state(folder, "schedule")
            if by_args:
                go_on_at(self.lr_scheduler, saved)
            else:
                self.lr_scheduler.load_state_dict(saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with putting_back(Path(checkpoint), "random"):
                set_rng_state(own_rng_state(load_state(Path(checkpoint), "random")))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:
            return
        if "scaler.json" not in read_manifest(Path(checkpoint)).files:
            raise UserError("fp16", f"{checkpoint} has no loss scaler: it was not trained in fp16", "Leave fp16 out.")
        with putting_back(Path(checkpoint), "scaler"):
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))


def _awaits_the_folder(callback: Any) -> bool:
    """Whether somebody else's callback does something at a save; it will expect the folder to be there."""
    own = isinstance(callback, CheckpointCallback)
    return not own and type(callback).on_save is not transformers.TrainerCallback.on_save


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
