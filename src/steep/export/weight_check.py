"""Whether a merged folder holds the weights that were trained: each is read back, and worked out anew.

Loss and logits see a fault as large as it is: half of one layer's adapter can move the logits of the whole model by
less than products in bf16 do. A weight hides nothing. What it should be comes from PEFT's model of the adapter (its
scale, its reading of the names, the base's own quantised layer), and from nothing that wrote the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper

from steep.export.base_weights import Kind
from steep.model.adapter_start import ADAPTER
from steep.model.base_tensors import BaseTensors
from steep.model.embeddings import is_tied
from steep.model.fp8_linear import Fp8Linear

ERROR_LIMIT = 1.0001
"""RMS error of a written weight, over that of the exact one rounded once. A sum in another order makes 1 + 2e-7; half
of an adapter that is 2e-4 of its weight makes 1.0017 (docs/decisions.md)."""


def wrong_weight(folder: Path, model: Any, base: Mapping[str, torch.Tensor], kind: Kind) -> str | None:
    """What in `folder` is not the trained model rounded once, in words; None if all of it is. One weight is in memory.

    Args:
        model: the adapter over the base of the run, a `peft.PeftModel`.
        base: the checkpoint's tensors.
        kind: what the folder was merged into.
    """
    written, opened = BaseTensors(str(folder), field="--output"), model.get_base_model()
    head = next(f"{name}.weight" for name, module in opened.named_modules() if module is opened.get_output_embeddings())
    if (head in written) is is_tied(opened):
        return f"{head} is {'a weight of its own, and the trained one is tied' if head in written else 'missing'}"
    for name in written:
        exact, tensor = _exact(opened, name, base, kind), written[name]
        if exact.shape != tensor.shape:
            return f"{name} is {tuple(tensor.shape)}, and the trained one {tuple(exact.shape)}"
        error = _error(tensor.to(exact.device), exact)
        if not error <= ERROR_LIMIT:
            return f"{name} is {error:.4g} roundings from the trained one (RMS), and {ERROR_LIMIT} is allowed"
    return None


def _exact(opened: Any, name: str, base: Mapping[str, torch.Tensor], kind: Kind) -> torch.Tensor:
    """The weight that the opened model computes with, but for LoRA's sum before any rounding."""
    place, _, part = name.rpartition(".")
    module = opened.get_submodule(place)
    if isinstance(module, ModulesToSaveWrapper):
        trained: Any = module.modules_to_save[ADAPTER]
        return trained.get_parameter(part).detach()
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    weight = layer.get_parameter(part)
    if kind == "dequantised" and isinstance(layer, Fp8Linear) and part == "weight":
        stored = layer.dequantize()
    elif kind == "dequantised" and isinstance(weight, (Params4bit, Int8Params)):
        stored = dequantize_module_weight(layer)
    else:  # a head of its own over a tied base is in no checkpoint
        stored = base[name] if name in base else weight.detach()
    if not isinstance(module, LoraLayer) or part != "weight":
        return stored
    layers: Any = module  # its parts are in dictionaries of modules
    a, b = (half[ADAPTER].weight.detach().float() for half in (layers.lora_A, layers.lora_B))
    merged = torch.addmm(stored.to(a.device).float(), b, a, alpha=layers.scaling[ADAPTER])
    if ADAPTER in layers.lora_magnitude_vector:
        magnitude = layers.lora_magnitude_vector[ADAPTER].weight.detach().float()
        merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


def _error(written: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of `written` − `exact` over that of `exact` rounded to its dtype; 1 where the two are the same to the bit."""
    rounded = exact.to(written.dtype)
    if torch.equal(written, rounded):
        return 1.0
    exact = exact.float()
    error, rounding = ((values.float() - exact).norm().item() for values in (written, rounded))
    return error / rounding if rounding else float("inf")
