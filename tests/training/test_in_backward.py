"""Updates inside backward are those at the end of a step, to the bit, with few gradients at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from steep import ranks
from steep.data.packing import Corpus
from steep.errors import RunError, UserError
from steep.model.install import fused_of, install
from steep.ops.backend import interpreted
from steep.out_of_memory import memory_told
from steep.training.adamw8bit import AdamW8bit
from steep.training.arguments import TrainingArguments
from steep.training.gradients import measure_and_clip
from steep.training.in_backward import PARTLY, _layer_of, check_in_backward, updates_in_backward
from steep.training.trainer import Trainer
from tests.training.helpers import AtStep, adapted, arguments, trained_weights, trainer_for
from tests.training.test_fused import held
from tests.training.test_resume import STEP_FIELDS, assert_same
from tests.trees import tree_differences

BF16, FP32 = torch.bfloat16, torch.float32
LEAN: dict[str, Any] = {"optim": "adamw_8bit", "max_grad_norm": 0.0, "optimizer_in_backward": True}


def model_of(dtype: torch.dtype = FP32, *, tied: bool = False, fused: bool = False, **settings: Any) -> Any:
    """At a rank that gives most adapters 8-bit states."""
    name = {BF16: "bf16", FP32: "fp32"}[dtype]
    model = adapted(tied=tied, **{"r": 64, "trained_dtype": name, **settings}).to(dtype)
    return install(model) if fused else model


def lean(model: Any, corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
    given = {"learning_rate": 1e-3, "weight_decay": 0.01, "lr_scheduler_type": "linear", "max_steps": 4}
    return trainer_for(model, corpus, folder, **{**LEAN, **given, **settings})


# ---- the same to the bit


@pytest.mark.parametrize(
    ("fused", "tied", "dtype", "given"),
    [
        (False, True, FP32, {}),
        (False, False, BF16, {}),
        (True, False, FP32, {}),
        (True, True, BF16, {}),
        (True, True, BF16, {"master_weights": "all", "optimizer_states": "fp32"}),
    ],
)
def test_it_is_the_update_at_the_end(
    fused: bool, tied: bool, dtype: torch.dtype, given: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    runs = []
    for in_backward in (False, True):
        model = model_of(dtype, tied=tied, fused=fused)
        start = trained_weights(model)
        trainer = lean(model, corpus, tmp_path / str(in_backward), optimizer_in_backward=in_backward, **given)
        trainer.train()
        assert not [name for name, weight in trained_weights(model).items() if torch.equal(weight, start[name])]
        assert not fused or fused_of(model).calls == 4
        runs.append(trainer)
    at_the_end, in_backward = runs
    assert_same(at_the_end, in_backward)
    assert {row["grad_norm"] > 0 for row in in_backward.state.log_history[:-1]} == {True}


def test_checkpointing_of_the_library(corpus: Corpus, tmp_path: Path) -> None:
    """A layer is computed again before the first of its gradients comes, so with the weights of its forward."""
    prefix = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    for reentrant in (False, True):
        runs = []
        for in_backward in (False, True):
            asked = {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": reentrant}}
            model = model_of(tied=True)
            model.enable_input_require_grads()
            runs.append(lean(model, corpus, tmp_path / "run", optimizer_in_backward=in_backward, **asked))
            runs[-1].train()
        assert_same(*runs)


SIZES = [(4096,), (300,), (64, 70), (513,), (7,), (4100,)]


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("route", [interpreted, nullcontext])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_in_any_order_and_company(dtype: torch.dtype, route: type[AbstractContextManager[None]]) -> None:
    def trained(companies: list[list[int]] | None) -> tuple[list[torch.Tensor], Any]:
        weights = [nn.Parameter(drawn(shape, index).to(dtype)) for index, shape in enumerate(SIZES)]
        groups = [{"params": weights[:4], "lr": 1e-2}, {"params": weights[4:], "lr": 1e-3, "weight_decay": 0.1}]
        optimizer = AdamW8bit(groups, seed=3)
        with route():
            for step in range(2):
                for index, weight in enumerate(weights):
                    weight.grad = drawn(SIZES[index], 100 * step + index).to(dtype)
                for company in companies or []:
                    optimizer.update([weights[index] for index in company])
                    for index in company:
                        weights[index].grad = None
                optimizer.step()  # of what is left
        return [weight.detach() for weight in weights], optimizer.state_dict()

    expected = trained(None)
    for companies in ([[5, 0], [3], [4, 2, 1]], [[2], [4], [2]]):  # one without a gradient is passed over
        assert tree_differences(trained(companies), expected) == []


def test_the_kernel_updates_inside_backward() -> None:
    def trained(in_backward: bool) -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 90), nn.Tanh(), nn.Linear(90, 50)).to(BF16)
        parameters, optimizer = dict(model.named_parameters()), AdamW8bit(model.parameters(), lr=1e-2)
        totals = []
        with interpreted(), updates_in_backward(parameters if in_backward else {}, optimizer) as updates:
            for step in range(2):
                model(drawn((8, 70), step).to(BF16)).square().sum().backward()
                report = updates.report() if in_backward else measure_and_clip(parameters, None)
                totals.append(report.total)
                assert not in_backward or all(weight.grad is None for weight in parameters.values())
                optimizer.step()
                optimizer.zero_grad()
        return [weight.detach() for weight in parameters.values()], totals

    assert tree_differences(trained(True), trained(False)) == []


# ---- few gradients at a time


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Of each update inside backward, how many tensors it is of, and how many have a gradient then."""
    found: list[tuple[int, int]] = []
    update = AdamW8bit.update

    def told(self: AdamW8bit, parameters: Any) -> None:
        there = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        found.append((len(list(parameters)), len(there)))
        update(self, parameters)

    monkeypatch.setattr(AdamW8bit, "update", told)
    yield found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
