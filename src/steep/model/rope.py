"""A scaling of rotary positions that the run file names, put into a model's config before the model is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_rope_utils import logger as rope_logger

from steep.errors import UserError, shown
from steep.model.positions import FROM, FURTHEST

KINDS = ("linear", "yarn", "llama3", "longrope")
_UNWINDOWED = "full_attention"
_KNOW_THEIR_ORIGIN = ("yarn", "llama3", "longrope")  # by that name, beside a length that is already the longer one
_REACH_BY_FACTOR = ("yarn", "longrope")  # times their origin; Llama 3.1's reaches twice that


def stretch(config: PretrainedConfig, scaling: Mapping[str, Any], field: str = "model.rope_scaling") -> None:
    """Give `config` that scaling in place of its own, in the terms of transformers' `rope_parameters`.

    Which length is stretched is the model's own, unless `original_max_position_embeddings` says it. Where each kind of
    layer has a rope (Gemma 3), that of layers without a window is scaled, as Gemma 3's own is: a window is no longer
    than it was.

    Raises:
        UserError: the model has no positions that can be scaled, or transformers does not take it.
    """
    text: Any = config.get_text_config()
    own, limit = rope_of_far_tokens(text), getattr(text, "max_position_embeddings", None)
    if own is None or limit is None:
        raise UserError(
            field,
            f"a model of type {config.model_type} has no rotary positions, or none of its layers without a window, "
            "which this could scale",
            "Leave it out.",
        )
    kind = scaling.get("rope_type")
    factor: Any = scaling.get("factor")
    if kind == "dynamic":
        problem = "dynamic frequencies follow the longest row so far, so that a resumed run would compute otherwise"
        raise UserError(field, problem, "Take rope_type: yarn.")
    if kind is None and "type" in scaling:
        raise UserError(field, "it has type, which is an older name", f"Write rope_type: {shown(scaling['type'])}.")
    if kind not in KINDS:
        raise UserError(field, f"rope_type is {shown(kind)}", f"Give one of {', '.join(KINDS)}.")
    if not _is_number(factor) or not 1 <= factor <= FURTHEST:
        remedy = f"Give how many times as far it shall reach, from 1 to {FURTHEST}, such as 4.0."
        raise UserError(field, f"factor is {shown(factor)}" if "factor" in scaling else "factor is missing", remedy)
    kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    parameters = {**kept, **scaling}
    if own.get("rope_type", "default") != "default" and FROM not in scaling:
        raise UserError(
            field,
            f"the model has a scaling of its own ({own['rope_type']}), which this takes the place of",
            f"Say which length is stretched: {FROM}, with yarn, llama3 or longrope.",
        )
    if kind in _KNOW_THEIR_ORIGIN:
        origin = parameters.setdefault(FROM, limit)
        if not _is_number(origin) or not 1 <= origin <= limit:
            problem = f"{FROM} is {shown(origin)}, of a model with {limit} positions"
            raise UserError(
                field, problem, f"Give the length that it was made for, from 1 to {limit}, or leave it out."
            )
        if origin * factor != int(origin * factor):
            raise UserError(
                field, f"{shown(factor)} times {shown(origin)} positions is no whole number", "Change factor."
            )
        if kind in _REACH_BY_FACTOR and origin * factor < limit:
            problem = f"{shown(factor)} times {shown(origin)} positions is less than the model's own {limit}"
            raise UserError(field, problem, f"Give a factor of {math.ceil(limit / origin):.1f} or more.")
        text.max_position_embeddings = max(limit, int(origin * factor))
    several = own is not text.rope_parameters
    if several and kind not in _KNOW_THEIR_ORIGIN:  # whose length is the longer one, see `positions`
        text.max_position_embeddings = int(limit * factor)
    text.rope_parameters = {**text.rope_parameters, _UNWINDOWED: parameters} if several else parameters
    with _complaints() as found:
        try:
            text.validate_rope()
            of_layers = {"layer_type": _UNWINDOWED} if several else {}
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"), seq_len=limit, **of_layers)
            if not torch.isfinite(frequencies).all():
                found.append("its frequencies are not finite")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            found.append(str(error) or type(error).__name__)
    if found:
        raise UserError(
            field, f"transformers does not take it: {found[0]}", "See its rope_parameters for the settings."
        )


def rope_of_far_tokens(config: Any) -> Mapping[str, Any] | None:
    """The rotary parameters of a text model, or where each kind of layer has its own, those of layers without a window;
    None: there are none."""
    own = getattr(config, "rope_parameters", None)
    if isinstance(own, Mapping) and "rope_theta" not in own:
        own = own.get(_UNWINDOWED)
    return own if isinstance(own, Mapping) and "rope_theta" in own else None


def as_arguments(config: PretrainedConfig) -> str:
    """What `from_pretrained` of the original gets besides, as Python, to make a model of that config."""
    text: Any = config.get_text_config()
    return f"rope_parameters={dict(text.rope_parameters)!r}, max_position_embeddings={text.max_position_embeddings}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Kept(logging.Handler):
    """Messages, in a list."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage())


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What transformers only warns of, and goes on with: also what it has said before, and where it is to be quiet."""
    found: list[str] = []
    kept, level = _Kept(found), rope_logger.level
    cast(Any, rope_logger.warning_once).cache_clear()
    rope_logger.addHandler(kept)
    rope_logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        rope_logger.setLevel(level)
        rope_logger.removeHandler(kept)
