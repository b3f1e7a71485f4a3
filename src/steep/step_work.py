"""What a fused step has to compute and to move, counted from the shapes of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from steep.fused_memory import FusedStep
from steep.memory import BASE_WIDTH, WIDTH
from steep.model.layer import Layer
from steep.model.load import QUANTISED
from steep.ops.lora import Projection
from steep.training.adamw8bit import ADAMW_8BIT

_UPDATE = 12  # bytes a trained bf16 value: gradient read twice, weight and both moments in 8 bits read and written


@dataclass(frozen=True)
class StepWork:
    """Of all micro-batches of a step, and its update.

    Attributes:
        products: operations of products in 16 bits (or fp32): 2 a multiplication with its addition.
        fp8: the same in e4m3.
        attention: the same of attention, as if causal.
        moved: bytes that kernels beside the products read and write.
    """

    products: float
    fp8: float
    attention: float
    moved: float


def step_work(step: FusedStep, levels: Sequence[int], *, micro_batches: int, document: float) -> StepWork:
    """The work of a step.

    Args:
        levels: of each layer, see `steep.model.block`: what is computed again.
        document: mean length of the document that a token is in.
    """
    layer, tokens = step.layers[0], step.tokens
    of_levels = [_layer(layer, step, level, document) for level in levels]
    products, fp8, attention, moved = (sum(each) for each in zip(*of_levels, strict=True))
    head = step.shape.vocabulary * step.shape.hidden
    products += 2 * head * (3 if step.trains_head else 2)
    logits = 4 * WIDTH[step.compute] * step.shape.vocabulary  # written, read, and so their gradient
    weights = micro_batches * 2 * step.shape.layers * _filled(layer, step)  # once in each direction
    update = step.shape.trained * (_UPDATE if step.optim in ADAMW_8BIT else 2 * _UPDATE)
    each = micro_batches * tokens
    return StepWork(each * products, each * fp8, each * attention, each * (moved + logits) + weights + update)


def _layer(layer: Layer, step: FusedStep, level: int, document: float) -> tuple[float, float, float, float]:
    """Of a token in a layer: operations in 16 bits, in e4m3 and of attention, and bytes."""
    groups: dict[str, tuple[Projection, ...]] = {
        "qkv": layer.qkv,
        "o": (layer.o,),
        "gate_up": layer.gate_up,
        "down": (layer.down,),
    }
    forwards = {"qkv": 1 + (level >= 2), "o": 1 + (level >= 3), "gate_up": 1 + (level >= 1), "down": 1}
    products = fp8 = 0.0
    for name, projections in groups.items():
        base, beside = sum(map(_base, projections)), sum(map(_adapters, projections))
        products += 2 * beside * (forwards[name] + 2)  # and in the backward pass to x, and to A and B
        in_fp8 = (step.fp8 == "both") * forwards[name] + (step.fp8 in ("both", "backward"))
        fp8 += 2 * base * in_fp8
        products += 2 * base * (forwards[name] + 1 - in_fp8)
    attention = layer.attention
    heads, seen = attention.num_heads * attention.head_dim, document / 2
    if attention.window is not None:
        seen = min(seen, attention.window)
    attended = 4 * seen * heads * (1 + 2.5 + (level >= 3))
    hidden, stream = step.shape.hidden, WIDTH[step.stream]
    qkv, wide = (sum(_shape(each)[0] for each in group) for group in (layer.qkv, layer.gate_up))
    # x → n1, q and k turned, a + x → x2, x2 → n2, gate and up → h, + x2 → y; backward reads and writes twice that.
    forward = 2 * hidden * (2 * stream + 2 * WIDTH[step.compute]) + (2 * qkv + 1.5 * wide) * WIDTH[step.compute]
    again = (level >= 1) * 1.5 * wide + (level >= 2) * 2 * qkv
    return products, fp8, attended, 3 * forward + again * WIDTH[step.compute]


def _filled(layer: Layer, step: FusedStep) -> float:
    """Bytes that are read and written to have a layer's weights as products read them."""
    base = sum(_base(each) for each in (*layer.qkv, layer.o, *layer.gate_up, layer.down))
    if step.base not in QUANTISED:
        return 2 * WIDTH[step.compute] * base  # copied beside the adapters
    return base * (BASE_WIDTH[step.base] + (0 if step.fp8 == "both" else WIDTH[step.compute]))


def _shape(projection: Projection) -> tuple[int, int]:
    """Outputs and inputs."""
    weight: Any = projection.weight
    outputs, inputs = weight.shape
    return outputs, inputs


def _base(projection: Projection) -> int:
    return prod(_shape(projection))


def _adapters(projection: Projection) -> int:
    return sum(lora.a.numel() + lora.b.numel() for lora in projection.adapters)
