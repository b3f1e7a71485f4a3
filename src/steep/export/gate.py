"""The round-trip gate: a folder that is handed on, opened by plain transformers, has to be the model that was trained.

That its weights are right is known already (`weight_check`). Here the whole is looked at: whether transformers makes
the same model of them, with the config beside them. Two things are compared with the adapter over the run's own base:
held-out loss by domain, which says whether the model is as good, and the logits of a few tokens, which also see what a
loss does not.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from steep.errors import RunError
from steep.evaluation.mode import inference_mode, input_device
from steep.evaluation.perplexity import Document, Progress, evaluate
from steep.evaluation.score import DomainScore
from steep.model.unwrap import unwrap

BITS_LIMIT = 0.005
"""Bits per byte, of any domain."""
LOGITS_LIMIT = 0.1
"""Relative RMS. Products in bf16 or int8 make up to 0.04, a config that is not the base's 0.4 and more."""
_PROBE_TOKENS = 64  # of one document a domain


@dataclass(frozen=True)
class Measured:
    """What a model says about the held-out text.

    Attributes:
        scores: by domain.
        logits: of a few tokens, fp32 [N, V], on the CPU.
        stream: the dtype of its input embeddings, and so of its residual stream.
    """

    scores: list[DomainScore]
    logits: torch.Tensor
    stream: torch.dtype

    @property
    def bits_per_byte(self) -> float:
        """Mean over the domains, each counting the same."""
        return sum(score.bits_per_byte for score in self.scores) / len(self.scores)


def measure(
    model: nn.Module,
    documents: Mapping[str, Sequence[Document]],
    *,
    max_length: int,
    stride: int | None,
    max_tokens: int | None,
    autocast_dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> Measured:
    """Score `model` as it stands; the arguments are those of `steep.evaluation.perplexity.evaluate`."""
    scores = evaluate(
        model,
        documents,
        max_length=max_length,
        stride=stride,
        max_tokens=max_tokens,
        autocast_dtype=autocast_dtype,
        progress=progress,
    )
    logits = []
    with inference_mode(model, autocast_dtype):
        for domain in documents.values():
            tokens = next(document.tokens for document in domain if len(document.tokens) > 1)
            ids = torch.from_numpy(tokens[:_PROBE_TOKENS].astype(np.int64))[None].to(input_device(model))
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    embeddings: Any = unwrap(model).get_input_embeddings()
    return Measured(scores, torch.cat(logits), embeddings.weight.dtype)


def open_plainly(folder: Path, dtype: torch.dtype | str, attention: Mapping[str, str]) -> Any:
    """The model in `folder` as anybody opens it: transformers alone.

    Args:
        dtype: ``auto`` is the folder's own.

    Raises:
        RunError: a tensor is missing or left over.
    """
    # A model that was trained in 4 bits may not fit onto its GPU in 16: what does not is left to the CPU.
    place: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    opened: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **place,
        **attention,
    )
    model, loading = opened
    if odd := {what: sorted(loading[what]) for what in ("missing_keys", "unexpected_keys") if loading[what]}:
        raise RunError(f"the exported model does not open as a whole: {odd}")
    return model


def measure_folder(
    folder: Path,
    adapter: Measured,
    documents: Mapping[str, Sequence[Document]],
    *,
    dtype: torch.dtype,
    attention: Mapping[str, str],
    **how: Any,
) -> Measured:
    """`measure` the model in `folder` with the arithmetic that the adapter had; it is gone from memory afterwards.

    A residual stream in bf16 alone costs 0.003 bits per byte, which would hide what the weights do. Embeddings that
    were trained in fp32 make one in fp32, so those of the merged model are scored in fp32 too.
    """
    model = open_plainly(folder, dtype, attention)
    model.get_input_embeddings().to(adapter.stream)
    try:
        return measure(model, documents, **how)
    finally:
        del model
        free_memory()


def free_memory() -> None:
    """Give back what dead models held: modules refer to each other, so counting references does not free them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Gap:
    """How far an exported model is from the adapter that it was made of.

    Attributes:
        bits_per_byte: merged minus adapter, by domain.
        logits: RMS of the difference over the RMS of the adapter's.
    """

    bits_per_byte: dict[str, float]
    logits: float

    @property
    def rise(self) -> float:
        """The largest rise of any domain; NaN if one is."""
        values = list(self.bits_per_byte.values())
        return math.nan if any(map(math.isnan, values)) else max(values)

    def problem(self, *, may_fall: bool = False) -> str | None:
        """Why this cannot be the model that was trained over the same base; None if it can.

        Args:
            may_fall: let the merged model be better, by any amount. LLM.int8 rounds activations to 8 bits too, which
                costs the adapter over such a base 0.02 bits per byte where the merged model pays nothing.
        """
        # Written so that NaN is a problem.
        for domain, gap in self.bits_per_byte.items():
            if not (gap if may_fall else abs(gap)) <= BITS_LIMIT:
                return f"{domain} is {gap:+.4f} bits per byte from the adapter's, and {BITS_LIMIT} is allowed"
        if not self.logits <= LOGITS_LIMIT:
            return f"its logits are {self.logits:.3f} from the adapter's (relative RMS), and {LOGITS_LIMIT} is allowed"
        return None


def compare(adapter: Measured, merged: Measured) -> Gap:
    """The gap between two models that were measured on the same documents."""
    theirs = {score.domain: score.bits_per_byte for score in merged.scores}
    gaps = {score.domain: theirs[score.domain] - score.bits_per_byte for score in adapter.scores}
    difference = merged.logits - adapter.logits
    return Gap(gaps, float(difference.norm() / adapter.logits.norm()))
