"""PEFT adapters for continued pretraining: rank-stabilised LoRA on every linear layer, embeddings trained whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from steep.errors import UserError, did_you_mean
from steep.foreign import told_as_input
from steep.model.adapter_config import read_adapter_config
from steep.model.adapter_start import (
    ADAPTER,
    START,
    NotInitialised,
    add_frozen_start,
    has_frozen_start,
    join,
    joined_config,
    split,
    start_from_principal_directions,
    start_from_quantisation_error,
)
from steep.model.embeddings import is_tied
from steep.model.load import DTYPES
from steep.model.names import DEFAULT_RANK, EMBEDDINGS, LINEAR_LAYERS
from steep.model.original_module import copied_to_nowhere, offload_originals
from steep.model.unwrap import has_adapters
from steep.tensor_files import write_tensors

WEIGHTS = "adapter_model.safetensors"
_OTHER_LAYERS = "Leave out the layers that it names, or give another model."
_ANOTHER = "Use the model and adapter settings that it was written with."
logger = logging.getLogger("steep")


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full name → (outputs, inputs) of every linear layer of `model` but its head. Works on the meta device."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return {
        name: (module.out_features, module.in_features)  # pyright: ignore[reportReturnType]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def targeted(
    shapes: Mapping[str, tuple[int, int]], target_modules: Sequence[str] | str, field: str = "adapter.target_modules"
) -> dict[str, tuple[int, int]]:
    """The linear layers that `target_modules` names: last parts of names, or ``all-linear``.

    Raises:
        UserError: a name that no linear layer of the model bears.
    """
    if target_modules == "all-linear":
        return dict(shapes)
    known = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in shapes):
            remedy = f"{did_you_mean(target, known)} It has: {', '.join(known)}.".lstrip()
            raise UserError(field, f"the model has no linear layer {target!r}", remedy)
    return {
        name: shape
        for name, shape in shapes.items()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    }


def lowered_ranks(shapes: Mapping[str, tuple[int, int]], r: int) -> dict[str, int]:
    """Layers whose smaller side is below `r`, with that side: a larger rank would be parameters without effect."""
    return {name: min(shape) for name, shape in shapes.items() if min(shape) < r}


def check_rank(model: nn.Module, target_modules: Sequence[str] | str, r: int, field: str = "adapter.r") -> None:
    """Check that some layer can use the whole of `r`; the default is lowered for any model. Works on the meta device.

    Raises:
        UserError: it is above the smaller side of every layer.
    """
    largest = max((min(shape) for shape in targeted(linear_shapes(model), target_modules).values()), default=0)
    if r > largest and r != DEFAULT_RANK:
        problem = f"{r} is above the smaller side of every layer: none has a rank beyond {largest}"
        raise UserError(field, problem, f"Give {largest} or less.")


def rank_pattern(shapes: Mapping[str, tuple[int, int]], r: int) -> dict[str, int]:
    """PEFT's `rank_pattern` for `lowered_ranks`: ``k_proj: 192`` where all layers of a name agree, else full names."""
    ranks: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        ranks.setdefault(name.rsplit(".", 1)[-1], set()).add(min(*shape, r))
    pattern = {last: min(found) for last, found in ranks.items() if len(found) == 1 and min(found) < r}
    for name, rank in lowered_ranks(shapes, r).items():
        if name.rsplit(".", 1)[-1] not in pattern:
            pattern[name.replace(".", r"\.")] = rank  # PEFT reads keys as regular expressions
    return pattern


def check_embeddings(model: nn.Module, modules_to_save: Sequence[str], field: str = "adapter.modules_to_save") -> None:
    """Check that each module meant to be trained whole is an embedding, and exists.

    Raises:
        UserError: with the modules that could be meant.
    """
    ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name}
    for name in modules_to_save:
        if name not in EMBEDDINGS:
            raise UserError(field, f"{name!r} is not an embedding", f"Give some of {', '.join(EMBEDDINGS)}, or [].")
        if name not in ends:
            raise UserError(field, f"the model has no module {name!r}", "Give a Llama, Mistral, Qwen or Gemma model.")


