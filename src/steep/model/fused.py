"""How an installed model computes: what was chosen for it, and what was read of its layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steep.model.backends import Backends
from steep.model.block import Place, has_little
from steep.model.host_store import HostLayer, HostStore
from steep.model.layer import Layer
from steep.model.machine import room_on_host
from steep.model.reading import Reading
from steep.model.recompute import Updates, room_on_card
from steep.ops.fp8_groups import Fp8Products
from steep.ops.linear_cross_entropy import Way

logger = logging.getLogger("steep")


@dataclass
class Fused:
    """How an installed model computes; one object for its decoder and its causal LM.

    Attributes:
        levels: what each layer keeps (`steep.model.block`); None: chosen at the first call that trains.
        places: where each layer keeps it (`steep.model.block`); None: on the GPU, or not chosen yet.
        chosen_for: tokens of the batch that the levels were chosen for: a longer one chooses again. 0: they were given,
            or memory has run out since.
        room: bytes of the card that the choice is within; None: there is no card.
        host_room: bytes of host memory that it is within.
        beside_on_host: bytes of host memory that training takes beside: a trainer says it before the first call.
        updates: what of gradients and optimizer states is on the card: a trainer says it before the first call.
        tile: tokens that a layer computes at a time (`steep.model.block`); None: as many as is fast.
        loss_way: how the loss is cut (`steep.ops.linear_cross_entropy`); None: as is faster.
        backends: of attention.
        fp8: which products over an fp8 base are in fp8; None: all on a card with fp8 units, none elsewhere.
        logits: give logits beside the loss.
        row_gradients: the gradient of the input embeddings is of the rows alone that a batch looks up, a sparse tensor;
            of how many batches, that are added up. 0: it is dense.
        beside: bytes that the head takes with its loss, for the choice of levels.
        beside_for: tokens of the batch that this was computed for: the longest that trained. 0: no call of the causal
            LM did, and no loss is counted (a trainer may call the decoder by itself).
        calls: fused forwards of the decoder so far.
        was_fused: whether the last call without a key-value cache was one.
        last: tokens of the last batch that trained, the dtypes of its products and of its residual stream, and tokens
            of a row.
        said: reasons that were told already.
    """

    levels: list[int] | None = None
    places: list[Place] | None = None
    chosen_for: int = 0
    room: float | None = None
    host_room: int = 0
    beside_on_host: int = 0
    updates: Updates = field(default_factory=Updates)
    tile: int | None = None
    loss_way: Way | None = None
    backends: Backends = field(default_factory=Backends)
    fp8: Fp8Products | None = None
    logits: bool = False
    row_gradients: int = 0
    beside: int = 0
    beside_for: int = 0
    calls: int = 0
    was_fused: bool = False
    last: tuple[int, torch.dtype, torch.dtype, int] | None = None
    said: set[str] = field(default_factory=set)
    _readings: dict[int, Reading] = field(default_factory=dict, repr=False)
    _host: HostStore = field(default_factory=HostStore, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readings": {}, "_host": HostStore()}  # of these modules, not of a copy's

    def layer(self, module: Any) -> Layer:
        """The tensors of a decoder layer as they are now: PEFT may switch adapters on and off between two calls."""
        readings, key = self._readings, id(module)
        reading = readings.get(key)
        if reading is None or not reading.holds():
            readings.pop(key, None)
            reading = readings[key] = Reading(module, module.traits, lambda _: readings.pop(key, None))
        return reading.layer

    def expect(self, updates: Updates, beside_on_host: int = 0) -> None:
        """Choose levels for such updates: anew where they were chosen for others.

        Args:
            beside_on_host: bytes of host memory that the trainer takes.
        """
        if updates != self.updates and self.chosen_for:
            self.levels = self.places = self.tile = None
            self.chosen_for = self.beside_for = 0
        self.updates, self.beside_on_host = updates, beside_on_host

    def measure(self, decoder: Any) -> None:
        """Note the room that there is for what layers keep: before the first backward pass."""
        self.room = room_on_card(decoder, self.updates)
        self.host_room = 0 if self.room is None else max(room_on_host() - self.beside_on_host, 0)

    def host_layers(self, num_layers: int, device: torch.device) -> Sequence[HostLayer | None]:
        """The layers' parts of host memory, for a forward pass that may be differentiated; None: all is on the GPU."""
        nowhere = [None] * num_layers
        if self.places is None or all(place == "gpu" for place in self.places):
            return nowhere
        assert self.levels is not None, "places are chosen with levels"
        begun = self._host.begin(device, has_little(self.levels, self.places))
        if begun is None:
            held = (
                "a forward before the backward of another keeps all on the GPU: host memory is for one. A step that an "
                "error ended is one too, as long as somebody has its loss"
            )
            self.say_once(held, fused=True)
            return nowhere
        return [HostLayer(begun, index, place) for index, place in enumerate(self.places)]

    def give_up_pass(self) -> None:
        """Let go of host memory that a forward pass has whose step is not ended."""
        self._host.take_back()

    def free_host(self) -> None:
        """Give host memory back: no step is to come for now."""
        self._host.free()

    def forget(self) -> None:
        """Let go of what was read: it is read again."""
        self._readings.clear()

    def forget_changed(self) -> None:
        """Let go of what was read of layers that are other ones since: it may hold what nobody else does."""
        for key, reading in list(self._readings.items()):
            if not reading.holds():
                self._readings.pop(key, None)

    def say_once(self, reason: str, *, fused: bool = False) -> None:
        if reason not in self.said:
            self.said.add(reason)
            logger.warning("%s" if fused else "not fused, so slower and with more memory: %s", reason)
