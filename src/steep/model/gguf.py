"""GGUF files as base models: converted once to a 16-bit folder in the cache, which adapters name and every library
opens."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from steep.errors import UserError
from steep.storage import cache_folder, published

logger = logging.getLogger("steep")


def converted_folder(file: Path) -> Path:
    """Where the conversion of `file` is or will be, by its contents."""
    status = file.stat()
    return cache_folder() / "models" / f"{file.stem}-{_digest(file, status.st_size, status.st_mtime_ns)}"


def check_readable(file: Path, field: str) -> None:
    """Refuse a file that transformers reads without a word as another model.

    Raises:
        UserError: it isn't GGUF, or it has scaled rotary frequencies (Llama 3.1 and later), which transformers' reader
            leaves out: its logits are then off by 84 %.
    """
    from gguf import GGUFReader

    try:
        tensors = {tensor.name for tensor in GGUFReader(file).tensors}
    except (ValueError, OSError, IndexError) as error:
        raise UserError(field, f"{file} is not a GGUF file: {error}", "Give a whole .gguf file.") from error
    if "rope_freqs.weight" in tensors:
        raise UserError(
            field,
            f"{file} scales its rotary frequencies, which transformers does not read from GGUF",
            "Give the model's safetensors checkpoint.",
        )


def convert(file: Path, tokenizer: Any) -> Path:
    """Write model and tokenizer of `file` into its `converted_folder` in bf16, unless they are there."""
    folder = converted_folder(file)
    if not folder.is_dir():
        logger.info("converting %s to 16 bit, once, into %s", file, folder)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        with published(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return folder


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
