"""How a base model is loaded as its run had it, as Python lines for a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from steep.export.markdown import python
from steep.model.fp8_published import COMPRESSED, FINE_GRAINED
from steep.model.rope import as_arguments

_TORCH = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
_BITSANDBYTES = {
    "nf4": """quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={},
)
""",
    "int8": "quantization = BitsAndBytesConfig(load_in_8bit=True)\n",
}
# Plain transformers computes with them by kernels of its own, where it has them: in 16 bits it does everywhere.
_DEQUANTISING = {
    FINE_GRAINED: ("FineGrainedFP8Config", "quantization = FineGrainedFP8Config(dequantize=True)\n", None),
    COMPRESSED: (
        "CompressedTensorsConfig",
        "quantization = CompressedTensorsConfig(run_compressed=False)  # needs the package compressed-tensors\n",
        "compressed-tensors",
    ),
}
LOFTQ_OVER_FP8 = (
    "The adapter holds the correction of what e4m3 lost of the weights (LoftQ), which the 16-bit original does not "
    "need: it belongs over the base in e4m3, as steep loads it."
)


class LoadingCode(NamedTuple):
    """What plain transformers loads a base with.

    Attributes:
        classes: of transformers, that the lines name.
        quantization: lines that make the base's quantisation, or none.
        settings: what `from_pretrained` gets.
        packages: what it takes beside transformers.
    """

    classes: list[str]
    quantization: str
    settings: str
    packages: list[str]


def loading_code(
    base: str, compute_dtype: str, stored_by: str | None, stretched: PretrainedConfig | None
) -> LoadingCode:
    """
    Args:
        base: ``nf4``, ``int8``, ``fp8``, ``bf16``, ``fp16`` or ``fp32``. An adapter that was trained over a 16-bit
            checkpoint in e4m3 opens over this checkpoint itself: it is close, and transformers has no such storage.
        compute_dtype: ``bf16``, ``fp16`` or ``fp32``.
        stored_by: the method by which the checkpoint itself is quantised, as its config names it, if it is.
        stretched: the config with the run's own scaling of positions, if it names one.
    """
    dtype = _TORCH[base if base in _TORCH else compute_dtype]
    name, lines, package = None, "", None
    if stored_by in _DEQUANTISING:
        name, lines, package = _DEQUANTISING[stored_by]
    elif base in _BITSANDBYTES:
        package = "bitsandbytes"
        if stored_by is None:  # else the checkpoint says it
            name, lines = "BitsAndBytesConfig", _BITSANDBYTES[base].format(dtype)
    settings = f"dtype={dtype}{', quantization_config=quantization' if lines else ''}"
    if stretched is not None:
        settings += f", {as_arguments(stretched)}"
    return LoadingCode([name] if name else [], lines, settings, [package] if package else [])


def is_loftq_over_fp8(base: str, stored_by: str | None, start: bool | str) -> bool:
    """Whether an adapter belongs over weights that plain transformers cannot make: a 16-bit checkpoint's in e4m3."""
    return base == "fp8" and stored_by is None and start == "loftq"


def loading_by_steep(
    name: str, base: str, compute_dtype: str, revision: str | None, rope_scaling: Mapping[str, Any] | None
) -> str:
    """The line that loads it as `base`."""
    further = f", revision={python(revision)}" if revision else ""
    further += f", rope_scaling={dict(rope_scaling)!r}" if rope_scaling else ""
    return (
        f"base, _ = steep.load({python(name)}, base={python(base)}, compute_dtype={python(compute_dtype)}{further})\n"
    )
