"""llama.cpp's own tokenizer and logits, for the tests: one thread, keys and values kept in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llama_cpp import Llama

_F32 = 0  # ggml's number of the type


@contextmanager
def opened(file: Path, vocab_only: bool = False, context: int = 256) -> Iterator[Llama]:
    from llama_cpp import Llama  # not everywhere: tests that come here are marked `llama_cpp`

    model = Llama(
        str(file),
        vocab_only=vocab_only,
        n_ctx=context,
        logits_all=not vocab_only,
        n_threads=1,
        n_threads_batch=1,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def logits(file: Path, ids: list[int]) -> torch.Tensor:
    """fp32 [T, V]."""
    with opened(file) as model:
        model.eval(ids)
        return torch.from_numpy(model.scores[: len(ids)].copy())


def token_ids(file: Path, texts: list[str], vocab_only: bool = False) -> list[list[int]]:
    """With BOS and EOS as the file says, and special tokens found in the text, as transformers does."""
    with opened(file, vocab_only) as model:
        return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def relative_error(values: torch.Tensor | NDArray[np.float32], reference: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    difference = torch.as_tensor(values) - reference
    return float(difference.square().mean().sqrt() / reference.square().mean().sqrt())
