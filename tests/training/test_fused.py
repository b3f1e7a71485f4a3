"""The trainer over a model that computes with steep's fused layers, as a script installs it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import Subset

from steep import ranks
from steep.data.packed_dataset import collate
from steep.data.packing import Corpus
from steep.errors import UserError
from steep.model.attention_half import AttentionHalf
from steep.model.choices import choices_of
from steep.model.install import fused_of, install
from steep.model.unwrap import unwrap
from steep.model.walked import Walked
from steep.ops.packing import Packing
from steep.training.adamw8bit import AdamW8bit
from steep.training.arguments import TrainingArguments
from steep.training.checkpoint import read_choices
from steep.training.fused import gradients_summed_in_fp32
from steep.training.guard import GoBack
from steep.training.trainer import Trainer
from tests.training.helpers import AtStep, adapted, arguments, losses, trainer_for

BF16 = torch.bfloat16


def fused(**settings: Any) -> Any:
    given = {name: settings.pop(name) for name in ("levels", "logits") if name in settings}
    return install(adapted(**settings), **given)


# ---- what needs logits


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_what_needs_logits_is_refused_by_name(name: str, corpus: Corpus, tmp_path: Path) -> None:
    def make(model: Any) -> Trainer:
        asked: dict[str, Any] = {name: lambda *given: {}}
        return Trainer(model=model, args=arguments(tmp_path), train_dataset=corpus, **asked)

    with pytest.raises(UserError, match=rf"{name}: it needs logits.*logits=True"):
        make(fused())
    make(adapted())
    make(fused(logits=True))


def test_label_smoothing_falls_back_by_name(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers makes that loss from whole logits, which the fused model gives where there are no labels."""
    seen = []
    for model in (fused(), adapted()):
        trainer = trainer_for(model, corpus, tmp_path, label_smoothing_factor=0.1, max_steps=3)
        trainer.train()
        seen.append([*losses(trainer).values()])
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    assert [record.message for record in caplog.records if "label_smoothing_factor needs them" in record.message]


# ---- gradients of several micro-batches


