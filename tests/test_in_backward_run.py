"""`training.optimizer_in_backward` from the run file to the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steep.errors import UserError
from steep.plan import plan_run
from steep.run import train_run
from steep.schema import RunConfig
from steep.settings import training_arguments
from steep.training.adamw8bit import AdamW8bit
from tests.test_run import lines, run_file

LEAN: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0}


def lean_file(model: Path, corpus: Path, folder: Path, fused: str, r: int = 8, **training: Any) -> RunConfig:
    sections = {"model": {"base": "nf4", "fused": fused}, "adapter": {"r": r}, "training": {**LEAN, **training}}
    return run_file(model, corpus, folder, **sections)


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[float]], Any]:
    """The weights, what was logged of each step, and the proof."""
    logged = [[row["loss"], row["grad_norm"]] for row in lines(folder / "metrics.jsonl")]
    proof = json.loads((folder / "proof.json").read_text("utf-8"))
    return load_file(folder / "final" / "adapter_model.safetensors"), logged, proof


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_run_is_the_one_with_updates_at_the_end(
    fused: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is killed, and resumed with either kind of update."""
    updates: list[int] = []
    update = AdamW8bit.update
    monkeypatch.setattr(
        AdamW8bit, "update", lambda self, members: (updates.append(len(members)), update(self, members))[1]
    )

    def config(folder: str, **training: Any) -> RunConfig:
        return lean_file(llama_folder, korean_corpus, tmp_path / folder, fused, **training)

    train_run(config("at-the-end", optimizer_in_backward=False))
    assert not updates
    train_run(config("in-backward"))
    assert sorted(updates) == sorted(6 * [14, 14, 1, 1])
    weights, logged, proof = results(tmp_path / "at-the-end")
    assert proof["ok"] and all(norm > 0 for _, norm in logged)
    killed = tmp_path / "in-backward"
    for in_backward in (None, True, False):
        if in_backward is not None:
            shutil.rmtree(killed / "checkpoint-6")
            shutil.rmtree(killed / "final")
            train_run(config("in-backward", optimizer_in_backward=in_backward), resume=True)
        found, told, seen = results(killed)
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
        assert told == logged and seen == proof
    assert len(updates) == 4 * (6 + 3)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"max_grad_norm": 1.0}, r"^training\.max_grad_norm: clipping .* training\.optimizer_in_backward: false"),
        ({"gradient_accumulation_steps": 8}, r"^training\.gradient_accumulation_steps: .* Set it to 1, or set"),
        ({"optim": "adamw_torch"}, r"^training\.optim: adamw_torch .* Set it to adamw_8bit"),
        ({"spike_action": "skip"}, r"^training\.spike_action: .* Set it to warn or rollback"),
    ],
)
def test_contradictions_are_found_by_the_plan(
    training: dict[str, Any], told: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        plan_run(lean_file(llama_folder, korean_corpus, tmp_path / "run", "off", **training))
    assert not (tmp_path / "run").exists()


def test_a_loss_scaler_is_found_by_the_plan(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Products in fp16 need one; this machine has none."""
    config = lean_file(llama_folder, korean_corpus, tmp_path / "run", "off")
    with pytest.raises(UserError, match=r"^training\.optimizer_in_backward: a loss scaler .* Compute in bf16 or fp32"):
        training_arguments(config, torch.float16)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_the_plan_counts_it(fused: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Its rows are short, for else the peak is where no gradients are."""
    whole, lean = (
        plan_run(
            lean_file(
                llama_folder, korean_corpus, tmp_path / "run", fused, r=64, per_device_train_batch_size=1,
                optimizer_in_backward=each,
            )
        ).memory
        for each in (False, True)
    )  # fmt: skip
    assert lean["gradients"] < whole["gradients"] and sum(lean.values()) < sum(whole.values())
