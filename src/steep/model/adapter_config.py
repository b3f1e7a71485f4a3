"""The settings of a saved adapter, read as data: one that is not known here is refused.

PEFT acts on some: `megatron_core` is the name of a module that it imports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType

from steep.errors import UserError, shown
from steep.foreign import told_as_input

CONFIG = "adapter_config.json"
# Fields of LoraConfig that steep reads, or that say how training began or what is trained, which the tensors say too.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "use_dora", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config",
    "eva_config", "ensure_weight_tying", "runtime_config",
}  # fmt: skip


def _anything(value: Any) -> bool:
    return True


def _is_number(value: Any, smallest: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and smallest <= value < math.inf


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value, 1)


def _are_names(value: Any) -> bool:
    """One text, or several; PEFT makes lists sets."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
    )


def _are_by_name(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(kind(each) for each in value.values())


# Null stands in files of some writers for what is not set; PEFT trips over it.
_MAY_BE_NULL = ("lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# PEFT does not look at the types of what it reads, and fails on them later or never.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value, 0) and value <= 1,
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "target_modules": _are_names,
    "exclude_modules": lambda value: value is None or _are_names(value),
    "modules_to_save": lambda value: value is None or _are_names(value),
    "rank_pattern": lambda value: _are_by_name(value, _is_rank),
    "alpha_pattern": lambda value: _are_by_name(value, _is_number),
}


def read_adapter_config(folder: Path, field: str) -> LoraConfig:
    """The config of the adapter in `folder`; null is the default of what may be unset.

    Raises:
        UserError: there is none, it cannot be read, it is no LoRA's, or it sets something that is not understood here.
    """
    file = folder / CONFIG
    if not file.is_file():  # PEFT would look for it on the hub
        raise UserError(field, f"{folder} holds no adapter ({CONFIG})", "Give the folder of a finished run.")
    with told_as_input(field, f"{file} cannot be read", "Put it back, or train again."):
        config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise UserError(field, f"{folder} holds an adapter of type {config.peft_type}", "Only LoRA is opened.")
    for spec in fields(LoraConfig):
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        value = getattr(config, spec.name)
        if value is None and spec.name in _MAY_BE_NULL:
            value = default
            setattr(config, spec.name, default)
        if spec.name not in _UNDERSTOOD and value != default:
            raise UserError(field, f"{file} has {spec.name}: {shown(value)}", "steep does not open such an adapter.")
        if not _KINDS.get(spec.name, _anything)(value):
            problem = f"{file} is damaged: {spec.name} cannot be {shown(value)}"
            raise UserError(field, problem, "Put it back, or train again.")
    return config
