"""A saved adapter as what it does to a weight: W + s·BA, DoRA's magnitude, or a trained embedding in W's place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from steep.errors import UserError
from steep.model.adapter_config import CONFIG, read_adapter_config
from steep.model.names import EMBEDDINGS

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


class AdapterWeights:
    """An adapter in PEFT's format, its tensors read one at a time.

    Attributes:
        folder: where it is.
        config: PEFT's own.
        modules: names of the linear layers that it changes, as the base model has them.
        whole: names of the weights that it holds whole: trained embeddings.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        field: named in errors.

    Raises:
        UserError: it is no LoRA, it has a setting or a tensor that is not understood here, or it is not whole.
    """

    def __init__(self, folder: Path, field: str = "run folder") -> None:
        self.folder, self._file, self._field = folder, folder / WEIGHTS, field
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UserError(field, f"{folder} holds no adapter ({name})", "Give the folder of a finished run.")
        self.config = read_adapter_config(folder, field)
        self._parts: dict[str, set[str]] = {}
        self.whole: set[str] = set()
        for key in self._keys():
            name = key.removeprefix(PREFIX)
            if found := _LORA.fullmatch(name):
                self._parts.setdefault(found["module"], set()).add(found["part"])
            elif name.endswith(tuple(f"{embedding}.weight" for embedding in EMBEDDINGS)):
                self.whole.add(name)
            else:
                raise UserError(field, f"{self._file} has a tensor of an unknown kind, {key}", "It cannot be merged.")
        needed = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if self.config.use_dora else set())
        for module, parts in self._parts.items():
            if parts != needed:
                odd = sorted(parts ^ needed)[0]
                what = "lacks" if odd in needed else "has, though use_dora is off,"
                raise UserError(field, f"{self._file} {what} {module}.{odd}", "Put it back, or train again.")
        if not self._parts and not self.whole:
            raise UserError(field, f"{self._file} holds no tensors", "Give the folder of a finished run.")

    @property
    def modules(self) -> set[str]:
        return set(self._parts)

    @property
    def weights(self) -> set[str]:
        """Names of all weights that it changes or replaces."""
        return {f"{module}.weight" for module in self._parts} | self.whole

    def rank(self, module: str) -> int:
        """The rank of a layer, by PEFT's reading of `rank_pattern`."""
        pattern = self.config.rank_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), module), self.config.r)

    def scale(self, module: str) -> float:
        """LoRA's s of a layer, by PEFT's reading of `alpha_pattern`: alpha / rank, or / its root with rsLoRA."""
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), self.config.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def merged(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """What a layer computes with, in fp32: V = W + s·BA, or with DoRA m · V / ‖V‖ over each output's inputs.

        Args:
            weight: W, [outputs, inputs], in any dtype and anywhere.

        Returns:
            fp32 [outputs, inputs], where W is.

        Raises:
            UserError: shapes do not fit.
        """
        a, b = (half.to(weight.device) for half in self.halves(module))
        rank = self.rank(module)
        if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise UserError(
                self._field,
                f"{module} is {tuple(weight.shape)}, and its adapter {tuple(b.shape)} by {tuple(a.shape)}, rank {rank}",
                "Give the run's own base model.",
            )
        merged = torch.addmm(weight.float(), b, a, alpha=self.scale(module))
        if self.config.use_dora:
            magnitude = self.magnitude(module).to(weight.device)
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged

    def halves(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, inputs] and B [outputs, rank] of a layer, fp32."""
        a, b = (self._get(f"{module}.lora_{part}.weight").float() for part in "AB")
        return a, b

    def magnitude(self, module: str) -> torch.Tensor:
        """DoRA's m of a layer, fp32 [outputs]."""
        return self._get(f"{module}.lora_magnitude_vector").float()

    def embedding(self, name: str) -> torch.Tensor:
        """A trained embedding, [tokens, width], in the dtype that it was trained in."""
        return self._get(name)

    def embedding_shape(self, name: str) -> tuple[int, int]:
        """Tokens and width of a trained embedding, without reading it."""
        with self._opened() as tensors:
            rows, width = tensors.get_slice(PREFIX + name).get_shape()
        return rows, width

    def _get(self, name: str) -> torch.Tensor:
        with self._opened() as tensors:
            return tensors.get_tensor(PREFIX + name)

    def _keys(self) -> Iterable[str]:
        with self._opened() as tensors:
            keys = list(tensors.keys())
        for key in keys:
            if not key.startswith(PREFIX):
                raise UserError(self._field, f"{self._file} has an unknown tensor {key}", "It cannot be merged.")
        return keys

    def _opened(self):
        try:
            return safe_open(self._file, framework="pt")
        except SafetensorError as error:
            raise UserError(self._field, f"{self._file} is damaged: {error}", "Put it back, or train again.") from error
