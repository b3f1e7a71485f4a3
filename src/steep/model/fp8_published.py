"""Checkpoints that are published in e4m3: what their config.json says of it, and which of them can be trained over.

    transformers' fine-grained format    quant_method fp8: codes `weight`, scales `weight_scale_inv`, of blocks of
                                         128 x 128 or one of the whole matrix (DeepSeek, Qwen)
    compressed-tensors                   format float-quantized: codes `weight`, scales `weight_scale`, one of each
                                         row, of blocks of 128 x 128, or one of the whole matrix (LLM Compressor)

W = codes · scale in all of them. Layers that are stored in 16 bits (`ignore`, `modules_to_not_convert`) stay so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from steep.errors import UserError
from steep.ops.fp8 import BLOCK, Fp8Weight, fp8_reference

FINE_GRAINED, COMPRESSED = "fp8", "compressed-tensors"
STORED_E4M3 = "F8_E4M3"  # safetensors' name
SCALES = {FINE_GRAINED: "weight_scale_inv", COMPRESSED: "weight_scale"}
REMEDY = "Give the 16-bit checkpoint, or one in e4m3 with scales of rows or of blocks of 128 x 128."
_NO_NUMBER = 0x7F  # the bits of NaN, whatever its sign; e4m3 has no infinity


def is_published_fp8(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint's own quantisation settings are of a format read here."""
    return quantization is not None and quantization.get("quant_method") in SCALES


def has_blocks(quantization: Mapping[str, Any] | None) -> bool:
    """Whether such settings say that a scale is that of a block of 128 x 128."""
    if quantization is None:
        return False
    if quantization.get("quant_method") == FINE_GRAINED:
        return quantization.get("weight_block_size", BLOCK) is not None  # without a word on it transformers takes 128
    groups: Any = quantization.get("config_groups") or {}
    return any((group.get("weights") or {}).get("strategy") == "block" for group in groups.values())


def scale_name(quantization: Mapping[str, Any], layer: str) -> str:
    """Which tensor of the checkpoint scales the weight of `layer`."""
    return f"{layer}.{SCALES[quantization['quant_method']]}"


def is_scale(name: str, weights: Collection[str]) -> bool:
    """Whether the tensor called `name` scales one of `weights`."""
    layer, _, last = name.rpartition(".")
    return last in SCALES.values() and f"{layer}.weight" in weights


def check_published(quantization: Mapping[str, Any], name: str, field: str) -> None:
    """Check the settings of a checkpoint of such a format, before a weight is looked at.

    Raises:
        UserError: they ask for what `Fp8Weight` does not hold.
    """
    check = _fine_grained if quantization["quant_method"] == FINE_GRAINED else _compressed
    if problem := check(quantization):
        raise UserError(field, f"{name} is stored quantised with {problem}, which cannot be trained over", REMEDY)


def expanded_scale(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A scale as it is stored, as `Fp8Weight` has it for a weight of that shape: fp32, to the bit.

    Raises:
        ValueError: it has another shape.
    """
    if (expected := scale_shape(tuple(scale.shape), shape)) is None:
        raise ValueError(f"a scale of {list(scale.shape)} for a weight of {list(shape)}")
    scale = scale.float()
    return (scale.reshape(1).expand(expected) if scale.numel() == 1 else scale.reshape(expected)).contiguous()


def scale_shape(stored: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape that a scale stored as `stored` has in `Fp8Weight`, of a weight of that `shape`; None: it is not of it.

    One of the whole matrix becomes one of each row, all the same. A matrix of one block of 128 x 128 has such a one.
    """
    rows, columns = shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    if stored in ((rows,), (rows, 1)) or torch.Size(stored).numel() == 1:
        return (rows,)
    return blocks if stored == blocks else None


def read_published(
    tensors: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any],
    layer: str,
    device: torch.device,
    field: str = "model.name",
) -> Fp8Weight:
    """The weight of `layer`: its codes as they are stored, to the bit.

    Raises:
        UserError: a code or a scale is no number, or a scale is not above 0. One of 0 may be over codes of 0.
    """
    name, scale_of = f"{layer}.weight", scale_name(quantization, layer)
    codes = tensors[name].to(device, copy=True).contiguous()
    scale = expanded_scale(tensors[scale_of].to(device), (codes.shape[0], codes.shape[1]))
    weight = Fp8Weight(codes, scale)
    if problem := _no_weight(weight, name, scale_of):
        raise UserError(field, problem, "Download it again, or give another checkpoint.")
    return weight


def _no_weight(weight: Fp8Weight, name: str, scale_of: str) -> str | None:
    """What in the numbers of `weight` is none of a weight."""
    scale = weight.scale
    no_number = (weight.codes.view(torch.uint8) & _NO_NUMBER) == _NO_NUMBER
    above, zero = (scale > 0) & scale.isfinite(), scale == 0
    if bool(above.all() & ~no_number.any()):
        return None
    if bool(no_number.any()):
        return f"{name} holds {int(no_number.sum()):,} codes that are NaN"
    if not bool((above | zero).all()):
        return f"{scale_of} holds {float(scale[~(above | zero)][0]):g}, and a scale of e4m3 is above 0"
    if bool(fp8_reference(Fp8Weight(weight.codes, zero.float())).any()):
        return f"{scale_of} holds 0 for codes of {name} that are not 0"
    return None


def _fine_grained(settings: Mapping[str, Any]) -> str | None:
    """What in transformers' fine-grained settings is not read here."""
    block = settings.get("weight_block_size")
    if block is not None and list(block) != [BLOCK, BLOCK]:
        return f"blocks of {' x '.join(map(str, block))} (weight_block_size)"
    if (scheme := settings.get("activation_scheme", "dynamic")) != "dynamic":
        return f"activations whose scales are fixed (activation_scheme: {scheme})"
    if (kind := settings.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return f"numbers in {kind} (fmt)"
    return None


def _compressed(settings: Mapping[str, Any]) -> str | None:
    """What in the settings of compressed-tensors is not read here."""
    if (kind := settings.get("format")) != "float-quantized":
        return f"the format {kind} of compressed-tensors"
    if settings.get("kv_cache_scheme") is not None:
        return "a quantised cache (kv_cache_scheme)"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparse weights (sparsity_config)"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "weights turned by a transform (transform_config)"
    groups: Any = settings.get("config_groups") or {}
    for name, group in groups.items():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return f"weights of type {weights.get('type')} in {weights.get('num_bits')} bits ({name})"
        strategy, block = weights.get("strategy"), weights.get("block_structure")
        if strategy not in ("channel", "tensor", "block"):
            return f"weights scaled by {strategy} ({name})"
        if strategy == "block" and block is not None and list(block) != [BLOCK, BLOCK]:
            return f"blocks of {' x '.join(map(str, block))} ({name})"
        if weights.get("symmetric") is False:
            return f"weights with zero points ({name})"
        if inputs is not None and not inputs.get("dynamic"):
            return f"activations whose scales are fixed ({name})"
        if group.get("output_activations") is not None:
            return f"quantised outputs ({name})"
    return None
