"""The base model's own tensors, read from its safetensors files one at a time; the model itself is never built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from steep.errors import UserError
from steep.model.weight_files import weight_files


class BaseTensors(Mapping[str, torch.Tensor]):
    """Name → tensor as it is stored, on the CPU, read at each access; iterated shard by shard, in the files' order.

    Args:
        name: folder or hub name of a model in safetensors (what `steep.model.load.as_folder` makes of a GGUF file).
        revision: commit, tag or branch on the hub.
        field: named in errors.
        download: whether a hub model may be downloaded. If not, one that is not in the cache has no tensors.

    Raises:
        UserError: the checkpoint has no safetensors, or a shard is missing or damaged.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, field: str = "model.name", download: bool = True
    ) -> None:
        self._field = field
        self._files: dict[str, Path] = {}
        for file in weight_files(name, revision=revision, field=field, download=download):
            with self._opened(file) as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)

    def file(self, name: str) -> Path:
        """Where `name` is read from."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`, without reading it."""
        with self._opened(self._files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The dtype of `name`, as safetensors names it, without reading it."""
        with self._opened(self._files[name]) as tensors:
            return tensors.get_slice(name).get_dtype()

    def __contains__(self, name: object) -> bool:
        return name in self._files  # that of a mapping would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _opened(self, file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(self._field, f"{file} is damaged: {error}", "Download it again.") from error
