"""How far each quantised base is from the weights it is made of: from a sample of their rows, before it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from bitsandbytes import functional

from steep.model.base_tensors import BaseTensors
from steep.model.resolve import ResolvedModel
from steep.ops.fp8 import fp8_reference, quantise_weight

_LAYERS, _ROWS = 16, 16  # about so many are looked at, and of each


def weight_errors(resolved: ResolvedModel, linear: Sequence[str]) -> dict[str, float]:
    """Base → RMS of the difference over the RMS of the weights: of Gaussian ones 0.095 in nf4, 0.008 in int8, 0.026 in
    fp8. Nothing where the weights are not here in 16 or 32 bits: in the hub, stored quantised, or in a GGUF file.

    Only the pages of the sampled rows are read, 3 MB of an 8B.

    Args:
        linear: names of the layers that a base quantises, see `steep.model.quantisable`.
    """
    if resolved.quantization is not None or "gguf_file" in resolved.arguments:
        return {}
    tensors = BaseTensors(resolved.name, revision=resolved.arguments.get("revision"), download=False)
    names = [name for each in linear if (name := f"{each}.weight") in tensors]
    step = max(1, len(names) // _LAYERS)
    step += step % 7 == 0  # a layer of most models has seven: each of them comes in turn
    difference, total = dict.fromkeys(("nf4", "int8", "fp8"), 0.0), 0.0
    for name in names[::step]:
        weight = tensors[name]
        rows = weight[:: max(1, len(weight) // _ROWS)].float()
        total += float(rows.square().sum())
        for base in difference:
            difference[base] += float((_quantised(rows, base) - rows).square().sum())
    if not total:
        return {}
    errors = {base: (each / total) ** 0.5 for base, each in difference.items()}
    return {base: error for base, error in errors.items() if math.isfinite(error)}  # else no base is made of it


def _quantised(rows: torch.Tensor, base: str) -> torch.Tensor:
    """What `steep.model.load` makes of rows, in fp32."""
    if base == "fp8":
        return fp8_reference(quantise_weight(rows))
    if base == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(rows.half())
        return functional.int8_vectorwise_dequant(codes, scales)
    codes, state = functional.quantize_4bit(rows.contiguous(), compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)
