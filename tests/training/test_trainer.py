"""The trainer on tiny models: it learns, at the rates it was given, exactly, and says when it does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from steep.data.packing import Corpus
from steep.errors import RunError
from steep.training.trainer import Trainer
from tests.tiny import FAMILIES
from tests.training.helpers import AtStep, adapted, arguments, losses, trained_weights, trainer_for


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, None) for family in FAMILIES), ("llama", True), ("qwen2", True), ("gemma3", False)]
)
def test_every_family_learns(family: str, tied: bool | None, corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(family, tied), corpus, tmp_path, max_steps=10, embedding_learning_rate=1e-2)
    output = trainer.train()
    seen = losses(trainer)
    assert list(seen) == list(range(1, 11))
    assert sum(seen[step] for step in (8, 9, 10)) / 3 < 0.9 * seen[1]
    assert output.training_loss == pytest.approx(sum(seen.values()) / 10)
    assert trainer.proof is not None
    report = trainer.proof.report()
    assert report["ok"], report
    assert report["frozen_changed"] == []
    assert trainer.times_trained.sum() == 20
    ledger = corpus.ledger(trainer.times_trained.numpy())
    assert ledger["adds_up"], ledger["problems"]


@pytest.mark.parametrize(
    ("schedule", "warmup", "minimum", "expected"),
    [
        ("linear", 2, 0.0, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("linear", 2, 0.2, [0, 0.5, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0, 0.0, [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
        ("cosine", 0, 0.1, [0.1 + 0.45 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
        ("constant_with_warmup", 3, 0.0, [0, 1 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_rates_by_group_follow_one_shape(
    schedule: str, warmup: int, minimum: float, expected: list[float], corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trainer_for(
        adapted(),
        corpus,
        tmp_path,
        learning_rate=1e-3,
        embedding_learning_rate=3e-4,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        min_lr_rate=minimum,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * factor for factor in expected])
    for row in rows:
        assert row["learning_rate_adapters_a"] == row["learning_rate_adapters_b"] == row["learning_rate"]
        assert row["learning_rate_embeddings"] == row["embedding_learning_rate"]
        assert row["embedding_learning_rate"] == pytest.approx(0.3 * row["learning_rate"])


def test_embeddings_train_at_a_tenth_by_default(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["embedding_learning_rate"] == pytest.approx(1e-4)


def poison(model: torch.nn.Module, bad: set[int]) -> AtStep:
    """Makes the loss of the steps in `bad` NaN: the final norm gives NaN while one of them runs."""
    now = {"step": 0}
    norm = next(module for name, module in model.named_modules() if name.endswith("model.norm"))
    norm.register_forward_hook(lambda module, inputs, output: output * math.nan if now["step"] in bad else None)
    return AtStep(begin=lambda step: now.update(step=step))


def test_a_step_with_a_nan_is_not_applied(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, corpus, tmp_path, max_steps=7)
    trainer.add_callback(poison(model, {3}))
    snapshots: dict[int, dict[str, torch.Tensor]] = {}
    trainer.add_callback(AtStep(end=lambda step: snapshots.update({step: trained_weights(model)})))
    trainer.train()
    assert all(torch.equal(snapshots[2][name], snapshots[3][name]) for name in snapshots[2])
    assert not any(torch.equal(snapshots[4][name], snapshots[3][name]) for name in snapshots[3])
    assert trainer.steps_not_finite == 1
    assert list(losses(trainer)) == [1, 2, 4, 5, 6, 7]
    rows = {row["step"]: row for row in trainer.state.log_history if "tokens" in row}
    assert "loss" not in rows[3] and "grad_norm" not in rows[3]
    assert [rows[step]["steps_not_finite"] for step in (2, 3, 4)] == [0, 1, 1]
    assert trainer.times_trained.sum() == 12  # the rows of step 3 were not trained


def test_too_many_nan_steps_in_a_row_stop_the_run(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, corpus, tmp_path, max_steps=9, max_nonfinite_steps=3)
    trainer.add_callback(poison(model, {1, 2, 4, 5, 6}))
    with pytest.raises(RunError, match=r"3 steps in a row, the last of them step 6"):
        trainer.train()
    assert list(losses(trainer)) == [3]


def test_a_tensor_without_gradient_stops_the_run_by_name(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    name = "model.layers.1.self_attn.v_proj.lora_B.default"
    module = next(module for full, module in model.named_modules() if full.endswith(name))
    module.register_forward_hook(lambda module, inputs, output: output.detach())
    trainer = trainer_for(model, corpus, tmp_path)
    with pytest.raises(RunError, match=r"v_proj\.lora_[AB].*always zero or missing") as raised:
        trainer.train()
    assert "model.layers.1.self_attn.v_proj.lora_B.default.weight" in str(raised.value)
    assert "layers.0" not in str(raised.value)
    assert trainer.state.global_step == 2  # seen at the third update, before the run goes on


def test_a_trainable_tensor_that_is_never_used_stops_the_run(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    model.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    trainer = trainer_for(model, corpus, tmp_path)
    with pytest.raises(RunError, match=r"^1 of \d+ tensors that are meant to train did not: spare \(its gradient"):
        trainer.train()


def test_accumulated_unequal_micro_batches_equal_one_large_batch(corpus: Corpus, tmp_path: Path) -> None:
    """The loss is a mean over all targets of a step, however they fall into micro-batches."""
    results = []
    labels = [corpus.train[row]["labels"] for row in range(4)]
    rows = [{**corpus.train[row], "labels": labels[row].clone()} for row in range(4)]
    for number, row in enumerate(rows):
        row["labels"][10 * (number + 1) :] = -100
        del row["row"]
    assert len({int((row["labels"] != -100).sum()) for row in rows}) > 2
    for batch, accumulation in ((1, 4), (4, 1)):
        model = adapted()
        args = arguments(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            embedding_learning_rate=1.0,
            max_grad_norm=0,
            max_steps=1,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        before = trained_weights(model)
        trainer.train()
        results.append((trained_weights(model), before, losses(trainer)))
    (several, start, several_loss), (one, _, one_loss) = results
    assert several_loss == pytest.approx(one_loss, rel=1e-6)
    moved = 0
    for name, weight in one.items():
        torch.testing.assert_close(several[name], weight, rtol=1e-5, atol=1e-7)
        moved += int(not torch.equal(weight, start[name]))
    assert moved >= 16  # all of LoRA's B and the embeddings
