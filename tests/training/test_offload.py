"""Optimizer states in host memory through a trainer: the same run to the bit, or an error by name."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.model.install import fused_of
from steep.model.recompute import Updates
from steep.ops import host_states
from steep.training import in_backward
from steep.training.adamw8bit import AdamW8bit
from steep.training.proof import Proof
from steep.training.snapshot import Snapshot
from steep.training.trainer import Trainer
from tests.training.helpers import adapted, arguments, trainer_for, update_by_reference
from tests.training.test_in_backward import BF16, FP32, LEAN, lean, model_of
from tests.training.test_resume import assert_same

AT_THE_END: dict[str, Any] = {"optimizer_in_backward": False, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("settings", "dtype", "tied", "offload"),
    [
        (AT_THE_END, BF16, False, "embeddings"),
        (AT_THE_END, FP32, True, "all"),
        (LEAN, BF16, False, "all"),
        (LEAN, BF16, True, "embeddings"),
        ({**AT_THE_END, "optimizer_states": "fp32", "master_weights": "embeddings"}, BF16, False, "all"),
        ({**LEAN, "master_weights": "all"}, BF16, False, "embeddings"),
    ],
    ids=["clipped", "clipped-tied", "in-backward", "in-backward-tied", "fp32-masters", "masters"],
)
def test_a_run_is_the_one_with_states_on_the_card(
    settings: dict[str, Any],
    dtype: torch.dtype,
    tied: bool,
    offload: str,
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, states, log, proof; also after it was stopped, and resumed with either choice."""
    update_by_reference(monkeypatch)
    monkeypatch.setattr(host_states, "PIECE", 2**12)
    settings = {**settings, "save_strategy": "steps", "save_steps": 2}

    def made(folder: str, choice: str) -> Trainer:
        model = model_of(dtype, tied=tied, fused=True)
        return lean(model, corpus, tmp_path / folder, offload_optimizer=choice, **settings)

    whole, ours = made("whole", "none"), made("ours", offload)
    whole.train()
    ours.train()
    assert_same(whole, ours)
    optimizer = ours._own_optimizer
    numbers = {"embeddings": 1 if tied else 2, "all": sum(p.numel() >= 4096 for p in optimizer._places)}
    assert len(optimizer._hosted) == numbers[offload] and not whole._own_optimizer._hosted
    for start, choice in (("whole", offload), ("ours", "none")):
        resumed = made(f"from-{start}", choice)
        resumed.train(resume_from_checkpoint=str(tmp_path / start / "checkpoint-2"))
        assert_same(whole, resumed)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_heads_update_is_awaited(
    tied: bool, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first gradient of a layer comes; those of layers may still be under way when the next ones come, and
    all that are left when the norms are read, the table's among them. Before anybody else looks, none is."""
    update_by_reference(monkeypatch)
    read, looked = list[int](), list[int]()
    read_norms = in_backward.read_norms
    monkeypatch.setattr(
        in_backward, "read_norms", lambda *given: read.append(len(optimizer._under_way)) or read_norms(*given)
    )
    before: list[int] = []
    update = AdamW8bit.update
    monkeypatch.setattr(
        AdamW8bit, "update", lambda self, given: before.append(len(self._under_way)) or update(self, given)
    )
    trainer = lean(model_of(BF16, tied=tied, fused=True), corpus, tmp_path, offload_optimizer="all", max_steps=2)
    judge = trainer.guard.judge
    monkeypatch.setattr(
        trainer.guard, "judge", lambda *given: looked.append(len(optimizer._under_way)) or judge(*given)
    )
    trainer.create_optimizer()
    optimizer = trainer._own_optimizer
    trainer.train()
    assert before == 2 * ([0, 1, 2] if tied else [0, 0, 1, 2])
    assert read == [3, 3] and looked == [0, 0]


@pytest.mark.parametrize("settings", [AT_THE_END, LEAN], ids=["clipped", "in-backward"])
def test_nobody_reads_a_parameter_before_its_update(
    settings: dict[str, Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No callback, evaluation, checkpoint or proof, nor whoever goes on after training."""
    update_by_reference(monkeypatch)
    left: dict[str, set[int]] = {}
    trainer = lean(
        model_of(BF16, fused=True), corpus, tmp_path, **settings, offload_optimizer="all", save_strategy="steps",
        save_steps=2, max_steps=2,
    )  # fmt: skip

    def look(name: str) -> None:
        left.setdefault(name, set()).add(len(trainer._own_optimizer._under_way))

    class Looks(transformers.TrainerCallback):
        def on_event(self, name: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look(name)

    events = ["on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_save", "on_train_end"]
    for name in events:
        monkeypatch.setattr(Looks, name, partialmethod(Looks.on_event, name))
    trainer.add_callback(Looks())
    for owner, name in ((Proof, "observe"), (Snapshot, "take"), (Trainer, "_maybe_log_save_evaluate")):
        own = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, _own=own, _name=name, **named: (look(_name), _own(*given, **named))[1]
        )
    updated: list[int] = []
    run = host_states.Staging.run
    monkeypatch.setattr(host_states.Staging, "run", lambda *given: updated.append(1) or run(*given))
    trainer.train()
    assert updated and left == {name: {0} for name in (*events, "observe", "take", "_maybe_log_save_evaluate")}


def test_what_comes_after_another_table_finds_its_gradient_gone() -> None:
    """Where no layer trains too: the last alone need not be awaited."""
    tables = {name: torch.nn.Parameter(torch.ones(3)) for name in ("lm_head", "embed_tokens")}
    optimizer = AdamW8bit(tables.values(), lr=0.1)
    calls: list[str] = []
    with in_backward.updates_in_backward(tables, optimizer) as updates, pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "update", lambda members: calls.append("update"))
        patch.setattr(optimizer, "finish_updates", lambda but=0: calls.append("finish"))
        for _ in range(2):
            for table in tables.values():
                table.sum().backward()
            updates.report()
            assert calls == ["update", "finish", "update"]
            updates.finish()
            assert calls.pop() == "finish" and not calls.clear()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "paged_adamw_8bit"])
def test_another_optimizer_is_refused_by_name(optim: str, corpus: Corpus, tmp_path: Path) -> None:
    told = rf"^offload_optimizer: {optim} keeps its states on the card\. Set optim: adamw_8bit"
    with pytest.raises(UserError, match=told):
        trainer_for(adapted(), corpus, tmp_path, optim=optim, offload_optimizer="embeddings")


def test_what_a_trainer_is_given_has_to_do_it(corpus: Corpus, tmp_path: Path) -> None:
    model, args = adapted(), arguments(tmp_path, optim="adamw_8bit", offload_optimizer="all")
    trained = [p for p in model.parameters() if p.requires_grad]
    told = r'^optimizers: offload_optimizer is all, and .* Give AdamW8bit\(\.\.\., offload="all"\)'
    for given in (AdamW8bit(trained, lr=1e-3), torch.optim.AdamW(trained)):
        with pytest.raises(UserError, match=told):
            Trainer(model=model, args=args, train_dataset=corpus, optimizers=(given, None))
    given = AdamW8bit(trained, lr=1e-3, offload="all")
    Trainer(model=model, args=args, train_dataset=corpus, optimizers=(given, None))
    with pytest.raises(UserError, match=r"^offload_optimizer: SGD keeps its states on the card"):
        Trainer(model=model, args=args, train_dataset=corpus, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))
    with pytest.raises(UserError, match=r"^offload_optimizer: .* is in torch\.float16\. Train in bf16 or fp32"):
        Trainer(model=adapted().half(), args=args, train_dataset=corpus)
    args.offload_optimizer = "embeddings"
    with pytest.raises(UserError, match=r"^offload_optimizer: it is embeddings, and none is trained\. Set .*: all, or"):
        Trainer(model=adapted(modules_to_save=[]), args=args, train_dataset=corpus)
    with pytest.raises(UserError, match=r"^offload_optimizer: 'heads' is unknown\. Give none, embeddings, all"):
        arguments(tmp_path, offload_optimizer="heads")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_layers_of_a_script_hear_what_is_on_the_card(tied: bool, corpus: Corpus, tmp_path: Path) -> None:
    """Before the first call, in which they choose what they keep."""
    trainer = lean(model_of(BF16, tied=tied, fused=True), corpus, tmp_path, offload_optimizer="all")
    assert fused_of(trainer.model).updates == Updates(True, "all", tied)
    trainer = lean(model_of(BF16, fused=True), corpus, tmp_path, **AT_THE_END)
    assert fused_of(trainer.model).updates.on_host == "none" and not fused_of(trainer.model).updates.in_backward


def test_layers_of_a_script_leave_the_host_what_the_trainer_takes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that live there, and the copy of a checkpoint, which has states and weights."""
    monkeypatch.setattr("steep.model.fused.room_on_card", lambda *_: 1e9)
    monkeypatch.setattr("steep.model.fused.room_on_host", lambda: 10**9)
    found = {}
    for offload, saves in (("none", "no"), ("embeddings", "no"), ("all", "no"), ("none", "steps"), ("all", "steps")):
        trainer = lean(model_of(BF16, fused=True), corpus, tmp_path, offload_optimizer=offload, save_strategy=saves)
        fused_of(trainer.model).measure(trainer.model.base_model.model.model)
        found[offload, saves] = 10**9 - fused_of(trainer.model).host_room
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    states = sum(host_states.state_bytes(p.numel()) for p in trained)
    assert states == pytest.approx(2.03 * sum(p.numel() for p in trained), rel=0.05)
    copied = states + sum(p.nbytes for p in trained)
    assert 0 == found["none", "no"] < found["embeddings", "no"] < found["all", "no"] == states
    assert found["none", "steps"] == copied and found["all", "steps"] == states + copied
    fused_of(trainer.model).beside_on_host = 10**10
    fused_of(trainer.model).measure(trainer.model.base_model.model.model)
    assert fused_of(trainer.model).host_room == 0
