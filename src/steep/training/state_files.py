"""Nested state (optimizers, schedulers, random generators) as safetensors plus JSON, so that nothing is ever pickled.

A state is a tree of dict, list, tuple, None, bool, int, float, str, dtypes and tensors. Tensors go to
``NAME.safetensors`` under running numbers; the tree, with a reference in each tensor's place, goes to ``NAME.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from steep.errors import UserError
from steep.machine_faults import is_the_machines
from steep.storage import naming

# Optimizer states of torchao are tensor subclasses; their parts are saved and only these classes are ever rebuilt.
_SUBCLASSES = {
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def encode(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The tree of `state` as JSON has it, and its tensors by the keys that stand in their place: not copied.

    Raises:
        TypeError: a leaf of a type that cannot be stored without pickle.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(state, tensors), tensors


def load_state(folder: Path, name: str, field: str = "--resume") -> Any:
    """Read the state called `name`; tensors come back on the CPU, bit for bit.

    Raises:
        UserError: a file is missing or damaged, or holds something that `save_state` does not write.
        OSError: one is there and cannot be read; it names the file.
    """
    remedy = "Delete that checkpoint: the run then goes on from the one before."
    if field != "--resume":
        remedy = "Give another checkpoint."
    try:
        with naming(folder / f"{name}.safetensors"):
            (folder / f"{name}.safetensors").open("rb").close()  # safetensors says of any fault that it is not there
            tensors = load_file(folder / f"{name}.safetensors", device="cpu")
        with naming(folder / f"{name}.json"):
            tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _decode(tree, tensors)
    # ValueError: broken JSON or UTF-8, too. RecursionError: thousands of brackets, or of lists within lists.
    except (
        SafetensorError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise UserError(field, f"{folder} is damaged: {name} cannot be read ({error!r})", remedy) from error


@contextmanager
def putting_back(folder: Path, name: str) -> Iterator[None]:
    """Tell what keeps a state from being put back, into an optimizer and the like, as the fault of its file: by the
    manifest it is as it was written, so somebody else wrote it, or for another run.

    Raises:
        UserError: the state does not fit; memory that ran out, and a card that failed, stay what they are.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_the_machines(error):
            raise
        problem = f"{folder} does not fit this run: {name} cannot be put back ({error!r})"
        raise UserError("--resume", problem, "Delete that checkpoint, or give one that this run wrote.") from error


def to_bytes(state: Any) -> bytes:
    """What `from_bytes` makes `state` of again, in another process.

    Raises:
        TypeError: as `encode`.
    """
    tree, tensors = encode(state)
    return save({**tensors, "tree": torch.frombuffer(bytearray(json.dumps(tree).encode()), dtype=torch.uint8)})


def from_bytes(payload: bytes) -> Any:
    """The state that `to_bytes` was given."""
    tensors = load(payload)
    return _decode(json.loads(tensors.pop("tree").numpy().tobytes()), tensors)


def _encode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    # Every container becomes {kind: ...}: JSON alone would turn integer keys into text and tuples into lists.
    if isinstance(node, torch.Tensor):
        if type(node) not in (torch.Tensor, torch.nn.Parameter):
            return _encode_subclass(node, tensors)
        key = str(len(tensors))
        tensors[key] = node.detach()
        return {"tensor": key}
    if isinstance(node, dict):
        return {"dict": [[_encode(key, tensors), _encode(value, tensors)] for key, value in node.items()]}
    if isinstance(node, tuple):
        return {"tuple": [_encode(value, tensors) for value in node]}
    if isinstance(node, list):
        return {"list": [_encode(value, tensors) for value in node]}
    if isinstance(node, torch.dtype):  # torchao keeps one beside its parts
        return {"dtype": str(node).removeprefix("torch.")}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"a {type(node).__name__} cannot be stored in a checkpoint without pickle")


def _encode_subclass(node: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
    name = type(node).__name__
    if name not in _SUBCLASSES:
        raise TypeError(f"an optimizer state of type {name} cannot be stored in a checkpoint without pickle")
    fields, context = node.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "subclass": name,
        "parts": _encode({field: getattr(node, field) for field in fields}, tensors),
        "context": _encode(list(context), tensors),
    }


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "dtype" in node:
        dtype = getattr(torch, node["dtype"])
        if not isinstance(dtype, torch.dtype):  # a checkpoint's text names dtypes, and nothing else of torch
            raise ValueError(f"{node['dtype']!r} is no dtype")
        return dtype
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "dict" in node:
        return {_decode(key, tensors): _decode(value, tensors) for key, value in node["dict"]}
    if "tuple" in node:
        return tuple(_decode(value, tensors) for value in node["tuple"])
    if "list" in node:
        return [_decode(value, tensors) for value in node["list"]]
    subclass = getattr(import_module(_SUBCLASSES[node["subclass"]]), node["subclass"])
    return subclass.__tensor_unflatten__(_decode(node["parts"], tensors), _decode(node["context"], tensors))
