"""Parameter groups: what trains at which rate, with or without weight decay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from steep.errors import UserError
from steep.model.embeddings import embedding_parameter_names
from steep.training.arguments import TrainingArguments

KINDS = ("adapters_a", "adapters_b", "embeddings", "other")


def kind_of(name: str, embedding_names: Collection[str]) -> str:
    """The kind of the parameter called `name`: LoRA's A or B, an embedding, or another (norms, biases, DoRA's
    lengths)."""
    if name in embedding_names:
        return "embeddings"
    if "lora_A" in name or "lora_embedding_A" in name:
        return "adapters_a"
    if "lora_B" in name or "lora_embedding_B" in name:
        return "adapters_b"
    return "other"


def parameter_groups(
    model: nn.Module, args: TrainingArguments, decayed: Collection[str], given: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One group for each kind, and for its part without weight decay, over the trainable parameters of `model`.

    Args:
        decayed: names of the parameters that weight decay applies to (transformers' rule: no biases, no norms).
        given: groups that an optimizer asks for with settings of its own (GaLore, APOLLO); they are divided further.

    Returns:
        Groups with the keys ``name, params, lr, weight_decay`` and what `given` brought.

    Raises:
        UserError: an `embedding_learning_rate` although no embedding is trained; nothing to train at all.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise UserError("model", "it has no trainable parameter", "Call steep.add_adapters(model) first.")
    embedding_names = embedding_parameter_names(model)
    if args.embedding_learning_rate is not None and not embedding_names:
        raise UserError(
            "embedding_learning_rate",
            "it is set but no embedding is trained",
            'Train them (modules_to_save: ["embed_tokens", "lm_head"]) or leave the rate out.',
        )
    names = {id(parameter): name for name, parameter in named.items()}
    groups: list[dict[str, Any]] = []
    for source in given or [{"params": list(named.values())}]:
        members: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
        for parameter in source["params"]:
            name = names[id(parameter)]
            decays = name in decayed and "lora_magnitude" not in name  # DoRA's lengths start at the base's
            members.setdefault((kind_of(name, embedding_names), decays), []).append(parameter)
        for kind in KINDS:
            for decays in (True, False):
                if (kind, decays) not in members:
                    continue
                groups.append(
                    {key: value for key, value in source.items() if key != "params"}
                    | {
                        "name": kind,
                        "params": members[kind, decays],
                        "lr": _rate(kind, args),
                        "weight_decay": args.weight_decay if decays else 0.0,
                    }
                )
    return groups


def _rate(kind: str, args: TrainingArguments) -> float:
    if kind == "embeddings":
        return args.resolved_embedding_learning_rate
    return args.learning_rate * (args.loraplus_lr_ratio if kind == "adapters_b" else 1)
