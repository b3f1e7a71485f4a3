"""How much GPU memory a fused step needs, by item, from shapes alone; and what its layers may keep within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

from steep.model.attention_bytes import BY_KERNEL, AttentionForm
from steep.model.block import Place
from steep.model.layer import Layer
from steep.model.load import DTYPES
from steep.model.placement import HIDDEN, Kept
from steep.model.recompute import candidates
from steep.model.step_bytes import loss_bytes, work_bytes
from steep.model.tiling import tile_sizes
from steep.ops.fp8_groups import Fp8Products
from steep.ops.linear_cross_entropy import Way, faster_way
from steep.ops.row_gradient import SUMMING, fewer_rows
from steep.planning.memory import WIDTH, Shape, standing, states_bytes, update_scratch, updates_under_way
from steep.training.adamw8bit import ADAMW_8BIT, Masters, Offload, States


@dataclass(frozen=True)
class FusedStep:
    """A step of the fused forward.

    Attributes:
        layers: those that there are in the model, on the meta device, with their adapters. Which stands where is not
            counted: each is taken for the one that needs most.
        base, compute, trained, stream: storage of the frozen weights; dtypes of products, of what trains, and of the
            residual stream, which is that of the input embeddings.
        tokens: in one forward.
        accumulates: several micro-batches make a step, so that gradients are there while the next one is computed.
        in_backward: a gradient is gone as soon as it is whole (`optimizer_in_backward`).
        processes: that train together. With several the gradients are always there: DDP's buckets hold them.
        trains_head: whether the head has a gradient.
        on_card: it is planned for a card.
        fp8: which products are in fp8.
        offload: whose optimizer states live in host memory; there has to be a card.
        states, masters: as in `steep.planning.memory.states_bytes`.
        micro_batches: that make a step.
        accumulates_in_fp32: whether gradients of several are added up in fp32 where they can be (`grad_accum_dtype`).
        trains_table: whether the input embeddings have a gradient.
        hidden: operations of a layer forward for each byte from which on its copy to the host is hidden.
        form: how attention is computed.
    """

    shape: Shape
    layers: Sequence[Layer]
    base: str
    compute: str
    trained: str
    stream: str
    optim: str
    tokens: int
    accumulates: bool
    in_backward: bool
    processes: int
    trains_head: bool
    on_card: bool
    fp8: Fp8Products = "none"
    offload: Offload = "none"
    states: States = "8bit"
    masters: Masters = "none"
    micro_batches: int = 1
    accumulates_in_fp32: bool = True
    trains_table: bool = False
    hidden: float = HIDDEN
    form: AttentionForm = BY_KERNEL
    _works: dict[tuple[int, int, Place], int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _least: dict[Any, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def by_item(
        self, levels: Sequence[int], way: Way, tile: int, places: Sequence[Place] | None = None
    ) -> dict[str, int]:
        """Bytes by item at the peak of a step, whose layers compute `tile` tokens at a time.

        The peak is at the loss, in the backward pass of a layer (`moments`), or at the update.

        Args:
            places: where layers keep what they keep; None: on the GPU.
        """
        on_gpu: list[Place] = ["gpu"] * len(levels)
        places = places or on_gpu
        states = (self._at_the_loss(levels, places, way), *self._in_layers(levels, places, tile))
        return {**self.standing, **max((*states, *self._at_the_update()), key=lambda items: sum(items.values()))}

    def in_host_memory(self, levels: Sequence[int], places: Sequence[Place] | None) -> int:
        """Bytes that layers keep on the host."""
        return 0 if places is None else self._kept.in_host_memory(levels, places)

    def choose(
        self, budget: float, host_room: int = 0, given: list[int] | None = None
    ) -> tuple[list[int], list[Place] | None, Way, int]:
        """What each layer keeps and where, how the loss is cut, and the tile, so that the peak is within `budget`
        bytes: the least that is computed again, and of that the fewest layers with something in host memory; level 3
        everywhere in the smallest tile where not even that fits. The loss is cut by the vocabulary where that is
        faster, or where more fits by it; into narrow parts where more fits by those.

        Args:
            host_room: bytes that layers may have in host memory.
            given: levels, where the rest is open.
        """
        ways: list[Way] = ["tokens", "vocabulary", "narrow"]
        ways = ways[ways.index(self.faster_way) :]
        all_of_them = candidates(self.shape.layers, self.tokens)
        if given is not None:
            all_of_them = ((given, tile) for tile in tile_sizes(self.tokens))
        if self._standing + self._most_at_the_update > budget:  # whatever layers keep
            all_of_them = list(all_of_them)[-1:]

        def fits(levels: list[int], way: Way, tile: int, places: list[Place]) -> bool:
            return sum(self.by_item(levels, way, tile, places).values()) <= budget

        for (levels, tile), way in product(all_of_them, ways):
            if self._at_least(levels, way, tile, host_room) > budget:
                continue  # for a hundredth of the work; there are up to three thousand
            places = self._kept.fewest(levels, host_room, partial(fits, levels, way, tile))
            if places is not None:
                return levels, _some(places), way, tile
        return levels, _some(self._kept.most(levels, host_room)), min(ways, key=self._loss), tile  # the leanest

    @property
    def faster_way(self) -> Way:
        """How the loss is cut where memory is no matter."""
        sums = self.trains_head and self.gradient_width != 4
        return faster_way(self.tokens, self.shape.hidden, WIDTH[self.compute], sums)

    @property
    def gradient_width(self) -> int:
        """Bytes of a value's gradient: one process adds up several micro-batches of bf16 weights in fp32 where
        AdamW8bit reads them, see the trainer."""
        in_fp32 = self.accumulates_in_fp32 and self.accumulates and self.processes == 1 and self.optim in ADAMW_8BIT
        return 4 if in_fp32 else WIDTH[self.trained]

    @property
    def _gradients_stay(self) -> bool:
        return self.accumulates or self.processes > 1

    @cached_property
    def standing(self) -> dict[str, int]:
        """Bytes by item of what is there all the time."""
        how = {"base": self.base, "compute": self.compute, "trained": self.trained, "optim": self.optim}
        return standing(self.shape, **how, offload=self.offload, states=self.states, masters=self.masters)

    def states_bytes(self, offload: Offload) -> int:
        """Bytes of the optimizer's states, less those of `offload`."""
        return states_bytes(self.shape, self.optim, offload, states=self.states, masters=self.masters)

    @cached_property
    def _kept(self) -> Kept:
        how = DTYPES[self.compute], DTYPES[self.stream], self.fp8
        return Kept.of(self.layers, *how, self.tokens, self.hidden)

    @cached_property
    def _turns(self) -> int:
        """Bytes of rope's cos and sin, in fp32, of layers with a window and of those without."""
        kinds = 2 if 0 < self.shape.unwindowed < self.shape.layers else 1
        return 4 * self.tokens * kinds * max(layer.attention.head_dim for layer in self.layers)

    def _work(self, tile: int, level: int, place: Place) -> int:
        key = tile, level, place
        if key not in self._works:
            how = DTYPES[self.compute], DTYPES[self.stream], level, self.tokens, self.fp8, tile, place, self.form
            self._works[key] = self._turns + max(work_bytes(layer, *how) for layer in self.layers)
        return self._works[key]

    def _at_least(self, levels: list[int], way: Way, tile: int, host_room: int) -> int:
        """Bytes below which no place brings a step: at the loss, in the last layer, and at the update."""
        kept = self._least_on_gpu(levels, host_room)
        at_the_loss = kept + self._loss(way) + self._gradients_before + self._of_head
        in_last_layer = kept + self._work(tile, levels[-1], "gpu") + self._gradients_in(len(levels) - 1, len(levels))
        return self._standing + max(at_the_loss, in_last_layer, self._most_at_the_update)

    def _least_on_gpu(self, levels: list[int], host_room: int) -> int:
        key = tuple(levels), host_room
        if key not in self._least:
            self._least[key] = self._kept.on_gpu(levels, self._kept.most(levels, host_room))
        return self._least[key]

    @cached_property
    def _standing(self) -> int:
        return sum(self.standing.values())

    @cached_property
    def _most_at_the_update(self) -> int:
        return max(sum(items.values()) for items in self._at_the_update())

    # ---- moments of a step

    def _at_the_loss(self, levels: Sequence[int], places: Sequence[Place], way: Way) -> dict[str, int]:
        kept = self._kept.on_gpu(levels, places)
        return _items(kept, 0, self._loss(way), self._gradients_before + self._of_head)

    def _in_layers(self, levels: Sequence[int], places: Sequence[Place], tile: int) -> Iterator[dict[str, int]]:
        for index, kept in self._kept.in_backward(levels, places):
            work = self._work(tile, levels[index], places[index])
            yield _items(kept, work, 0, self._gradients_in(index, len(levels)))

    def _gradients_in(self, index: int, layers: int) -> int:
        """Bytes of gradients in the backward pass of one of so many layers."""
        of_layer = self.shape.lora * self.gradient_width // self.shape.layers
        if self._gradients_stay:  # what comes is added to them, but for a tied head's
            return self._gradients_before + self._of_waiting_head
        if self.in_backward:
            return self._of_waiting_head + of_layer + self._under_way(layers - 1 - index)
        return self._of_head + of_layer * (layers - index)

    def _at_the_update(self) -> tuple[dict[str, int], ...]:
        scratch = update_scratch(self.optim, self.trained, self.on_card)
        if self.in_backward:
            waiting = self._of_waiting_head
            last = self.shape.trained_embeddings * self.gradient_width - (self._of_head - waiting)  # the table's
            last -= self._spared_by_rows
            return (_items(0, 0, 0, waiting + last + scratch + self._under_way(self.shape.layers)),)
        gradients = self.shape.trained * self.gradient_width - self._spared_by_rows
        of_table = self.shape.table * self.gradient_width if self.trains_table and not self._spared_by_rows else 0
        new = self._gradients_stay * (of_table + self._of_waiting_head)  # beside those that they are added to
        if self.shape.tied and not self._gradients_stay:
            new = of_table  # beside the head's, to which it is added
        return _items(0, 0, 0, gradients + new), _items(0, 0, 0, gradients + scratch)

    def _under_way(self, layers: int) -> int:
        """Gradients that updates over host memory still read, so many layers behind the head."""
        return updates_under_way(self.shape.lora * self.gradient_width // self.shape.layers, layers, self.offload)

    @property
    def _gradients_before(self) -> int:
        return self.shape.trained * self.gradient_width - self._spared_by_rows if self._gradients_stay else 0

    @property
    def _spared_by_rows(self) -> int:
        """What the gradient of the table does not take since it has the rows of the batch alone: those of each token,
        their sums, and what torch's kernel needs to sum up."""
        looked_up, shape = self.tokens * self.micro_batches, self.shape
        takes_them = self.trains_table and not shape.tied and self.processes == 1 and self.optim in ADAMW_8BIT
        has_scaler = self.compute == "fp16"
        if not takes_them or has_scaler or not self.on_card or not fewer_rows(looked_up, shape.vocabulary):
            return 0
        a_row = 2 * self.gradient_width + SUMMING
        return shape.table * self.gradient_width - round(looked_up * shape.hidden * a_row)

    @property
    def _of_head(self) -> int:
        return self.shape.table * self.gradient_width if self.trains_head else 0

    @property
    def _of_waiting_head(self) -> int:
        """The gradient of a tied head, which is whole with that of its table."""
        return self._of_head if self.shape.tied else 0

    def _loss(self, way: Way) -> int:
        shape, gradient = self.shape, self.gradient_width if self.trains_head else 0
        converts = self.trains_head and self.trained != self.compute
        widths = WIDTH[self.compute], WIDTH[self.stream]
        fp16 = self.compute == "fp16"
        return loss_bytes(
            self.tokens, shape.vocabulary, shape.hidden, *widths, gradient, way, converts=converts, lifted=fp16
        )


def _some(places: list[Place]) -> list[Place] | None:
    """None where all is on the GPU."""
    return places if any(place != "gpu" for place in places) else None


def _items(activations: int, work: int, loss: int, gradients: int) -> dict[str, int]:
    return {"activations": activations, "work of a layer": work, "logits and loss": loss, "gradients": gradients}
