"""Which tensors of a model are its embeddings: the tables behind token ids, at the input and at the output."""

from __future__ import annotations

from torch import nn


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
