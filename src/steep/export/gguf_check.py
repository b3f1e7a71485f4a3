"""Whether a GGUF file is the merged model: llama.cpp judges where it is installed, else the file is read back.

llama.cpp tokenises the texts and computes their logits, and both are compared with transformers' on the merged folder.
Reading back compares every tensor and every key with what they were made from; it would not see that llama.cpp
computes something else, which the project's tests do for each family.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steep.evaluation.mode import inference_mode, input_device
from steep.export.gate import open_plainly
from steep.export.gguf import GgufModel, open_model
from steep.export.gguf_refusals import FIELD
from steep.export.gguf_tokenizer import add_vocabulary
from steep.model.attention import attention
from steep.model.gguf_families import add_settings, same_value
from steep.model.resolve import read_tokenizer, resolve

_BITS_LIMITS = {"1": 0.005, "7": 0.02}
"""Bits per byte by which a file may be worse than the merged folder, by its `general.file_type` (f16, q8_0). In q8_0
llama.cpp rounds the activations too: a model of 135M lost 0.0019."""
_LOGITS_LIMITS = {"1": 0.05, "7": 0.15}
"""Relative RMS. Real models had 0.0009 and 0.034 where transformers computes in fp32, and bf16 adds some."""
_MAX_TOKENS = 512  # of a text: its logits are kept, 4 bytes for each entry of the vocabulary
_ROUNDING = {"F32": (1e-6, 2**-24), "F16": (2**-11, 2**-24), "Q8_0": (0.5 / 127 + 2**-11, 2**-18)}
"""What rounding may do: a share of the value (Q8_0: of the largest in its block of 32), and an amount, since small fp16
numbers lie 2^-24 apart. Q8_0 keeps a block's scale in fp16, half of that off, and multiplies it by up to 127."""


@dataclass(frozen=True)
class GgufCheck:
    """What the judge found.

    Attributes:
        judge: "llama.cpp", or "the file read back".
        problems: what is wrong, in words; none if the file is the merged model.
        remarks: texts of a kind that llama.cpp is known to cut into other tokens.
        tokens: scored tokens; 0 where nothing was scored, as are the next three.
        merged_loss, loss: nats a token, of the folder in transformers and of the file in llama.cpp.
        bits_per_byte_gap: file less folder.
        logit_error: relative RMS.
    """

    judge: str
    problems: list[str]
    remarks: list[str] = field(default_factory=list)
    tokens: int = 0
    merged_loss: float = 0.0
    loss: float = 0.0
    bits_per_byte_gap: float = 0.0
    logit_error: float = 0.0

    def __str__(self) -> str:
        if not self.tokens:
            return "tensors and metadata are the merged folder's; pip install llama-cpp-python to score the file too"
        return (
            f"{self.tokens} tokens: loss {self.loss:.4f} in llama.cpp, {self.merged_loss:.4f} in transformers "
            f"({self.bits_per_byte_gap:+.4f} bits per byte); logits differ by {self.logit_error:.2%}"
        )


