"""The same documents under the base model and under the trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from steep.evaluation.adapters import base_model
from steep.evaluation.perplexity import Document, Progress, evaluate
from steep.evaluation.score import DomainScore


def evaluate_base_and_trained(
    model: nn.Module,
    documents: Mapping[str, Sequence[Document]],
    *,
    max_length: int = 2048,
    stride: int | None = None,
    batch_tokens: int = 8192,
    max_tokens: int | None = None,
    step: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[list[DomainScore], list[DomainScore]]:
    """Scores of the base (as step 0) and of the trained model (as `step`), on the same tokens.

    Arguments and errors are `steep.evaluation.perplexity.evaluate`'s; `model` must be a PeftModel.
    """

    def scores(at_step: int) -> list[DomainScore]:
        return evaluate(
            model,
            documents,
            max_length=max_length,
            stride=stride,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            step=at_step,
            autocast_dtype=autocast_dtype,
            progress=progress,
        )

    with base_model(model):
        base = scores(0)
    return base, scores(step)
