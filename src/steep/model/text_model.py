"""The text model of a multimodal checkpoint (Gemma 3 4B, Mistral Small 3.1), written as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from steep.errors import UserError
from steep.model.missing_weights import refuse_missing
from steep.model.resolve import ResolvedModel, read_config, read_tokenizer, text_config_of
from steep.model.safety import check_safe
from steep.storage import published
from steep.tensor_files import system_errors

_PROBE = "The text model alone has to say what the whole model says."


def extract_text_model(name: str, folder: str | Path, *, revision: str | None = None) -> Path:
    """Write the text model of a multimodal checkpoint, with its tokenizer, into a folder that `steep` can train.

    The weights are those of the checkpoint, in the dtype that they are stored in; what sees images is left out. The
    whole checkpoint is loaded into memory once, and the logits of both models on a short text are compared before
    anything is written.

    Args:
        name: hub name or folder of the multimodal model.
        folder: where to write; must not exist, or be empty.

    Returns:
        `folder`.

    Raises:
        UserError: there is something in `folder`, the model has no text model that can stand alone, or its checkpoint
            lacks a weight.
    """
    if Path(name).expanduser().exists():
        name = str(Path(name).expanduser())
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError("folder", f"{folder} is not empty", "Give another folder.")
    arguments: dict[str, Any] = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    config = read_config(name, arguments, "name")
    text_config = text_config_of(config)
    if text_config is None:
        remedy = "Give a multimodal checkpoint, such as Gemma 3 4B."
        raise UserError("name", f"{name} ({config.model_type}) has no text model that can stand alone", remedy)
    resolved = ResolvedModel(name, arguments, config)
    check_safe(resolved, "name")
    whole, found = cast(
        tuple[Any, dict[str, Any]],
        AutoModelForImageTextToText.from_pretrained(
            name, dtype="auto", use_safetensors=True, output_loading_info=True, **arguments
        ),
    )
    # transformers fills what is missing with random numbers, in the whole model and so in what is taken out of it.
    refuse_missing(found["missing_keys"], name, "name", "Download it again, or give a whole checkpoint.")
    tokenizer = read_tokenizer(resolved, "name")
    model = _text_model(whole, text_config)
    if model is None or not _agree(whole, model, tokenizer):
        problem = f"the text model of {name} ({text_config.model_type}), taken out, is not what it is inside"
        raise UserError("name", problem, "Give a checkpoint without images.")
    with published(folder, existing="refuse") as staging, system_errors(folder):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return folder


def _text_model(whole: Any, text_config: Any) -> Any:
    """A causal LM around the text part of `whole`, sharing its tensors; None where the parts do not fit."""
    inner = getattr(getattr(whole, "model", None), "language_model", None)
    head = whole.get_output_embeddings()
    if inner is None or head is None:
        return None
    # What decides is whether the two are one tensor in the whole model; the text config may say otherwise.
    text_config.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(text_config, dtype=whole.dtype)
    if type(getattr(model, "model", None)) is not type(inner):
        return None
    model.model, model.lm_head = inner, head
    model.generation_config = whole.generation_config
    return model.eval()


def _agree(whole: Any, model: Any, tokenizer: Any) -> bool:
    tokens = tokenizer(_PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, got = (each(input_ids=tokens, use_cache=False).logits.float() for each in (whole.eval(), model))
    return bool((got - expected).abs().max() <= 1e-3 * expected.abs().max())  # rounding of another attention kernel