def gradients_of_a_step(model: Any, corpus: Corpus, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    given = {"optim": "adamw_8bit", "max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 1, **settings}
    trainer = trainer_for(model, corpus, folder, **given)
    found: dict[str, torch.Tensor] = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Look())
    trainer.train()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_micro_batches_of_bf16_weights_add_up_in_fp32(family: str, corpus: Corpus, tmp_path: Path) -> None:
    """As exact as one micro-batch of all rows in fp32 sums, embeddings too; in bf16 they would not be."""

    def model() -> Any:
        made = adapted(family, trained_dtype="bf16").to(BF16)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:  # zero, A would have no gradient
                parameter.data.normal_(0, 0.05, generator=generator)
        return install(made)

    summed = gradients_of_a_step(model(), corpus, tmp_path, gradient_accumulation_steps=4)
    assert {gradient.dtype for gradient in summed.values()} == {torch.float32}
    assert any("embed_tokens" in name for name in summed) and any("lora_A" in name for name in summed)
    for name, gradient in summed.items():
        rounded = gradient.to(BF16).float()
        assert not torch.equal(rounded, gradient), f"{name} was rounded"
    single = gradients_of_a_step(model(), corpus, tmp_path, per_device_train_batch_size=4)
    assert {gradient.dtype for gradient in single.values()} == {BF16}
    for name, gradient in single.items():
        difference = (gradient.float() - summed[name]).norm() / summed[name].norm()
        assert difference < 0.02, f"{name}: {difference:.3f}"


def test_and_in_bf16_where_that_is_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    """Half the memory, and a sum that is rounded at each micro-batch: near the other, and not the same."""
    found = []
    for number, dtype in enumerate(("fp32", "bf16")):
        model = install(adapted(trained_dtype="bf16").to(BF16))
        given: dict[str, Any] = {"gradient_accumulation_steps": 4, "grad_accum_dtype": dtype}
        found.append(gradients_of_a_step(model, corpus, tmp_path / str(number), **given))
    exact, rounded = found
    assert {gradient.dtype for gradient in exact.values()} == {torch.float32} and exact.keys() == rounded.keys()
    assert {gradient.dtype for gradient in rounded.values()} == {BF16}
    for name, gradient in exact.items():
        if gradient.norm() > 0:  # that of A is 0 while B is
            difference = (rounded[name].float() - gradient).norm() / gradient.norm()
            assert difference < 0.02, f"{name}: {difference:.3f}"
    assert any(not torch.equal(exact[name].to(BF16), gradient) for name, gradient in rounded.items())


def test_two_micro_batches_are_their_sum_rounded_once(corpus: Corpus, tmp_path: Path) -> None:
    """Each micro-batch's own gradients, added up outside, are to the bit what autograd keeps."""

    def parts(model: Any, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        found = []
        for row in rows:
            model.zero_grad(set_to_none=True)
            batch = {name: value[None] for name, value in corpus.train[row].items() if name != "row"}
            model(**batch, use_cache=False, num_items_in_batch=torch.tensor(100)).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return found

    model = install(adapted(trained_dtype="bf16").to(BF16)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32
    one, other = parts(model, [0, 1])
    model.zero_grad(set_to_none=True)
    for row in (0, 1):
        batch = {name: value[None] for name, value in corpus.train[row].items() if name != "row"}
        model(**batch, use_cache=False, num_items_in_batch=torch.tensor(100)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, one[name] + other[name]), name


@pytest.mark.parametrize(("optim", "accumulation"), [("adamw_8bit", 1), ("adamw_torch", 2)])
def test_else_gradients_have_the_dtype_of_their_weights(
    optim: str, accumulation: int, corpus: Corpus, tmp_path: Path
) -> None:
    model = install(adapted(trained_dtype="bf16").to(BF16))
    found = gradients_of_a_step(
        model, corpus, tmp_path, optim=optim, gradient_accumulation_steps=accumulation
    )  # adamw_torch takes gradients of its weights' dtype only
    assert {gradient.dtype for gradient in found.values()} == {BF16}


def bf16() -> Any:
    return install(adapted(trained_dtype="bf16").to(BF16))


def kept_in(model: Any) -> set[Any]:
    """The dtypes that autograd keeps gradients in."""
    return {parameter.grad_dtype for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("broken_off", [False, True])
def test_any_optimizer_can_train_the_model_afterwards(broken_off: bool, corpus: Corpus, tmp_path: Path) -> None:
    """Also where a step was broken off and has left gradients."""

    class Interrupts(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert kept_in(model) == {torch.float32}
            if broken_off and state.global_step == 1:
                assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
                raise KeyboardInterrupt

    model = bf16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = trainer_for(
        model, corpus, tmp_path / "first", optim="adamw_8bit", max_steps=2, gradient_accumulation_steps=2
    )
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt) if broken_off else nullcontext():
        trainer.train()
    assert kept_in(model) == {BF16} and all(parameter.grad is None for parameter in trained)
    rows = [{name: corpus.train[row][name] for name in ("input_ids", "labels")} for row in range(2)]
    for fused_step in (False, True):
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=not fused_step, fused=fused_step)
        model(**{name: value[None] for name, value in rows[0].items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "second"), max_steps=1, optim="adamw_torch", report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model=model, args=args, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]


def test_a_run_that_goes_back_adds_up_in_fp32_until_its_end(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = bf16(), []
    trainer = trainer_for(
        model, corpus, tmp_path, optim="adamw_8bit", max_steps=4, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=1, spike_action="rollback",
    )  # fmt: skip
    judge, spikes = trainer.guard.judge, iter([GoBack(3)])

    def judged(step: int, *given: Any) -> Any:
        seen.append((step, kept_in(model)))
        if step == 3 and (spike := next(spikes, None)):
            raise spike
        return judge(step, *given)

    monkeypatch.setattr(trainer.guard, "judge", judged)
    trainer.train()
    assert seen == [(step, {torch.float32}) for step in (1, 2, 3, 3, 4)]
    assert kept_in(model) == {BF16}


def test_gradients_from_before_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses another dtype while there is a gradient. DDP's are in the weights' own."""
    model = bf16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained[0].grad_dtype = None  # what a caller chose comes back
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW8bit(trained)
    with gradients_summed_in_fp32(model, optimizer, 2):
        assert kept_in(model) == {torch.float32}
    assert [parameter.grad_dtype for parameter in trained] == [None] + [BF16] * (len(trained) - 1)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with gradients_summed_in_fp32(model, optimizer, 2):
        assert kept_in(model) == {None, BF16}


# ---- where documents lie


@pytest.mark.parametrize("logits", [None, True, False])
def test_packed_rows_can_be_evaluated(logits: bool | None, corpus: Corpus, tmp_path: Path) -> None:
    """transformers passes on all that the collator gives."""
    model = adapted() if logits is None else fused(logits=logits)
    trainer, rows = trainer_for(model, corpus, tmp_path), Subset(corpus.train, range(3))
    batch = {name: value for name, value in collate([*rows]).items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        expected = float(model.eval()(**batch, use_cache=False).loss)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    predicted: Any = trainer.predict(rows)  # pyright: ignore[reportArgumentType]
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert predicted.label_ids.shape == batch["labels"].shape
    assert logits is False or predicted.predictions.shape[:2] == batch["labels"].shape


def test_the_host_need_not_ask_where_documents_lie(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read positions back, and so wait for all that the GPU has to do, in each micro-batch."""
    asked = []
    original = Packing.from_positions
    monkeypatch.setattr(Packing, "from_positions", lambda positions: (asked.append(positions), original(positions))[1])
    model = fused()
    trainer = trainer_for(model, corpus, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert fused_of(model).calls == 4 and not asked
    trainer.evaluate(Subset(corpus.train, range(2)))
    assert fused_of(model).calls == 5 and not asked


# ---- recomputation


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_transformers_checkpointing_makes_no_double_recomputation(
    level: int, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    project = AttentionHalf.project
    monkeypatch.setattr(AttentionHalf, "project", lambda self, *given: calls.append(1) or project(self, *given))
    for checkpointing in (False, True):
        calls.clear()
        model = fused(levels=level)
        prefix = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
        asked = {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
        trainer_for(model, corpus, tmp_path, max_steps=2, **(asked if checkpointing else {})).train()
        forward = 2 * 2  # steps and layers
        assert len(calls) == forward + (forward if level >= 2 else 0)
        assert fused_of(model).calls == 2


# ---- checkpoints


def test_a_script_goes_on_with_what_was_chosen(corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(fused(), corpus, tmp_path / "whole", **settings)
    fused_of(whole.model).loss_way = "vocabulary"
    whole.train()
    choices = read_choices(tmp_path / "whole" / "checkpoint-3")
    assert (choices.fused, choices.trained_dtype, choices.levels) == (True, "fp32", [0, 0])
    assert choices.loss_way == "vocabulary" and choices.backends
    resumed = trainer_for(fused(), corpus, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert choices_of(resumed.model) == choices_of(whole.model)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    told = trainer_for(fused(levels=[3, 1]), corpus, tmp_path / "told", **settings)
    told.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert choices_of(told.model).levels == [3, 1]


def test_a_checkpoint_of_another_forward_is_said(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_for(adapted(), corpus, tmp_path, save_strategy="steps", save_steps=3).train()
    assert not read_choices(tmp_path / "checkpoint-3").fused
    resumed = trainer_for(fused(), corpus, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "the steps from here on are fused, and those before were not" in caplog.text


def test_an_unusable_backend_is_chosen_anew(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fused()
    backends = fused_of(model).backends
    backends.chosen["documents of uneven lengths"] = "cudnn"
    trainer_for(model, corpus, tmp_path, max_steps=1).train()
    assert backends.chosen["documents of uneven lengths"] != "cudnn"
    assert "attention ran on cudnn so far" in caplog.text


def test_a_chosen_backend_is_taken(corpus: Corpus, tmp_path: Path) -> None:
    model, seen = fused(), set()
    fused_of(model).backends.chosen["documents of uneven lengths"] = "reference"
    original = AttentionHalf.attend

    def attend(self: Any, *given: Any) -> Any:
        seen.add(self.backend)
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionHalf, "attend", attend)
        trainer_for(model, corpus, tmp_path, max_steps=1).train()
    assert seen == {"reference"}


# ---- what is done while the norms are awaited


def held(trainer: Trainer) -> list[str]:
    """What was made ahead of a step and is still there."""
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    names = [name for name in ("_with_gradient", "_with_mode") if name in trainer.model.__dict__]
    return names + (["_prepared"] if optimizer._prepared is not None else [])


def test_the_next_step_is_worked_at_before_the_norms_are_read(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = trainer_for(fused(), corpus, tmp_path, optim="adamw_8bit", max_steps=2), []
    parts: list[tuple[Any, str]] = [(AdamW8bit, "prepare"), (Walked, "look_ahead"), (AdamW8bit, "step")]
    for owner, name in [*parts, (torch.Tensor, "tolist")]:
        inner = getattr(owner, name)

        def told(*given: Any, inner: Any = inner, name: str = name, **options: Any) -> Any:
            seen.append(name)
            return inner(*given, **options)

        monkeypatch.setattr(owner, name, told)
    trainer.train()
    steps = [number for number, name in enumerate(seen) if name == "prepare"]
    assert len(steps) == 2
    for number in steps:
        assert seen[number : number + 3] == ["prepare", "look_ahead", "tolist"]
    assert seen.count("step") == 2 and not held(trainer)


def test_a_step_that_is_not_taken_leaves_nothing_behind(corpus: Corpus, tmp_path: Path) -> None:
    model, now, seen = fused(), {"step": 0}, {}
    parameter = next(p for name, p in model.named_parameters() if "layers.1.mlp.down_proj.lora_B" in name)
    parameter.register_hook(lambda grad: grad * math.nan if now["step"] == 2 else None)
    trainer = trainer_for(model, corpus, tmp_path, optim="adamw_8bit", max_steps=3)
    trainer.add_callback(
        AtStep(begin=lambda step: now.update(step=step), end=lambda step: seen.update({step: held(trainer)}))
    )
    trainer.train()
    assert trainer.steps_not_finite == 1 and seen[2] == []
    assert seen[1] == seen[3] == ["_with_mode"] and not held(trainer)


def test_an_interrupted_step_leaves_nothing_behind(corpus: Corpus, tmp_path: Path) -> None:
    class Interrupts(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert held(trainer) == ["_with_gradient", "_with_mode", "_prepared"]
            raise KeyboardInterrupt

    trainer = trainer_for(fused(), corpus, tmp_path, optim="adamw_8bit", max_steps=2)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not held(trainer)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("part", [unwrap, lambda model: model.base_model, lambda model: unwrap(model).model.layers[1]])
def test_a_callback_that_sets_a_mode_changes_no_step(
    part: Any, accumulation: int, corpus: Corpus, tmp_path: Path
) -> None:
    """transformers sets all modes back before each micro-batch."""
    model, seen = fused(), []
    layer: Any = unwrap(model).model.layers[1]
    forward = type(layer).forward
    trainer = trainer_for(
        model, corpus, tmp_path, optim="adamw_8bit", max_steps=3, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.add_callback(AtStep(end=lambda _: part(model).eval()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(layer),
            "forward",
            lambda self, *given, **how: (seen.append(self.training), forward(self, *given, **how))[1],
        )
        trainer.train()
    assert seen and all(seen)
