"""How much GPU memory a run needs, by item, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from steep.model.adapters import linear_shapes, targeted
from steep.model.embeddings import is_tied
from steep.model.names import EMBEDDINGS
from steep.model.step_bytes import whole_logits_bytes
from steep.ops.host_states import staging_bytes
from steep.schema import AdapterSection, TrainingSection
from steep.training.adamw8bit import ADAMW_8BIT, UPDATES_UNDER_WAY, Masters, Offload, States

GIB = 2**30
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes a weight: codes, and their scales (nf4: a byte for each 64 weights and 4 bytes for each 256 of those; int8
# and fp8: 4 bytes a row, or a block of 128 x 128).
BASE_WIDTH = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "fp8": 1.0, "bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
# Bytes of optimizer state a trained value; others are counted like plain Adam, and so are fp32 states.
OPTIMIZER_WIDTH = {"adamw_8bit": 2 + 8 / 256, "adamw_bnb_8bit": 2 + 8 / 256, "sgd": 0.0, "adafactor": 0.01}
MASTER_WIDTH = 2  # beside a bf16 weight: `steep.ops.master_weights`

# What the update of bf16 weights copies to fp32 at a time, where it is not a kernel of steep's.
UPDATE_SCRATCH = round(0.4 * GIB)

# Gaps between allocations: of what comes and goes in a step, and at the most, what torch had reserved beyond what was
# allocated at the peak, in segments that grow. Seven runs of an 8B and a 70B had 2 to 37 %, and 0.11 to 3.43 GiB.
_GAPS, _MOST_GAPS = 0.4, round(3.5 * GIB)
_PASSING = ("activations", "work of a layer", "logits and loss", "gradients")

# What cuBLAS and the others hold on a card, and small tensors: 0.08 to 0.19 GiB were measured beyond the rest.
WORKSPACES = round(0.15 * GIB)


@dataclass(frozen=True)
class Shape:
    """Counts that a model's memory follows from.

    Attributes:
        linear: weights in linear layers, the head not counted.
        linear_kept: those of them that a checkpoint published in e4m3 has in 16 bits.
        embeddings: values in the embeddings, a tied pair counted once.
        other: every other parameter (norms, biases).
        lora: values in the LoRA adapters that train.
        lora_start: values in the frozen adapter that PiSSA takes its beginning back with.
        trained_embeddings: values of the embeddings that train.
        hidden, intermediate, layers, vocabulary: the model's own dimensions.
        unwindowed: layers whose attention sees all that is before a token.
    """

    linear: int
    embeddings: int
    other: int
    lora: int
    lora_start: int
    trained_embeddings: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    linear_kept: int = 0
    unwindowed: int = 0

    def linear_bytes(self, base: str, compute: str) -> int:
        """Bytes of the linear layers' weights in a base."""
        kept = self.linear_kept if base == "fp8" else 0
        return round((self.linear - kept) * BASE_WIDTH[base]) + kept * WIDTH[compute]

    @property
    def trained(self) -> int:
        return self.lora + self.trained_embeddings

    @property
    def table(self) -> int:
        """Values in one of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def tied(self) -> bool:
        """Whether the head is the table of the input embeddings."""
        return self.embeddings == self.table


def shape_of(model: Any, adapter: AdapterSection, kept: Collection[str] = ()) -> Shape:
    """Count `model` (it may be on the meta device) and the adapters that it would get.

    Args:
        kept: linear layers that an fp8 base has in 16 bits.
    """
    config = model.config.get_text_config()
    shapes = linear_shapes(model)
    layers = targeted(shapes, adapter.target_modules).values()
    factors = sum(min(adapter.r, *shape) * sum(shape) for shape in layers)
    lengths = sum(outputs for outputs, _ in layers) if adapter.use_dora else 0
    tables = [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()])
    embeddings = sum(table.weight.numel() for table in tables)
    linear = sum(out * inner for out, inner in shapes.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = [name for name in EMBEDDINGS if name in adapter.modules_to_save]
    if is_tied(model):
        trained_embeddings = embeddings if trained else 0
    else:
        trained_embeddings = sum(tables[EMBEDDINGS.index(name)].weight.numel() for name in trained)
    return Shape(
        linear=linear,
        embeddings=embeddings,
        other=total - linear - embeddings,
        lora=factors + lengths,
        lora_start=factors if adapter.init_lora_weights == "pissa" else 0,
        trained_embeddings=trained_embeddings,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
        layers=config.num_hidden_layers,
        vocabulary=tables[0].weight.shape[0],
        linear_kept=sum(math.prod(shapes[name]) for name in kept),
        unwindowed=list(getattr(config, "layer_types", None) or []).count("full_attention"),
    )


def masters_kept(training: TrainingSection, trained: str) -> Masters:
    """Whose weights have an fp32 master: as asked, where they train in bf16.

    Args:
        trained: dtype of what trains.
    """
    return training.master_weights if trained == "bf16" else "none"


def states_bytes(
    shape: Shape, optim: str, offload: Offload = "none", *, states: States = "8bit", masters: Masters = "none"
) -> int:
    """Bytes of the optimizer's states, masters among them, less those that live in host memory (`offload_optimizer`).

    Args:
        states: of `optimizer_states`.
        masters: whose weights have one (`masters_kept`).
    """
    width = OPTIMIZER_WIDTH.get(optim, 8.0) if states == "8bit" else 8.0
    adapters = shape.lora * (width + MASTER_WIDTH * (masters == "all"))
    embeddings = shape.trained_embeddings * (width + MASTER_WIDTH * (masters != "none"))
    return round({"none": adapters + embeddings, "embeddings": adapters, "all": 0}[offload])


def updates_under_way(of_layer: int, layers: int, offload: Offload) -> int:
    """Bytes of gradients that updates over host memory still read (`optimizer_in_backward`), so many layers behind the
    head: those of the layers before. The head's is awaited."""
    return min(layers, UPDATES_UNDER_WAY) * of_layer if offload == "all" else 0


