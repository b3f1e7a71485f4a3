"""What of a decoder and of a call makes transformers compute otherwise than the fused forward, beyond its layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steep.model.projections import Unfused, hooks_of

_HARMLESS = ("torch.distributed.", "transformers.utils.output_capturing")  # modules of hooks


def refuse_config(config: Any, layers: Any) -> None:
    """Settings that transformers reads at each call, so that they count as they are now.

    Raises:
        Unfused: attention is another one than causal attention of transformers, or not all `layers` are computed.
    """
    if not getattr(config, "is_causal", True):
        raise Unfused("config.is_causal is False")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unfused("config.use_bidirectional_attention is set")
    if config.num_hidden_layers != len(layers):
        raise Unfused(f"config.num_hidden_layers is {config.num_hidden_layers}, and it has {len(layers)} layers")
    name = config._attn_implementation
    function: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)  # of a kernel from the hub, a partial
    if name not in (None, "eager") and not getattr(function, "__module__", "").startswith("transformers."):
        raise Unfused(f"its attention is {name}, which is none of transformers' own")


def refuse_hooks_of_layer(layer: Any, name: str) -> None:
    """A fused layer is called, but with the tokens of all rows in one dimension: a hook would see other shapes.

    FSDP's own look at no shape, and those that transformers leaves behind once hidden states were asked for do nothing
    in a call that asks for none.

    Raises:
        Unfused: the layer has another hook, or another forward.
    """
    for hook in (hook for each in hooks_of(layer) for hook in each.values()):
        if not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS):
            raise Unfused(f"{name} has hooks")
    if "forward" in layer.__dict__:
        raise Unfused(f"the forward of {name} was replaced")


def refuse_outputs(config: Any, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        Unfused: the call asks for what lies between layers.
    """
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            raise Unfused(f"{name} was asked for")


def row_lengths(attention_mask: Any, position_ids: torch.Tensor | None, shape: torch.Size) -> list[int] | None:
    """Tokens of each row before its padding on the right; None: there is no mask.

    Raises:
        Unfused: the mask says something else, or positions start anew inside a row: with a mask, transformers lets
            the documents of a row see each other.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != shape:
        raise Unfused("its attention mask is not one value for each token")
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(shape[1]) < lengths[:, None]):
        raise Unfused("its attention mask is neither causal nor right padding")
    if not bool(lengths.all()):
        raise Unfused("its attention mask leaves a row without a token")
    if position_ids is not None:
        back = position_ids.cpu().expand(shape).diff(dim=1) <= 0
        if bool((back & mask[:, 1:]).any()):
            raise Unfused("positions start anew inside a row that has an attention mask: documents see each other")
    return lengths.tolist()
