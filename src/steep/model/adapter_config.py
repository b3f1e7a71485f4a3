"""The settings of a saved adapter, read as data: one that is not known here is refused.

PEFT acts on some: `megatron_core` is the name of a module that it imports.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftType

from steep.errors import UserError

CONFIG = "adapter_config.json"
# Fields of LoraConfig that steep reads, or that say how training began or what is trained, which the tensors say too.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "use_dora", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config",
    "eva_config", "ensure_weight_tying", "runtime_config",
}  # fmt: skip


def read_adapter_config(folder: Path, field: str) -> LoraConfig:
    """The config of the adapter in `folder`.

    Raises:
        UserError: there is none, it cannot be read, it is no LoRA's, or it sets something that is not understood here.
    """
    file = folder / CONFIG
    if not file.is_file():  # PEFT would look for it on the hub
        raise UserError(field, f"{folder} holds no adapter ({CONFIG})", "Give the folder of a finished run.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(field, f"{file} cannot be read: {error}", "Put it back, or train again.") from error
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise UserError(field, f"{folder} holds an adapter of type {config.peft_type}", "Only LoRA is opened.")
    for spec in fields(LoraConfig):
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        value = getattr(config, spec.name)
        if spec.name not in _UNDERSTOOD and value != default:
            raise UserError(field, f"{file} has {spec.name}: {value!r}", "steep does not open such an adapter.")
    return config
