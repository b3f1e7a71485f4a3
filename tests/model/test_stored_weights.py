"""The files of a base, looked at before they are loaded. `tests/bad_input/model.py` has what users see of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steep.errors import UserError
from steep.model.empty import empty_model
from steep.model.load import load
from steep.model.resolve import resolve
from steep.model.stored_weights import check_finite, check_stored
from tests.tiny import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_in_order(family: str, tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolved = resolve(str(save_tiny(family, tmp_path, tied=tied)))
    capfd.readouterr()
    assert check_stored(resolved, empty_model(resolved)) == []
    check_finite(resolved)
    assert capfd.readouterr() == ("", "")


def test_shards_are_read_like_one_file(llama_folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    resolved = resolve(str(tmp_path))
    assert check_stored(resolved, empty_model(resolved)) == []
    check_finite(resolved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 2049, -1])
def test_one_value_that_is_not_finite_is_found(
    dtype: torch.dtype, value: float, place: int, llama_folder: Path, tmp_path: Path
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in load_file(llama_folder / "model.safetensors").items()}
    stored["model.layers.1.mlp.up_proj.weight"].view(-1)[place] = value
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of the 8,192 values of model\.layers\.1\.mlp\.up_proj\.weight"):
        check_finite(resolve(str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("base", "prefix"), [("nf4", "model."), ("int8", "model."), ("fp8", "model."), ("fp8", "")])
def test_no_base_is_made_of_it(base: str, prefix: str, value: float, tmp_path: Path) -> None:
    """What is quantised from a NaN may be a number. Without a prefix transformers finds the place of a weight."""
    file = save_tiny("llama", tmp_path, tied=True) / "model.safetensors"
    stored = {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in load_file(file).items()}
    stored[f"{prefix}layers.1.mlp.up_proj.weight"][9, 3] = value
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.name: 1 of the 8,192 values of .*layers\.1\.mlp\.up_proj\.weight"):
        load(str(tmp_path), base=base)


def test_values_at_the_end_of_a_dtype_are_no_fault(llama_folder: Path, tmp_path: Path) -> None:
    stored = load_file(llama_folder / "model.safetensors")
    stored["model.norm.weight"].fill_(torch.finfo(torch.float32).max)
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_finite(resolve(str(tmp_path)))


def test_what_the_config_has_no_place_for_is_told(llama_folder: Path, tmp_path: Path) -> None:
    stored = load_file(llama_folder / "model.safetensors")
    save_file({**stored, "model.layers.7.x": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    resolved = resolve(str(tmp_path))
    (told,) = check_stored(resolved, empty_model(resolved))
    assert "holds model.layers.7.x, for which its config.json has no place" in told


def test_load_refuses_what_transformers_would_fill_with_random_numbers(llama_folder: Path, tmp_path: Path) -> None:
    stored = load_file(llama_folder / "model.safetensors")
    del stored["lm_head.weight"]
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"does not hold lm_head\.weight"):
        load(str(tmp_path), base="fp32")


def test_a_hub_model_that_is_not_here_is_not_downloaded_for_a_plan(llama_folder: Path) -> None:
    resolved = resolve(str(llama_folder))
    elsewhere = type(resolved)("nobody/nothing", {}, resolved.config)
    assert check_stored(elsewhere, empty_model(resolved), download=False) == []
    with pytest.raises(UserError, match=r"weights of nobody/nothing are not in the local cache.*HF_HUB_OFFLINE"):
        check_stored(elsewhere, empty_model(resolved))


def test_bytes_that_are_read_are_told(llama_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    check_finite(resolve(str(llama_folder)), progress=lambda done, total: told.append((done, total)))
    size = sum(file.stat().st_size for file in llama_folder.glob("*.safetensors"))
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and {total for _, total in told} == {size}
    assert 0.9 * size < told[-1][0] <= size
