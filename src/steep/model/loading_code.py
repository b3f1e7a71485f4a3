"""How a base model is loaded as its run had it, as Python lines for a README."""

from __future__ import annotations

_TORCH = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
_QUANTIZATION = {
    "nf4": """quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={},
)
""",
    "int8": "quantization = BitsAndBytesConfig(load_in_8bit=True)\n",
}


def loading_code(base: str, compute_dtype: str, stored_quantised: bool) -> tuple[str, str]:
    """Lines that make the base's quantisation, or none, and what `from_pretrained` gets.

    Args:
        base: ``nf4``, ``int8``, ``fp8``, ``bf16``, ``fp16`` or ``fp32``. What was trained over e4m3 made here is
            opened over the 16-bit original, which it is close to; transformers has no such storage.
        compute_dtype: ``bf16``, ``fp16`` or ``fp32``.
        stored_quantised: whether the checkpoint itself says how it is quantised.
    """
    dtype = _TORCH[base if base in _TORCH else compute_dtype]
    quantization = "" if base not in _QUANTIZATION or stored_quantised else _QUANTIZATION[base].format(dtype)
    return quantization, f"dtype={dtype}{', quantization_config=quantization' if quantization else ''}"
