"""Adapters whose every part matters, and the folders that a run would leave of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from steep.export.adapter_weights import AdapterWeights
from steep.export.base_weights import Kind
from steep.export.gate import Gap, compare, measure, measure_folder
from steep.export.merged import Merger
from steep.export.weight_check import wrong_weight
from steep.model.adapters import add_adapters
from steep.model.attention import attention
from steep.model.load import DTYPES, QUANTISED, load_resolved
from steep.model.resolve import read_tokenizer, resolve
from tests.tiny import documents, save_tiny, tiny_tokenizer

# So sharp that what a fault in the config does to the logits is far beyond what rounding does (docs/decisions.md).
SHARP: dict[str, Any] = {"initializer_range": 0.15}


@dataclass(frozen=True)
class Text:
    """A document for the gate."""

    tokens: np.ndarray
    num_bytes: int


def texts() -> dict[str, list[Text]]:
    tokenizer = tiny_tokenizer()
    return {
        language: [
            Text(np.array(tokenizer(text)["input_ids"], np.int32), len(text.encode()))
            for text in documents(language, 4)
        ]
        for language in ("en", "ko")
    }


@dataclass
class Trained:
    """A base, an adapter over it, and the folder that holds the adapter.

    Attributes:
        place: holds the folders `base` and `final`.
        model: the adapter over the base as a run has it.
        base: in what the run keeps the base's linear layers.
        compute: what it computes in.
    """

    place: Path
    model: Any
    base: str
    compute: str

    @property
    def final(self) -> Path:
        return self.place / "final"

    @property
    def exact(self) -> Kind:
        return "dequantised" if self.base in QUANTISED else "original"

    def merger(self) -> Merger:
        resolved = resolve(str(self.place / "base"))
        return Merger(resolved, AdapterWeights(self.final), base=self.base, compute_dtype=DTYPES[self.compute])

    def write(self, name: str = "merged", kind: Kind | None = None, **given: Any) -> Path:
        folder = self.place / name
        self.merger().write(folder, kind or self.exact, tokenizer=self.final, **given)
        return folder

    @property
    def how(self) -> dict[str, Any]:
        autocast = None if self.compute == "fp32" else DTYPES[self.compute]
        return {"max_length": 64, "stride": None, "max_tokens": None, "autocast_dtype": autocast}

    def gap(self, folder: Path) -> Gap:
        """Between the adapter and the model in `folder`."""
        ours = measure(self.model, texts(), **self.how)
        backend = attention("auto", self.model.config)
        theirs = measure_folder(folder, ours, texts(), dtype=DTYPES[self.compute], attention=backend, **self.how)
        assert theirs.stream == ours.stream
        return compare(ours, theirs)

    def wrong_weight(self, folder: Path, kind: Kind | None = None) -> str | None:
        return wrong_weight(folder, self.model, self.merger().tensors, kind or self.exact)

    def problem(self, folder: Path) -> str | None:
        """What an export says of `folder`."""
        return self.wrong_weight(folder) or self.gap(folder).problem(may_fall=self.base == "int8")


def trained(
    place: Path,
    family: str = "llama",
    *,
    tied: bool | None = None,
    base: str = "nf4",
    compute: str = "fp32",
    stored: torch.dtype = torch.float32,
    adapter: Mapping[str, Any] | None = None,
) -> Trained:
    """Make all of it in `place`."""
    folder = save_tiny(family, place / "base", tied, **SHARP)
    if stored != torch.float32:
        AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    resolved = resolve(str(folder))
    tokenizer = read_tokenizer(resolved)
    model = load_resolved(resolved, tokenizer, base=base, compute_dtype=compute, attn_implementation="auto")
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 24, **(adapter or {})}
    return saved(place, grown(add_adapters(model, **settings)), base, compute)


def grown(model: PeftModel) -> PeftModel:
    """`model` as if it had been trained: LoRA's B is random, and so is a change of each trained embedding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))  # drawn on the CPU
            elif "modules_to_save" in name:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator).to(parameter.device))
    return model.eval()


def saved(place: Path, model: Any, base: str = "nf4", compute: str = "fp32") -> Trained:
    """`model` over the base in `place`, saved as a run saves it."""
    model.save_pretrained(str(place / "final"), save_embedding_layers=False)
    tiny_tokenizer().save_pretrained(place / "final")
    return Trained(place, model, base, compute)
