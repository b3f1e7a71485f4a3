"""A decoder layer of transformers, read as the tensors that the fused block computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steep.model.layer import Attention, Layer, Norm
from steep.model.projections import Unfused, projection, refuse_hooks
from steep.model.refusals import library_class_of, refuse_class, refuse_patch
from steep.ops.swiglu import Activation

# transformers' classes for an MLP's activation, by what they compute.
_ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Traits:
    """What a family's layers do, beyond Llama's.

    Attributes:
        unit_offset: norms multiply by 1 + weight.
        norms_added: what attention and the MLP give is normed before it is added.
        softcap: attention's logits are capped.
        window: every layer attends within the config's `sliding_window`. Elsewhere a layer says so itself, or it has
            no window, whatever its config holds.
    """

    unit_offset: bool = False
    norms_added: bool = False
    softcap: bool = False
    window: bool = False


def eps_of(norm: Any) -> float:
    """Families name it differently."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def read_layer(module: Any, traits: Traits) -> Layer:
    """The tensors of a decoder layer as they are now: PEFT may switch adapters on and off between two calls.

    Raises:
        Unfused: the layer holds what the block does not compute, or trains what it gives no gradient.
    """
    try:
        return _read(module, traits)
    except (AttributeError, ValueError) as error:  # of a module, or a weight, of another make
        raise Unfused(f"a {type(module).__name__} cannot be read: {error}") from error


def _read(module: Any, traits: Traits) -> Layer:
    attention, mlp, owner = module.self_attn, module.mlp, library_class_of(module)
    for part in (attention, mlp):
        refuse_class(part, owner)
    name = f"layer {attention.layer_idx}"
    refuse_patch(owner)
    for path, part in module.named_modules():
        if part is not module:  # which is called
            refuse_hooks(part, f"{path} of {name}")
            refuse_patch(type(part))

    def norm(part: Any) -> Norm:
        refuse_class(part, owner)
        return Norm(part.weight, eps_of(part), traits.unit_offset)

    def linear(part: Any, last: str) -> Any:
        return projection(getattr(part, last), f"{last} of {name}")

    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if q_norm is not None and eps_of(q_norm) != eps_of(k_norm):
        raise Unfused("its norms of q and k add another eps each")  # one op does both
    config = attention.config
    if attention.training and attention.attention_dropout:
        raise Unfused("attention_dropout is above 0")
    if not attention.is_causal:
        raise Unfused("its attention is not causal")
    activation = _ACTIVATIONS.get(type(mlp.act_fn).__name__)
    if activation is None:
        raise Unfused(f"its activation is {type(mlp.act_fn).__name__}")
    window = config.sliding_window if traits.window else None
    if hasattr(attention, "sliding_window"):  # by its kind: masks are made of the config's, flash attention of its own
        window = config.sliding_window if attention.layer_type == "sliding_attention" else None
        if attention.sliding_window != window:
            raise Unfused(f"{name} has another window than its config")
    layer = Layer(
        attention_norm=norm(module.input_layernorm),
        qkv=(linear(attention, "q_proj"), linear(attention, "k_proj"), linear(attention, "v_proj")),
        attention=Attention(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            window=window,
            softcap=attention.attn_logit_softcapping if traits.softcap else None,
            q_norm=None if q_norm is None else norm(q_norm),
            k_norm=None if k_norm is None else norm(k_norm),
        ),
        o=linear(attention, "o_proj"),
        attention_out_norm=norm(module.post_attention_layernorm) if traits.norms_added else None,
        mlp_norm=norm(module.pre_feedforward_layernorm if traits.norms_added else module.post_attention_layernorm),
        gate_up=(linear(mlp, "gate_proj"), linear(mlp, "up_proj")),
        down=linear(mlp, "down_proj"),
        mlp_out_norm=norm(module.post_feedforward_layernorm) if traits.norms_added else None,
        activation=activation,
    )
    for path, parameter in module.named_parameters():  # last: what is of another kind is named above
        if parameter.requires_grad and ".lora_" not in path:  # adapters that are not active train nothing
            raise Unfused(f"{name} trains {path}")
    return layer
