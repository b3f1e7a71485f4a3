"""Whether the documents of a row see each other: nothing but positions that begin anew keeps them apart.

transformers builds its masks from such positions for most families. Some of its models take the argument and are told
nothing by it: those with a state or a convolution that runs along the row (Mamba, the linear attention of Qwen3.5,
LFM2), and those that make their mask without it (OPT, BLOOM, MPT, gpt-oss). Which these are depends on its version.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from steep.evaluation.logits import are_near
from steep.evaluation.mode import input_device
from steep.model.install import is_installed
from steep.model.unwrap import unwrap

_LENGTH = 8  # tokens of each document


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether a document's logits stay as they are when another one stands before it in its row.

    A fused model keeps them apart by what it computes. Of any other two rows of two short documents are computed, of
    which the first document differs. As shapes are the same, one that keeps them apart gives the same bits, or nearly
    (int8, experts), however deep it is. Alone a document may take other kernels, whose rounding some dozen layers in
    bf16 make larger than what is allowed here. To be called in `inference_mode`; no random number is drawn.
    """
    if is_installed(model):
        return True
    base: Any = unwrap(model)
    device = input_device(model)
    named = base.get_input_embeddings().named_parameters()
    rows = min(len(table) for name, table in named if name.endswith("weight"))  # the base has none of new tokens
    one, other, document = np.random.Generator(np.random.PCG64(0)).integers(0, rows, (3, _LENGTH))
    position_ids = torch.arange(_LENGTH, device=device).repeat(2)[None]

    def behind(before: np.ndarray) -> torch.Tensor:
        input_ids = torch.from_numpy(np.concatenate([before, document]))[None].to(device)
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[0, _LENGTH:]

    logits = behind(one)
    return are_near(behind(other), logits, _epsilon(base, logits))


def _epsilon(base: nn.Module, logits: torch.Tensor) -> float:
    """Of the coarsest dtype that computes. Weights of one byte count as bf16: int8's outliers are those of a batch."""
    dtypes = {logits.dtype, *(parameter.dtype for parameter in base.parameters())}
    wide = {dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16 for dtype in dtypes}
    return max(torch.finfo(dtype).eps for dtype in wide)