def add_adapters(
    model: Any,
    *,
    r: int = DEFAULT_RANK,
    lora_alpha: float = 32,
    use_rslora: bool = True,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = LINEAR_LAYERS,
    modules_to_save: Sequence[str] = EMBEDDINGS,
    init_lora_weights: bool | str = True,
    use_dora: bool = False,
    trained_dtype: str = "fp32",
    resumed: bool = False,
    offloads: bool = False,
) -> PeftModel:
    """Put LoRA on the linear layers of `model` and make its embeddings trainable.

    Args:
        r: rank; a layer whose smaller side is below it gets that side as its rank (said once).
        use_rslora: scale ``lora_alpha / sqrt(rank of the layer)`` instead of ``/ rank`` (Kalajdzievski 2023).
        modules_to_save: modules trained whole; a tied head stays tied.
        init_lora_weights: True (B begins at zero), ``"pissa"`` or ``"loftq"``: see `steep.model.adapter_start`.
        use_dora: train each output row's length apart from its direction (Liu et al. 2024).
        trained_dtype: ``fp32`` or ``bf16``, of everything that trains.
        resumed: leave A at zero too, and out the work of `init_lora_weights`: a checkpoint will bring all values.

        offloads: call `offload_originals`, so early that no untied embedding is in memory twice meanwhile.

    Returns:
        A plain `peft.PeftModel`.

    Raises:
        UserError: r ≤ 0, a model that has adapters, an unknown target, one that PEFT refuses, a module that is not
            there, options that exclude each other.
    """
    if r <= 0:
        raise UserError("adapter.r", f"{r} is not a rank", "Give a number above 0, such as 256.")
    if trained_dtype not in ("fp32", "bf16"):
        raise UserError("model.trained_dtype", f"{trained_dtype!r} cannot be trained", "Give fp32 or bf16.")
    if has_adapters(model):
        problem = "it has adapters already"
        raise UserError("model", problem, "Give the model that they were put on, or use its own add_adapter.")
    check_start(init_lora_weights, use_dora, lora_dropout, over_int8=getattr(model, "is_loaded_in_8bit", False))
    shapes = targeted(linear_shapes(model), target_modules)
    check_embeddings(model, modules_to_save)
    lowered = lowered_ranks(shapes, r)
    if lowered and model.device.type != "meta":
        example, smallest = next(iter(lowered.items()))
        logger.info("r is lowered on %d of %d layers (%s: %d)", len(lowered), len(shapes), example, smallest)
    tied = is_tied(model)
    whole = [name for name in modules_to_save if not (tied and name == "lm_head" and "embed_tokens" in modules_to_save)]
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=whole or None,
        rank_pattern=rank_pattern(shapes, r),
        ensure_weight_tying=tied and bool(whole),
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    told = told_as_input("adapter.target_modules", f"PEFT refuses them on {type(model).__name__}", _OTHER_LAYERS)
    peft_model = _wrapped(model, config, trained_dtype, offloads, told)
    _begin(peft_model, resumed=resumed)
    if resumed and init_lora_weights == "pissa":
        add_frozen_start(peft_model)
    elif not resumed and init_lora_weights == "pissa":
        start_from_principal_directions(peft_model)
    elif not resumed and init_lora_weights == "loftq":
        start_from_quantisation_error(peft_model)
    return peft_model


def open_adapter(
    model: Any, folder: Path, *, trained_dtype: str = "fp32", field: str = "run folder", offloads: bool = False
) -> PeftModel:
    """Put the adapter that is saved in `folder` on `model`, as its own config says, in `trained_dtype`.

    Args:
        offloads: as in `add_adapters`.

    Raises:
        UserError: its config is not one that steep knows, or the folder's tensors are not what it says, or do not fit
            the model.
    """
    config = read_adapter_config(folder, field)
    config.inference_mode = False
    told = told_as_input(field, f"the adapter_config.json of {folder} does not fit the model", _ANOTHER)
    peft_model = _wrapped(model, config, trained_dtype, offloads, told)
    load_adapter_weights(peft_model, folder, field)
    return peft_model


def _wrapped(
    model: Any, config: LoraConfig, trained_dtype: str, offloads: bool, told: AbstractContextManager[None]
) -> PeftModel:
    """`model` with adapters whose A is still to come, but for DoRA's: from A times a B of zeros it takes lengths.

    Args:
        told: says what PEFT refuses, as in `steep.foreign`.
    """
    dtype = DTYPES[trained_dtype]
    with (
        nullcontext() if config.use_dora else NotInitialised(dtype),
        copied_to_nowhere(model, config.modules_to_save or ()) if offloads else nullcontext() as share,
    ):
        with told:
            peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
        if share is not None:
            share(peft_model)
    if offloads:
        offload_originals(peft_model)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft_model


