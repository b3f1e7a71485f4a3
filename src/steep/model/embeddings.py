"""The embeddings of a model, the tables behind token ids at the input and the output: which they are, tied or not."""

from __future__ import annotations

from typing import Any

from torch import nn

from steep.errors import UserError


def embedding_parameter_names(model: nn.Module) -> set[str]:
    """Names of the trained `embed_tokens` and `lm_head` parameters of `model`, a plain causal LM or a PEFT model.

    A LoRA matrix on an embedding is an adapter, not an embedding. A tied head is listed once, as
    `named_parameters` does.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    members = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(base, getter)() if hasattr(base, getter) else None
        if module is not None:
            members |= {id(parameter) for name, parameter in module.named_parameters() if "lora_" not in name}
    return {
        name for name, parameter in model.named_parameters() if id(parameter) in members and parameter.requires_grad
    }


def is_tied(model: nn.Module) -> bool:
    """Whether the head of a causal LM is its input embedding."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    table = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return head is not None and head.weight is table.weight


def untie(model: Any, field: str = "model.untie_embeddings") -> None:
    """Make the head of a tied model a parameter of its own. While both are frozen they share their memory.

    Raises:
        UserError: the model's head is its own already.
    """
    if not is_tied(model):
        raise UserError(field, "the model's head is a matrix of its own already", "Leave it out.")
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
