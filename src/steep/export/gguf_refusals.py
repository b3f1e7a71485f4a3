"""Models that have no right GGUF file: what is said of them, and of which family the others are."""

from __future__ import annotations

from typing import Any

from steep.errors import UserError
from steep.model.gguf_families import FAMILIES, Family, difference

FIELD = "--to"
REMEDY = (
    "Export with --to merged, which transformers and vLLM read. llama.cpp's convert_hf_to_gguf.py may take that folder "
    "too, but not where it has a SentencePiece tokenizer and no tokenizer.model: it then gives every piece one score."
)


def family_of(config: Any) -> Family:
    """The family of a model that llama.cpp computes as transformers does.

    Raises:
        UserError: the family is another one, or the model has something that its graph in llama.cpp lacks.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise refused(f"GGUF is written for {', '.join(FAMILIES)}, and this model is a {config.model_type}")
    reason = difference(config, family)
    if reason is not None:
        raise refused(f"llama.cpp computes {config.model_type} otherwise than this model: {reason}")
    return family


def refused(problem: str) -> UserError:
    return UserError(FIELD, problem, REMEDY)