class GgufJudge:
    """Compares GGUF files with the merged folder that they were written from, which is opened once for all of them.

    Args:
        texts: held-out text; of each the first 512 tokens are scored, and all of it is tokenised.

    Raises:
        UserError: the folder cannot be opened, or is none that has a GGUF file.
    """

    def __init__(self, model_folder: Path, texts: Sequence[str]) -> None:
        self._folder, self._texts = model_folder, texts
        self._model = open_model(model_folder)

    def check(self, file: Path) -> GgufCheck:
        """Hold `file` against the folder."""
        problems = read_back(file, self._model)
        if find_spec("llama_cpp") is None:
            return GgufCheck("the file read back", problems)
        scored = self._scored(file)
        return replace(scored, problems=problems + scored.problems)

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(resolve(str(self._folder), field=FIELD), FIELD)

    @cached_property
    def _merged(self) -> Any:
        """The folder's model in transformers. On a CPU in fp32, as everywhere: bf16 is several times slower there."""
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        return open_plainly(self._folder, dtype, attention("auto", self._model.config))

    def _scored(self, file: Path) -> GgufCheck:
        from llama_cpp import Llama  # optional

        texts, tokenizer, vocabulary = self._texts, self._tokenizer, self._model.vocabulary
        context, threads = min(_MAX_TOKENS, self._model.config.max_position_embeddings), torch.get_num_threads()
        encoded = [tokenizer(text, return_offsets_mapping=True) for text in texts]
        ids = [list(each["input_ids"]) for each in encoded]
        bytes_scored = sum(
            len(text[: each["offset_mapping"][:context][-1][1]].encode())
            for text, each in zip(texts, encoded, strict=True)
            if each["input_ids"]
        )
        llama = Llama(
            str(file), n_ctx=context, logits_all=True, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        try:
            differing = [
                text
                for text, wanted in zip(texts, ids, strict=True)
                if llama.tokenize(text.encode(), add_bos=True, special=True) != wanted
            ]
            their_loss, our_loss, error, size, tokens = 0.0, 0.0, 0.0, 0.0, 0
            model = self._merged
            with inference_mode(model, None):
                for sequence in (each[:context] for each in ids if len(each) > 1):
                    row = torch.tensor([sequence], device=input_device(model))
                    ours = model(input_ids=row, use_cache=False).logits[0, :-1].float().cpu()
                    llama.reset()
                    llama.eval(sequence)
                    theirs = torch.from_numpy(llama.scores[: len(sequence) - 1].copy())
                    labels = torch.tensor(sequence[1:])
                    our_loss += torch.nn.functional.cross_entropy(ours, labels, reduction="sum").item()
                    their_loss += torch.nn.functional.cross_entropy(theirs, labels, reduction="sum").item()
                    error += (theirs - ours).square().sum().item()
                    size += ours.square().sum().item()
                    tokens += len(labels)
        finally:
            llama.close()
        gap = (their_loss - our_loss) / math.log(2) / max(bytes_scored, 1)
        kind, logit_error = llama.metadata["general.file_type"], math.sqrt(error / size) if size else math.nan
        # Such a tokenizer composes by NFC, if it changes its text at all.
        composes = vocabulary.model == "gpt2" and tokenizer.backend_tokenizer.normalizer is not None
        problems, remarks = other_tokens(differing, adds_space=vocabulary.adds_space, composes=composes)
        if not logit_error <= _LOGITS_LIMITS[kind]:  # nothing scored is no proof either
            problems.append(f"logits in llama.cpp differ by {logit_error:.1%}")
        if not gap <= _BITS_LIMITS[kind]:  # a loss that is no number too
            problems.append(f"the loss in llama.cpp is {gap:.4f} bits per byte higher")
        return GgufCheck(
            "llama.cpp",
            problems,
            remarks,
            tokens,
            our_loss / max(tokens, 1),
            their_loss / max(tokens, 1),
            gap,
            logit_error,
        )


def read_back(file: Path, model: GgufModel) -> list[str]:
    """What in `file` is not what `model` has: tensors beyond their rounding, and keys."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, GGUFWriter  # optional
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    problems = [f"{name} is in one of them only" for name in sorted(found.keys() ^ model.names.keys())]
    for name in found.keys() & model.names.keys():
        tensor, expected = found[name], model.expected(name).numpy()
        values = dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        share, amount = _ROUNDING[tensor.tensor_type.name]
        difference = np.abs(values - expected)
        excess = difference - (share * _block_maximum(expected, tensor.tensor_type.name) + amount)
        if not excess.max() <= 0:  # NaN too
            worst = np.unravel_index(np.nanargmax(excess), excess.shape)
            problems.append(f"{name} differs by {difference[worst]:.3g} at {tuple(map(int, worst))}")
    wanted = GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH[model.family.architecture]])
    add_settings(wanted, model.config, model.family)
    add_vocabulary(wanted, model.vocabulary)
    for key, value in wanted.kv_data[0].items():
        stored = reader.fields[key].contents() if key in reader.fields else None
        if not same_value(stored, value.value):
            problems.append(f"{key} is {str(stored)[:80]}, not {str(value.value)[:80]}")
    return problems


def _block_maximum(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    if kind != "Q8_0":
        return np.abs(values)
    blocks = np.abs(values).reshape(-1, 32).max(1, keepdims=True)
    return np.broadcast_to(blocks, (len(blocks), 32)).reshape(values.shape)


def other_tokens(texts: Sequence[str], *, adds_space: bool, composes: bool) -> tuple[list[str], list[str]]:
    """Problems and remarks about texts that llama.cpp makes other tokens of.

    Two kinds of text it is known to read otherwise, whatever the file says. Any other is a fault of the file.

    Args:
        adds_space: the tokenizer puts a space before a text. llama.cpp does so before a text that begins with one too.
        composes: the tokenizer composes its text (NFC). llama.cpp does not.
    """
    problems, remarks = [], []
    for text in texts:
        begins_with_space = adds_space and text.startswith((" ", "▁"))
        is_composed_first = composes and not unicodedata.is_normalized("NFC", text)
        said = remarks if begins_with_space or is_composed_first else problems
        said.append(f"llama.cpp makes other tokens of {text[:60]!r}")
    return problems, remarks
