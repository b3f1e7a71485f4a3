"""Checkpoints in e4m3 as others publish them, written by hand from a folder in 16 or 32 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FINE_GRAINED: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
IGNORED = "model.layers.1.mlp.down_proj"


def compressed(strategy: str = "channel") -> dict[str, Any]:
    """What LLM Compressor writes for FP8_DYNAMIC."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "group_size": None}
    weights |= {"strategy": strategy, "block_structure": [128, 128] if strategy == "block" else None, "actorder": None}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", IGNORED],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def in_e4m3(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `weight`, as a publisher makes them: of each row [N, 1], block of 128 x 128, or all of it."""
    weight = weight.float()
    rows, columns = weight.shape
    if strategy == "tensor":
        scale = weight.abs().amax().reshape(1) / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    if strategy == "channel":
        scale = weight.abs().amax(1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    tiles = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    tiles[:rows, :columns] = weight
    tiles = tiles.view(tiles.shape[0] // 128, 128, tiles.shape[1] // 128, 128)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).view(-1, tiles.shape[2] * 128)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn), scale


def publish(folder: Path, out: Path, quantization: dict[str, Any], scale_dtype: torch.dtype = torch.float32) -> Path:
    """Write the model of `folder` into `out`, its linear layers in e4m3 but for the head and `IGNORED`."""
    shutil.copytree(folder, out)
    fine = quantization["quant_method"] == "fp8"
    strategy = "block" if quantization.get("weight_block_size") else "tensor"
    if not fine:
        strategy = quantization["config_groups"]["group_0"]["weights"]["strategy"]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or layer == IGNORED:
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        tensors[name], scale = in_e4m3(tensor, strategy)
        tensors[f"{layer}.weight_scale{'_inv' if fine else ''}"] = scale.to(scale_dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out
