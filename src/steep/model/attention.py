"""Which attention backend computes what the model means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PretrainedConfig

from steep.errors import UserError

_FIELD = "model.attn_implementation"
_REMEDY = "Leave it at auto, or install what it needs."


def attention(attn_implementation: str, config: PretrainedConfig) -> dict[str, str]:
    """The argument for transformers; `auto` leaves the choice to it.

    Args:
        config: the model's. With soft caps on attention's logits (Gemma 2) `auto` is ``eager``: transformers 5.17 takes
            sdpa, which leaves the caps out without a word; 5.23 takes eager too.

    Raises:
        UserError: sdpa for a model with soft caps.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and attn_implementation == "sdpa":
        raise UserError(_FIELD, "sdpa cannot be used: it leaves out the model's attn_logit_softcapping", _REMEDY)
    if attn_implementation == "auto":
        return {"attn_implementation": "eager"} if capped else {}
    return {"attn_implementation": attn_implementation}


@contextmanager
def attention_refused(attn_implementation: str) -> Iterator[None]:
    """Turn transformers' refusal of an attention backend into a `UserError` that names the field."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if attn_implementation == "auto" or "attention" not in str(error).lower():
            raise
        problem = f"{attn_implementation} cannot be used: {str(error).splitlines()[0]}"
        raise UserError(_FIELD, problem, _REMEDY) from error
