"""Whether transformers reads a GGUF file as the model that llama.cpp computes of it.

Its reader takes the keys and tensors that it knows and says nothing of others: scaled rotary frequencies, biases,
windows and Gemma's scales of attention are lost, and the model is another one. So the config that it makes is put into
the terms of GGUF again, by what writes GGUF files, and has to come out as the file has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from steep.errors import UserError
from steep.foreign import told_as_input
from steep.model.gguf_families import (
    FAMILIES,
    Family,
    add_settings,
    difference,
    gguf_names,
    query_scale,
    same_value,
    windowed_layers,
)
from steep.model.gguf_file import GgufFile
from steep.model.missing_weights import first_of, refuse_missing

REMEDY = "Give the model's safetensors checkpoint."

_CHANGES_NOTHING = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.finetuned": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",  # the one that llama.cpp reads
}
"""Keys that the converted config has no equal of, and the value with which they say what it does."""


def check_config(file: GgufFile, config: Any, field: str) -> None:
    """Compare the hyperparameters in `file` with the `config` that transformers makes of them.

    Raises:
        UserError: they are those of two models, or the family is none of those that can be compared.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted({each.architecture.lower() for each in FAMILIES.values()}))
        problem = f"{file.path} is a {file.architecture}, and whether transformers reads that right is not known here"
        raise UserError(field, problem, f"{REMEDY} In GGUF it may be one of {known}.")
    with told_as_input(field, f"{file.path} cannot be understood", REMEDY):
        if reason := difference(config, family):
            raise UserError(field, f"{file.path} becomes another model in transformers: {reason}", REMEDY)
        wanted, stored = _settings(config, family), _stored(file, config, family)
        for key in sorted(wanted.keys() | stored.keys()):
            if same_value(stored.get(key), wanted.get(key)):
                continue
            if key not in wanted and key in _CHANGES_NOTHING and same_value(stored[key], _CHANGES_NOTHING[key]):
                continue
            says = f"has {stored[key]!r}" if key in stored else "has nothing"
            reads = f"reads as {wanted[key]!r}" if key in wanted else "does not read from GGUF"
            raise UserError(
                field, f"{file.path} {says} for {file.architecture}.{key}, which transformers {reads}", REMEDY
            )
        if family.layers_of_27b is not None and not math.isclose(query_scale(config, family), 1.0):
            read = config.query_pre_attn_scalar
            scale = f"1/√{read * query_scale(config, family) ** 2:g}"
            by = f"(by {file.architecture}.attention.key_length and block_count)"
            problem = f"{file.path} scales attention by {scale} {by}, which transformers reads as 1/√{read:g}"
            raise UserError(field, problem, REMEDY)


def check_tensors(file: GgufFile, names: Iterable[str], config: Any, field: str) -> None:
    """Compare the tensors in `file` with those of the model that transformers makes of it.

    Args:
        names: the model's, as in its state dict.

    Raises:
        UserError: the file lacks one, or has one that transformers leaves out.
    """
    asked_for = gguf_names(names, config, FAMILIES[config.model_type])
    known = {name for name in asked_for.values() if name is not None}
    refuse_missing(known - file.tensors, str(file.path), field, "Give a whole .gguf file.")
    if left_out := file.tensors - known:
        problem = f"{file.path} has {first_of(left_out)}, which transformers does not read from GGUF"
        raise UserError(field, problem, REMEDY)


def _settings(config: Any, family: Family) -> dict[str, Any]:
    """The hyperparameters that a file of a model with `config` has, by key."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter  # optional

    architecture = MODEL_ARCH_NAMES[MODEL_ARCH[family.architecture]]
    writer = GGUFWriter(None, architecture)
    add_settings(writer, config, family)
    own = f"{architecture}."
    return {name.removeprefix(own): each.value for name, each in writer.kv_data[0].items() if name.startswith(own)}


def _stored(file: GgufFile, config: Any, family: Family) -> dict[str, Any]:
    """The hyperparameters in `file`, with what llama.cpp takes for those that are not there."""
    settings = file.settings
    head_size = settings["embedding_length"] // settings["attention.head_count"]
    taken: dict[str, Any] = {
        "attention.head_count_kv": settings["attention.head_count"],
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": settings.get("attention.key_length", head_size),
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,  # in both it is the number of tokens
    }
    if family.architecture == "GEMMA2":
        taken |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}
    if family.architecture == "GEMMA3":
        taken |= {"rope.freq_base_swa": 10000.0}
    stored = taken | settings
    pattern = stored.get("attention.sliding_window_pattern")
    if family.window_period is not None and pattern is not None:
        layers = config.num_hidden_layers
        windows = windowed_layers(layers, pattern) if isinstance(pattern, int) else list(pattern)
        if windows == windowed_layers(layers, family.window_period):
            del stored["attention.sliding_window_pattern"]
    return stored
