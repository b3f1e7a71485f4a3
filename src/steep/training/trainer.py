"""transformers' Trainer for continued pretraining: rates by group, proof, ledger, exact and pickle-free checkpoints."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from steep import ranks
from steep.data.packed_dataset import collate
from steep.data.packing import Corpus
from steep.data.sampler import EpochSampler
from steep.errors import RunError, UserError
from steep.evaluation.mode import inference_mode
from steep.evaluation.separation import keeps_documents_apart
from steep.model.embeddings import is_tied
from steep.model.install import fused_of, is_installed
from steep.model.recompute import Updates
from steep.model.unwrap import unwrap
from steep.stopping import Stop
from steep.training import parallel, state_options
from steep.training.adamw8bit import ADAMW_8BIT, AdamW8bit
from steep.training.ahead import forget_ahead, work_ahead
from steep.training.arguments import TrainingArguments
from steep.training.branch import Branch
from steep.training.counting import COUNTS
from steep.training.deterministic import deterministic
from steep.training.fused import check_logits, gradients_by_rows, gradients_summed_in_fp32
from steep.training.gradients import GradientReport, measure_and_clip
from steep.training.groups import parameter_groups
from steep.training.guard import GoBack, Guard, Outcome
from steep.training.in_backward import UpdatesInBackward, check_trainer, updates_in_backward
from steep.training.incidents import described
from steep.training.observations import refuse_other_counts
from steep.training.passed_through import REFUSED
from steep.training.proof import Proof
from steep.training.reporting import Reporting
from steep.training.retention import check_best_metric
from steep.training.retry import Retry, retry_of
from steep.training.schedules import schedule_of

logger = logging.getLogger("steep")


class Trainer(Reporting):
    """`transformers.Trainer` with what continued pretraining needs; takes the same arguments.

    Args:
        args: a `steep.TrainingArguments`.
        train_dataset: any map-style data set, or the `Corpus` that `steep.pack` made (its rows are then counted one
            by one for the ledger, and drawn in an order that is a function of seed and epoch alone).
        branch: begin at another run's checkpoint (`steep.training.branch.read_branch`), with a schedule from its rate
            on; `max_steps` are then the branch's own.
        stop: looked at after each step (`steep.heed_signals`): whether to save and end there.

    Attributes:
        proof: what was seen of every trained tensor, from `train()` on.
        guard: what was out of the ordinary, and what became of it.
        times_seen, times_trained, times_skipped, times_seen_before: see `Counting`.
        planned_bytes: what a step was planned to need of the card, to be told where it needs more.

    Raises:
        UserError: settings that contradict each other, or a model that lets the documents of the `Corpus` see each
            other; before the first step.
        RunError: a tensor that is meant to train does not, too many steps in a row were not finite, or too many were
            spikes.
        Stopped: `stop` asked for it.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        branch: Branch | None = None,
        stop: Stop | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, TrainingArguments):
            raise UserError("args", f"it is a {type(args).__name__}", "Give steep.TrainingArguments.")
        self.branch = branch
        self.corpus = train_dataset if isinstance(train_dataset, Corpus) else None
        rows: Any = train_dataset
        if self.corpus is not None:
            if not args.dataloader_in_order:
                raise UserError("dataloader_in_order", REFUSED["dataloader_in_order"], "Leave it out.")
            rows = self.corpus.train
            eval_dataset = self.corpus.heldout if eval_dataset is None else eval_dataset
            data_collator = data_collator or collate
            args.remove_unused_columns = False  # a row's number travels with it, for the ledger
            accelerator: Any = args.accelerator_config
            accelerator.non_blocking = args.dataloader_pin_memory  # a batch's copy need not wait for the GPU's work
        parallel.settle_arguments(args)
        check_logits(model, args, **kwargs)
        super().__init__(model, args, data_collator, rows, eval_dataset, **kwargs)
        parallel.settle_trainer(self)
        check_trainer(self)
        state_options.check_trainer(self)
        if is_installed(self.model):  # before its first call, which chooses levels
            tied = is_tied(unwrap(self.model))
            width = state_options.bytes_of_value(args)
            updates = Updates(args.optimizer_in_backward, args.offload_optimizer, tied, width)
            fused_of(self.model).expect(updates, state_options.bytes_on_host(self.model, args))
        if self.corpus is not None:
            self._refuse_documents_that_are_seen()
        self.let_end(stop)
        self.add_callback(_StepObserver(self))
        self.proof: Proof | None = None
        self.guard = Guard(args, self._described)
        self._judged = False
        self._until_trained = ExitStack()
        self._updates: UpdatesInBackward | None = None
        self._gradients: GradientReport | None = None
        self._losses_of_step: list[torch.Tensor] = []
        self._retry: Retry | None = None
        self.planned_bytes: int | None = None
        self._outcome = Outcome.APPLIED
        self._operations_a_token: float | None = None

    def _refuse_documents_that_are_seen(self) -> None:
        """Where the model is whole, and before anything is scored. One process looks: all go on, or none."""
        with inference_mode(self.model, self.autocast_dtype):
            if ranks.from_main(partial(keeps_documents_apart, self.model)):
                return
        base = unwrap(self.model)
        raise UserError(
            "model.name",
            f"{type(base).__name__} ({base.config.model_type}) lets the documents of a row see each other: positions "
            "that begin anew tell it nothing, and rows always hold several documents",
            "Give a model that keeps them apart: Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Phi, OLMo, Granite and "
            "GPT-NeoX do.",
        )

    # ---- optimizer and schedule

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim in ADAMW_8BIT:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("optim_bits", "is_paged")}
            return AdamW8bit, {**kwargs, "seed": args.seed, **state_options.keywords(args)}
        return cls, kwargs

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over named groups: adapters A, adapters B, embeddings, other, each with its own rate."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        kwargs = dict(kwargs)
        if "model" in kwargs or "optimizer_dict" in kwargs:
            raise UserError(
                "optim",
                f"{self.args.optim} updates each tensor inside backward at a single rate and keeps no parameter groups",
                "Choose an optimizer with groups, such as adamw_8bit.",
            )
        groups = parameter_groups(
            model, self.args, self.get_decay_parameter_names(model), kwargs.pop("params", None)  # GaLore's own groups
        )  # fmt: skip
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedules, and those of `steep.training.schedules`; a branch's is over its own steps."""
        if self.lr_scheduler is None:
            start = self.branch.rate_factor if self.branch else None
            schedule = schedule_of(self.args, num_training_steps - self.first_step, start=start)
            if schedule is not None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, schedule)
                self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.corpus is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(
            len(self.corpus.train), seed, self.args.per_device_train_batch_size, ranks.rank(), ranks.world_size()
        )
        return self._sampler

    def get_train_dataloader(self) -> Any:
        if self.corpus is None or ranks.world_size() == 1:
            return super().get_train_dataloader()
        return self._for_the_end(parallel.loader(self, self._get_train_sampler()))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers would train a step more
            self.control.should_training_stop = True
            return
        if self.corpus is not None:
            # accelerate's loaders pass the epoch on to most samplers, but not through a resumed epoch's skipping one
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    # ---- one step

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._until_trained.close()  # a run that goes back comes by here again
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.resumed_state is None:
            parallel.draw_apart(self.args.seed)
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.args.grad_accum_dtype == "fp32":
            self._until_trained.enter_context(
                gradients_summed_in_fp32(self.model, self._own_optimizer, self.args.gradient_accumulation_steps)
            )
        self._until_trained.enter_context(
            gradients_by_rows(
                self.model, self._own_optimizer, self.args.gradient_accumulation_steps, self.accelerator.scaler
            )
        )
        proof = Proof(self.model, self._groups_of_trained(), self.args.seed, self._own_optimizer)
        self._updates = None
        if self.args.optimizer_in_backward:
            self._updates = self._until_trained.enter_context(updates_in_backward(self._trainable, self._own_optimizer))
        if is_installed(self.model):
            self._until_trained.callback(fused_of(self.model).free_host)
        self._begin_step()
        self._forget_step()
        self._retry = retry_of(self, self._forward_and_backward) if self._updates is None else None
        if self._begins_branch:
            assert self.resumed_state is not None
            proof.refuse_other_base(self.resumed_state["proof"])
            if self.corpus is not None:
                self.times_seen_before = self.rows_before()
        elif self.resumed_state is not None:
            proof.load_state(self.resumed_state["proof"])
            self._load_observations(self.resumed_state)
            self.delete_older_checkpoints()
        self.proof = proof  # not before: what is seen of a run that goes on is told as a whole or not at all
        kept = None if self.is_new or self.resumed_state is None else self.resumed_state["guard"]
        self.guard.begin(self.state.global_step, kept, self.taken_over())
        self.evaluations = [scores for scores in self.evaluations if scores[0].step <= self.state.global_step]
        self._meter.restart()
        return prepared

    def _groups_of_trained(self) -> dict[str, str]:
        """Group of each trainable tensor; a caller's own optimizer may have groups without names."""
        by_id = {
            id(parameter): group.get("name", "other")
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        missed = [name for name, parameter in self._trainable.items() if id(parameter) not in by_id]
        if missed:
            raise UserError(
                "optimizers",
                f"{len(missed)} trainable tensors are in no group of the optimizer, the first of them {missed[0]}",
                "Give it every parameter that requires a gradient, or freeze the others.",
            )
        return {name: by_id[id(parameter)] for name, parameter in self._trainable.items()}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch. The loss that goes back to transformers is zero where it is not finite, since its running
        sum would stay NaN for ever; what is reported is counted here."""
        rows = inputs.get("row")
        self._micro_batches += 1
        if self.corpus is not None and rows is not None:
            self._note_rows(rows)
        if self.state.global_step + 1 in self.guard.skip_list:
            return torch.zeros((), device=self.args.device)
        if self.corpus is None or rows is None:
            self._note_tokens(inputs)
        if self._retry is None:
            self._losses_of_step.append(self._forward_and_backward(model, inputs, num_items_in_batch))
        else:
            self._losses_of_step = self._retry.losses(self._losses_of_step, model, inputs, num_items_in_batch)
        loss = self._losses_of_step[-1]
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _forward_and_backward(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        return super().training_step(model, self._for_model(inputs), num_items_in_batch)

    def _forget_step(self) -> None:
        self._losses_of_step = []
        if self._retry is not None:
            self._retry.forget()

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._for_model(inputs), *args, **kwargs)

    def _for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model takes it: what `collate` adds to its tensors is for the ledger and the fused forward."""
        inputs = {**inputs}
        rows, lengths = inputs.pop("row", None), inputs.pop("document_lengths", None)
        if self.corpus is not None and rows is not None:
            inputs = self._as_packed(inputs)
        if lengths is not None and is_installed(self.model):
            inputs["document_lengths"] = lengths.tolist()
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """transformers' estimate, which is by the token, without counting all parameters at each step."""
        tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
        if not tokens:
            return super().floating_point_ops(inputs)
        if self._operations_a_token is None:
            self._operations_a_token = super().floating_point_ops(inputs) / tokens
        return self._operations_a_token * tokens

    def _as_packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Several rows as a single one where attention is flash: transformers reads restarting positions as document
        boundaries there only in a batch of one, and else lets documents see each other. Each piece's first label is
        masked, so no target crosses a row's edge."""
        if "flash" not in (unwrap(self.model).config._attn_implementation or ""):
            return inputs
        return {name: value.reshape(1, -1) for name, value in inputs.items()}

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return self._look_at_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self._look_at_gradients(model, None) if grad_norm is None else grad_norm

    def _look_at_gradients(self, model: Any, max_norm: float | None) -> torch.Tensor:
        """Measure and clip, and decide what becomes of the step: once a step, right before the optimizer."""
        step, self._rows = self.state.global_step + 1, self._rows_of_all()
        if step in self.guard.skip_list:
            self._outcome = Outcome.PASSED_OVER
            self._have_no_gradients(model)
            return torch.tensor(math.nan)
        self.accelerator.unscale_gradients()
        own = torch.stack(self._losses_of_step).sum()
        arriving = own.to("cpu", non_blocking=True)
        ahead = partial(work_ahead, self._own_optimizer, model)
        if self._updates is None:
            self._gradients = measure_and_clip(self._trainable, max_norm, self._own_optimizer, ahead)
        else:
            self._gradients = self._updates.report(ahead)
        if own.is_cuda:
            torch.cuda.current_stream(own.device).synchronize()  # at once: the norms came after it
        if self._updates is not None:
            self._updates.finish()  # not before, or the host would have waited for the last of them, the table's
        # transformers multiplies each process's share by their number, because DDP divides the gradients by it.
        loss = float(ranks.gathered(np.array([float(arriving)])).mean())
        self._forget_step()
        self._meter.add_loss(loss)
        scaler = self.accelerator.scaler
        # Too high a loss scale explains such a gradient; one that no longer magnifies anything does not.
        overflowed = not self._gradients.finite and scaler is not None and scaler.get_scale() > 1
        try:
            self._outcome = self.guard.judge(step, loss, self._gradients, overflowed, self._rows, self._is_short)
        except GoBack:
            forget_ahead(self._own_optimizer, self.model)
            self.finish_saving()  # what is gone back to may be on its way; that it failed would end the run
            raise
        self.ending = self.guard.failure
        if self._outcome is not Outcome.APPLIED:
            model.zero_grad(set_to_none=True)  # an optimizer passes over tensors without a gradient
            forget_ahead(self._own_optimizer, self.model)
        return torch.tensor(self._gradients.total)

    @property
    def _own_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _have_no_gradients(self, model: Any) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:  # it takes no step without having seen a gradient
            scaler.scale(torch.zeros((), device=self.args.device))
            one = next(iter(self._trainable.values()))
            one.grad = torch.zeros_like(one)
            self.accelerator.unscale_gradients()
        model.zero_grad(set_to_none=True)

    def _after_optimizer_step(self) -> None:
        """Note what was applied, at the rates it was applied with (the schedule moves on right after)."""
        self._meter.rates = {g.get("name", "other"): float(g["lr"]) for g in self.optimizer.param_groups}
        if self._outcome is Outcome.PASSED_OVER:
            self.guard.pass_over(self.state.global_step + 1, self._rows, self._is_short)
        self._meter.add_tokens(self._count_step(self._outcome), applied=self._outcome is Outcome.APPLIED)
        if self._outcome is not Outcome.APPLIED:
            return
        assert self.proof is not None and self._gradients is not None
        self.proof.observe(
            dict(zip(self._gradients.names, self._gradients.norms.tolist(), strict=True)), self.optimizer
        )
        if not self._judged and self.proof.ready:
            self.proof.judge()
            self._judged = True

    def _described(self, rows: np.ndarray) -> list[dict[str, Any]]:
        return [] if self.corpus is None else described(self.corpus, rows, self.processing_class)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, then judge the proof once more. A branch begins at its parent's checkpoint, or goes on from its own.

        Raises:
            RunError: a tensor that is meant to train did not, a frozen one changed, or too many steps were not applied.
            Stopped: `stop` asked for it.
        """
        if self.corpus is not None:
            check_best_metric(self.args, self.corpus.heldout)
        try:
            with deterministic(self.args.deterministic), self.finishing_steps(), self._until_trained:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            forget_ahead(self._own_optimizer, self.model)
        assert self.proof is not None
        self.proof.judge()
        changed = self.proof.changed_frozen()
        if changed:
            file = self.proof.files.get(changed[0])
            place = f" in {file}. Put it back, and resume" if file else ""
            raise RunError(
                f"{len(changed)} frozen tensors changed during training, the first of them {changed[0]}{place}"
            )
        return output._replace(training_loss=self._meter.mean_loss)

    # ---- what a checkpoint keeps beyond transformers' own

    def observations(self) -> dict[str, Any]:
        assert self.proof is not None
        return {
            "proof": self.proof.state(),
            "judged": self._judged,
            **{name: getattr(self, name) for name in COUNTS},
            "fingerprint": self.fingerprint,
            "data_start": self.data_start,
            "rate_factor": self.rate_factor(),
            "window": self._meter.state(),
            "guard": self.guard.state(),
        }

    def _load_observations(self, state: dict[str, Any]) -> None:
        self._judged = state["judged"]
        for name in COUNTS:
            refuse_other_counts(state[name], len(self.times_seen), "--resume")
            setattr(self, name, state[name])
        self._meter.load_state(state["window"])


class _StepObserver(transformers.TrainerCallback):
    """Tells the trainer when the optimizer has stepped: transformers has a hook there only for callbacks."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer_step()
