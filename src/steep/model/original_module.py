"""The frozen originals of trained embeddings, out of the GPU's memory.

PEFT keeps the original of each module that is trained whole beside the trained copy, for `disable_adapter()`. Of an
embedding that is V x H values which no training step reads. Here the original becomes a module without parameters,
which reads what it is asked for from the base's own files: so no device move takes it along, no checkpoint stores it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from steep.errors import UserError
from steep.model.base_tensors import BaseTensors
from steep.model.embeddings import is_tied
from steep.model.frozen_matrix import FrozenMatrix, read_from


def offload_originals(model: PeftModel) -> PeftModel:
    """Take the frozen originals of the trained embeddings out of the memory of `model`, which computes what it did.

    With `disable_adapter()` the embedding gathers the rows that it needs from the base's safetensors files. The head is
    read whole when it is first used, stays on its device until adapters are enabled again, and then is freed. Merging,
    unloading and further adapters go on as before. Rows that the files do not hold to the bit (those of new tokens, or
    all of a model that came from no file) stay in host memory.

    Args:
        model: a causal LM with adapters, from `add_adapters` or PEFT's own; the base's files are found by its config.

    Returns:
        `model` itself. While it is in use the files have to stay as they are: reading from others is a RunError.
        PEFT's batches of mixed adapters (`adapter_names`) need an original with a weight, and refuse this one.
    """
    base: Any = model.get_base_model()
    tensors = _tensors_of(base.config)
    matrices: dict[tuple[int, torch.Size], FrozenMatrix] = {}  # tied ones, and those just untied, are one
    for name, wrapper in list(base.named_modules()):
        if type(wrapper) is not ModulesToSaveWrapper or not _is_plain(wrapper.original_module):
            continue
        original: Any = wrapper.original_module
        place = (original.weight.data_ptr(), original.weight.shape)
        if place not in matrices:
            matrices[place] = read_from(original.weight, tensors, name)
        kind: Any = OriginalEmbedding if isinstance(original, nn.Embedding) else OriginalHead
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, _Wrapper.of(wrapper, kind(matrices[place], original)))
    return model


@contextmanager
def copied_to_nowhere(model: Any, saved: Collection[str]) -> Iterator[Callable[[PeftModel], None]]:
    """Within, PEFT makes the trained copies of an untied model's embeddings on the meta device. What is given takes the
    model then: each copy gets the memory that its original has, so that no embedding is there twice. At once
    `offload_originals` has to follow, which leaves that memory to the copy. A copy gets memory of its own where others
    go on with the original's: the table and the head of an untied model have one until then.

    Args:
        saved: names of what PEFT will copy.
    """
    named = [] if is_tied(model) else list(model.named_modules())
    tables = {id(table): table for name, table in named if name.rpartition(".")[2] in saved and _is_plain(table)}
    weights = {key: table.weight for key, table in tables.items()}
    users = Counter(_memory_of(parameter) for parameter in model.parameters())
    for table in tables.values():
        table.weight = nn.Parameter(table.weight.to("meta"), requires_grad=False)

    def put_back() -> None:
        for key, weight in weights.items():
            tables[key].weight = weight

    def share(peft_model: PeftModel) -> None:
        put_back()
        for wrapper in list(peft_model.modules()):
            if isinstance(wrapper, ModulesToSaveWrapper) and id(wrapper.original_module) in weights:
                copied: Any
                for copied in wrapper.modules_to_save.values():
                    weight = weights[id(wrapper.original_module)].detach()
                    others = users[_memory_of(weight)] - 1
                    users[_memory_of(weight)] = others
                    copied.weight = nn.Parameter(weight.clone() if others else weight, copied.weight.requires_grad)

    try:
        yield share
    finally:
        put_back()
        weights.clear()  # what was given lives on


def lend_copies(model: Any) -> None:
    """Let each original that is in use be its trained copy until adapters are enabled again. Nothing of the model may
    be trained yet: the two are the same then. So no head is read, and none is there twice."""
    for module in model.modules():
        if isinstance(module, _Wrapper) and module.disable_adapters:
            copied: Any
            (copied,) = module.modules_to_save.values()
            module.original_module.lend(copied.weight.detach())


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_of(config: Any) -> BaseTensors | None:
    """The files of the checkpoint that a model with `config` was loaded from; None where there are none."""
    if not config.name_or_path:
        return None
    try:
        return BaseTensors(config.name_or_path, revision=getattr(config, "_commit_hash", None), download=False)
    except UserError:
        return None


def _is_plain(module: Any) -> bool:
    """Whether `module` is an embedding or a head whose weight is all that it computes with, and is read in no other
    way than by its forward."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if hasattr(module, "_hf_hook") or type(weight) is not nn.Parameter or weight.is_meta or len(parameters) != 1:
        return False
    return type(module) is nn.Linear or (isinstance(module, nn.Embedding) and module.max_norm is None)


