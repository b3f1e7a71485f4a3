"""A run that was stopped and resumed is the run that was never stopped, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from steep.data.packing import Corpus, pack
from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.load import load
from steep.training import bitsandbytes_update
from steep.training.trainer import Trainer
from tests.tiny import write_corpus
from tests.training.helpers import AtStep, adapted, trained_weights, trainer_for
from tests.trees import tree_differences

STEP_FIELDS = ("loss", "grad_norm", "learning_rate", "embedding_learning_rate", "tokens", "epoch")
OF_THE_PROCESS = {"tokens_per_second", "peak_memory_bytes", "save_seconds"}


def assert_same(whole: Trainer, resumed: Trainer) -> None:
    """Weights, optimizer, log, ledger and proof of the two are the same to the bit."""
    assert tree_differences(trained_weights(whole.model), trained_weights(resumed.model)) == []
    assert whole.optimizer is not None and resumed.optimizer is not None
    assert tree_differences(whole.optimizer.state_dict(), resumed.optimizer.state_dict()) == []
    for expected, row in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        assert [row[field] for field in STEP_FIELDS] == [expected[field] for field in STEP_FIELDS]
    assert torch.equal(whole.times_trained, resumed.times_trained)
    assert whole.proof is not None and resumed.proof is not None
    assert resumed.proof.report() == whole.proof.report()
    assert resumed.proof.report()["ok"]


def make(
    llama: Path, corpus: Corpus, folder: Path, trained_dtype: str, base: str = "nf4", r: int = 8, **settings: Any
) -> Trainer:
    torch.manual_seed(5)
    model, _ = load(str(llama), base=base, compute_dtype=trained_dtype)
    model = add_adapters(model, r=r, lora_alpha=8, lora_dropout=0.1, trained_dtype=trained_dtype)
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "min_lr_rate": 0.1,
        "save_strategy": "steps",
        "save_steps": 5,
        "weight_decay": 0.01,
        **settings,
    }
    return trainer_for(model, corpus, folder, **given)


@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
def test_resumed_is_never_stopped(trained_dtype: str, llama_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    whole = make(llama_folder, corpus, tmp_path / "whole", trained_dtype)
    start = trained_weights(whole.model)
    whole.train()
    assert len(whole.state.log_history) - 1 == whole.state.global_step > 12
    assert tree_differences(start, trained_weights(whole.model)) != []
    assert whole.times_trained.min() == whole.times_trained.max() == 2
    for step in (5, 10):  # within the first epoch, and within the second
        torch.manual_seed(99)
        resumed = make(llama_folder, corpus, tmp_path / f"resumed-{step}", trained_dtype)
        seen: list[int] = []
        resumed.add_callback(AtStep(begin=seen.append))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert seen == list(range(step + 1, whole.state.global_step + 1))
        assert_same(whole, resumed)


def test_tensors_that_share_an_8bit_update_resume(
    llama_folder: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run wholly in bf16, at a rank that gives most adapters the 4,096 elements from which states are 8-bit."""
    shared: set[tuple[int, torch.dtype]] = set()
    update = bitsandbytes_update._update

    def spy(pieces: list[Any], *rest: Any) -> None:
        shared.add((len(pieces), pieces[0].moments[0].dtype))
        update(pieces, *rest)

    monkeypatch.setattr(bitsandbytes_update, "_update", spy)
    whole = make(llama_folder, corpus, tmp_path / "whole", "bf16", base="bf16", r=64)
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16} and whole.autocast_dtype is None
    whole.train()
    assert max(count for count, dtype in shared if dtype == torch.uint8) >= 4  # o, gate, up, down, then the next q
    assert max(count for count, dtype in shared if dtype == torch.float32) >= 2  # k and v
    resumed = make(llama_folder, corpus, tmp_path / "resumed", "bf16", base="bf16", r=64)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert_same(whole, resumed)


