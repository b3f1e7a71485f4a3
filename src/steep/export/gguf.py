"""GGUF files from a merged 16-bit folder: f16 and q8_0, for llama.cpp, Ollama and what is built on them.

Names of tensors and keys come from the gguf package's own tables; what a family needs from
`steep.model.gguf_families`, the tokenizer from `gguf_tokenizer`. Tensors are read one at a time and go into both files,
so one of them is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steep.errors import UserError
from steep.export.gguf_refusals import FIELD, REMEDY, family_of
from steep.export.gguf_tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from steep.export.modelfile import modelfile
from steep.model.base_tensors import BaseTensors
from steep.model.gguf_families import ROTARY_FACTORS, Family, add_settings, gguf_names, layout, rotary_factors
from steep.model.resolve import read_tokenizer, resolve

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

logger = logging.getLogger("steep")

_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class GgufModel:
    """A merged folder in the terms of GGUF, before any weight is read.

    Attributes:
        names: GGUF's tensor name → the checkpoint's, in the order of the files.
    """

    config: Any
    family: Family
    vocabulary: Vocabulary
    tensors: BaseTensors
    names: dict[str, str]

    def expected(self, name: str) -> torch.Tensor:
        """The tensor that GGUF calls `name`, laid out for llama.cpp, in fp32."""
        if name == ROTARY_FACTORS:
            factors = rotary_factors(self.config)
            assert factors is not None
            return factors
        stored = self.names[name]
        return layout(stored, self.config, self.family)(self.tensors[stored].float())


def check_convertible(config: Any, tokenizer: Any) -> None:
    """Refuse a model that has no right GGUF file; no weights are needed.

    Raises:
        UserError: the package gguf is missing, or llama.cpp would compute or tokenise otherwise.
    """
    _check_installed()
    family_of(config)
    read_vocabulary(tokenizer, config)


def open_model(model_folder: Path) -> GgufModel:
    """Read everything but the weights of a merged folder.

    Raises:
        UserError: as `check_convertible`, or the folder's tensors are not those of its family.
    """
    resolved = resolve(str(model_folder), field=FIELD)
    config = resolved.config
    if resolved.quantization is not None:
        raise UserError(FIELD, f"{model_folder} is stored quantised", "Give a folder in 16 bit (--to merged).")
    family = family_of(config)
    vocabulary = read_vocabulary(read_tokenizer(resolved, FIELD), config)
    tensors = BaseTensors(resolved.name, field=FIELD)
    names: dict[str, str] = {}
    for stored, name in gguf_names(tensors, config, family).items():
        if name is None:
            raise UserError(FIELD, f"{model_folder} has {stored}, which GGUF has no name for", REMEDY)
        names[name] = stored
    if rotary_factors(config) is not None:
        names[ROTARY_FACTORS] = ""
    return GgufModel(config, family, vocabulary, tensors, names)


def write_gguf(model_folder: Path, out: Path, name: str | None = None) -> list[Path]:
    """Write `NAME-f16.gguf`, `NAME-q8_0.gguf` and a `Modelfile` for Ollama into `out`, and return the three.

    Args:
        model_folder: what `save_pretrained` wrote of a whole model in 16 or 32 bit, with its tokenizer.
        name: NAME; the folder's own if it is None.

    Raises:
        UserError: the model or its tokenizer cannot be written so that llama.cpp computes the same, a weight is out of
            f16's range, or the package gguf is missing.
    """
    _check_installed()
    from gguf import GGMLQuantizationType, LlamaFileType  # optional

    model = open_model(model_folder)
    name = name or model_folder.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    kinds = (GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)
    files = {kind: out / f"{name}-{kind.name.lower()}.gguf" for kind in kinds}
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(_writer(file, model, name, LlamaFileType[f"MOSTLY_{kind.name}"]))
            for kind, file in files.items()
        }
        for gguf_name in model.names:
            shape = _shape(model, gguf_name)
            for kind, writer in writers.items():
                stored_as = _stored_as(shape, kind)
                writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), _bytes(shape, stored_as), stored_as)
        for writer in writers.values():
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        for gguf_name in model.names:
            tensor = _in_range(gguf_name, model.expected(gguf_name))
            for kind, writer in writers.items():
                writer.write_tensor_data(_encoded(tensor, _stored_as(tuple(tensor.shape), kind)))
    (out / "Modelfile").write_text(
        modelfile(files[GGMLQuantizationType.Q8_0].name, model.config.max_position_embeddings), encoding="utf-8"
    )
    return [*files.values(), out / "Modelfile"]


@contextmanager
def _writer(file: Path, model: GgufModel, name: str, file_type: int) -> Iterator[GGUFWriter]:
    """A writer with all the metadata; its file gets its name when the block ends without an error."""
    from gguf import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter  # optional

    unfinished = file.with_name(f".writing-{file.name}")
    writer = GGUFWriter(unfinished, MODEL_ARCH_NAMES[MODEL_ARCH[model.family.architecture]])
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_settings(writer, model.config, model.family)
    add_vocabulary(writer, model.vocabulary)
    try:
        yield writer
        writer.close()
        unfinished.replace(file)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)  # gone if it was renamed


def _check_installed() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(FIELD, "writing GGUF needs the package gguf", "pip install 'steep[gguf]'") from error


def _shape(model: GgufModel, name: str) -> tuple[int, ...]:
    if name == ROTARY_FACTORS:
        return tuple(model.expected(name).shape)
    return model.tensors.shape(model.names[name])


def _stored_as(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """As llama.cpp's converter: vectors stay in fp32, and rows that don't fill Q8_0's blocks of 32 in f16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # optional

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _bytes(shape: tuple[int, ...], stored_as: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES  # optional

    block, size = GGML_QUANT_SIZES[stored_as]
    return int(np.prod(shape)) // block * size


def _encoded(tensor: torch.Tensor, stored_as: GGMLQuantizationType) -> np.ndarray:
    from gguf.quants import quantize  # optional

    return quantize(tensor.numpy(), stored_as)


def _in_range(name: str, tensor: torch.Tensor) -> torch.Tensor:
    largest = tensor.abs().max().item()
    if (tensor.ndim > 1 and not largest <= _LARGEST_F16) or not np.isfinite(largest):
        raise UserError(
            FIELD,
            f"{name} has a value of {largest:g}, and f16 ends at {_LARGEST_F16:g}",
            f"{REMEDY} With --outtype bf16 it keeps such values.",
        )
    return tensor