def test_a_layer_is_updated_in_one_go(
    fused: bool, tied: bool, seen: list[tuple[int, int]], corpus: Corpus, tmp_path: Path
) -> None:
    """The head's gradient is gone before those of the last layer come. That of a tied table comes once, when all of it
    is there."""
    trainer = lean(model_of(tied=tied, fused=fused, r=4), corpus, tmp_path, max_steps=2)
    left: list[int] = []
    step = AdamW8bit.step
    with pytest.MonkeyPatch.context() as patch:

        def counted(self: AdamW8bit, closure: Any = None) -> Any:
            left.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
            return step(self, closure)

        patch.setattr(AdamW8bit, "step", counted)
        trainer.train()
    table, layers = (1, 1), [(14, 14), (14, 14)]
    assert seen == 2 * [*([] if tied else [table]), *layers, table]
    assert left == [0, 0] and not held(trainer)


@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@pytest.mark.parametrize("in_backward", [True, False])
def test_gradients_are_freed_and_not_held(in_backward: bool, fused: bool, corpus: Corpus, tmp_path: Path) -> None:
    """The memory of the head's and of the last layer's is free when the first of the layer before come."""
    model = model_of(BF16, fused=fused, r=4)
    storages, alive = list[StorageWeakRef](), list[bool]()
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lm_head" in name or "layers.1." in name):
            weight.register_hook(lambda gradient: storages.append(StorageWeakRef(gradient.untyped_storage())))
        elif weight.requires_grad and "layers.0." in name:
            weight.register_hook(lambda gradient: alive.extend(not each.expired() for each in storages))
    lean(model, corpus, tmp_path, max_steps=1, optimizer_in_backward=in_backward).train()
    assert len(storages) == 15 and len(alive) == 14 * 15 and set(alive) == {not in_backward}


# ---- what is left, and what cannot be


