"""Tensors of a base checkpoint by name, without building the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from steep.errors import UserError
from steep.model.base_tensors import BaseTensors
from tests.tiny import tiny_model


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_every_tensor_is_read_as_it_is_stored(tmp_path: Path, shard_size: str) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "60KB")
    tensors, state = BaseTensors(str(tmp_path)), model.state_dict()
    assert set(tensors) == set(state)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, state[name])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"no {shard.name}"):
        BaseTensors(str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(UserError, match="is damaged"):
        BaseTensors(str(tmp_path))


def test_says_which_file_a_tensor_is_in(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    tensors = BaseTensors(str(tmp_path))
    assert len({tensors.file(name) for name in tensors}) == len([*tmp_path.glob("*.safetensors")]) > 1
    with safe_open(tensors.file("lm_head.weight"), framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118


def test_without_a_download_a_model_that_is_not_there_has_no_tensors() -> None:
    assert len(BaseTensors("nobody/has-this", download=False)) == 0
