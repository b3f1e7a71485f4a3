"""What a fused step computes, moves, and copies to the host and back, counted from the shapes of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from steep.model.block import Place, drops_x2, has_little
from steep.model.host_store import buffers_of
from steep.model.layer import Attention, Layer
from steep.model.load import QUANTISED
from steep.ops.linear_cross_entropy import Way, chunk_size
from steep.ops.lora import Projection
from steep.planning.fused_memory import FusedStep
from steep.planning.memory import BASE_WIDTH, WIDTH
from steep.training.adamw8bit import ADAMW_8BIT

_UPDATE = 8  # bytes a trained bf16 value: gradient read twice, weight read and written; its states are too
_OTHER_UPDATE = 24  # of other optimizers, all in all
ATTENTION_BACKWARD = 2.5  # times the operations forward


@dataclass(frozen=True)
class Work:
    """What a card computes.

    Attributes:
        products: operations of products in 16 bits (or fp32): 2 a multiplication with its addition.
        fp8: the same in e4m3.
        attention: the same of attention, as if causal.
        moved: bytes that kernels beside the products read and write.
    """

    products: float = 0.0
    fp8: float = 0.0
    attention: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.fp8 + other.fp8,
            self.attention + other.attention,
            self.moved + other.moved,
        )

    def times(self, count: float) -> Work:
        return Work(count * self.products, count * self.fp8, count * self.attention, count * self.moved)


@dataclass(frozen=True)
class Transfer:
    """A copy between the card and host memory.

    Attributes:
        nbytes: that go one way; as many may come the other way meanwhile.
        behind: what is computed meanwhile, and hides it.
        count: of such copies in a step.
    """

    nbytes: float
    behind: Work
    count: int = 1


@dataclass(frozen=True)
class StepWork(Work):
    """Of all micro-batches of a step, and its update."""

    transfers: tuple[Transfer, ...] = ()


def step_work(
    step: FusedStep,
    levels: Sequence[int],
    *,
    micro_batches: int,
    document: float,
    places: Sequence[Place] | None = None,
    way: Way | None = None,
) -> StepWork:
    """The work of a step.

    Args:
        levels: of each layer, see `steep.model.block`: what is computed again.
        document: mean length of the document that a token is in.
        places: where each layer keeps what it keeps; None: on the GPU.
        way: how the loss is cut; None: as is faster.
    """
    layer, tokens = step.layers[0], step.tokens
    on_gpu: list[Place] = ["gpu"] * len(levels)
    places = places or on_gpu
    slot = max(step.in_host_memory([level], [place]) for level, place in set(zip(levels, places, strict=True)))
    fetched_before = buffers_of(slot, has_little(levels, places)) > 1
    transfers: list[Transfer] = []
    layers, of_states = Work(), _states_of_a_layer(step)
    waits = [False] * (len(levels) - 1) + [places[-1] != "gpu"]  # the last layer, for its own copies
    for (level, place, waited), count in Counter(zip(levels, places, waits, strict=True)).items():
        forward, backward = (half.times(tokens) for half in _layer(layer, step, level, place, document))
        layers += (forward + backward).times(count)
        copied, times = step.in_host_memory([level], [place]), micro_batches * count
        going, coming = (copied, forward), [(copied + of_states, backward)]  # over one link
        if waited or not fetched_before:  # a layer with one buffer fetches its own
            coming = [(copied, Work()), (of_states, backward)]
        if waited:  # the loss comes after it
            going = copied, Work()
        transfers += [Transfer(nbytes, half, times) for nbytes, half in (going, *coming) if nbytes]
    weights = 2 * step.shape.layers * _filled(layer, step)  # once in each direction
    update = step.shape.trained * _OTHER_UPDATE
    if step.optim in ADAMW_8BIT:
        update = step.shape.trained * _UPDATE + 2 * step.states_bytes("none")
    whole = (layers + _head(step, way or step.faster_way).times(tokens) + Work(moved=weights)).times(
        micro_batches
    ) + Work(moved=update)
    transfers += _awaited_states(step)
    return StepWork(whole.products, whole.fp8, whole.attention, whole.moved, tuple(transfers))


def attention_work(attention: Attention, document: float) -> float:
    """Operations a token of a causal forward pass.

    Args:
        document: mean length of the document that a token is in.
    """
    seen = document / 2 if attention.window is None else min(document / 2, attention.window)
    return 4 * seen * attention.num_heads * attention.head_dim


def mean_document(lengths: np.ndarray | Sequence[int]) -> float:
    """Mean length of the document that a token is in."""
    of_each = np.asarray(lengths, np.float64)
    return float((of_each**2).sum() / of_each.sum())


def _awaited_states(step: FusedStep) -> Iterator[Transfer]:
    """Copies of optimizer states in host memory that nothing hides. The next forward pass waits for the last update,
    and so for all at the end of a step. Of updates inside backward those of the embeddings are awaited: the head's at
    once (`steep.training.in_backward`), and the table's gradient comes last. A tied pair has one update."""
    on_host = step.states_bytes("none") - step.states_bytes(step.offload)
    if not step.in_backward:
        if on_host:
            yield Transfer(on_host, Work())
        return
    of_tables = on_host - step.shape.layers * _states_of_a_layer(step)
    if on_host and (tables := step.shape.trained_embeddings // step.shape.table):
        yield Transfer(of_tables / tables, Work(), tables)


def _states_of_a_layer(step: FusedStep) -> float:
    """Bytes of optimizer states that come from host memory, and go back, in a layer's backward pass."""
    if not step.in_backward or step.offload != "all":
        return 0
    return step.states_bytes("embeddings") / step.shape.layers


def _layer(layer: Layer, step: FusedStep, level: int, place: Place, document: float) -> tuple[Work, Work]:
    """Of a token in a layer, forward and backward."""
    groups: dict[str, tuple[Projection, ...]] = {
        "qkv": layer.qkv,
        "o": (layer.o,),
        "gate_up": layer.gate_up,
        "down": (layer.down,),
    }
    again = {"qkv": level >= 2, "o": drops_x2(level, place), "gate_up": level >= 1, "down": False}
    whole, twice = [0, 0], [0, 0]  # weights and adapters, and those whose products are computed again
    for name, projections in groups.items():
        for index, count in enumerate((_base, _adapters)):
            found = sum(map(count, projections))
            whole[index] += found
            twice[index] += again[name] * found
    forwards_in_fp8, to_x_in_fp8 = step.fp8 == "both", step.fp8 in ("both", "backward")
    hidden, stream = step.shape.hidden, WIDTH[step.stream]
    qkv, wide = (sum(_shape(each)[0] for each in group) for group in (layer.qkv, layer.gate_up))
    # x → n1, q and k turned, a + x → x2, x2 → n2, gate and up → h, + x2 → y; backward reads and writes twice that.
    moved = 2 * hidden * (2 * stream + 2 * WIDTH[step.compute]) + (2 * qkv + 1.5 * wide) * WIDTH[step.compute]
    moved_again = ((level >= 1) * 1.5 * wide + (level >= 2) * 2 * qkv) * WIDTH[step.compute]
    attended, everything = attention_work(layer.attention, document), replace(layer.attention, window=None)
    attended += step.shape.unwindowed / step.shape.layers * (attention_work(everything, document) - attended)
    forward = _products(whole[0], forwards_in_fp8) + Work(2 * whole[1], 0, attended, moved)
    backward = _products(twice[0], forwards_in_fp8) + _products(whole[0], to_x_in_fp8)
    backward += Work(2 * twice[1] + 4 * whole[1])  # again, and to x, and to A and B
    backward += Work(attention=(ATTENTION_BACKWARD + (level >= 3)) * attended, moved=2 * moved + moved_again)
    return forward, backward


def _head(step: FusedStep, way: Way) -> Work:
    """Of a token in the head and its loss, in both directions."""
    vocabulary, width, again = step.shape.vocabulary, WIDTH[step.compute], 0.0
    if way != "tokens":  # logits are made twice, but for the chunk that is still there
        chunk = chunk_size(step.tokens, vocabulary, width, gradients=True, way=way)
        again = 1 - min(chunk / vocabulary, 1)
    logits = width * vocabulary * (4 + 2 * again)  # written, read, and so their gradient
    return Work(products=2 * step.shape.table * ((3 if step.trains_head else 2) + again), moved=logits)


def _products(weights: int, in_fp8: bool) -> Work:
    return Work(fp8=2 * weights) if in_fp8 else Work(products=2 * weights)


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