def test_what_is_left_is_the_optimizers_own() -> None:
    """A layer of which a tensor has no gradient; one that somebody set; one behind another one's hook."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(30, 30) for _ in range(2)), "beside": nn.Linear(30, 30)})
    parameters: Any = dict(model.named_parameters())
    optimizer = AdamW8bit(parameters.values(), lr=1e-2)
    layers: Any = model["layers"]
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    done: list[str] = []
    with updates_in_backward(parameters, optimizer) as updates:
        x = drawn((4, 30), 5)
        (layers[0](x) @ layers[1].weight).square().sum().backward()  # without the bias of the second
        parameters["beside.weight"].grad = torch.ones(30, 30)
        there = {name for name, weight in parameters.items() if weight.grad is not None}
        assert there == {"layers.1.weight", "beside.weight"}
        report = updates.report(lambda: done.append("meanwhile"))
        optimizer.step()
        assert done == ["meanwhile"] and not updates.begun
        norms = dict(zip(report.names, report.norms.tolist(), strict=True))
        assert norms["beside.weight"] == pytest.approx(30) and norms["layers.1.bias"] == norms["beside.bias"] == 0
        assert report.total == pytest.approx(math.sqrt(sum(norm**2 for norm in norms.values())))
        moved = {name for name, weight in parameters.items() if not torch.equal(weight, before[name])}
        assert moved == {"layers.0.weight", "layers.0.bias", *there}
        optimizer.zero_grad()
        assert updates.report().total == 0
    layers[0](x).sum().backward()  # the hooks are gone
    assert layers[0].weight.grad is not None


def test_a_gradient_in_two_parts_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    with (
        pytest.raises(RunError, match=r"the gradient of weight came in two parts.*optimizer_in_backward") as raised,
        updates_in_backward({"weight": weight}, AdamW8bit([weight], lr=0.1)),
    ):
        (2 * weight).sum().backward()
        weight.sum().backward()
    assert raised.value.__notes__ == [PARTLY]
    both = nn.Parameter(torch.ones(3))
    with updates_in_backward({"both": both}, AdamW8bit([both], lr=0.1)) as updates:  # one backward sums them up
        ((2 * both).sum() + both.sum()).backward()
        assert updates.report().total == pytest.approx(3 * math.sqrt(3))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_grad_norm": 1.0}, r"^max_grad_norm: clipping at 1 needs .*\. Set it to 0, or set optimizer_in_backward"),
        (
            {"gradient_accumulation_steps": 4},
            r"^gradient_accumulation_steps: the gradients of 4 forwards .* Set it to 1",
        ),
        ({"optim": "adamw_torch"}, r"^optim: adamw_torch applies all gradients at once\. Set it to adamw_8bit"),
        ({"spike_action": "skip"}, r"^spike_action: .* applied already\. Set it to warn or rollback"),
        ({"auto_find_batch_size": True}, r"^auto_find_batch_size: .* Leave it out"),
    ],
)
def test_contradictions_are_refused_by_name(
    settings: dict[str, Any], told: str, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        lean(adapted(), corpus, tmp_path, **settings)
    lean(adapted(), corpus, tmp_path, **settings, optimizer_in_backward=False)


def test_several_processes_are_refused(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^training\.optimizer_in_backward: 2 processes .* Train in one process"):
        check_in_backward(arguments(tmp_path, **LEAN), section="training.")


def test_another_optimizer_and_dtype_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    model, args = adapted(), arguments(tmp_path, **LEAN)
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    made = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(UserError, match=r"^optimizers: AdamW applies all gradients at once\. Give steep's AdamW8bit"):
        Trainer(model=model, args=args, train_dataset=corpus, optimizers=(plain, None))
    with pytest.raises(UserError, match=r"^optimizers: SGD applies all"):
        Trainer(model=model, args=args, train_dataset=corpus, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))
    Trainer(model=model, args=args, train_dataset=corpus, optimizers=(made, None))
    with pytest.raises(UserError, match=r"^optimizer_in_backward: .* is in torch\.float16\. Train in bf16 or fp32"):
        lean(adapted().half(), corpus, tmp_path)


# ---- a step that fails


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run(what: str, corpus: Corpus, tmp_path: Path) -> None:
    """Nothing of it is saved, and with updates at the end the run goes on without it."""

    def trainer(folder: str, **settings: Any) -> Trainer:
        model, now = model_of(fused=True), {"step": 0}
        name = "lm_head" if what == "loss" else "layers.0.self_attn.q_proj.lora_A"
        weight = next(p for key, p in model.named_parameters() if name in key and p.requires_grad)
        weight.register_hook(lambda gradient: gradient * math.nan if now["step"] == 4 else None)
        made = lean(model, corpus, tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=2, **settings)
        made.add_callback(AtStep(begin=lambda step: now.update(step=step)))
        return made

    expected = trainer("at-the-end", optimizer_in_backward=False)
    expected.train()
    broken = trainer("run")
    told = r"^step 4: the gradient of .* is not finite, and the weights are partly updated by it .*"
    told += r"training\.optimizer_in_backward: false, which leaves such a step out"
    with pytest.raises(RunError, match=told):
        broken.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    (line,) = [json.loads(row) for row in (tmp_path / "run" / "incidents.jsonl").read_text("utf-8").splitlines()]
    assert (line["step"], line["kind"], line["action"]) == (4, "gradient not finite", "ended")
    again = trainer("run", optimizer_in_backward=False)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.steps_not_finite == expected.steps_not_finite == 1
    assert tree_differences(trained_weights(again.model), trained_weights(expected.model)) == []


@pytest.mark.parametrize(("place", "partly"), [("layers.0.self_attn.q_proj.lora_A", True), ("lm_head", False)])
def test_memory_that_runs_out_inside_backward_says_what_is_lost(
    place: str, partly: bool, corpus: Corpus, tmp_path: Path
) -> None:
    """Before the first update nothing is."""
    model, now = model_of(), {"step": 0}

    def fail(gradient: torch.Tensor) -> None:
        if now["step"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    next(p for name, p in model.named_parameters() if place in name and p.requires_grad).register_hook(fail)
    trainer = lean(model, corpus, tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))
    with pytest.raises(RunError, match=r"^GPU memory ran out") as raised, memory_told(None):
        trainer.train()
    assert (PARTLY in str(raised.value)) == partly
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not held(trainer) and not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ---- going on


@pytest.mark.parametrize(("dtype", "fused"), [(FP32, False), (BF16, True)])
def test_resumed_is_never_stopped(dtype: torch.dtype, fused: bool, corpus: Corpus, tmp_path: Path) -> None:
    """With either kind of update, whatever it was before."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = lean(model_of(dtype, fused=fused), corpus, tmp_path / "whole", **settings)
    whole.train()
    for in_backward in (True, False):
        resumed = lean(
            model_of(dtype, fused=fused),
            corpus,
            tmp_path / str(in_backward),
            optimizer_in_backward=in_backward,
            **settings,
        )
        steps: list[int] = []
        resumed.add_callback(AtStep(begin=steps.append))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert steps == [4, 5, 6]
        assert_same(whole, resumed)


