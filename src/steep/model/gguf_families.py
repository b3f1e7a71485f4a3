"""What llama.cpp computes for each family, and how a transformers checkpoint has to be laid out for it.

llama.cpp's graphs fix a few things that a transformers config leaves open: the activation, which biases exist, the
scale of attention in Gemma. `difference` says where a model is another one; what can be put into the weights `layout`
puts there. Files are written by this (`steep.export.gguf`) and held to it when they are read (`steep.model.gguf`).
Source: llama.cpp's `src/models/*.cpp`; the tests hold each family against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from gguf import GGUFWriter

ROTARY_FACTORS = "rope_freqs.weight"
"""The tensor of `rotary_factors`, which no checkpoint has."""


@dataclass(frozen=True)
class Family:
    """One of llama.cpp's architectures.

    Attributes:
        architecture: its name in `gguf.MODEL_ARCH`.
        activation: the one its graph computes.
        rotary_pairs_adjacent: a rotary pair's two halves stand side by side in q and k, not half a head apart.
        norm_offset: what the checkpoint's norm weights lack: Gemma multiplies by 1 + w.
        biases: the attention's or the MLP's linear layers may have one (Qwen 2's q, k and v always do).
        separate_head: `output.weight` is read, if it is there.
        window_period: every so many layers one sees the whole context, unless the file says otherwise.
        layers_of_27b: with so many layers the attention's scale is 1 / √(hidden / heads), else 1 / √head_dim.
    """

    architecture: str
    activation: str = "silu"
    rotary_pairs_adjacent: bool = False
    norm_offset: float = 0.0
    biases: bool = False
    separate_head: bool = True
    window_period: int | None = None
    layers_of_27b: int | None = None


FAMILIES = {
    "llama": Family("LLAMA", rotary_pairs_adjacent=True, biases=True),
    "mistral": Family("LLAMA", rotary_pairs_adjacent=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA", "gelu_pytorch_tanh", norm_offset=1.0, separate_head=False),
    "gemma2": Family(
        "GEMMA2", "gelu_pytorch_tanh", norm_offset=1.0, separate_head=False, window_period=2, layers_of_27b=46
    ),
    "gemma3_text": Family("GEMMA3", "gelu_pytorch_tanh", norm_offset=1.0, window_period=6, layers_of_27b=62),
}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary parameters of the layers that see everything, and those of the windowed layers where they differ."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters["sliding_attention"]
    return parameters, None


def add_settings(writer: GGUFWriter, config: Any, family: Family) -> None:
    """The model's hyperparameters, under the names of the gguf package."""
    from gguf import RopeScalingType  # optional

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    full, windowed = rope_of(config)
    writer.add_rope_freq_base(full["rope_theta"])
    if windowed is not None:
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            getattr(writer, f"add_{cap}")(getattr(config, cap))
    if family.window_period is not None:
        writer.add_sliding_window(config.sliding_window)
        windows = [kind == "sliding_attention" for kind in config.layer_types]
        if windows != windowed_layers(len(windows), family.window_period):
            writer.add_sliding_window_pattern(windows)


def windowed_layers(layers: int, period: int) -> list[bool]:
    """Which layers have a window, if every `period`-th sees the whole context."""
    return [bool((layer + 1) % period) for layer in range(layers)]


def gguf_names(stored: Iterable[str], config: Any, family: Family) -> dict[str, str | None]:
    """The checkpoint's name of each tensor → GGUF's, in the same order; None where GGUF has none.

    Tied output embeddings, which a GGUF file does without, are left out.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map  # optional

    known = get_tensor_name_map(MODEL_ARCH[family.architecture], config.num_hidden_layers)
    return {
        name: known.get_name(name, try_suffixes=(".weight", ".bias"))
        for name in stored
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def rotary_factors(config: Any) -> torch.Tensor | None:
    """What each rotary frequency is divided by (Llama 3.1 and later), fp32 [head_dim / 2]; None where nothing is."""
    rope, _ = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def layout(name: str, config: Any, family: Family) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the checkpoint's tensor `name`, in fp32, is laid out for llama.cpp: same shape, fp32."""

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("norm.weight") and family.norm_offset:
            tensor = tensor + family.norm_offset
        if family.rotary_pairs_adjacent and name.endswith(("q_proj.weight", "q_proj.bias")):
            tensor = _pairs_adjacent(tensor, config.num_attention_heads)
        if family.rotary_pairs_adjacent and name.endswith(("k_proj.weight", "k_proj.bias")):
            tensor = _pairs_adjacent(tensor, config.num_key_value_heads)
        scaled = {"gemma2": "q_proj.weight", "gemma3_text": "q_norm.weight"}.get(config.model_type)
        if scaled is not None and name.endswith(scaled):
            tensor = tensor * query_scale(config, family)
        return tensor

    return laid_out


def _pairs_adjacent(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def query_scale(config: Any, family: Family) -> float:
    """What Gemma's queries lack for llama.cpp's own scale to make `query_pre_attn_scalar` ** -0.5 of it; often 1."""
    built_in = head_dim(config)
    if config.num_hidden_layers == family.layers_of_27b:
        built_in = config.hidden_size // config.num_attention_heads
    return math.sqrt(built_in / config.query_pre_attn_scalar)


def difference(config: Any, family: Family) -> str | None:
    """Where a model is another one than its family's graph in llama.cpp computes, in words."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope, windowed_rope = rope_of(config)
    kind = rope["rope_type"]
    window = getattr(config, "sliding_window", None)
    has_windows = set(getattr(config, "layer_types", None) or []) != {"full_attention"}
    if activation != family.activation:
        return f"its activation is {activation}, not {family.activation}"
    if kind not in ("default", "linear") and not (kind == "llama3" and family.architecture == "LLAMA"):
        return f"its rotary frequencies are scaled by {kind!r}"
    if windowed_rope is not None and windowed_rope["rope_type"] != "default":
        return f"its windowed layers' rotary frequencies are scaled by {windowed_rope['rope_type']!r}"
    if any((part or {}).get("partial_rotary_factor", 1.0) != 1.0 for part in (rope, windowed_rope)):
        return "only a part of each head is rotated"
    if head_dim(config) % 2:
        return f"its heads have an odd size, {head_dim(config)}"
    if config.model_type == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"its heads of {head_dim(config)} do not add up to its hidden size {config.hidden_size}"
    if family.window_period is None:
        if window is not None and has_windows and window < config.max_position_embeddings:
            return f"it sees {window} tokens back, fewer than its context of {config.max_position_embeddings}"
    elif window is None:
        return "it has no sliding window"
    if not family.biases and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        return "its linear layers have biases"
    if not family.separate_head and not config.tie_word_embeddings:
        return "its output embeddings are separate from its input embeddings"
    if getattr(config, "use_bidirectional_attention", None):
        return "it attends in both directions"
    caps = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if config.model_type == "gemma2" and None in caps.values():
        return "a soft cap is switched off"
    if config.model_type == "gemma3_text" and caps["attn_logit_softcapping"] is not None:
        return "its attention has a soft cap"
    return None


def same_value(stored: Any, wanted: Any) -> bool:
    """Whether a key of a file has the value that is wanted; a file keeps numbers in fp32."""
    if isinstance(wanted, float):
        return isinstance(stored, int | float) and math.isclose(stored, wanted, rel_tol=1e-6)
    if isinstance(wanted, (list, tuple)):
        return isinstance(stored, (list, tuple)) and list(stored) == list(wanted)
    return stored == wanted
