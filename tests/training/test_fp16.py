"""fp16 with loss scaling, on the CPU: accelerate scales only on a GPU, so `fp16` sets what it would set there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.packing import Corpus
from steep.errors import RunError
from steep.training.trainer import Trainer
from tests.training.helpers import AtStep, adapted, losses, trained_weights, trainer_for
from tests.trees import tree_differences

TOO_HIGH = 2.0**40  # no fp16 gradient survives it
SCALE = 2.0**16  # torch's own first scale
Fp16 = Callable[..., Trainer]


@pytest.fixture
def fp16(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fp16:
    """Makes a trainer whose products run in fp16; after an overflow its scale goes from TOO_HIGH to SCALE at once."""

    def make(model: Any, init_scale: float = SCALE, folder: str = "run", **settings: Any) -> Trainer:
        trainer = trainer_for(model, corpus, tmp_path / folder, **settings)
        accelerator = trainer.accelerator
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=SCALE / TOO_HIGH)
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        return trainer

    return make


def overflow(trainer: Trainer, steps: set[int]) -> None:
    """Make the loss scale too high in `steps`."""
    scaler = trainer.accelerator.scaler
    assert scaler is not None
    trainer.add_callback(AtStep(begin=lambda step: scaler.update(TOO_HIGH) if step in steps else None))


def weights_after(trainer: Trainer) -> dict[int, dict[str, torch.Tensor]]:
    """Filled while it trains: step → trained weights after it."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    trainer.add_callback(AtStep(end=lambda step: seen.update({step: trained_weights(trainer.model)})))
    return seen


def logged(trainer: Trainer) -> dict[int, dict[str, Any]]:
    return {int(row["step"]): row for row in trainer.state.log_history if "tokens" in row}


def test_it_learns_as_in_fp32(fp16: Fp16, corpus: Corpus, tmp_path: Path) -> None:
    exact = trainer_for(adapted(), corpus, tmp_path / "fp32", max_steps=10, embedding_learning_rate=1e-2)
    exact.train()
    model = adapted()
    dtypes: set[torch.dtype] = set()
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    trainer = fp16(model, max_steps=10, embedding_learning_rate=1e-2)
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.float16} and trainer.autocast_dtype == torch.float16
    assert {weight.dtype for weight in trained_weights(model).values()} == {torch.float32}
    seen = losses(trainer)
    assert sum(seen[step] for step in (8, 9, 10)) / 3 < 0.9 * seen[1]
    assert list(seen.values()) == pytest.approx(list(losses(exact).values()), rel=5e-3)
    assert seen != losses(exact)
    assert trainer.proof is not None and trainer.proof.report()["ok"]
    assert trainer.steps_scaler_skipped == trainer.steps_not_finite == 0
    assert trainer.times_trained.sum() == 20


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit"])
def test_a_step_that_overflows_is_skipped_and_counted_apart(optim: str, fp16: Fp16, corpus: Corpus) -> None:
    """Fused optimizers skip by themselves, and accelerate does not notice."""
    trainer = fp16(adapted(), init_scale=TOO_HIGH, max_steps=7, optim=optim)
    start, after = trained_weights(trainer.model), weights_after(trainer)
    overflow(trainer, {4})
    trainer.train()
    assert tree_differences(after[1], start) == tree_differences(after[4], after[3]) == []
    for step in (2, 3, 5, 6, 7):
        still = [name for name, weight in after[step].items() if torch.equal(weight, after[step - 1][name])]
        assert still == ([name for name in start if "lora_A" in name] if step == 2 else [])  # B was zero up to here
    assert trainer.steps_scaler_skipped == 2 and trainer.steps_not_finite == 0
    rows = logged(trainer)
    assert [rows[step]["steps_scaler_skipped"] for step in rows] == [1, 1, 1, 2, 2, 2, 2]
    assert [rows[step]["steps_not_finite"] for step in rows] == [0] * 7
    assert [step for step in rows if "grad_norm" not in rows[step]] == [1, 4]
    assert all("loss" in row for row in rows.values())
    assert trainer.times_trained.sum() == 10
    ledger = corpus.ledger(trainer.times_trained.numpy(), trainer.times_seen.numpy())
    assert ledger["adds_up"], ledger["problems"]
    assert trainer.proof is not None
    report = trainer.proof.report()
    assert report["ok"] and {record["updates"] for record in report["trained"].values()} == {5}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("offset", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_applied(offset: float, optim: str, fp16: Fp16) -> None:
    """An infinite loss may have finite gradients, which the loss scaler would let pass."""
    trainer = fp16(adapted(), max_steps=6, optim=optim)
    after, now = weights_after(trainer), {"step": 0}
    trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))

    def spoil(module: Any, inputs: Any, output: Any) -> None:
        if now["step"] == 3:
            output["loss"] = output["loss"] + offset

    trainer.model.register_forward_hook(spoil)
    trainer.train()
    assert tree_differences(after[3], after[2]) == []
    assert not any(torch.equal(after[4][name], weight) for name, weight in after[3].items())
    assert trainer.steps_not_finite == 1 and trainer.steps_scaler_skipped == 0
    assert list(losses(trainer)) == [1, 2, 4, 5, 6]
    assert trainer.times_trained.sum() == 10


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(fp16: Fp16, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.1" in n and "down_proj.lora_B" in n)
    weight.register_hook(lambda gradient: gradient * math.nan)
    trainer = fp16(model, init_scale=4.0, max_steps=20)
    assert trainer.accelerator.scaler is not None
    trainer.accelerator.scaler.set_backoff_factor(0.5)
    with pytest.raises(RunError, match="3 steps in a row, the last of them step 5"):
        trainer.train()
    assert (trainer.steps_scaler_skipped, trainer.steps_not_finite) == (2, 3)  # scales 4 and 2; then 1, 0.5 and 0.25
    assert f"step 3: the gradient of {name} is not finite" in caplog.text


def test_gradients_are_measured_and_clipped_unscaled(fp16: Fp16, corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "embedding_learning_rate": 1.0,
        "max_grad_norm": 0.5,
        "max_steps": 1,
    }
    norms, moved = [], []
    for make in (
        lambda model: trainer_for(model, corpus, tmp_path / "fp32", **settings),
        lambda m: fp16(m, **settings),
    ):
        model = adapted()
        start, trainer = trained_weights(model), make(model)
        trainer.train()
        norms.append(logged(trainer)[1]["grad_norm"])
        steps = [weight - start[name] for name, weight in trained_weights(model).items()]
        moved.append(float(torch.linalg.vector_norm(torch.cat([step.flatten() for step in steps]))))
    exact, half = norms
    assert exact > 1 and half == pytest.approx(exact, rel=2e-3)
    assert moved == pytest.approx([0.5, 0.5], rel=1e-3)


def test_resumed_is_never_stopped(fp16: Fp16, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_8bit"}
    whole = fp16(adapted(), folder="whole", **settings)
    overflow(whole, {3})
    whole.train()
    assert whole.accelerator.scaler is not None and whole.steps_scaler_skipped == 1
    resumed = fp16(adapted(), init_scale=1.0, folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.accelerator.scaler is not None
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert whole.accelerator.scaler.get_scale() == SCALE
    assert tree_differences(trained_weights(whole.model), trained_weights(resumed.model)) == []
    assert whole.optimizer is not None and resumed.optimizer is not None
    assert tree_differences(whole.optimizer.state_dict(), resumed.optimizer.state_dict()) == []
    assert losses(resumed) == losses(whole)
    assert torch.equal(whole.times_trained, resumed.times_trained)
    assert resumed.steps_scaler_skipped == 1