def test_a_run_goes_back_for_a_spike(corpus: Corpus, tmp_path: Path) -> None:
    """What was applied of the spike is gone with its weights, and its rows are passed over the second time."""
    settings = {"max_steps": 12, "spike_action": "rollback", "spike_window": 8, "spike_threshold": 8.0}
    settings |= {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 4}

    def trained(in_backward: bool) -> Trainer:
        model, now = model_of(), {"step": 0}
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(lambda gradient: gradient * (1000 if now["step"] == 10 else 1))
        trainer = lean(model, corpus, tmp_path / str(in_backward), optimizer_in_backward=in_backward, **settings)
        trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))
        trainer.train()
        return trainer

    at_the_end, in_backward = trained(False), trained(True)
    assert list(in_backward.guard.skip_list.steps) == [10] and in_backward.guard.steps_skipped == 1
    assert tree_differences(trained_weights(at_the_end.model), trained_weights(in_backward.model)) == []
    for one, other in zip(at_the_end.state.log_history[:-1], in_backward.state.log_history[:-1], strict=True):
        assert [one.get(field) for field in STEP_FIELDS] == [other.get(field) for field in STEP_FIELDS]


def test_too_many_spikes_end_the_run_without_their_last(corpus: Corpus, tmp_path: Path) -> None:
    settings = {"max_steps": 30, "spike_action": "rollback", "spike_window": 8, "spike_threshold": 8.0}
    model, now = model_of(), {"step": 0}
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient * (4.0 ** now["step"] if now["step"] > 12 else 1))
    trainer = lean(model, corpus, tmp_path, **settings, learning_rate=1e-4, save_strategy="steps", save_steps=4)
    trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))
    with pytest.raises(RunError, match="of the last 8 steps were spikes"):
        trainer.train()
    assert trainer.ending is None
    last = max(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*"))
    assert last <= 16 and last % 4 == 0
    lines = [json.loads(row) for row in (tmp_path / "incidents.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["action"] == "ended" and lines[-1]["step"] > last


def test_the_layer_of_a_name() -> None:
    start = "base_model.model.model"
    assert _layer_of(f"{start}.layers.12.mlp.up_proj.lora_A.default.weight") == f"{start}.layers.12"
    assert _layer_of(f"{start}.embed_tokens.modules_to_save.default.weight").endswith("weight")
