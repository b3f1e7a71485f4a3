"""From hidden states to the loss of single tokens, without ever holding a batch's logits.

A vocabulary of 128,000 makes 4 GiB of fp32 logits of 8,192 tokens. So the decoder runs once, and the head runs on tiles
of scored positions with at most `TILE_BYTES` of fp32 logits: an evaluation must not run out of memory where training
fits, whose loss holds as much. For that one must know what the model does to its head's output; three families' habits
are known here, and `agrees` finds out whether they are all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steep.model.unwrap import unwrap

TILE_BYTES = 2**28


@dataclass(frozen=True)
class Head:
    """The two halves of a causal LM, and what lies between its head and its logits.

    logits = softcap * tanh(scale * head(decoder(tokens)) / softcap)

    Attributes:
        decoder: gives `last_hidden_state` [B, L, D].
        projection: the output embeddings with their adapters or trained copy, D -> V.
        vocabulary: V.
        scale: Cohere's `logit_scale`, one over Granite's `logits_scaling`, else 1.
        softcap: Gemma 2's `final_logit_softcapping`, else None.
    """

    decoder: nn.Module
    projection: nn.Module
    vocabulary: int
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [N, V] of hidden states [N, D]. The projection computes in its own dtype, the rest in fp32."""
        logits = self.projection(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def find_head(model: nn.Module) -> Head | None:
    """The halves of a transformers causal LM, bare or inside PEFT; None where its parts don't have the usual names."""
    base = unwrap(model)
    decoder, projection = getattr(base, base.base_model_prefix or "model", None), base.get_output_embeddings()
    if not isinstance(decoder, nn.Module) or not isinstance(projection, nn.Module):
        return None
    config: Any = base.config.get_text_config(decoder=True)
    multiplier, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)
    return Head(decoder, projection, config.vocab_size, scale, getattr(config, "final_logit_softcapping", None))


def agrees(head: Head, model: nn.Module, tokens: torch.Tensor) -> bool:
    """Whether the head gives the logits that the outermost model gives for `tokens` (int64 [1, n], one document).

    Both run the same layers on the same input, so they may differ by the rounding of one matrix product and of what
    follows it in the model's dtype, as `are_near` allows.
    """
    theirs = model(input_ids=tokens, use_cache=False).logits[0]
    hidden = head.decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
    epsilon = max(torch.finfo(theirs.dtype).eps, torch.finfo(hidden.dtype).eps)
    return are_near(head.logits(hidden), theirs, epsilon)


def are_near(ours: torch.Tensor, theirs: torch.Tensor, epsilon: float) -> bool:
    """Whether logits are the same but for rounding: 4 units in the last place of the largest one, by the `epsilon` of
    a dtype, but no finer than 1e-4 of it. NaN is near NaN: a diverged model is no reason to distrust how it computes.
    """
    ours, theirs = ours.float(), theirs.float()
    largest = torch.nan_to_num(theirs, posinf=0.0, neginf=0.0).abs().max().item()
    return torch.allclose(ours, theirs, rtol=0.0, atol=max(4 * epsilon, 1e-4) * largest, equal_nan=True)


def losses_from_hidden(head: Head, hidden: torch.Tensor, where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of each scored token, fp32 [N], from hidden states [M, D] at the positions `where` [N] of M."""
    size = tile_size(head.vocabulary)
    tiles = zip(where.split(size), targets.split(size), strict=True)
    return torch.cat([_nats(head.logits(hidden[tile]), tile_targets) for tile, tile_targets in tiles])


def losses_from_logits(logits: torch.Tensor, where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of each scored token, fp32 [N], from the logits [M, V] of one row; fp32 copies are made tile by tile."""
    size = tile_size(logits.shape[1])
    tiles = zip(where.split(size), targets.split(size), strict=True)
    return torch.cat([_nats(logits[tile].float(), tile_targets) for tile, tile_targets in tiles])


def tile_size(vocabulary: int) -> int:
    """Positions of a tile: a multiple of 64, as products are cut, and no fewer."""
    return max(TILE_BYTES // (4 * vocabulary) // 64, 1) * 64


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")
