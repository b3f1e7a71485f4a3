"""What of a decoder and of a call makes transformers compute otherwise than the fused forward, beyond its layers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steep.model.projections import Unfused, refuse_hooks

_READ = ("transformers.", "torch.nn.", "peft.", "bitsandbytes.")  # modules of classes that are computed here
_FUNCTIONS = (  # of a module of transformers, where a layer or a decoder looks them up when it is called
    "apply_rotary_pos_emb", "create_causal_mask", "create_sliding_window_causal_mask", "eager_attention_forward",
    "repeat_kv", "rotate_half",
)  # fmt: skip
_ARGUMENTS = {  # beside the decoder's own, and what none of them changes where a call is fused
    "is_causal", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx",
    "ignore_index", "labels", "num_items_in_batch", "shift_labels",  # of a loss
    "length", "offset_mapping", "special_tokens_mask", "token_type_ids",  # columns of a tokenizer
}  # fmt: skip


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


def refuse_prefixes(model: Any) -> None:
    """
    Raises:
        Unfused: PEFT hands its learned keys and values to each call, in a key-value cache.
    """
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
            raise Unfused(f"{PeftType(config.peft_type).value} trains what a key-value cache holds")


def refuse_hooks_of_layer(layer: Any, name: str) -> None:
    """A fused layer is called, but with the tokens of all rows in one dimension: a hook would see other shapes.

    FSDP's own look at no shape.

    Raises:
        Unfused: the layer has another hook, or another forward.
    """
    refuse_hooks(layer, name, but="torch.distributed.")


def library_class_of(module: Any) -> type:
    """The class of transformers that `module` is of, below those that steep or a wrapper put over it."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))


def refuse_class(part: Any, owner: type) -> None:
    """
    Args:
        owner: the class of transformers that `part` is in.

    Raises:
        Unfused: `part` is not of the family of `owner`, so that it may compute otherwise.
    """
    if type(part).__module__ != owner.__module__:
        raise Unfused(f"it has a {type(part).__name__} of {type(part).__module__}")


def refuse_patch(cls: type) -> None:
    """What was read is the library's code: a forward that somebody set on one of its classes computes otherwise.

    Raises:
        Unfused: the forward of `cls` is none of the module that the class comes from.
    """
    owner = next(each for each in cls.__mro__ if "forward" in each.__dict__)
    module = getattr(owner.__dict__["forward"], "__module__", None)
    if owner.__module__.startswith(_READ) and module != owner.__module__:
        raise Unfused(f"the forward of every {owner.__name__} was replaced by one of {module}")


def refuse_decoder(decoder: Any) -> None:
    """What a decoder computes beside its layers.

    Raises:
        Unfused: its norm or its rotations are of another family, or have hooks; the norm is trained; or its forward,
            which calls them, was replaced, or a function of transformers that it or its layers call.
    """
    owner = library_class_of(decoder)
    refuse_patch(owner)
    for name in _FUNCTIONS:
        function = getattr(sys.modules[owner.__module__], name, None)
        module = getattr(function, "__module__", None)
        if function is not None and not str(module).startswith("transformers."):
            raise Unfused(f"{name} of {owner.__module__} was replaced by one of {module}")
    for part, name in ((decoder.norm, "the last norm"), (decoder.rotary_emb, "rotary_emb")):
        refuse_class(part, owner)
        refuse_patch(type(part))
        refuse_hooks(part, name)
    if decoder.norm.weight.requires_grad:
        raise Unfused("the last norm is trained")


def refuse_arguments(config: Any, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        Unfused: the call asks for what lies between layers, for attention that is not causal, or for something that is
            not known here: transformers hands what it does not know on to attention.
    """
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            raise Unfused(f"{name} was asked for")
    for name, value in kwargs.items():
        if name == "is_causal" and value is not None and not value:
            raise Unfused("is_causal=False was asked for")
        if name not in _ARGUMENTS and value is not None:
            raise Unfused(f"it was called with {name}, which it does not know")


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
