"""One decoder layer as tensors and numbers, without the modules that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from steep.model.host_store import HostLayer
from steep.model.weights import Weights
from steep.ops.fp8 import Fp8Rows
from steep.ops.fp8_groups import Fp8Products, group_of
from steep.ops.fp8_linear import why_not_fp8
from steep.ops.lora import Group, Projection
from steep.ops.packing import Packing
from steep.ops.rms_norm import rms_norm_backward, rms_norm_forward
from steep.ops.swiglu import Activation


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight [n], or 1 + weight with `unit_offset` (Gemma)."""

    weight: torch.Tensor
    eps: float
    unit_offset: bool

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return rms_norm_forward(x, self.weight, self.eps, unit_offset=self.unit_offset, **options)

    def backward(self, dy: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return rms_norm_backward(dy, x, self.weight, self.eps, unit_offset=self.unit_offset, **options)


@dataclass(frozen=True)
class Attention:
    """How a layer attends.

    Attributes:
        window: tokens that a token sees, itself included; None: all before it in its document.
        softcap: logits become softcap * tanh(logits / softcap).
        q_norm, k_norm: norms of each head [head_dim], or None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    q_norm: Norm | None
    k_norm: Norm | None

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim


class Groups(NamedTuple):
    """The projections of a layer, by the input that they read."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group


@dataclass(frozen=True)
class Layer:
    """The tensors of one decoder layer.

    Attributes:
        attention_out_norm, mlp_out_norm: Gemma's norms of what is added to the residual stream, or None.
        activation: ``silu`` or ``gelu_tanh``, of gate.
    """

    attention_norm: Norm
    qkv: tuple[Projection, Projection, Projection]
    attention: Attention
    o: Projection
    attention_out_norm: Norm | None
    mlp_norm: Norm
    gate_up: tuple[Projection, Projection]
    down: Projection
    mlp_out_norm: Norm | None
    activation: Activation
    _groups: dict[tuple[torch.dtype, Fp8Products], Groups] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def groups(self, dtype: torch.dtype, fp8: Fp8Products) -> Groups:
        """For products in `dtype`, or over an fp8 base as `fp8` says. Kept with the layer: what a launch needs of them
        is put together once."""
        groups = self._groups.get((dtype, fp8))
        if groups is None:
            parts = [group_of(group, dtype, fp8, head_dim) for group, head_dim in self._members()]
            groups = self._groups[dtype, fp8] = Groups(*parts)
        return groups

    def why_dequantised(self, dtype: torch.dtype) -> list[str]:
        """Why groups have no products in fp8, whatever is asked for, where others are in `dtype`: a reason for each."""
        reasons = []
        for name, (group, head_dim) in zip(("q, k, v", "o", "gate, up", "down"), self._members(), strict=True):
            if reason := why_not_fp8([projection.weight for projection in group], dtype, head_dim):
                reasons.append(f"{reason} ({name})")
        return reasons

    def why_no_fp8(self, dtype: torch.dtype) -> str | None:
        """Why no group at all has products in fp8; None: some have."""
        reasons = self.why_dequantised(dtype)
        return reasons[0] if len(reasons) == len(Groups._fields) else None

    def _members(self) -> list[tuple[tuple[Projection, ...], int | None]]:
        """The projections of each group, and the heads by which its dy is quantised."""
        return [(self.qkv, self.attention.head_dim), ((self.o,), None), (self.gate_up, None), ((self.down,), None)]

    def mapped(self, change: Callable[[Projection], Projection]) -> Layer:
        """The same layer with other projections."""
        q, k, v = map(change, self.qkv)
        gate, up = map(change, self.gate_up)
        return replace(self, qkv=(q, k, v), o=change(self.o), gate_up=(gate, up), down=change(self.down))

    def trained(self) -> list[torch.Tensor]:
        """The adapters' matrices that require a gradient, in the order in which the backward pass gives theirs."""
        projections = (*self.qkv, self.o, *self.gate_up, self.down)
        matrices = (matrix for each in projections for lora in each.adapters for matrix in (lora.a, lora.b))
        return [matrix for matrix in matrices if matrix.requires_grad]


@dataclass(frozen=True)
class Batch:
    """What a layer computes on, beside its input.

    Attributes:
        packing: where documents begin and end among the T tokens.
        cos, sin: fp32 [T, R / 2], of this layer's kind.
        dtype: of products and of what lies between them.
        fp8: which products over an fp8 base are in fp8.
        level: what the layer keeps for its backward pass (`steep.model.block`); None: there is none.
        tile: tokens that what is row by row is computed for at a time.
        host: where the layer keeps some of it in host memory; None: no layer does.
        takes_dy: the gradient of the layer's output is nobody else's, so that its backward pass may write over it.
    """

    packing: Packing
    cos: torch.Tensor
    sin: torch.Tensor
    dtype: torch.dtype
    fp8: Fp8Products
    level: int | None
    tile: int
    host: HostLayer | None = None
    takes_dy: bool = False

    @cached_property
    def tiles(self) -> list[slice]:
        """All T tokens, in order."""
        tokens = self.packing.num_tokens
        return [slice(start, min(start + self.tile, tokens)) for start in range(0, max(tokens, 1), self.tile)]

    def weights(self, group: Group, passes: int = 1) -> Weights:
        """The buffer of `group`, for so many passes over all tiles."""
        return Weights(group, self.cos.device, passes * len(self.tiles))


class Rows(NamedTuple):
    """Rows that a group of projections reads: its input, or the gradient of its outputs.

    Attributes:
        extended: [T, W] with what LoRA adds beside (`steep.ops.lora`).
        quantised: the same without that in e4m3, where the group's products are in fp8 and are still to come.
    """

    extended: torch.Tensor
    quantised: Fp8Rows | None


def place(like: torch.Tensor) -> tuple[int, torch.device]:
    """T and the device of `like` [T, ...]."""
    return like.shape[0], like.device


def rows(like: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [T, width], T and device those of `like`."""
    return torch.empty(like.shape[0], width, dtype=dtype, device=like.device)
