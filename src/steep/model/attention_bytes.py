"""Bytes that attention's backward pass takes by how the card computes it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from steep.model.layer import Layer
from steep.ops.attention import heads_at_once
from steep.ops.attention_flex import OLDEST_CARD as OLDEST_COMPILED

# Tensors of a soft-capped attention's scores at the peak of its backward, by torch's autograd: 5.2 were counted.
_SCORES = 6


class AttentionForm(NamedTuple):
    """How a batch's attention is computed, as far as memory follows from it. Documents are taken to be as long as rows.

    Attributes:
        row: tokens of a row; 0: all of a batch are one.
        by: a kernel, which keeps nothing of [L, L]; torch's own, which has a mask [L, L] where there is a window, and
            in q's dtype what it adds by it; or plain torch, whose scores [heads, L, L] exist in fp32, of one document.
        shares: into how many sums of its own a kernel splits dq, spread over documents and heads: with an order that is
            fixed, flash has one for each multiprocessor. 1: it does not.
    """

    row: int = 0
    by: Literal["kernel", "mask", "scores"] = "kernel"
    shares: int = 1

    @classmethod
    def of(
        cls, layer: Layer, dtype: torch.dtype, row: int, capability: tuple[int, int] | None, processors: int | None
    ) -> AttentionForm:
        """
        Args:
            dtype: of q.
            capability: the card's; None: not known, taken for one that has all kernels.
            processors: multiprocessors of the card where kernels have to be deterministic; None: they need not.
        """
        capped = layer.attention.softcap is not None
        if dtype == torch.float32 or (capability is not None and capability < OLDEST_COMPILED):
            return cls(row, "scores" if capped else "mask")
        return cls(row, shares=1 if capped or processors is None else processors)  # caps are for the compiled one

    @classmethod
    def here(cls, layer: Layer, dtype: torch.dtype, row: int, device: torch.device) -> AttentionForm:
        """On that device, as this process is set; of a CPU, whose memory nothing is fitted to, a kernel's."""
        if device.type != "cuda":
            return cls(row)
        card = torch.cuda.get_device_properties(device)
        processors = card.multi_processor_count if torch.are_deterministic_algorithms_enabled() else None
        return cls.of(layer, dtype, row, (card.major, card.minor), processors)

    def sums(self, tokens: int, heads: int) -> int:
        """Sums of dq of q's shape, in fp32, in the backward pass of so many heads at a time."""
        documents = max(tokens // (self.row or tokens), 1)
        return max(-(-self.shares // (documents * heads)), 1)

    def beyond_kernel(self, layer: Layer, tokens: int, width: int, heads: int) -> int:
        """Bytes of what is [L, L] in the backward pass of so many heads at a time.

        Args:
            width: bytes of a value of q.
        """
        row, window = min(self.row or tokens, tokens), layer.attention.window
        if self.by == "scores":
            return _SCORES * 4 * heads * row**2
        masked = self.by == "mask" and window is not None and window < row
        return (1 + width) * row**2 if masked else 0


BY_KERNEL = AttentionForm()


def in_heads(layer: Layer, tokens: int, width: int, form: AttentionForm) -> int:
    """Bytes of attention's backward over q, k and v, some heads at a time: the gradients of these heads, two copies of
    q's size, dq in fp32, and of k and v each query head's own gradients, and their sums where those come one after the
    other. It is what flash allocates, and fits the peaks that were measured with cuDNN, which does not say."""
    attention = layer.attention
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    heads, kv_heads = heads_at_once(tokens, num_heads, num_kv_heads, attention.head_dim, width)
    columns = (heads + 2 * kv_heads) * width + heads * (2 * width + 4 * form.sums(tokens, heads))
    columns += 2 * heads * width if heads > kv_heads else 0
    columns += 2 * 4 * kv_heads if heads * num_kv_heads < kv_heads * num_heads else 0
    return tokens * attention.head_dim * columns + form.beyond_kernel(layer, tokens, width, heads)
