"""GGUF files as base models: converted once to a 16-bit folder in the cache, which every library opens."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from steep.errors import UserError
from steep.storage import cache_folder, published
from steep.tensor_files import system_errors

logger = logging.getLogger("steep")


def converted_folder(file: Path) -> Path:
    """Where the conversion of `file` is or will be, by its contents."""
    status = file.stat()
    return cache_folder() / "models" / f"{file.stem}-{_digest(file, status.st_size, status.st_mtime_ns)}"


def check_readable(file: Path, field: str) -> None:
    """Refuse a file that transformers reads without a word as another model.

    Raises:
        UserError: it isn't GGUF, or it has what transformers' reader leaves out: scaled rotary frequencies (Llama 3.1
            and later; logits are then off by 84 %), Mistral's window, Qwen 3's head size, Gemma 2's soft caps.
    """
    header = _header(file, field)
    settings = header.settings
    reason = None
    if "rope_freqs.weight" in header.tensors:
        reason = "scales its rotary frequencies"
    elif header.architecture == "llama" and "attention.sliding_window" in settings:
        reason = "is a Mistral with a sliding window"
    elif header.architecture == "qwen3" and settings.get("attention.key_length", 128) != 128:
        reason = f"has heads of {settings['attention.key_length']:g}"
    elif header.architecture == "gemma2":
        caps = {"attn_logit_softcapping": 50, "final_logit_softcapping": 30}
        other = [name for name, value in caps.items() if settings.get(name, value) != value]
        reason = f"has {' and '.join(other)} of its own" if other else None
    if reason:
        raise UserError(
            field,
            f"{file} {reason}, which transformers does not read from GGUF",
            "Give the model's safetensors checkpoint.",
        )


def correct_special_tokens(tokenizer: Any, file: Path, field: str) -> None:
    """Give `tokenizer` the beginning and end tokens that `file` names: transformers 5.17 takes Llama's BOS for both."""
    for name, token in _header(file, field).special_tokens.items():
        setattr(tokenizer, name, token)


def convert(file: Path, tokenizer: Any) -> Path:
    """Write model and tokenizer of `file` into its `converted_folder` in bf16, unless they are there."""
    folder = converted_folder(file)
    if not folder.is_dir():
        logger.info("converting %s to 16 bit, once, into %s", file, folder)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        with published(folder, existing="keep") as staging, system_errors(folder):
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return folder


@dataclass(frozen=True)
class _Header:
    architecture: str
    settings: dict[str, float]
    tensors: frozenset[str]
    special_tokens: dict[str, str]


def _header(file: Path, field: str) -> _Header:
    status = file.stat()
    try:
        return _read_header(file, status.st_size, status.st_mtime_ns)
    except ImportError as error:
        raise UserError(field, "a .gguf file needs the package gguf", "pip install 'steep[gguf]'") from error
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(field, f"{file} is not a whole GGUF file: {error}", "Give a whole .gguf file.") from error


@cache  # the package reads in Python: seconds for a large vocabulary
def _read_header(file: Path, size: int, modified: int) -> _Header:
    from gguf import GGUFReader  # optional

    reader = GGUFReader(file)
    tokens, special = reader.fields.get("tokenizer.ggml.tokens"), {}
    for name in ("bos", "eos"):
        number = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
        if tokens is not None and number is not None:
            special[f"{name}_token"] = bytes(tokens.parts[tokens.data[int(number.parts[-1][0])]]).decode()
    named = reader.fields["general.architecture"]
    architecture = bytes(named.parts[named.data[0]]).decode()
    settings = {
        name.removeprefix(f"{architecture}."): float(field.parts[-1][0])
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.") and field.types and field.types[0] not in (8, 9)  # no text, no list
    }
    return _Header(architecture, settings, frozenset(tensor.name for tensor in reader.tensors), special)


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
