"""GGUF files as base models: converted once to a 16-bit folder in the cache, which every library opens."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from steep.model.gguf_fidelity import REMEDY, check_tensors
from steep.model.gguf_file import read_gguf
from steep.model.missing_weights import refuse_missing
from steep.storage import cache_folder, published
from steep.tensor_files import system_errors

logger = logging.getLogger("steep")

_VERSION = 2
"""Counts up when files are converted otherwise, so that no older conversion stands for one: in 1 some were wrong."""


def converted_folder(file: Path) -> Path:
    """Where the conversion of `file` is or will be, by its contents."""
    status = file.stat()
    digest = _digest(file, status.st_size, status.st_mtime_ns)
    return cache_folder() / "models" / f"{file.stem}-{digest}-v{_VERSION}"


def convert(file: Path, tokenizer: Any, field: str = "model.name") -> Path:
    """Write model and tokenizer of `file` into its `converted_folder` in bf16, unless they are there.

    Raises:
        UserError: the model lacks tensors that are in the file, or has some that are not.
    """
    folder = converted_folder(file)
    if not folder.is_dir():
        logger.info("converting %s to 16 bit, once, into %s", file, folder)
        model, found = cast(
            tuple[Any, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            ),
        )
        check_tensors(read_gguf(file, field), model.state_dict(), model.config, field)
        refuse_missing(found["missing_keys"], f"{file}, as transformers reads it,", field, REMEDY)
        with published(folder, existing="keep") as staging, system_errors(folder):
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return folder


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
