"""q, k and v with their adapters as one group: two small products and two large ones (ops/lora.py).

The fused decoder layer does not call this: it runs the same `LoraGroup` inside its own pass (model/attention_half.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steep.ops.lora import Projection
from steep.ops.lora_linear import lora_linear_reference, lora_linears


def lora_qkv_reference(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    """[T, H] -> [T, Nq + Nk + Nv], projection by projection."""
    return torch.cat([lora_linear_reference(x, projection) for projection in projections], dim=1)


def lora_qkv(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    """[T, H] -> [T, Nq + Nk + Nv] of (q, k, v), in x's dtype. Saves x and the adapters."""
    return lora_linears(x, projections)
