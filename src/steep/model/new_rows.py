"""The rows that new tokens begin with, in a small file of a run and of its checkpoints: the base's files lack them.

They are the frozen original of what trains, as much as the rows of the base's files are, and so they are read again and
never made again: sums come out in other bits on another device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from steep.errors import UserError
from steep.model.checksum import checksum
from steep.model.unwrap import unwrap

NEW_ROWS = "new_tokens.safetensors"
_IDS, _CHECKSUM = "ids", "checksum"
_REMEDY = (
    "Put it back: tokenizer/ of the run and each of its checkpoints have the same one. An older steep wrote none: open "
    "its run with that version, or train again."
)


@dataclass(frozen=True)
class NewRows:
    """Rows that the base's files lack, as they were before training.

    Attributes:
        ids: which rows of the embeddings they are: int64 [n], rising.
        tables: [n, H] in the dtype of the embedding, on the CPU, by its name: `embed_tokens`, and `lm_head` where that
            is a matrix of its own.
    """

    ids: torch.Tensor
    tables: dict[str, torch.Tensor]

    def to_bytes(self) -> bytes:
        """The content of the file, the same each time: safetensors, with a checksum of what it holds."""
        tensors = {_IDS: self.ids, **self.tables}
        return save(tensors, {_CHECKSUM: _checksum_of(tensors)})


def new_rows_of(model: Any) -> NewRows | None:
    """What `grow_embeddings` gave to `model`, a causal LM with adapters or without; None: it was not grown."""
    return getattr(unwrap(model), "new_rows", None)


def read_new_rows(file: Path) -> NewRows:
    """
    Raises:
        UserError: it is not there, or not as it was written.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            noted, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError("run folder", f"{file}, the rows that new tokens begin with, is not there", _REMEDY) from error
    except (SafetensorError, OSError) as error:
        raise UserError("run folder", f"{file} is damaged: {error}", _REMEDY) from error
    if _IDS not in tensors or noted.get(_CHECKSUM) != _checksum_of(tensors):
        raise UserError("run folder", f"{file} is damaged: it does not hold what was written", _REMEDY)
    return NewRows(tensors.pop(_IDS), tensors)


def check_new_rows(rows: NewRows, ids: torch.Tensor, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Check that `rows`, of `file`, are those of a model that lacks the rows `ids` of `weights`.

    Raises:
        UserError: they are of other tokens, or of another model.
    """
    found = {name: tuple(table.shape) for name, table in rows.tables.items()}
    meant = {name: (len(ids), weight.shape[1]) for name, weight in weights.items()}
    if found == meant and torch.equal(rows.ids, ids):
        return
    what = (
        "rows of other ids"
        if found == meant
        else f"{_told(found)}, where the model and its tokenizer need {_told(meant)}"
    )
    raise UserError("run folder", f"{file} is of another model or of other new tokens: it holds {what}", _REMEDY)


def _checksum_of(tensors: dict[str, torch.Tensor]) -> str:
    return "; ".join(f"{name} {checksum(tensor)}" for name, tensor in sorted(tensors.items()))


def _told(shapes: dict[str, tuple[int, ...]]) -> str:
    return " and ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
