"""Loading a base into e4m3: each linear layer is quantised as it is read, or taken as a checkpoint stores it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from steep.model.base_tensors import BaseTensors
from steep.model.fp8_linear import Fp8Linear, stack_groups
from steep.model.fp8_published import STORED_E4M3, is_published_fp8, is_scale, read_published
from steep.model.loading_progress import Progress, told_of
from steep.model.quantisable import plain_config, quantisable
from steep.model.resolve import ResolvedModel
from steep.model.stored_weights import refuse_not_finite
from steep.ops.fp8 import E4M3, Fp8Weight, quantise_weight

_AT_ONCE = 4  # layers that are read and go to a card at the same time
_PIECE = 2**23  # weights of one that are
# The name of the quantisation, as `save_pretrained` has it in its error.
_METHOD = (
    "e4m3 as nobody reads it but steep (save the adapter alone, or merge it into the 16-bit original: steep export RUN)"
)
_KINDS = {torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them


def load_fp8(
    resolved: ResolvedModel,
    empty: Any,
    *,
    compute_dtype: torch.dtype,
    attention: dict[str, str],
    device: torch.device,
    progress: Progress | None = None,
) -> Any:
    """The model of `resolved`, its linear layers but the head as `Fp8Linear`, all else in `compute_dtype`, on `device`.

    transformers loads what is not quantised, and is given a number in the place of each weight that is: which never is
    there in 16 bits, but for the few layers that are being read.

    Args:
        empty: the model on the meta device, which `check_stored` has held against the checkpoint.
        attention: of `steep.model.attention.attention`.
        progress: called with the linear layers loaded so far, and how many there are.

    Raises:
        UserError: a weight to be quantised is not finite, or see `read_published`.
    """
    tensors = BaseTensors(resolved.name, revision=resolved.arguments.get("revision"))
    published = is_published_fp8(resolved.quantization)
    linear = quantisable(empty)
    layers = [name for name in linear if _is_there(tensors, f"{name}.weight", only_e4m3=published)]
    replaced = {f"{name}.weight" for name in layers}
    number = torch.zeros((), dtype=compute_dtype)
    state = {
        name: number.expand(tensors.shape(name)) if name in replaced else tensors[name]
        for name in tensors
        if not is_scale(name, replaced)
    }

    def put_into(dtype: torch.dtype) -> Any:
        config = plain_config(resolved.config)
        return type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **attention)

    model = put_into(compute_dtype)
    _take_settings(model, resolved)
    # What the checkpoint has under another name, or in pieces, transformers has put together: once more in fp32, which
    # holds all that is stored, where the model's dtype does not.
    put_together = [] if published else [name for name in linear if name not in set(layers)]
    holds_all = compute_dtype == torch.float32 or {tensors.kind(name) for name in tensors} == {_KINDS[compute_dtype]}
    whole = model if holds_all or not put_together else put_into(torch.float32)

    def stored(name: str) -> Fp8Weight:
        if name not in put_together:
            if published:
                return read_published(tensors, resolved.quantization or {}, name, device)
            weight, place = tensors[f"{name}.weight"], tensors.file(f"{name}.weight")
        else:
            weight, place = whole.get_submodule(name).weight.detach(), resolved.name
        quantised = quantised_in_pieces(weight, device)
        if not bool(quantised.scale.isfinite().all()):  # that of a row is not where a weight in it is not
            refuse_not_finite(weight.float(), f"{name}.weight", place)
        return quantised

    # torch's own threads are all that a CPU has.
    with torch.no_grad(), ThreadPoolExecutor(_AT_ONCE if device.type == "cuda" else 1) as pool:
        names = layers + put_together
        of_all = zip(names, pool.map(stored, names), strict=True)
        for name, weight in of_all if progress is None else told_of(of_all, len(names), progress):
            bias = model.get_submodule(name).bias
            bias = None if bias is None else bias.detach().to(device, copy=True)
            model.set_submodule(name, Fp8Linear(weight, bias, compute_dtype).eval())
    model.to(device)
    stack_groups(model)
    model.hf_quantizer = _NotSaved(QuantizationConfigMixin(_METHOD), pre_quantized=False)  # pyright: ignore[reportArgumentType]
    return model


def quantised_in_pieces(weight: torch.Tensor, device: torch.device) -> Fp8Weight:
    """`quantise_weight` on `device` of what lies elsewhere: some rows at a time are there in full, and in fp32."""
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=E4M3, device=device)
    scale = torch.empty(outputs, dtype=torch.float32, device=device)
    step = max(1, _PIECE // inputs)
    for start in range(0, outputs, step):
        piece = quantise_weight(weight[start : start + step].to(device))
        codes[start : start + step], scale[start : start + step] = piece.codes, piece.scale
    return Fp8Weight(codes, scale)


class _NotSaved(HfQuantizer):
    """Lets `save_pretrained` refuse the base by itself: whoever opened it would read codes as weights."""

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _is_there(tensors: BaseTensors, name: str, *, only_e4m3: bool) -> bool:
    return name in tensors and (not only_e4m3 or tensors.kind(name) == STORED_E4M3)


def _take_settings(model: Any, resolved: ResolvedModel) -> None:
    """What `from_pretrained` takes from a folder beside weights, and knows none of without its name."""
    model.config.name_or_path = model.name_or_path = resolved.name  # PEFT writes it into adapters
    arguments = {
        name: resolved.arguments[name] for name in ("revision", "local_files_only") if name in resolved.arguments
    }
    with suppress(OSError):  # there is none: the config makes one
        model.generation_config = GenerationConfig.from_pretrained(resolved.name, **arguments)
