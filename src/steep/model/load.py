"""Loading a base model: frozen weights in 4, 8, 16 or 32 bit, on the GPU where there is one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steep.errors import UserError
from steep.model.attention import attention, attention_refused
from steep.model.empty import empty_model
from steep.model.fp8_loading import load_fp8
from steep.model.fp8_published import is_published_fp8
from steep.model.gguf import convert
from steep.model.loading_progress import Progress, tensors_told
from steep.model.machine import Card, card_here
from steep.model.quantisable import check_quantisable
from steep.model.resolve import ResolvedModel, read_tokenizer, resolve
from steep.model.safety import check_weights_in_safetensors
from steep.model.stored_weights import check_finite, check_stored

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTISED = ("nf4", "int8", "fp8")
BASES = (*QUANTISED, *DTYPES)


def resolve_compute_dtype(compute_dtype: str, base: str, card: Card | None, field: str = "model.compute_dtype") -> str:
    """`auto` in terms of the card, or of none: bf16 on one that has it, fp16 on one that has not; on a CPU fp32, or
    bf16 over a base in bf16.

    Raises:
        UserError: fp16 without a GPU, or fp32 over a base in 16 bit.
    """
    if compute_dtype == "fp16" and card is None:
        raise UserError(field, "fp16 needs a GPU, for its loss scaling", "Give fp32 or bf16.")
    if compute_dtype == "fp32" and base in ("bf16", "fp16"):
        raise UserError(
            field,
            f"fp32 products cannot be had from weights in {base}",
            f"Leave it at auto, or set model.base: {compute_dtype}.",
        )
    if compute_dtype != "auto":
        return compute_dtype
    if card is None:
        return "bf16" if base in ("bf16", "fp16") else "fp32"
    return "bf16" if card.has_bf16 else "fp16"


def resolve_base(base: str, model: ResolvedModel, field: str = "model.base") -> str:
    """`auto` in terms of the checkpoint: what it is stored in if that is quantised, else nf4.

    Raises:
        UserError: a quantised checkpoint is asked to be something else.
    """
    stored = model.quantization
    if stored is None:
        return "nf4" if base == "auto" else base
    kind = "fp8" if is_published_fp8(stored) else "int8" if stored.get("load_in_8bit") else "nf4"
    if base not in ("auto", kind):
        raise UserError(field, f"{base} was asked for but the checkpoint is stored as {kind}", "Leave it at auto.")
    return kind


def load(
    name: str,
    *,
    base: str = "auto",
    compute_dtype: str = "auto",
    attn_implementation: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model with frozen weights, and its tokenizer.

    Args:
        name: hub name, folder, or ``.gguf`` file (converted once into the cache, in 16 bit).
        base: what the linear layers' weights are kept in: ``auto | nf4 | int8 | fp8 | bf16 | fp16 | fp32``. ``nf4`` is
            4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023), ``fp8`` is e4m3 with a scale a
            row (or as a checkpoint is published in it). ``auto`` is what a quantised checkpoint is stored in, else
            ``nf4``: no step is planned here, by which `steep train` may choose ``fp8``.
        compute_dtype: ``auto | bf16 | fp16 | fp32``: what products run in, and what is not quantised is kept in.
        rope_scaling: of its positions, in place of its own, such as ``{"rope_type": "yarn", "factor": 4.0}``.

    Returns:
        The transformers model, every parameter frozen, and the tokenizer.

    Raises:
        UserError: an unknown `base` or `compute_dtype`, or a weight to be quantised that is not finite; and see
            `steep.model.resolve.resolve`.
    """
    for field, given, known in (("base", base, BASES), ("compute_dtype", compute_dtype, DTYPES)):
        if given not in ("auto", *known):
            raise UserError(f"model.{field}", f"{given!r} is unknown", f"Give one of auto, {', '.join(known)}.")
    resolved = resolve(name, revision=revision, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling)
    tokenizer = read_tokenizer(resolved)
    model = load_resolved(
        resolved, tokenizer, base=base, compute_dtype=compute_dtype, attn_implementation=attn_implementation
    )
    return model, tokenizer


