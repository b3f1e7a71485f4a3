"""How long a text a model was made for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from steep.errors import UserError

FROM = "original_max_position_embeddings"
FURTHEST = 1024  # times as far as a model was made for: beyond what has ever been made to work


def positions(config: PretrainedConfig) -> int | None:
    """Positions that the model has an embedding or a rotary frequency for; None if its config sets no limit.

    A scaled rope reaches `factor` times as far as the pretraining that it stretches, and some configs leave
    `max_position_embeddings` at the length of that (Qwen's with YaRN). Gemma 3's do not, which have a rope for each
    kind of layer: as vLLM reads them too. So does `linear`, by transformers' convention (Vicuna 16k: 4,096, and 4.0): a
    config that names the longer length with it (DeepSeek Coder's: 16,384, and 4.0) cannot be told from one that does
    not, and is taken to reach further than its model was made for.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    reach = limit
    for rope, origin in _scaled_ropes(text):
        if origin is not None:
            reach = max(reach, int((rope.get("factor") or 1) * origin))
    return reach


def unstretched(config: PretrainedConfig) -> int | None:
    """Positions that the model had before a scaling of its rope; None if its config does not say."""
    text = config.get_text_config()
    scaled = next(_scaled_ropes(text), None)
    return getattr(text, "max_position_embeddings", None) if scaled is None else scaled[1]


def check_length(max_length: int, config: PretrainedConfig, field: str = "data.max_length") -> None:
    """Check that a text of so many tokens fits into the positions that the model was made for.

    Raises:
        UserError: it does not.
    """
    limit = positions(config)
    if limit is None or max_length <= limit:
        return
    origin, remedy = limit, f"Give {limit} or less"
    scaled = next(_scaled_ropes(config.get_text_config()), None)
    if scaled is not None:
        _, origin = scaled
    factor = math.inf if origin is None else math.ceil(max_length / origin)
    if factor <= FURTHEST:
        known = f", {FROM}: {origin}" if scaled is not None else ""
        remedy += f", or stretch them: model.rope_scaling, such as {{rope_type: yarn, factor: {factor:.1f}{known}}}"
    raise UserError(
        field, f"{max_length} tokens are beyond the {limit} positions that the model was made for", f"{remedy}."
    )


def _scaled_ropes(text: Any) -> Iterator[tuple[Mapping[str, Any], int | None]]:
    """The scaled ones among a model's ropes, and what each stretches; None: the config does not say."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
            yield rope, rope.get(FROM) or (text.max_position_embeddings if rope is parameters else None)
