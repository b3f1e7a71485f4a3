"""Which attention backend a model's fused layers take: chosen at the first step that needs it, and then kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from steep.model.layer import Attention
from steep.ops.attention import BACKENDS
from steep.ops.attention_backends import fastest_backend, table_backend, usable_backends
from steep.ops.packing import Packing

logger = logging.getLogger("steep")


@dataclass
class Backends:
    """The choices of one model.

    Attributes:
        chosen: by kind of layer and batch (`_kind`). A checkpoint keeps it, and a resumed run goes on with it.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    # Whether what is chosen for a kind is to be had for a dtype and head_dim: by this process, on this card.
    _looked_at: dict[tuple[str, torch.dtype, int], bool] = field(default_factory=dict)
    _others: dict[tuple[object, ...], str] = field(default_factory=dict)  # what is not simply `chosen`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_looked_at": {}, "_others": {}}  # another process may have another card

    def backend(self, attention: Attention, packing: Packing, dtype: torch.dtype, *, trains: bool) -> str:
        """The backend for one layer and one batch.

        A batch that trains chooses for its kind: by a timer on a GPU, by a table on a CPU or where kernels have to be
        deterministic. What is only evaluated takes what training chose, or else the table's.
        """
        device, deterministic = packing.cu_seqlens.device, torch.are_deterministic_algorithms_enabled()
        window = attention.window
        if window is not None and window >= packing.max_length:
            window = None
        asked = (device, dtype, attention.head_dim, packing.uniform, window, attention.softcap)
        kind = _kind(packing, window, attention.softcap, deterministic)
        looked_at = kind, dtype, attention.head_dim
        if trains and looked_at not in self._looked_at:
            before, usable = self.chosen.get(kind), usable_backends(*asked)
            if before not in usable and all(kind != other for other, *_ in self._looked_at):
                if device.type == "cpu" or deterministic:
                    self.chosen[kind] = table_backend(*asked, deterministic=deterministic)
                else:
                    self.chosen[kind] = fastest_backend(
                        packing, *attention.heads, dtype, window=window, softcap=attention.softcap
                    )
                if before is not None:
                    logger.warning(
                        "attention ran on %s so far (%s), which is not to be had here: it goes on with %s, whose sums "
                        "round otherwise", before, kind, self.chosen[kind],
                    )  # fmt: skip
            self._looked_at[looked_at] = self.chosen[kind] in usable
            if not self._looked_at[looked_at]:
                logger.warning(
                    "attention runs on %s (%s), which is not to be had for %s and heads of %d: there it takes %s",
                    self.chosen[kind], kind, dtype, attention.head_dim,
                    table_backend(*asked, deterministic=deterministic),
                )  # fmt: skip
        found = self.chosen.get(kind)
        # a batch of the same kind may still have a length that the backend does not take
        of_batch = packing.uniform, window, attention.softcap
        if trains and found is not None and self._looked_at[looked_at] and BACKENDS[found].lacks(*of_batch) is None:
            return found
        key = found, deterministic, *asked
        if key not in self._others:  # asking torch takes longer than a layer is launched
            usable = [] if found is None else usable_backends(*asked)
            self._others[key] = found if found in usable else table_backend(*asked, deterministic=deterministic)
        return self._others[key]


def _kind(packing: Packing, window: int | None, softcap: float | None, deterministic: bool) -> str:
    words = ["documents of uneven lengths" if packing.uniform is None else "documents of one length"]
    words += [] if window is None else [f"a window of {window}"]
    words += [] if softcap is None else ["a soft cap"]
    words += ["deterministic"] if deterministic else []
    return ", ".join(words)
