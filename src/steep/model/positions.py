"""How long a text a model was made for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from steep.errors import UserError


def positions(config: PretrainedConfig) -> int | None:
    """Positions that the model has an embedding or a rotary frequency for; None if its config sets no limit.

    A scaled rope reaches `factor` times as far as the pretraining that it stretches, and some configs leave
    `max_position_embeddings` at the length of that (Qwen's with YaRN).
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        stretched = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or limit)
        limit = max(limit, int(stretched))
    return limit


def check_length(max_length: int, config: PretrainedConfig, field: str = "data.max_length") -> None:
    """Check that a text of so many tokens fits into the positions that the model was made for.

    Raises:
        UserError: it does not.
    """
    limit = positions(config)
    if limit is not None and max_length > limit:
        raise UserError(
            field,
            f"{max_length} tokens are beyond the {limit} positions that the model was made for",
            f"Give {limit} or less, or stretch them: model.rope_scaling, such as {{rope_type: yarn, factor: "
            f"{math.ceil(max_length / limit):.1f}}}.",
        )


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The scaled ones among a model's ropes; some have one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return
    if parameters.get("rope_type", "default") != "default":
        yield parameters
    for inner in parameters.values():
        yield from _ropes(inner)
