"""In what a run computes, and the bytes of its step: from the run file and the shapes of a layer alone, so that other
settings can be tried for a moment's work."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from steep import ranks
from steep.errors import UserError
from steep.model.adapters import check_start
from steep.model.choices import Choices
from steep.model.fp8_published import has_blocks
from steep.model.layer import Layer
from steep.model.load import QUANTISED, resolve_base, resolve_compute_dtype
from steep.model.machine import Card
from steep.model.quantisable import check_quantisable, quantisable
from steep.model.resolve import ResolvedModel
from steep.ops.fp8_groups import Fp8Products
from steep.planning.fp8_choice import in_fp8, kept_in_16_bits, resolve_fp8_products
from steep.planning.fused_memory import FusedStep
from steep.planning.fusing import fused_step, resolve_trained_dtype, settle
from steep.planning.memory import Shape, shape_of
from steep.planning.rates import Rates, hidden_from
from steep.planning.sizes import host_bytes, memory_of
from steep.schema import RunConfig


@dataclass(frozen=True)
class Computation:
    """What `auto` becomes.

    Attributes:
        base: storage of the frozen weights.
        compute, trained: dtypes of products, and of what trains.
        layers: those that there are of a fused run, on the meta device with their adapters, their weights as they are
            kept; None: not fused.
        products: which are in fp8.
    """

    base: str
    compute: str
    trained: str
    layers: list[Layer] | None
    products: Fp8Products


@dataclass(frozen=True)
class Sizes:
    """A step in numbers.

    Attributes:
        choices: what the run keeps for good.
        memory: bytes by item at the peak of a step.
        on_host: bytes that layers keep in host memory, of each process.
        step: None: it is not fused.
    """

    shape: Shape
    choices: Choices
    memory: dict[str, int]
    on_host: int = 0
    step: FusedStep | None = None

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Ground:
    """What a step stands on, whatever its settings are.

    Attributes:
        empty: the model on the meta device; it may get rows for new tokens before `sized`.
        layer: of `steep.planning.fusing.decide`; None: the run is not fused.
        card: that it is planned for, if any.
        budget: bytes of it that may be filled, or of a card that nothing more is known of; None: there is none.
        before: what the run that goes on was begun with.
        to_train: whether steps are still to come.
        host: bytes of host memory that may be filled, of all processes.
        rates: of the card, by which layers have something in host memory; None: as an H200's.
        shapes: counts of the model with adapters that were tried.
    """

    resolved: ResolvedModel
    empty: Any
    layer: Layer | None
    card: Card | None
    budget: int | None
    before: Choices | None
    to_train: bool = True
    host: int = 0
    rates: Rates | None = None
    shapes: dict[str, Shape] = field(default_factory=dict, repr=False, compare=False)

    def computation(self, config: RunConfig) -> Computation:
        """What `auto` becomes here.

        Raises:
            UserError: settings that do not go together.
        """
        model, layers = config.model, None if self.layer is None else [self.layer]
        base = resolve_base(model.base, self.resolved)
        check_quantisable(self.empty, base)
        check_adapter(config, base, self.resolved)
        compute = resolve_compute_dtype(model.compute_dtype, base, self.card)
        trained = resolve_trained_dtype(config, layers is not None, compute, self.before)
        if self.layer is not None and base == "fp8":
            blocks = has_blocks(self.resolved.quantization)
            layers = in_fp8(self.layer, quantisable(self.empty), self._kept, blocks=blocks)
        products = resolve_fp8_products(
            config, base, compute, self.before, layers=layers, card=self.card, to_train=self.to_train
        )
        return Computation(base, compute, trained, layers, products)

    @cached_property
    def _kept(self) -> set[str]:
        """Linear layers that a checkpoint published in e4m3 has in 16 bits."""
        return kept_in_16_bits(self.resolved, quantisable(self.empty))

    def _shape(self, config: RunConfig, base: str) -> Shape:
        """To walk through a model takes as long as the rest of a plan."""
        rows, kept = self.empty.get_input_embeddings().weight.shape[0], self._kept if base == "fp8" else set[str]()
        key = f"{rows} {sorted(kept)} {config.adapter.model_dump_json()}"
        if key not in self.shapes:
            self.shapes[key] = shape_of(self.empty, config.adapter, kept)
        return self.shapes[key]

    def sized(self, config: RunConfig, computation: Computation) -> Sizes:
        """A step of that computation, within the budget as far as it can be."""
        base, compute, trained = computation.base, computation.compute, computation.trained
        shape, on_card = self._shape(config, base), self.budget is not None
        step, choices = None, Choices(False, trained)
        if computation.layers is not None:
            step = fused_step(
                config,
                computation.layers,
                shape,
                base=base,
                compute=compute,
                trained=trained,
                on_card=on_card,
                card=self.card,
                fp8=computation.products,
                hidden=hidden_from(self.rates, computation.products),
            )
            others = sum(host_bytes(config, shape, step.standing, trained).values())
            choices = settle(config, step, self.budget, self.before, (self.host - others) // ranks.processes_here())
        memory = memory_of(config, shape, step, choices, base=base, compute=compute, on_card=on_card)
        on_host = step.in_host_memory(choices.levels, choices.places) if step and choices.levels else 0
        return Sizes(shape, choices, memory, on_host, step)


def check_adapter(config: RunConfig, base: str, resolved: ResolvedModel) -> None:
    """Check that the adapter can begin over that base.

    Raises:
        UserError: it cannot.
    """
    adapter, field = config.adapter, "adapter.init_lora_weights"
    check_start(adapter.init_lora_weights, adapter.use_dora, adapter.lora_dropout, over_int8=base == "int8")
    if adapter.init_lora_weights == "loftq" and base not in QUANTISED:
        raise UserError(field, f"loftq begins at the quantisation's error, and a base in {base} has none", "Give true.")
    if adapter.init_lora_weights == "loftq" and resolved.quantization is not None:
        raise UserError(
            field,
            f"loftq needs the 16-bit weights, and {config.model.name} is stored quantised",
            "Give the 16-bit checkpoint as model.name.",
        )