@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("optim", "optim_args", "rate"),
    [
        ("adamw_torch", None, 1e-3),
        ("adamw_torch_fused", None, 1e-3),
        ("adafactor", None, 1e-2),
        ("sgd", "momentum=0.9", 2.0),
        ("lion_32bit", None, 1e-3),
        ("lion_8bit", None, 1e-3),
    ],
)
def test_every_kind_of_optimizer_resumes(
    optim: str, optim_args: str | None, rate: float, trained_dtype: str, corpus: Corpus, tmp_path: Path
) -> None:
    """Adafactor keeps fp32 states of bf16 weights, which torch rounds to bf16 when it loads them."""

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(5)
        model = adapted(r=64, lora_dropout=0.1, trained_dtype=trained_dtype)
        return trainer_for(
            model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[trained_dtype]),
            corpus,
            tmp_path / folder,
            max_steps=6,
            optim=optim,
            optim_args=optim_args,
            learning_rate=rate,
            embedding_learning_rate=rate,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=4,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    start = trained_weights(whole.model)
    whole.train()
    assert not any(torch.equal(weight, start[name]) for name, weight in trained_weights(whole.model).items())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    ("by_epoch", "further"),
    [
        (("logging", "eval"), {}),
        (("logging",), {"eval_strategy": "steps", "eval_steps": 2}),
        (("eval",), {"logging_steps": 2}),
        (("eval",), {"logging_steps": 2, "save_strategy": "epoch"}),
        (("logging", "eval"), {"max_steps": 10}),  # the last epoch is left in its midst
    ],
)
def test_every_checkpoint_knows_what_was_logged_and_scored_at_its_step(
    by_epoch: tuple[str, ...], further: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    """Also one of an epoch's last step, where something is due with the step and something with the epoch's end."""
    whole_folder = tmp_path / "whole"

    def trainer(folder: Path) -> Trainer:
        settings: dict[str, Any] = {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 2}
        settings |= {"save_strategy": "steps", "save_steps": 1}
        settings |= {f"{what}_strategy": "epoch" for what in by_epoch}
        return trainer_for(adapted(lora_dropout=0.1), corpus, folder, **settings | further, eval_max_tokens=200)

    def lines(trainer: Trainer) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key not in OF_THE_PROCESS}
            for row in trainer.state.log_history
            if "train_loss" not in row
        ]

    whole = trainer(whole_folder)
    whole.train()
    per_epoch = -(-len(corpus.train) // 5)
    last = whole.state.global_step
    for what in by_epoch:
        key = {"logging": "loss", "eval": "eval_loss"}[what]
        assert {row["step"] for row in lines(whole) if key in row} == {per_epoch, last}
    for step in (per_epoch - 1, per_epoch, per_epoch + 1, last):
        checkpoint = whole_folder / f"checkpoint-{step}"
        if further.get("save_strategy") == "epoch" and not checkpoint.is_dir():
            continue
        resumed = trainer(tmp_path / f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert lines(resumed) == lines(whole), step


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


@pytest.mark.parametrize(
    ("name", "before", "here"),
    [
        ("per_device_train_batch_size", 2, 1),
        ("gradient_accumulation_steps", 2, 1),
        ("seed", 42, 7),
        ("data_seed", None, 7),
    ],
)
def test_a_run_does_not_go_on_in_other_steps(
    name: str, before: int | None, here: int, corpus: Corpus, tmp_path: Path
) -> None:
    """Some rows would be trained twice, and others never."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer_for(adapted(), corpus, tmp_path / "a", max_steps=2, **settings).train()
    place = str(tmp_path / "a" / "checkpoint-2")
    other = trainer_for(adapted(), corpus, tmp_path / "b", max_steps=4, **{**settings, name: here})
    start = trained_weights(other.model)
    told = rf"^{name}: it was {before} up to .*checkpoint-2, and is {here} here: .*Give {name}={before}, or begin a new"
    with pytest.raises(UserError, match=told):
        other.train(resume_from_checkpoint=place)
    assert tree_differences(start, trained_weights(other.model)) == []
    trainer_for(adapted(), corpus, tmp_path / "c", max_steps=4, **settings).train(resume_from_checkpoint=place)


def test_a_run_does_not_go_on_with_another_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also not with as many rows of it."""
    trainer_for(adapted(), corpus, tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = write_corpus(tmp_path / "text", 20)
    (file,) = folder.iterdir()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps({**row, "text": row["text"][::-1]}) + "\n" for row in rows), encoding="utf-8")
    text = pack(folder, tokenizer, max_length=64, holdout=0.1, cache_dir=tmp_path / "tokens")
    other = trainer_for(adapted(), text, tmp_path / "b", max_steps=4)
    with pytest.raises(UserError, match=rf"^train_dataset: its fingerprint is {text.fingerprint}, and .*Pack the same"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