class OriginalModule(nn.Module, ABC):
    """The original of an embedding or a head, without parameters.

    Attributes:
        matrix: its weight, where it is read from.
        device: where `weight` is put. It goes along when the model is moved, as `weight.dtype` goes along with a cast.
    """

    def __init__(self, matrix: FrozenMatrix, weight: torch.Tensor) -> None:
        super().__init__()
        self.matrix, self.device, self.dtype = matrix, weight.device, weight.dtype
        self._rows = matrix.shape[0]
        self._holds = False
        self._held: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """[V, H] on `device`, read at each access, or once while it is held."""
        if self._held is not None and len(self._held) >= self._rows:
            return self._held[: self._rows]
        weight = self.matrix.whole(self.device, self._rows).to(self.dtype)
        if self._holds:
            self._held = weight
        return weight

    @abstractmethod
    def materialised(self) -> nn.Module:
        """The module of the library's that it stands for, with a frozen weight; those of a tied pair share it."""

    def hold(self, holds: bool) -> None:
        """Keep `weight` once it is read, or read it anew each time and free the one that is kept."""
        self._holds, self._held = holds, None

    def lend(self, weight: torch.Tensor) -> None:
        """Have `weight`, [V, H], for as long as it is held.

        Raises:
            RunError: the base's file is another than it was.
        """
        assert self._holds
        self.matrix.check()
        self._held = weight.to(self.dtype)

    @contextmanager
    def only_the_first(self, rows: int) -> Iterator[None]:
        """Let `weight` end after `rows` rows."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.device, self.dtype, self._held = like.device, like.dtype, None
        return self

    def extra_repr(self) -> str:
        return f"{self.matrix.shape[0]}, {self.matrix.shape[1]}, {self.matrix.file or 'in host memory'}"


class OriginalEmbedding(OriginalModule):
    """Token ids to rows, which are gathered from the file: what the original's own class makes of them.

    Attributes:
        shell: the original without its weight; it knows of Gemma's `embed_scale`.
    """

    def __init__(self, matrix: FrozenMatrix, original: nn.Embedding) -> None:
        super().__init__(matrix, original.weight)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = original.padding_idx
        self.shell = original
        del original.weight
        original.padding_idx = None  # it matters to a gradient only, and is no row of the few that are gathered

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids, places = torch.unique(input_ids, return_inverse=True)
        rows = self.matrix.rows(ids.cpu()).to(input_ids.device, self.dtype)
        return functional_call(self.shell, {"weight": rows}, (places,))

    def materialised(self) -> nn.Embedding:
        module: Any = copy.deepcopy(self.shell)
        module.padding_idx = self.padding_idx
        module.weight = self.matrix.parameter(self.device, self.dtype)
        return module


class OriginalHead(OriginalModule):
    """Hidden states [..., H] to logits [..., V] by the weight as it was."""

    def __init__(self, matrix: FrozenMatrix, original: nn.Linear) -> None:
        super().__init__(matrix, original.weight)
        self.out_features, self.in_features = matrix.shape
        self.bias = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight)

    def materialised(self) -> nn.Linear:
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        module.weight = self.matrix.parameter(self.device, self.dtype)
        return module.train(self.training)


class _Wrapper(ModulesToSaveWrapper):
    """PEFT's wrapper around an `OriginalModule`: it says when adapters are off, and hands on no module without a
    weight."""

    original_module: Any

    @classmethod
    def of(cls, wrapper: ModulesToSaveWrapper, original: OriginalModule) -> _Wrapper:
        """`wrapper` with another original: the trained copies are the same."""
        own = cls.__new__(cls)
        own.__setstate__(vars(wrapper))
        own.original_module = original
        original.hold(wrapper.disable_adapters)
        return own

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.original_module.hold(not enabled)

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        if tied_module is not None or adapter_name in self.modules_to_save:
            return super().update(adapter_name, tied_module, **kwargs)
        original = self.original_module
        self.original_module = original.materialised()  # what the new adapter's copy is made of
        try:
            super().update(adapter_name, tied_module, **kwargs)
        finally:
            self.original_module = original

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super().unload_and_optionally_merge_module(*args, **kwargs)
        return module.materialised() if isinstance(module, OriginalModule) else module
