"""Gradients of the rows that a batch looks up, through a trainer, against dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steep import ranks
from steep.data.packing import Corpus
from steep.model.install import fused_of, install
from steep.ops import embedding
from steep.training import fused
from steep.training.adamw8bit import AdamW8bit
from steep.training.gradients import measure_and_clip
from steep.training.trainer import Trainer
from tests.ops.closeness import error
from tests.training.helpers import AtStep, adapted, trained_weights, update_by_reference
from tests.training.test_in_backward import BF16, FP32, LEAN, lean, model_of
from tests.training.test_offload import AT_THE_END
from tests.training.test_resume import assert_same
from tests.trees import tree_differences


def table_of(model: Any) -> torch.nn.Parameter:
    return next(p for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" in name)


def trained(
    corpus: Corpus, folder: Path, monkeypatch: pytest.MonkeyPatch, by_rows: bool, **settings: Any
) -> tuple[Trainer, list[tuple[bool, torch.dtype]]]:
    """A run, and what each gradient of the table was as it came."""
    dtype, tied = settings.pop("dtype", BF16), settings.pop("tied", False)
    monkeypatch.setattr(embedding, "fewer_rows", lambda tokens, rows: by_rows)
    trainer = lean(model_of(dtype, tied=tied, fused=True), corpus, folder, **settings)
    seen: list[tuple[bool, torch.dtype]] = []
    table = table_of(trainer.model)

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append((parameter.grad.is_sparse, parameter.grad.dtype))

    table.register_post_accumulate_grad_hook(note)
    trainer.train()
    assert fused_of(trainer.model).calls > 0 and not fused_of(trainer.model).row_gradients
    return trainer, seen


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.1, "optimizer_in_backward": False},
        LEAN,
        {**LEAN, "offload_optimizer": "all", "dtype": FP32},
        {**LEAN, "offload_optimizer": "embeddings", "optimizer_states": "fp32", "master_weights": "embeddings"},
    ],
    ids=["clipped", "in-backward", "in-backward-host", "in-backward-host-masters"],
)
def test_a_run_is_the_one_with_dense_gradients(
    settings: dict[str, Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, weights, states and proof after four steps, to the bit. Rows that no batch had have moved as well."""
    update_by_reference(monkeypatch)
    dense, others = trained(corpus, tmp_path / "dense", monkeypatch, False, **settings)
    ours, seen = trained(corpus, tmp_path / "rows", monkeypatch, True, **settings)
    assert not any(sparse for sparse, _ in others) and all(sparse for sparse, _ in seen) and len(seen) == 4
    assert_same(dense, ours)
    assert all(row["grad_norm"] > 0 for row in ours.state.log_history[:-1])


def test_several_micro_batches_add_up_in_fp32(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are in another order than the dense ones."""
    update_by_reference(monkeypatch)
    runs = [trained(corpus, tmp_path / str(rows), monkeypatch, rows, **AT_THE_END) for rows in (False, True)]
    (dense, _), (ours, seen) = runs
    assert seen == 8 * [(True, FP32)]
    for one, other in zip(dense.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    first = [run.state.log_history[0]["grad_norm"] for run, _ in runs]
    assert first[1] == pytest.approx(first[0], rel=1e-6)


@pytest.mark.parametrize("settings", [{"optim": "adamw_torch"}, {"tied": True}, {"world": 2}], ids=str)
def test_everything_else_gets_dense_gradients(
    settings: dict[str, Any], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.pop("world", 1) == 2:
        monkeypatch.setattr(fused, "ranks", type("Two", (), {"world_size": staticmethod(lambda: 2)}))
    settings = {"max_steps": 1, "optimizer_in_backward": False, **settings}
    _, seen = trained(corpus, tmp_path, monkeypatch, True, **settings)
    assert ranks.world_size() == 1 and [sparse for sparse, _ in seen] == [False]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_rows_are_those_of_the_librarys_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled as Gemma scales them, equal ids summed, and none of padding."""
    monkeypatch.setattr(embedding, "fewer_rows", lambda tokens, rows: True)
    model = adapted(family, tied=False).train()
    padding, table = model.get_input_embeddings().padding_idx, table_of(model)
    tokens = torch.tensor([[5, padding, 9, 5, 7, padding, 5, 11]])
    found: list[torch.Tensor] = []
    for by_rows in (False, True):
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with fused.gradients_by_rows(install(model) if by_rows else model, optimizer, 1):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            assert table.grad is not None and table.grad.is_sparse is by_rows
            found.append(table.grad.to_dense())
        model.zero_grad(set_to_none=True)
    expected, ours = found
    assert padding is not None and not ours[padding].any() and not expected[padding].any()
    assert error(ours, expected) < 2e-5 < error(ours / 2, expected)
    assert ours.any(dim=1).nonzero().flatten().tolist() == [5, 7, 9]  # the last predicts nothing


def test_another_trainer_gets_dense_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch can clip: transformers' own, over the same fused model."""
    monkeypatch.setattr(embedding, "fewer_rows", lambda tokens, rows: True)
    model, seen = model_of(fused=True), list[bool]()
    table = table_of(model)
    table.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.is_sparse))  # pyright: ignore
    tokens = list(range(3, 35))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, max_grad_norm=0.1, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows: Any = [{"input_ids": tokens, "labels": tokens}] * 32
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert seen == [False, False] and fused_of(model).calls == 2


def test_bitsandbytes_update_on_a_cpu_has_them_dense(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        trained(corpus, tmp_path / str(rows), monkeypatch, rows, optimizer_in_backward=False, max_steps=2)[0]
        for rows in (False, True)
    ]
    dense, rows = (trained_weights(run.model) for run in runs)
    assert tree_differences(dense, rows) == []


def test_a_row_that_is_not_finite_refuses_the_step(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "fewer_rows", lambda tokens, rows: True)
    model, now = model_of(fused=True), {"step": 0}
    table = table_of(model)

    def spoil(parameter: torch.Tensor) -> None:
        if now["step"] == 2:
            assert parameter.grad is not None and parameter.grad.is_sparse
            parameter.grad._values()[0, 0] = float("nan")

    table.register_post_accumulate_grad_hook(spoil)
    trainer = lean(model, corpus, tmp_path, optimizer_in_backward=False, max_steps=3)
    trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))
    trainer.train()
    assert trainer.steps_not_finite == 1


def test_clipping_counts_them() -> None:
    dense, ours = (torch.nn.Parameter(torch.ones(50, 4)) for _ in range(2))
    for parameter, by_rows in ((dense, False), (ours, True)):
        embedding.embedding(parameter, torch.tensor([3, 4, 3]), None, by_rows).sum().backward()
    assert ours.grad is not None and ours.grad.is_sparse
    reports = [measure_and_clip({"table": parameter}, None) for parameter in (dense, ours)]
    assert reports[0].total == reports[1].total == pytest.approx((4 * 4 + 4) ** 0.5)
