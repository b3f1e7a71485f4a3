"""The weights of a base before they are loaded: every tensor is there, in the shape that the config says, and finite.

transformers fills what a checkpoint lacks with random numbers and goes on; a NaN would be found at the first step, or,
quantised to 4 bits, never.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from steep.errors import UserError
from steep.foreign import told_as_input
from steep.model.base_tensors import BaseTensors
from steep.model.fp8_published import REMEDY as REMEDY_FP8
from steep.model.fp8_published import STORED_E4M3, is_published_fp8, read_published, scale_name, scale_shape
from steep.model.gguf_fidelity import check_tensors
from steep.model.gguf_file import read_gguf
from steep.model.loading_progress import Progress
from steep.model.quantisable import plain_config, quantisable
from steep.model.resolve import ODD_CONFIG, ResolvedModel
from steep.model.weight_files import weight_files

_REMEDY = "Download it again, or give another checkpoint."
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_stored(resolved: ResolvedModel, empty: Any, field: str = "model.name", *, download: bool = True) -> list[str]:
    """Compare what is stored with `empty`, the model that the config makes. Only the files' headers are read.

    transformers' own loading is asked, with tensors on the meta device, since it knows which stored name becomes which
    parameter. Weights that bitsandbytes stores quantised are not compared: their shapes are not the model's.

    Args:
        download: whether a hub model may be downloaded for it. If not, one that is not in the cache is not checked.

    Returns:
        What the user should know, in plain words.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, has another shape, or is in 8 bits or integers.
    """
    if "gguf_file" in resolved.arguments:  # converted first
        file = read_gguf(Path(resolved.name) / resolved.arguments["gguf_file"], field)
        check_tensors(file, empty.state_dict(), resolved.config, field)
        return []
    files = weight_files(resolved.name, revision=resolved.arguments.get("revision"), field=field, download=download)
    stored, kinds = {}, {}
    for file in files:
        for name, (kind, shape) in _headers(file, field).items():
            stored[name], kinds[name] = torch.empty(shape, dtype=torch.float32, device="meta"), kind
    if not stored or not (resolved.quantization is None or is_published_fp8(resolved.quantization)):
        return []
    if resolved.quantization is not None:
        _take_published(stored, kinds, resolved, empty, field)
    elif odd := [name for name, kind in kinds.items() if name.endswith(".weight") and kind not in _FLOATS]:
        problem = f"{resolved.name} holds {odd[0]}{_and_more(odd)} as {kinds[odd[0]]}, and its config.json names no "
        raise UserError(field, f"{problem}quantisation", "Give the checkpoint in 16 or 32 bits.")
    with (
        told_as_input(field, f"the weights of {resolved.name} do not go into its model", ODD_CONFIG),
        _without_reports(),
    ):
        _, found = type(empty).from_pretrained(
            None,
            config=plain_config(resolved.config),
            state_dict=stored,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # told below
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        problem = f"{resolved.name} does not hold {missing[0]}{_and_more(missing)}, which its config.json asks for"
        raise UserError(field, problem, "Give the config.json and the weights that belong together.")
    if mismatched := sorted(found["mismatched_keys"]):
        name, shape, meant = mismatched[0]
        problem = f"{resolved.name} holds {name} as {_size(shape)}{_and_more(mismatched)}"
        problem += f", and its config.json makes it {_size(meant)}"
        raise UserError(field, problem, "Give the config.json and the weights that belong together.")
    if unused := sorted(found["unexpected_keys"]):
        return [
            f"{resolved.name} holds {unused[0]}{_and_more(unused)}, for which its config.json has no place: unused."
        ]
    return []


def check_finite(resolved: ResolvedModel, field: str = "model.name", progress: Progress | None = None) -> None:
    """Read every tensor once, of a checkpoint that `check_stored` let pass.

    Args:
        progress: called with the bytes read so far, and how many there are.

    Raises:
        UserError: one holds NaN or infinite values, the scale of one in e4m3 is not above 0, or a file is damaged.
    """
    revision = resolved.arguments.get("revision")
    files, done = weight_files(resolved.name, revision=revision, field=field), 0
    total = sum(file.stat().st_size for file in files)
    for file in files:
        with _opened(file, field) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                refuse_not_finite(tensor, name, file, field)
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total)
    if resolved.quantization is not None and is_published_fp8(resolved.quantization):
        tensors = BaseTensors(resolved.name, revision=revision, field=field)
        for name in tensors:
            if tensors.kind(name) == STORED_E4M3:
                layer = name.removesuffix(".weight")
                read_published(tensors, resolved.quantization, layer, torch.device("cpu"), field)


def refuse_not_finite(tensor: torch.Tensor, name: str, place: object, field: str = "model.name") -> None:
    """
    Raises:
        UserError: `tensor`, stored as `name`, holds NaN or infinite values.
    """
    if not _is_finite(tensor):
        count = int((~torch.isfinite(tensor.float())).sum())  # e4m3 has no such op
        problem = f"{count:,} of the {tensor.numel():,} values of {name} in {place} are NaN or infinite"
        raise UserError(field, problem, _REMEDY)


def _take_published(
    stored: dict[str, torch.Tensor], kinds: dict[str, str], resolved: ResolvedModel, empty: Any, field: str
) -> None:
    """Check the tensors of a checkpoint that is published in e4m3, and take the scales out of `stored`.

    Raises:
        UserError: no tensor is in e4m3, one in another place than the weight of a linear layer is, a scale is missing
            or of another shape, or a tensor is in another quantised type.
    """
    quantization: Any = resolved.quantization
    linear = set(quantisable(empty))
    if STORED_E4M3 not in kinds.values():
        problem = f"the config.json of {resolved.name} says that it is stored in e4m3, and it holds no such tensor"
        raise UserError(field, problem, "Give the config.json and the weights that belong together.")
    for name in [name for name, kind in kinds.items() if kind == STORED_E4M3]:
        layer, _, last = name.rpartition(".")
        if layer not in linear or last != "weight":
            problem = (
                f"{resolved.name} holds {name} in e4m3, and it is not the weight of a linear layer before the head"
            )
            raise UserError(field, problem, REMEDY_FP8)
        scale, shape = scale_name(quantization, layer), tuple(stored[name].shape)
        if scale not in stored:
            raise UserError(field, f"{resolved.name} holds {name} in e4m3 without {scale}", REMEDY_FP8)
        if kinds[scale] not in _FLOATS or scale_shape(tuple(stored[scale].shape), shape) is None:  # pyright: ignore[reportArgumentType]
            problem = (
                f"{resolved.name} holds {scale} as {_size(stored[scale].shape)} of {kinds[scale]}, for a weight of "
            )
            raise UserError(field, f"{problem}{_size(shape)}", REMEDY_FP8)
        del stored[scale], kinds[scale]
    if odd := [name for name, kind in kinds.items() if kind not in (*_FLOATS, STORED_E4M3)]:
        raise UserError(field, f"{resolved.name} holds {odd[0]}{_and_more(odd)} as {kinds[odd[0]]}", REMEDY_FP8)


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch has no aminmax for 8 bits
        tensor = tensor.float()
    # NaN if one is; 20 times as fast as isfinite
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _headers(file: Path, field: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype, as safetensors names it, and shape."""
    with _opened(file, field) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def _opened(file: Path, field: str) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(field, f"{file} is damaged: {error}", _REMEDY) from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """transformers would show a bar, and print a table of what is missing, which the error says."""
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _and_more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
