"""The arms of the ablation: what each does to a run, what it is held against, and what the advice says comes of it.

An arm stands on another one, and differs from that in one thing. The ladder leads from the setting of "LoRA Learns Less
and Forgets Less" (Biderman et al. 2024) to steep's own; options and replay stand on a rung of it, by default the last.
Unless an arm is about it, all train over a base in bf16 with products in bf16 and trained weights in fp32, without
fused layers, so that full finetuning, which has none, is computed as the others are. LoftQ begins at a quantisation's
error: it and the arm below it have a base in NF4. Weights in bf16 that are rounded to the nearest take an optimizer
other than `adamw_8bit`, which rounds stochastically: the arm below has that optimizer over fp32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
WITHOUT_GATE, ALL_LINEAR = (*ATTENTION, "up_proj", "down_proj"), (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
ALPHA = 32.0
ADAPTER_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
FULL_RATES = (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4)
RECIPE, FULL = "rslora", "full"
# Text: what is learned, what may be forgotten and is replayed, and what may be forgotten and never is.
NEW, OLD, UNSEEN = "new", "old", "unseen"


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    Attributes:
        says: what it is, in words.
        on: the arm that it is held against; None: it is the first.
        better: whether the advice is that it is better than that; None: there is none.
        by: the text whose bits a byte decide it: `NEW`, or `OLD` for what is forgotten, which `UNSEEN` decides where
            runs were scored on it.
        targets, saved: layers with adapters, and modules trained whole.
        slower: the embeddings' rate is the adapters' divided by this.
        rslora: alpha / sqrt(r) in place of alpha / r.
        replay: share of the tokens.
        whole: all weights train, without adapters.
        on_top: it stands on the rung that --over names.
        rates: the grid of its learning rates.
        model, adapter, training: fields of the run file that are its own.
    """

    says: str
    on: str | None = None
    better: bool | None = None
    by: str = NEW
    targets: tuple[str, ...] = ALL_LINEAR
    saved: tuple[str, ...] = EMBEDDINGS
    slower: float = 10.0
    rslora: bool = True
    replay: float = 0.0
    whole: bool = False
    on_top: bool = False
    rates: tuple[float, ...] = ADAPTER_RATES
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def embedding_rate(self, learning_rate: float) -> float | None:
        return learning_rate / self.slower if self.saved else None


LADDER: dict[str, Arm] = {
    "lora": Arm(
        "LoRA on attention, up and down, scale alpha / r",
        targets=WITHOUT_GATE,
        saved=(),
        rslora=False,
        rates=(*ADAPTER_RATES, 1.28e-2, 2.56e-2),  # its best was the last of the others'
    ),
    "gate": Arm("and on gate_proj", "lora", True, saved=(), rslora=False),
    "embeddings": Arm("and embed_tokens and lm_head at the same rate", "gate", False, slower=1, rslora=False),
    "apart-2": Arm("these at half the rate", "embeddings", True, slower=2, rslora=False),
    "apart-5": Arm("these at a fifth", "embeddings", True, slower=5, rslora=False),
    "apart-10": Arm("these at a tenth", "embeddings", True, slower=10, rslora=False),
    RECIPE: Arm("these at a tenth, scale alpha / sqrt(r)", "apart-10", True),
}
ARMS: dict[str, Arm] = {
    **LADDER,
    FULL: Arm(
        "full finetuning at one rate", RECIPE, True, slower=1, whole=True, rates=FULL_RATES, model={"base": "fp32"}
    ),
    "replay-5": Arm("with 5 % replay", RECIPE, True, OLD, replay=0.05, on_top=True),
    "replay-25": Arm("with 25 % replay", "replay-5", True, OLD, replay=0.25, on_top=True),
    "pissa": Arm("begun by PiSSA", RECIPE, on_top=True, adapter={"init_lora_weights": "pissa"}),
    "loraplus": Arm("with LoRA+, B at 16 times the rate", RECIPE, on_top=True, training={"loraplus_lr_ratio": 16.0}),
    "dora": Arm("with DoRA", RECIPE, on_top=True, adapter={"use_dora": True}),
    "nf4": Arm("over NF4", RECIPE, on_top=True, model={"base": "nf4"}),
    "loftq": Arm(
        "over NF4, begun by LoftQ", "nf4", on_top=True, model={"base": "nf4"}, adapter={"init_lora_weights": "loftq"}
    ),
    "fused": Arm("by fused layers", RECIPE, on_top=True, model={"fused": "on"}),
    "stochastic": Arm("trained in bf16, rounded stochastically", RECIPE, on_top=True, model={"trained_dtype": "bf16"}),
    "lean": Arm(
        "not clipped, updated inside the backward pass",
        RECIPE,
        on_top=True,
        training={"max_grad_norm": 0.0, "optimizer_in_backward": True},
    ),
    "adamw": Arm("with AdamW's states in 32 bits", RECIPE, on_top=True, training={"optim": "adamw_torch"}),
    "nearest": Arm(
        "so, trained in bf16, rounded to the nearest",
        "adamw",
        False,
        on_top=True,
        model={"trained_dtype": "bf16"},
        training={"optim": "adamw_torch"},
    ),
}
CORE = [*LADDER, FULL, "replay-5", "replay-25"]
BESIDE = {"apart-10": "gate"}  # the advice as a whole: embeddings trained slowly against none; better, as it says


def arm_over(name: str, over: str) -> Arm:
    """The arm called `name`; one that stands on top has the rung `over` below it."""
    arm = ARMS[name]
    if not arm.on_top:
        return arm
    rung = LADDER[over]
    return dataclasses.replace(
        arm,
        on=over if arm.on == RECIPE else arm.on,
        targets=rung.targets, saved=rung.saved, slower=rung.slower, rslora=rung.rslora,
    )  # fmt: skip


def run_file(arm: Arm, r: int, learning_rate: float) -> dict[str, dict[str, Any]]:
    """The fields of a run file that are the arm's: sections `model`, `adapter`, `training` and `data`."""
    rate = arm.embedding_rate(learning_rate)
    return {
        "model": {"base": "bf16", **arm.model},
        "adapter": {
            "r": r, "lora_alpha": ALPHA, "use_rslora": arm.rslora, "target_modules": list(arm.targets),
            "modules_to_save": list(arm.saved), **arm.adapter,
        },
        "data": {"replay_share": arm.replay},
        "training": {
            "learning_rate": learning_rate, **({} if rate is None else {"embedding_learning_rate": rate}),
            **arm.training,
        },
    }  # fmt: skip
