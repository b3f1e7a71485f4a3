"""The base model's weights, re-read from its checkpoint: as they are stored, or as a quantised base holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit

from steep.model.fp8_published import SCALES, expanded_scale
from steep.ops.fp8 import E4M3, Fp8Weight, quantise_weight

Kind = Literal["original", "dequantised"]


class BaseWeights:
    """Name → weight, read at each access.

    A weight that the checkpoint itself stores in 4 or 8 bits (bitsandbytes, e4m3) is always dequantised.

    Args:
        tensors: of the checkpoint, as stored.
        kind: ``original`` is what is stored; ``dequantised`` is what the run trained over, dequantise(quantise(W)).
        base: ``nf4``, ``int8`` or ``fp8``, what the run kept its linear layers in; without meaning for ``original``.
        linear: names of the weights that the run kept so.
        compute_dtype: what the run loaded weights in before bitsandbytes quantised them, and so what they dequantise
            to. Those in e4m3 are made of what is stored, and dequantise to fp32.
        device: where weights are put, and quantised.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        kind: Kind,
        base: str,
        linear: Collection[str],
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tensors, self._kind, self._base = tensors, kind, base
        self._linear, self._compute_dtype, self._device = linear, compute_dtype, device
        self._companions: dict[str, list[str]] = {}
        stored = set(tensors)
        for name in stored:
            if (weight := _belongs_to(name)) in stored:
                self._companions.setdefault(weight, []).append(name)
        self.names = stored - {name for parts in self._companions.values() for name in parts}

    @property
    def stored_quantised(self) -> bool:
        """Whether the checkpoint has any weight in 4 or 8 bits only."""
        return bool(self._companions)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name].to(self._device)
        if name in self._companions:
            return self._stored_in_few_bits(name, tensor)
        if self._kind == "original" or name not in self._linear or self.stored_quantised:
            return tensor  # what a quantised checkpoint has in 16 bits stays so
        if self._base == "fp8":
            return as_fp8(tensor)
        quantise = as_nf4 if self._base == "nf4" else as_int8
        return quantise(tensor.to(self._compute_dtype))

    def _stored_in_few_bits(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        parts = {part: self._tensors[part].to(self._device) for part in self._companions[name]}
        if tensor.dtype == E4M3:
            (scale,) = parts.values()
            return _whole(Fp8Weight(tensor.contiguous(), expanded_scale(scale, (tensor.shape[0], tensor.shape[1]))))
        if tensor.dtype == torch.int8:
            return functional.int8_vectorwise_dequant(tensor, parts[f"{name.removesuffix('weight')}SCB"])
        stored = Params4bit.from_prequantized(data=tensor, quantized_stats=parts, device=str(self._device))
        return functional.dequantize_4bit(stored.data, stored.quant_state)


def _belongs_to(name: str) -> str | None:
    """The weight that a tensor helps to read: ``x.weight`` of bitsandbytes' ``x.weight.absmax`` and ``x.SCB``, and of
    the scales of checkpoints in e4m3."""
    layer, _, last = name.rpartition(".")
    if last in SCALES.values():
        return f"{layer}.weight"
    if name.endswith(".SCB"):
        return f"{name.removesuffix('SCB')}weight"
    module, _, part = name.partition(".weight.")
    return f"{module}.weight" if part else None


def as_nf4(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as 4-bit NormalFloat holds it, double quantised in blocks of 64, in its own dtype and place.

    These are the arguments that transformers gives bitsandbytes for `steep.model.load`'s settings; the tests hold the
    result to the bits of a loaded model.
    """
    codes, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


def as_fp8(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as e4m3 holds it, a scale for each row, in fp32."""
    return _whole(quantise_weight(weight))


def _whole(weight: Fp8Weight) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.codes.device)
    weight.write(out)
    return out


def as_int8(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as LLM.int8 holds it, a scale for each row, in fp32; bitsandbytes rounds it to fp16 first."""
    codes, scales, _ = functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return functional.int8_vectorwise_dequant(codes, scales)
