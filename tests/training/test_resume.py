"""A run that was stopped and resumed is the run that was never stopped, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.load import load
from steep.training.trainer import Trainer
from tests.training.helpers import AtStep, adapted, trained_weights, trainer_for

STEP_FIELDS = ("loss", "grad_norm", "learning_rate", "embedding_learning_rate", "tokens", "epoch")


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Paths at which two trees of plain values and tensors are not the same to the bit."""
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return [] if same else [where]
    if isinstance(left, dict):
        if list(left) != list(right):
            return [f"{where}: keys"]
        return [found for key in left for found in differences(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{where}: length"]
        return [
            found
            for i, pair in enumerate(zip(left, right, strict=True))
            for found in differences(*pair, f"{where}[{i}]")
        ]
    return [] if left == right else [where]


def make(llama: Path, corpus: Corpus, folder: Path, trained_dtype: str) -> Trainer:
    torch.manual_seed(5)
    model, _ = load(str(llama), base="nf4", compute_dtype=trained_dtype)
    model = add_adapters(model, r=8, lora_alpha=8, lora_dropout=0.1, trained_dtype=trained_dtype)
    return trainer_for(
        model,
        corpus,
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=2,
        optim="adamw_8bit",
        lr_scheduler_type="cosine",
        warmup_steps=2,
        min_lr_rate=0.1,
        save_strategy="steps",
        save_steps=5,
        weight_decay=0.01,
    )


@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
def test_resumed_is_never_stopped(trained_dtype: str, llama_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    whole = make(llama_folder, corpus, tmp_path / "whole", trained_dtype)
    start = trained_weights(whole.model)
    whole.train()
    assert len(whole.state.log_history) - 1 == whole.state.global_step > 12
    assert differences(start, trained_weights(whole.model)) != []
    assert whole.optimizer is not None
    for step in (5, 10):  # within the first epoch, and within the second
        torch.manual_seed(99)
        resumed = make(llama_folder, corpus, tmp_path / f"resumed-{step}", trained_dtype)
        seen: list[int] = []
        resumed.add_callback(AtStep(begin=seen.append))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert seen == list(range(step + 1, whole.state.global_step + 1))
        assert differences(trained_weights(whole.model), trained_weights(resumed.model)) == []
        assert resumed.optimizer is not None
        assert differences(whole.optimizer.state_dict(), resumed.optimizer.state_dict()) == []
        for expected, row in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
            assert [row[field] for field in STEP_FIELDS] == [expected[field] for field in STEP_FIELDS]
        assert torch.equal(whole.times_trained, resumed.times_trained)
        assert whole.times_trained.min() == whole.times_trained.max() == 2
        assert whole.proof is not None and resumed.proof is not None
        assert resumed.proof.report() == whole.proof.report()
        assert resumed.proof.report()["ok"]


def test_checkpoints_hold_no_pickle(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(
        adapted(), corpus, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_8bit"
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".jinja"}
        for path in files:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    assert {"optimizer", "schedule", "random", "observations"} <= {
        p.stem for p in (tmp_path / "checkpoint-4").iterdir()
    }
    assert not list(tmp_path.glob(".*"))


def test_old_checkpoints_go(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_of_other_adapters_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    trainer_for(adapted(), corpus, tmp_path / "a", save_strategy="steps", save_steps=6).train()
    other = trainer_for(adapted(r=4), corpus, tmp_path / "b")
    with pytest.raises(UserError, match="does not fit"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