def load_resolved(
    resolved: ResolvedModel,
    tokenizer: Any,
    *,
    base: str,
    compute_dtype: str,
    attn_implementation: str,
    checked: bool = False,
    progress: Progress | None = None,
) -> Any:
    """`load` for a model and a tokenizer that were found already.

    One tensor at a time is on its way: it is read from the file's map, goes to the GPU, and is quantised there. So the
    host holds a tensor, whatever the model's size, and the GPU one in 16 bits beside what is loaded.

    Args:
        checked: `check_finite` has read the checkpoint.
        progress: called with the tensors loaded so far, and how many there are.
    """
    resolved = as_folder(resolved, tokenizer)
    check_weights_in_safetensors(resolved)
    base = resolve_base(base, resolved)
    compute = DTYPES[resolve_compute_dtype(compute_dtype, base, card_here())]
    if base == "fp8":
        model = _load_fp8(resolved, compute, attn_implementation, progress)
    else:
        model = _load(resolved, base, compute, attn_implementation, checked, progress)
    model.requires_grad_(False)
    model.config.use_cache = False  # packed documents would see each other through a cache
    return model


def _load_fp8(
    resolved: ResolvedModel, compute: torch.dtype, attn_implementation: str, progress: Progress | None
) -> Any:
    empty = empty_model(resolved, attn_implementation)
    check_quantisable(empty, "fp8")
    check_stored(resolved, empty)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with attention_refused(attn_implementation):
        chosen = attention(attn_implementation, resolved.config)
        return load_fp8(resolved, empty, compute_dtype=compute, attention=chosen, device=device, progress=progress)


def _load(
    resolved: ResolvedModel,
    base: str,
    compute: torch.dtype,
    attn_implementation: str,
    checked: bool,
    progress: Progress | None,
) -> Any:
    arguments = {
        **resolved.arguments,
        **attention(attn_implementation, resolved.config),
        "dtype": DTYPES.get(base, compute),
        "use_safetensors": True,
    }
    if resolved.rope_scaling is not None:
        arguments["config"] = copy.deepcopy(resolved.config)
    if "local_files_only" in arguments:
        arguments["adapter_kwargs"] = {"local_files_only": True}  # its look for an adapter heeds only these
    if base in ("nf4", "int8") and resolved.quantization is None:
        arguments["quantization_config"] = _quantization(base, compute)
    if torch.cuda.is_available():
        arguments["device_map"] = {"": torch.cuda.current_device()}
    empty = empty_model(resolved, attn_implementation)
    check_4bit_rows(empty, base)
    check_stored(resolved, empty)
    if base in ("nf4", "int8") and not checked:  # bitsandbytes would make numbers of a NaN; load_fp8 looks as it reads
        check_finite(resolved)
    with attention_refused(attn_implementation), tensors_told(progress):
        model = AutoModelForCausalLM.from_pretrained(resolved.name, **arguments)
    if resolved.quantization is not None:
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = compute  # pyright: ignore[reportArgumentType]
    keep_4bit_layout(model)
    return model


def check_4bit_rows(empty: torch.nn.Module, base: str) -> None:
    """Refuse 4-bit rows that bitsandbytes' CPU kernel (0.50) reads wrong: from the second row on it takes another
    block's scale where a row ends inside a block.

    Raises:
        UserError: there are such rows, and no GPU.
    """
    if base != "nf4" or torch.cuda.is_available():
        return
    for name, module in empty.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 64 and not name.endswith("lm_head"):
            raise UserError(
                "model.base",
                f"bitsandbytes reads nf4 wrong on a CPU where rows are no multiple of 64, and those of {name} have "
                f"{module.in_features} elements",
                "Set model.base: fp32, or train on a GPU.",
            )


def as_folder(resolved: ResolvedModel, tokenizer: Any) -> ResolvedModel:
    """`resolved` itself, or what stands for a GGUF file: the folder that it is converted into, once."""
    if "gguf_file" not in resolved.arguments:
        return resolved
    folder = convert(Path(resolved.name) / resolved.arguments["gguf_file"], tokenizer)
    return resolve(str(folder), rope_scaling=resolved.rope_scaling)


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place.

    On a CPU with AVX512-BF16 its first forward in eval mode turns the weights into an inference layout that training
    can no longer read. Said to each layer of this model; nothing is changed for others.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def _quantization(base: str, compute: torch.dtype) -> BitsAndBytesConfig:
    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
