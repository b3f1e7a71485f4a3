"""Where LoRA's A and B begin, other than at PEFT's random A and zero B: LoftQ and PiSSA, each over the stock base.

Both put a best approximation of low rank into s·BA, s being the layer's scale. LoftQ (Li et al. 2023, one iteration)
takes that of the quantisation's error, W − Q(W): the model begins nearer to its 16-bit original. PiSSA (Meng et al.
2024) takes that of the weight itself, so that its principal directions train; the usual way puts the residual into the
base, which then is no stock base any more. Here the base stays, and a second, frozen adapter `START` subtracts what was
put in: W + s·BA − s·B0·A0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.overrides import TorchFunctionMode

from steep.errors import UserError
from steep.model.base_tensors import BaseTensors

ADAPTER, START = "default", "start"  # names of adapters in PEFT's sense


class NotInitialised(TorchFunctionMode):
    """New weights keep what was in their memory: torch draws those of each linear layer, and PEFT draws half of them
    once more, which takes seconds at a high rank.

    Args:
        dtype: that they are made in where none is asked for; PEFT's over quantised weights would be in fp32 at first.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._given = {} if dtype is None else {"dtype": dtype}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.kaiming_uniform_:
            return args[0] if args else kwargs["tensor"]
        if func is torch.empty and kwargs.get("dtype") is None:
            kwargs = {**kwargs, **self._given}
        return func(*args, **kwargs)


def best_factors(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [m, r] and A [r, n], fp32: their product is the best approximation of rank `r` of `matrix` [m, n] (Eckart &
    Young 1936), and they share the singular values evenly.

    From the eigenvectors of the smaller Gram matrix: the leading directions are as exact as an SVD's, in a fraction of
    its time.
    """
    matrix = matrix.float()
    rows, columns = matrix.shape
    if rows > columns:
        right, left = best_factors(matrix.T, r)
        return left.T.contiguous(), right.T.contiguous()
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    left = vectors[:, -r:].flip(1)
    right = left.T @ matrix
    root = right.norm(dim=1).sqrt()
    return left * root, right / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]


def start_from_quantisation_error(model: PeftModel) -> None:
    """LoftQ: s·BA = SVD_r(W − Q(W)), W read tensor by tensor from the checkpoint that the base was loaded from.

    Raises:
        UserError: the checkpoint lacks a layer's 16-bit weight.
    """
    base = model.get_base_model()
    tensors = BaseTensors(base.config.name_or_path, revision=getattr(base.config, "_commit_hash", None))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for name, layer in _layers(model):
        frozen = dequantize_module_weight(layer.get_base_layer())  # pyright: ignore[reportArgumentType]
        weight = tensors.get(f"{name}.weight")
        # A weight stored in e4m3 is floating point too, but without its scale it is not W, and with it it is Q(W).
        if (
            weight is None
            or weight.shape != frozen.shape
            or not weight.is_floating_point()
            or weight.element_size() == 1
        ):
            raise UserError(
                "adapter.init_lora_weights",
                f"loftq needs the 16-bit {name}.weight, and the model's checkpoint has none of that name and shape",
                "Give the model's 16-bit checkpoint as model.name, or leave it out.",
            )
        _put(layer, ADAPTER, weight.to(frozen.device, torch.float32) - frozen.float())


def start_from_principal_directions(model: PeftModel) -> None:
    """PiSSA: s·BA = SVD_r(Q(W)), and the same with the opposite sign in the frozen adapter `START`."""
    add_frozen_start(model)
    for _, layer in _layers(model):
        _put(layer, ADAPTER, dequantize_module_weight(layer.get_base_layer()))  # pyright: ignore[reportArgumentType]
        layer.lora_A[START].weight.data.copy_(layer.lora_A[ADAPTER].weight.data)
        layer.lora_B[START].weight.data.copy_(-layer.lora_B[ADAPTER].weight.data)


def add_frozen_start(model: PeftModel) -> None:
    """Give `model` the adapter `START`, active and frozen, of the shapes and dtypes of the one it has, at no effect."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    config = replace(config, modules_to_save=None, ensure_weight_tying=False)
    with NotInitialised():
        model.add_adapter(START, config, autocast_adapter_dtype=False)
    for _, layer in _layers(model):
        layer.lora_A[START].weight.data.zero_()
        layer.set_adapter([ADAPTER, START])
        for side in (layer.lora_A, layer.lora_B):
            side[START].to(side[ADAPTER].weight.dtype).requires_grad_(False)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def has_frozen_start(model: PeftModel) -> bool:
    return START in model.peft_config


def joined_config(config: LoraConfig) -> LoraConfig:
    """The config of an adapter [B, B1][A; A1] of twice the ranks, in which every layer keeps its scale."""
    joined = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2  # alpha / sqrt(2r) or alpha / 2r
    joined.r, joined.lora_alpha = 2 * config.r, config.lora_alpha * factor  # pyright: ignore[reportAttributeAccessIssue]
    joined.rank_pattern = {layer: 2 * r for layer, r in (config.rank_pattern or {}).items()}
    joined.alpha_pattern = {layer: alpha * factor for layer, alpha in (config.alpha_pattern or {}).items()}  # pyright: ignore[reportAttributeAccessIssue]
    joined.init_lora_weights = True
    return joined


def join(trained: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One adapter of twice the rank out of two, by PEFT's names: their effects add up."""
    return {
        name: torch.cat([tensor, start[name]], dim=_side(name)) if name in start else tensor
        for name, tensor in trained.items()
    }


def split(joined: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What `join` put together."""
    trained, start = {}, {}
    for name, tensor in joined.items():
        if ".lora_" in name:
            trained[name], start[name] = (part.contiguous() for part in tensor.chunk(2, dim=_side(name)))
        else:
            trained[name] = tensor
    return trained, start


def _side(name: str) -> int:
    """The dimension of a LoRA matrix that is its rank."""
    return 0 if ".lora_A." in name else 1


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name in the base model → layer, for each linear layer with an adapter."""
    base: nn.Module = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _put(layer: Any, adapter: str, matrix: torch.Tensor) -> None:
    """Let s·BA be the best approximation of `matrix`. Where it has no more directions, A stays random and B zero, as
    in plain LoRA: with both at zero neither would ever get a gradient."""
    b, a = best_factors(matrix, layer.r[adapter])
    root, there = layer.scaling[adapter] ** 0.5, a.norm(dim=1) > 0
    layer.lora_B[adapter].weight.data.copy_(b / root)
    own = layer.lora_A[adapter].weight.data
    own.copy_(torch.where(there[:, None], (a / root).to(own.dtype), own))
