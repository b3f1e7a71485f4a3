"""How much GPU memory a fused step needs, by item, from shapes alone; and what its layers may keep within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steep.memory import ADAMW_8BIT, WIDTH, Shape, standing, update_scratch
from steep.model.block import LEVELS
from steep.model.layer import Layer
from steep.model.load import DTYPES
from steep.model.recompute import levels_for
from steep.model.step_bytes import kept_bytes, loss_bytes, work_bytes
from steep.ops.linear_cross_entropy import Way, faster_way


@dataclass(frozen=True)
class FusedStep:
    """A step of the fused forward.

    Attributes:
        layer: one of the model's, on the meta device, with its adapters.
        base, compute, trained, stream: storage of the frozen weights; dtypes of products, of what trains, and of the
            residual stream, which is that of the input embeddings.
        tokens: in one forward.
        accumulates: several micro-batches make a step, so that gradients are there while the next one is computed.
        trains_head: whether the head has a gradient.
    """

    shape: Shape
    layer: Layer
    base: str
    compute: str
    trained: str
    stream: str
    optim: str
    tokens: int
    accumulates: bool
    trains_head: bool

    def by_item(self, levels: Sequence[int], way: Way) -> dict[str, int]:
        """Bytes by item at the peak of a step.

        The peak is at the loss; in the last layer's backward pass, when all others still have what they kept; in the
        first one's, when most gradients are there; or at the update: whichever needs the most.
        """
        kept = self.tokens * sum(self._kept[level] for level in levels)
        fixed = standing(self.shape, base=self.base, compute=self.compute, trained=self.trained, optim=self.optim)
        states = (self._at_the_loss(kept, way), self._at_the_last(kept, max(levels)), *self._afterwards(levels[0]))
        return {**fixed, **max(states, key=lambda items: sum(items.values()))}

    def choose(self, budget: float) -> tuple[list[int], Way]:
        """What each layer keeps, and how the loss is cut, so that the peak is within `budget` bytes: the least that is
        computed again; level 3 everywhere where not even that fits. The loss is cut by the vocabulary where that is
        faster, or where more fits by it."""
        ways: tuple[Way, ...] = (self.faster_way, "vocabulary")
        found: list[tuple[list[int], Way]] = [(self._levels(budget, way), way) for way in ways]

        def cost(levels: list[int], way: Way) -> tuple[float, int]:
            return max(sum(self.by_item(levels, way).values()) - budget, 0), sum(levels)

        return min(found, key=lambda each: cost(*each))

    @property
    def faster_way(self) -> Way:
        """How the loss is cut where memory is no matter."""
        sums = self.trains_head and self.gradient_width != 4
        return faster_way(self.tokens, self.shape.hidden, WIDTH[self.compute], sums)

    @property
    def gradient_width(self) -> int:
        """Bytes of a value's gradient: several micro-batches of bf16 weights are added up in fp32 where AdamW8bit reads
        them, see the trainer."""
        return 4 if self.accumulates and self.optim in ADAMW_8BIT else WIDTH[self.trained]

    @property
    def _kept(self) -> list[int]:
        return kept_bytes(self.layer, DTYPES[self.compute], DTYPES[self.stream])

    def _work(self, level: int) -> int:
        return work_bytes(self.layer, DTYPES[self.compute], DTYPES[self.stream], level, self.tokens)

    def _levels(self, budget: float, way: Way) -> list[int]:
        fixed = standing(self.shape, base=self.base, compute=self.compute, trained=self.trained, optim=self.optim)
        levels: list[int] = []
        for highest in LEVELS[1:]:  # whose layers need the most beside what they keep
            needed = max(sum(state.values()) for state in (self._at_the_loss(0, way), self._at_the_last(0, highest)))
            room = budget - sum(fixed.values()) - needed
            levels = levels_for(self._kept, self.shape.layers, self.tokens, room)
            if max(levels) <= highest:
                break
        return levels

    # ---- moments of a step

    def _at_the_loss(self, kept: int, way: Way) -> dict[str, int]:
        return _items(kept, 0, self._loss(way), self._gradients_before + self._of_head)

    def _at_the_last(self, kept: int, level: int) -> dict[str, int]:
        of_head = 0 if self.accumulates else self._of_head  # else it is added to the one that is there
        return _items(kept, self._work(level), 0, self._gradients_before + of_head)

    def _afterwards(self, level: int) -> tuple[dict[str, int], ...]:
        gradients = self.shape.trained * self.gradient_width
        of_table = self.shape.vocabulary * self.shape.hidden * self.gradient_width if self.accumulates else 0
        of_adapters = self.shape.lora * self.gradient_width + self._of_head
        before = gradients if self.accumulates else of_adapters
        return (
            _items(self.tokens * self._kept[level], self._work(level), 0, before),
            _items(0, 0, 0, gradients + (of_table if self.shape.trained_embeddings else 0)),
            _items(0, 0, 0, gradients + update_scratch(self.optim, self.trained)),
        )

    @property
    def _gradients_before(self) -> int:
        return self.shape.trained * self.gradient_width if self.accumulates else 0

    @property
    def _of_head(self) -> int:
        return self.shape.vocabulary * self.shape.hidden * self.gradient_width if self.trains_head else 0

    def _loss(self, way: Way) -> int:
        shape, gradient = self.shape, self.gradient_width if self.trains_head else 0
        converts = self.trains_head and self.trained != self.compute
        width = WIDTH[self.compute]
        return loss_bytes(self.tokens, shape.vocabulary, shape.hidden, width, gradient, way, converts=converts)


def _items(activations: int, work: int, loss: int, gradients: int) -> dict[str, int]:
    return {"activations": activations, "work of a layer": work, "logits and loss": loss, "gradients": gradients}
