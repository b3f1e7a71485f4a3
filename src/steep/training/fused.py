"""What a trainer has to heed where its model computes with steep's fused layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from steep import ranks
from steep.errors import UserError
from steep.model.install import fused_of, is_installed
from steep.model.projections import in_use
from steep.model.unwrap import unwrap
from steep.training.adamw8bit import AdamW8bit

logger = logging.getLogger("steep")


def check_logits(model: Any, args: Any, **asked: Any) -> None:
    """Check that nothing which is `asked` for needs the logits that a fused model does not give beside its loss.

    Args:
        asked: arguments of the trainer by name, or None.

    Raises:
        UserError: something does.
    """
    if model is None or not is_installed(model):
        return
    fused = fused_of(model)
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if asked.get(name) is not None and not fused.logits:
            raise UserError(
                name,
                "it needs logits, and the fused model computes its loss without those of a batch",
                "Install it with steep.install(model, logits=True), or leave it out.",
            )
    for name, is_set in (
        ("label_smoothing_factor", args.label_smoothing_factor > 0),
        ("compute_loss_func", asked.get("compute_loss_func") is not None),
    ):
        if is_set:
            logger.warning("the loss is not fused, and a batch's logits exist whole: %s needs them", name)


@contextmanager
def gradients_summed_in_fp32(model: Any, optimizer: Any, micro_batches: int) -> Iterator[None]:
    """Within, a fused model's bf16 weights have gradients in fp32 where several micro-batches are added up: each would
    round the sum once. A single one is rounded once anyway. Other optimizers than `AdamW8bit` take gradients in their
    weights' dtype only; so does DDP.

    Afterwards any optimizer can train the model: the gradients of a step that was broken off are gone.
    """
    in_fp32 = micro_batches > 1 and is_installed(model) and isinstance(optimizer, AdamW8bit) and ranks.world_size() == 1
    before = {
        parameter: parameter.grad_dtype
        for parameter in model.parameters()
        if in_fp32 and parameter.requires_grad and parameter.dtype == torch.bfloat16
    }
    for parameter in before:
        _keep_gradient_in(parameter, torch.float32)
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            _keep_gradient_in(parameter, dtype)


@contextmanager
def gradients_by_rows(model: Any, optimizer: Any, micro_batches: int, scaler: Any = None) -> Iterator[None]:
    """Within, the gradient of a fused model's input embeddings is of the rows alone that a batch looks up, a sparse
    tensor (`steep.ops.row_gradient`): what `AdamW8bit` takes, in one process, without a loss scaler. A tied table has a
    gradient in every row, from the head.

    Afterwards any optimizer can train the model: the gradients of a step that was broken off are gone.
    """
    alone = isinstance(optimizer, AdamW8bit) and ranks.world_size() == 1 and scaler is None
    if not alone or not is_installed(model):
        yield
        return
    whole, fused = unwrap(model), fused_of(model)
    table, head = in_use(whole.get_input_embeddings()), in_use(whole.get_output_embeddings())
    trains = isinstance(table, nn.Embedding) and table.weight.requires_grad
    if trains and table.weight is not getattr(head, "weight", None):
        fused.row_gradients = micro_batches
    try:
        yield
    finally:
        fused.row_gradients = 0
        if trains and table.weight.grad is not None and table.weight.grad.is_sparse:
            table.weight.grad = None


def _keep_gradient_in(parameter: torch.Tensor, dtype: torch.dtype | None) -> None:
    parameter.grad = None  # torch refuses a dtype that the gradient which is there does not have
    parameter.grad_dtype = dtype