def standing(
    shape: Shape,
    *,
    base: str,
    compute: str,
    trained: str,
    optim: str,
    offload: Offload = "none",
    states: States = "8bit",
    masters: Masters = "none",
) -> dict[str, int]:
    """Bytes by item of what is there all the time. The frozen originals of trained embeddings are not
    (`steep.model.original_module`); the base is scored with its head in the place of gradients.

    Args:
        offload: whose optimizer states live in host memory; there has to be a card.
        states, masters: as in `states_bytes`.
    """
    untrained = shape.embeddings - shape.trained_embeddings + shape.other
    return {
        "frozen linear weights": shape.linear_bytes(base, compute),
        "frozen embeddings and norms": untrained * WIDTH.get(base, WIDTH[compute]),
        "adapters": (shape.lora + shape.lora_start) * WIDTH[trained],
        "trained embeddings": shape.trained_embeddings * WIDTH[trained],
        "optimizer states": states_bytes(shape, optim, offload, states=states, masters=masters),
        "staging of states": 0 if offload == "none" else staging_bytes(),
    }


def gaps(memory: Mapping[str, int]) -> int:
    """Bytes that torch reserves at the most beyond the peak of a fused step, where its segments grow
    (`steep.allocator`): no part of the peak, but what `training.vram: auto` leaves a tenth of the card for.

    Args:
        memory: of a step, by item.
    """
    return min(round(_GAPS * sum(memory.get(name, 0) for name in _PASSING)), _MOST_GAPS)


def update_scratch(optim: str, trained: str, on_card: bool) -> int:
    """Bytes that the update of the weights needs beside them: on a card it is in the kernel."""
    copies = optim in ADAMW_8BIT and trained == "bf16" and not on_card
    return UPDATE_SCRATCH if copies else 0


def memory_by_item(
    shape: Shape,
    *,
    base: str,
    compute: str,
    trained: str,
    optim: str,
    tokens: int,
    checkpointing: bool,
    accumulates: bool,
    on_card: bool,
    in_backward: bool = False,
    offload: Offload = "none",
    states: States = "8bit",
    masters: Masters = "none",
) -> dict[str, int]:
    """Bytes by item at the peak of a step over `tokens` tokens in one forward of the library's.

    The peak is where the loss is differentiated, or where all gradients are there, whichever needs more. The residual
    stream has the dtype of the trained embeddings. With checkpointing each layer keeps its input, and one layer's
    insides live at a time. Autocast keeps 16-bit copies of what it trains in fp32.

    Args:
        accumulates: gradients are there while the next loss is computed, as where several micro-batches make a step.
        on_card: it is planned for a card.
        in_backward: a gradient is gone as soon as it is whole (`optimizer_in_backward`).
        offload: whose optimizer states live in host memory.
        states, masters: as in `states_bytes`.
    """
    stream = WIDTH[trained]
    inside = tokens * (8 * shape.hidden * stream + 5 * shape.intermediate * WIDTH[compute])
    kept = shape.layers * (tokens * shape.hidden * stream if checkpointing else inside)
    gradients = shape.trained * WIDTH[trained]
    scratch = update_scratch(optim, trained, on_card)
    copies = (shape.trained + shape.lora_start) * WIDTH[compute] if trained != compute else 0
    kept_so: dict[str, Any] = {"optim": optim, "offload": offload, "states": states, "masters": masters}
    always = standing(shape, base=base, compute=compute, trained=trained, **kept_so)
    fixed = {**always, "16-bit copies": copies}
    at_the_loss = {
        "activations": kept,
        "logits and loss": whole_logits_bytes(tokens, shape.vocabulary),
        "gradients": gradients if accumulates else 0,
    }
    moments = [at_the_loss]
    if in_backward:
        of_table = shape.table * WIDTH[trained] if shape.trained_embeddings else 0
        of_layer = shape.lora * WIDTH[trained] // shape.layers
        waits = of_table if shape.tied else 0  # the head's, for that of the same table
        of_layer += updates_under_way(of_layer, shape.layers - 1, offload)
        for activations, there in ((kept, of_table), (inside, waits + of_layer), (0, waits + of_table)):
            moments.append({"activations": activations, "logits and loss": 0, "gradients": there + scratch})
    else:
        moments.append({"activations": inside, "logits and loss": 0, "gradients": gradients + scratch})
        new = shape.table * WIDTH[trained] * (accumulates + shape.tied) if shape.trained_embeddings else 0
        moments.append({"activations": 0, "logits and loss": 0, "gradients": gradients + new})  # the table's comes last
    return {**fixed, **max(moments, key=lambda items: sum(items.values()))}
