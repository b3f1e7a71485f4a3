"""GGUF files as base models: what comes out is what went in, and what cannot be read right is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from steep.errors import UserError
from steep.export import gguf
from steep.export.gguf import write_gguf
from steep.model.gguf import converted_folder
from steep.model.gguf_families import add_settings
from steep.model.load import load
from steep.model.resolve import read_tokenizer, resolve
from tests.tiny import EOS, tiny_model, tiny_tokenizer


def written(model: PreTrainedModel, folder: Path) -> Path:
    """`model` (Llama) in f16, with the tests' tokenizer."""
    model.save_pretrained(folder / "model")
    tiny_tokenizer(bos=True).save_pretrained(folder / "model")
    return write_gguf(folder / "model", folder, "tiny")[0]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tied=False)


@pytest.fixture(scope="module")
def gguf_file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(model, tmp_path_factory.mktemp("gguf"))


def test_the_model_is_the_one_in_the_file(model: PreTrainedModel, gguf_file: Path) -> None:
    loaded, tokenizer = load(str(gguf_file), base="fp32", compute_dtype="fp32")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected, logits = model(ids).logits, loaded(ids).logits
    # The conversion rounds the weights to bf16.
    assert (logits - expected).norm() < 0.02 * expected.norm()
    text = "강물이 the river"
    assert tokenizer(text)["input_ids"][-5:] == tiny_tokenizer()(text)["input_ids"][-5:]


def test_the_end_token_is_the_files(gguf_file: Path) -> None:
    tokenizer = read_tokenizer(resolve(str(gguf_file)))
    assert (tokenizer.eos_token, tokenizer.bos_token) == (EOS, "<s>")


def test_a_converted_file_is_not_parsed_again(gguf_file: Path) -> None:
    load(str(gguf_file), base="fp32", compute_dtype="fp32")
    resolved = resolve(str(gguf_file))
    assert resolved.name == str(converted_folder(gguf_file))
    assert "gguf_file" not in resolved.arguments
    assert read_tokenizer(resolved).eos_token == EOS


def test_scaled_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    file = written(tiny_model("llama", rope_parameters=rope | {"original_max_position_embeddings": 64}), tmp_path)
    with pytest.raises(UserError, match=r"scales its rotary frequencies.*safetensors"):
        resolve(str(file))


def test_mistrals_window_is_refused(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_window(writer: GGUFWriter, *arguments: Any) -> None:
        add_settings(writer, *arguments)
        writer.add_sliding_window(64)

    monkeypatch.setattr(gguf, "add_settings", with_window)  # steep itself writes no such file
    with pytest.raises(UserError, match=r"is a Mistral with a sliding window.*safetensors"):
        resolve(str(written(model, tmp_path)))


def test_a_file_that_is_cut_off_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    for size in (3, 1000, 100_000):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            resolve(str(cut))
