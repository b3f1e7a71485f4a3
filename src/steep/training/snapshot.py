"""What a checkpoint will hold, copied out of reach of the training that goes on, and written from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from steep.ops.pinned import pinned_zeros
from steep.tensor_files import write_tensors
from steep.training.state_files import encode

Finish = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
_ALIGNMENT = 64  # bytes


class HostMemory:
    """Page-locked memory that tensors are copied into where any is on a GPU: allocated once, at its exact size, and
    used again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous copies on the CPU, until the next call."""
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is None:
            return [_clone(tensor) for tensor in tensors]
        sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self._reserve(sum(sizes), device)
        places = dict(enumerate(self._memory[: sum(sizes)].split(sizes)))
        made: dict[int, torch.Tensor] = {}
        for from_gpu in (True, False):
            made |= {i: self._copy(each, places[i]) for i, each in enumerate(tensors) if each.is_cuda == from_gpu}
            torch.cuda.synchronize()  # before the rest: optimizers may page their states between the GPU and the host
        return [made[i] for i in range(len(tensors))]

    def release(self) -> None:
        """Give the memory back."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, size: int, device: torch.device) -> None:
        if self._memory.numel() >= size:
            return
        self.release()
        self._memory = pinned_zeros((size,), torch.uint8, device, "training will wait longer for each checkpoint")

    @staticmethod
    def _copy(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        return place[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)


class Snapshot:
    """Files of a checkpoint that is about to be written: collected, copied by `take`, then written in any thread."""

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._trees: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._finish: dict[str, tuple[Finish, dict[str, str]]] = {}

    def add_text(self, name: str, text: str | bytes) -> None:
        """A small file."""
        self._texts[name] = text.encode() if isinstance(text, str) else text

    def add_tensors(
        self, name: str, tensors: dict[str, torch.Tensor], finish: Finish, metadata: dict[str, str]
    ) -> None:
        """A safetensors file, of what `finish` makes of the copied tensors."""
        self._tensors[name], self._finish[name] = tensors, (finish, metadata)

    def add_state(self, name: str, state: Any) -> None:
        """The two files of a state, see `state_files`."""
        self._trees[f"{name}.json"], self._tensors[f"{name}.safetensors"] = encode(state)

    def take(self, memory: HostMemory) -> None:
        """Copy every tensor. Training may go on after it."""
        places = [(file, name) for file, tensors in self._tensors.items() for name in tensors]
        copies = memory.copies([self._tensors[file][name] for file, name in places])
        for (file, name), copy in zip(places, copies, strict=True):
            self._tensors[file][name] = copy

    def write(self, folder: Path) -> None:
        """Write the files into `folder`."""
        for name, content in self._texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, tree in self._trees.items():
            (folder / name).write_text(json.dumps(tree), encoding="utf-8")
        for name, tensors in self._tensors.items():
            finish, metadata = self._finish.get(name, (dict, None))
            write_tensors(finish(tensors), folder / name, metadata)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
