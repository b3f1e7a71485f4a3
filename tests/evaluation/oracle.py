"""Documents to score, and the plainest way to score them: one window after another, whole fp32 logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.tiny import VOCAB_SIZE, tiny_model

# transformers 5.23 deprecates a property that PEFT 0.21 reads when it wraps a model.
ignore_pefts_warning = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@dataclass
class TokenDocument:
    tokens: NDArray[np.int32]
    num_bytes: int


def random_document(length: int, seed: int = 0) -> TokenDocument:
    tokens = np.random.default_rng([length, seed]).integers(3, VOCAB_SIZE, length)
    return TokenDocument(tokens.astype(np.int32), num_bytes=3 * length + 1)


def random_documents(*lengths: int) -> list[TokenDocument]:
    return [random_document(length, seed) for seed, length in enumerate(lengths)]


@torch.no_grad()
def oracle_nats(model: nn.Module, document: TokenDocument, max_length: int, stride: int) -> tuple[float, int]:
    """Nats and number of scored tokens of one document."""
    model.eval()
    tokens = torch.from_numpy(document.tokens).long()
    nats, count = 0.0, 0
    start, first = 0, 1
    while first < len(tokens):
        end = min(start + max_length, len(tokens))
        logits = model(input_ids=tokens[None, start:end], use_cache=False).logits[0].float()
        nats += F.cross_entropy(logits[first - 1 - start : -1].double(), tokens[first:end], reduction="sum").item()
        count += end - first
        first, start = end, start + stride
    return nats, count


def oracle(model: nn.Module, documents: Sequence[TokenDocument], max_length: int, stride: int) -> tuple[float, int]:
    """Mean nats a token and the number of scored tokens."""
    parts = [oracle_nats(model, document, max_length, stride) for document in documents]
    count = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / count, count


def with_adapters(tied: bool, family: str = "llama", trained: bool = True) -> PeftModel:
    """LoRA on every layer and trained copies of the embeddings, moved off their start if `trained`."""
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model(family, tied=tied), config)
    assert isinstance(model, PeftModel)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
