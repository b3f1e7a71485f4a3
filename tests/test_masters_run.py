"""fp32 states and masters from a run file: they go on at a resume, and masters may come and go with `--allow`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from steep.run import train_run
from steep.schema import RunConfig
from tests.test_run import run_file

FUSED = {"base": "bf16", "compute_dtype": "bf16", "trained_dtype": "bf16", "fused": "on"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def masters(folder: Path) -> list[torch.Tensor]:
    """What stands beside weights in a checkpoint."""
    states = load_file(folder / "optimizer.safetensors").values()
    return [state for state in states if state.dtype == torch.int16]


def test_a_run_with_masters_goes_on_to_the_bit(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    def config(folder: str, **training: Any) -> RunConfig:
        given = {"optimizer_states": "fp32", "master_weights": "all", **training}
        return run_file(llama_folder, korean_corpus, tmp_path / folder, model=FUSED, training=given)

    def kill(folder: str) -> None:
        for name in ("checkpoint-6", "final"):
            shutil.rmtree(tmp_path / folder / name)

    train_run(config("run"))
    wanted = weights(tmp_path / "run")
    assert {weight.dtype for weight in wanted.values()} == {torch.bfloat16}
    kept = masters(tmp_path / "run" / "checkpoint-6")
    assert sum(low.numel() for low in kept) == sum(weight.numel() for weight in wanted.values())
    assert all(low.any() for low in kept)
    kill("run")
    train_run(config("run"), resume=True)
    found, again = weights(tmp_path / "run"), masters(tmp_path / "run" / "checkpoint-6")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(*pair) for pair in zip(again, kept, strict=True))
    kill("run")
    train_run(config("run", master_weights="none"), resume=True, allow=["training.master_weights"])
    assert masters(tmp_path / "run" / "checkpoint-6") == []
    assert any(not torch.equal(weight, wanted[name]) for name, weight in weights(tmp_path / "run").items())
    train_run(config("branch", master_weights="embeddings"), branch=tmp_path / "run" / "checkpoint-6")
    (last,) = (tmp_path / "branch").glob("checkpoint-12")
    assert len(masters(last)) == len([name for name in wanted if "embed_tokens" in name or "lm_head" in name]) > 0
