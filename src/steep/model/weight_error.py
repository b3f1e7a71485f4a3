"""How far a quantised base is from the weights that it is made of: from a sample of their rows, before it is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bitsandbytes import functional

from steep.model.base_tensors import BaseTensors
from steep.model.load import DTYPES
from steep.model.resolve import ResolvedModel
from steep.ops.fp8 import fp8_reference, quantise_weight

_LAYERS, _ROWS = 16, 64  # about so many are looked at, and of each


def weight_error(resolved: ResolvedModel, linear: Sequence[str], base: str) -> float:
    """RMS of the difference over the RMS of the weights: of Gaussian ones 0.095 in nf4, 0.026 in fp8, 0.008 in int8.

    Only the pages of the sampled rows are read.

    Args:
        resolved: a model that is stored in 16 or 32 bits (a GGUF file after `steep.model.load.as_folder`).
        linear: names of the layers that a base quantises, see `steep.model.quantisable`.
        base: ``nf4``, ``int8``, ``fp8``, ``bf16``, ``fp16`` or ``fp32``.
    """
    tensors = BaseTensors(resolved.name, revision=resolved.arguments.get("revision"))
    names = [name for each in linear if (name := f"{each}.weight") in tensors]
    step = max(1, len(names) // _LAYERS)
    step += step % 7 == 0  # a layer of most models has seven: each of them comes in turn
    difference = total = 0.0
    for name in names[::step]:
        weight = tensors[name]
        rows = weight[:: max(1, len(weight) // _ROWS)].float()
        difference += float((_quantised(rows, base) - rows).square().sum())
        total += float(rows.square().sum())
    return (difference / total) ** 0.5 if total else 0.0


def _quantised(rows: torch.Tensor, base: str) -> torch.Tensor:
    """What `steep.model.load` makes of rows, in fp32."""
    if base == "fp8":
        return fp8_reference(quantise_weight(rows))
    if base == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(rows.half())
        return functional.int8_vectorwise_dequant(codes, scales)
    if base == "nf4":
        codes, state = functional.quantize_4bit(rows.contiguous(), compress_statistics=True, quant_type="nf4")
        return functional.dequantize_4bit(codes, state)
    return rows.to(DTYPES[base]).float()
