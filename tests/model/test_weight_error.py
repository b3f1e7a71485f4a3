"""The error of a base, told from a sample of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.model.base_tensors import BaseTensors
from steep.model.empty import empty_model
from steep.model.load import load
from steep.model.projections import base_weight
from steep.model.quantisable import quantisable
from steep.model.resolve import ResolvedModel, resolve
from steep.model.weight_error import weight_errors
from tests.fp8_checkpoints import FINE_GRAINED, publish
from tests.tiny import save_tiny

GAUSSIAN = {
    "nf4": (0.085, 0.105),
    "int8": (0.006, 0.010),
    "fp8": (0.024, 0.029),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResolvedModel, list[str]]:
    """Its weights are drawn from a Gaussian."""
    resolved = resolve(
        str(save_tiny("llama", tmp_path_factory.mktemp("gaussian"), hidden_size=256, num_hidden_layers=3))
    )
    return resolved, quantisable(empty_model(resolved))


@pytest.mark.parametrize("base", GAUSSIAN)
def test_the_error_of_gaussian_weights(base: str, model: tuple[ResolvedModel, list[str]]) -> None:
    low, high = GAUSSIAN[base]
    assert low <= weight_errors(*model)[base] <= high


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8"])
def test_it_is_that_of_the_loaded_model(base: str, model: tuple[ResolvedModel, list[str]]) -> None:
    """All of it, where a sample was looked at."""
    resolved, linear = model
    loaded: Any = load(resolved.name, base=base, compute_dtype="fp32")[0]
    tensors = BaseTensors(resolved.name)
    difference = total = 0.0
    for name in linear:
        stored, weight = base_weight(loaded.get_submodule(name), name), tensors[f"{name}.weight"]
        whole = torch.empty(stored.shape)
        stored.write(whole)
        difference += float((whole - weight).square().sum())
        total += float(weight.square().sum())
    assert weight_errors(resolved, linear)[base] == pytest.approx((difference / total) ** 0.5, rel=0.05)


def test_only_some_rows_are_read(model: tuple[ResolvedModel, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, linear = model
    read: list[str] = []
    real = BaseTensors.__getitem__
    monkeypatch.setattr(BaseTensors, "__getitem__", lambda self, name: read.append(name) or real(self, name))
    many = [each for each in linear for _ in range(8)]
    weight_errors(resolved, many)
    assert 16 <= len(read) <= 20
    assert {name.split(".")[-2] for name in read} >= {"q_proj", "gate_proj", "down_proj"}


def test_without_weights_in_16_or_32_bits_it_is_not_measured(
    model: tuple[ResolvedModel, list[str]], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, linear = model
    assert set(weight_errors(resolved, linear)) == set(GAUSSIAN)
    assert weight_errors(resolved, []) == {}
    published = resolve(str(publish(llama_folder, tmp_path / "published", FINE_GRAINED)))
    assert weight_errors(published, linear) == {}
    zeros = save_tiny("llama", tmp_path / "zeros")
    tensors = load_file(zeros / "model.safetensors")
    save_file({name: each.zero_() for name, each in tensors.items()}, zeros / "model.safetensors", {"format": "pt"})
    assert weight_errors(resolve(str(zeros)), linear) == {}
    monkeypatch.setattr("steep.model.base_tensors.weight_files", lambda *_, download, **__: [] if not download else 1)
    assert weight_errors(resolved, linear) == {}  # not in the cache