def _begin(model: PeftModel, *, resumed: bool) -> None:
    """Give every adapter PEFT's own beginning: B is zero by now; A is drawn on the CPU, so that a seed is the same on
    each card. Where a checkpoint will bring it, it is zero: a NaN in its memory would be one times a B of zeros too."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            a: Any = module.lora_A[ADAPTER].weight
            if resumed:
                a.data.zero_()
            elif not a.is_meta:
                drawn = torch.empty(a.shape, dtype=torch.float32, device="cpu")
                a.data.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))


def check_start(init_lora_weights: bool | str, use_dora: bool, lora_dropout: float, *, over_int8: bool) -> None:
    """Check that LoRA's beginning is one that steep has, and that the options go together.

    Args:
        over_int8: whether the base's weights are in 8 bits.

    Raises:
        UserError: another of PEFT's, or one that excludes DoRA or dropout; DoRA over 8 bits.
    """
    field = "adapter.init_lora_weights"
    if init_lora_weights not in (True, "pissa", "loftq"):
        remedy = "Give true, pissa or loftq."
        if "pissa" in str(init_lora_weights).lower():
            remedy = "Give pissa, which here works over a 4-bit base too and is as exact as an SVD."
        raise UserError(field, f"steep does not have {init_lora_weights!r}", remedy)
    if use_dora and over_int8:
        raise UserError(
            "adapter.use_dora",
            "DoRA reads the weights themselves, and bitsandbytes moves those in 8 bits to where PEFT misses them",
            "Give model.base: nf4 or bf16, or leave use_dora out.",
        )
    if use_dora and init_lora_weights is not True:
        raise UserError(
            "adapter.use_dora",
            f"DoRA's lengths are those of the stock weights, and {init_lora_weights} begins elsewhere",
            "Give one of the two.",
        )
    if lora_dropout and init_lora_weights == "pissa":
        raise UserError(
            "adapter.lora_dropout",
            "PiSSA takes back what it put in, and dropout would drop other parts of the two",
            "Set lora_dropout: 0, or leave init_lora_weights out.",
        )


def save_adapter(model: PeftModel, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the trained adapter in PEFT's format, each matrix once; it opens on the stock base.

    With PiSSA it is one adapter of twice the rank, [B, −B0][A; A0]; `load_adapter_weights` takes it apart again.
    """
    # "auto" would look the base model up on the hub and write the trained embeddings a second time.
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER], state_dict=state_dict, save_embedding_layers=False)
    if has_frozen_start(model):
        start = get_peft_model_state_dict(model, state_dict, adapter_name=START, save_embedding_layers=False)
        file = folder / WEIGHTS
        write_tensors(join(load_file(file), {name: t.cpu() for name, t in start.items()}), file, {"format": "pt"})
        config = read_adapter_config(folder, "run folder")
        joined_config(config).save_pretrained(str(folder))


def all_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, by reference: a `state_dict` that packs no 4-bit weight."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What `save_adapter` writes into `WEIGHTS`, by reference, until `joined` puts a frozen start to it."""
    tensors = all_tensors(model)
    own = get_peft_model_state_dict(model, tensors, adapter_name=ADAPTER, save_embedding_layers=False)
    if has_frozen_start(model):
        start = get_peft_model_state_dict(model, tensors, adapter_name=START, save_embedding_layers=False)
        own |= {f"{START}:{name}": tensor for name, tensor in start.items()}
    return own


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`adapter_tensors` under the names, and with the ranks, that they have in the file."""
    mark = f"{START}:"
    start = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
    return join({name: tensor for name, tensor in tensors.items() if not name.startswith(mark)}, start)


def load_adapter_weights(model: PeftModel, folder: Path, field: str) -> None:
    """Put the adapter that is saved in `folder` into the one that `model` has, in the dtypes that it has.

    `PeftModel.load_adapter` may change dtypes on its way (bf16 adapters to fp32, fp32 embeddings to the base's).

    Raises:
        UserError: the folder's tensors are not those of the model's adapter.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(
            field, f"{folder} holds no adapter (adapter_model.safetensors)", "Give a folder that a run wrote."
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(field, f"{file} is damaged: {error}", "Put it back, or train again.") from error
    start: dict[str, Any] = {}
    if has_frozen_start(model):
        tensors, start = split(tensors)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Checked before anything is written: PEFT would load an embedding that this adapter does not train into the base.
    for names, others, what in ((own, tensors, "lacks"), (tensors, own, "has an unknown tensor")):
        if odd := [name for name in names if name not in others]:
            raise UserError(field, f"{file} {what} {odd[0]}", _ANOTHER)
    try:
        set_peft_model_state_dict(model, tensors)
        if start:
            set_peft_model_state_dict(model, start, adapter_name=START)
    except RuntimeError as error:
        raise UserError(field, f"{file} does not fit: {str(error).splitlines()[-1].strip()}", _ANOTHER) from error
