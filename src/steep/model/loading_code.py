"""How a base model is loaded as its run had it, as Python lines for a README."""

from __future__ import annotations

from steep.model.fp8_published import COMPRESSED, FINE_GRAINED

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
# Plain transformers computes with them by kernels of its own, where it has them: in 16 bits it does everywhere.
_DEQUANTISING = {
    FINE_GRAINED: """from transformers import FineGrainedFP8Config

quantization = FineGrainedFP8Config(dequantize=True)
""",
    COMPRESSED: """from transformers import CompressedTensorsConfig

quantization = CompressedTensorsConfig(run_compressed=False)  # needs the package compressed-tensors
""",
}


def loading_code(base: str, compute_dtype: str, stored_by: str | None) -> tuple[str, str]:
    """Lines that make the base's quantisation, or none, and what `from_pretrained` gets.

    Args:
        base: ``nf4``, ``int8``, ``fp8``, ``bf16``, ``fp16`` or ``fp32``. An adapter that was trained over a 16-bit
            checkpoint in e4m3 opens over this checkpoint itself: it is close, and transformers has no such storage.
        compute_dtype: ``bf16``, ``fp16`` or ``fp32``.
        stored_by: the method by which the checkpoint itself is quantised, as its config names it, if it is.
    """
    dtype = _TORCH[base if base in _TORCH else compute_dtype]
    if stored_by is not None:
        quantization = _DEQUANTISING.get(stored_by, "")
    else:
        quantization = _QUANTIZATION.get(base, "").format(dtype)
    return quantization, f"dtype={dtype}{', quantization_config=quantization' if quantization else ''}"
