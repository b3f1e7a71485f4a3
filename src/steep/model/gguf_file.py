"""What a GGUF file says of its model, before a tensor is read: its keys, and the names of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from steep.errors import UserError


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a file.

    Attributes:
        architecture: llama.cpp's name of the model's graph, such as "llama".
        settings: the model's hyperparameters by key, without the architecture in front: "rope.freq_base".
        tokenizer: what the file holds of its tokenizer, by key without "tokenizer.ggml." in front.
        chat_template: the tokenizer's, if it has one.
        tensors: names.
    """

    path: Path
    architecture: str
    settings: dict[str, Any]
    tokenizer: dict[str, Any]
    chat_template: str | None
    tensors: frozenset[str]


def read_gguf(path: Path, field: str) -> GgufFile:
    """Read the metadata of `path`; once, until the file changes: the package reads in Python, seconds for a large
    vocabulary.

    Raises:
        UserError: it is not a whole GGUF file, or the package gguf is missing.
    """
    status = path.stat()
    try:
        return _read(path, status.st_size, status.st_mtime_ns)
    except ImportError as error:
        raise UserError(field, "a .gguf file needs the package gguf", "pip install 'steep[gguf]'") from error
    except (ValueError, OSError, IndexError, KeyError, TypeError) as error:
        raise UserError(field, f"{path} is not a whole GGUF file: {error}", "Give a whole .gguf file.") from error


@cache
def _read(path: Path, size: int, modified: int) -> GgufFile:
    from gguf import GGUFReader  # optional

    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    if (parts := keys.get("split.count", 1)) > 1:
        raise ValueError(f"it is one of {parts} parts, which llama-gguf-split --merge joins")
    architecture = keys["general.architecture"]

    def below(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in keys.items() if name.startswith(prefix)}

    return GgufFile(
        path,
        architecture,
        below(f"{architecture}."),
        below("tokenizer.ggml."),
        keys.get("tokenizer.chat_template"),
        frozenset(tensor.name for tensor in reader.tensors),
    )
