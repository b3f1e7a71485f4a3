"""`optimizer_states` and `master_weights` of a trainer: who can have them, and what they take on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.model.install import fused_of
from steep.model.step_bytes import training_bytes
from steep.ops.host_states import state_bytes
from steep.settings import training_arguments
from steep.training.adamw8bit import AdamW8bit
from steep.training.state_options import bytes_on_host
from steep.training.trainer import Trainer
from tests.test_run import run_file
from tests.training.helpers import adapted, arguments, trainer_for
from tests.training.test_in_backward import BF16, lean, model_of

ASKED = [("optimizer_states", "fp32", "8bit", "states"), ("master_weights", "all", "none", "masters")]


@pytest.mark.parametrize(("field", "value", "usual", "keyword"), ASKED)
def test_another_optimizer_is_refused_by_name(
    field: str, value: str, usual: str, keyword: str, corpus: Corpus, tmp_path: Path
) -> None:
    given: dict[str, Any] = {field: value}
    for optim in ("adamw_torch", "paged_adamw_8bit"):
        told = rf"^{field}: {optim} (has|keeps) .*Set optim: adamw_8bit, or {field}: {usual}"
        with pytest.raises(UserError, match=told):
            trainer_for(adapted(), corpus, tmp_path, optim=optim, **given)
    model, args = adapted(), arguments(tmp_path, optim="adamw_8bit", **given)
    trained = [p for p in model.parameters() if p.requires_grad]
    told = rf'^optimizers: {field} is {value}, and .* Give AdamW8bit\(\.\.\., {keyword}="{value}"\)'
    for other in (AdamW8bit(trained, lr=1e-3), torch.optim.AdamW(trained)):
        with pytest.raises(UserError, match=told):
            Trainer(model=model, args=args, train_dataset=corpus, optimizers=(other, None))
    asked: dict[str, Any] = {keyword: value}
    Trainer(model=model, args=args, train_dataset=corpus, optimizers=(AdamW8bit(trained, **asked), None))
    with pytest.raises(UserError, match=rf"^{field}: SGD (has|keeps) .* Give AdamW8bit, or {field}: {usual}"):
        Trainer(model=model, args=args, train_dataset=corpus, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))
    with pytest.raises(UserError, match=rf"^{field}: 'some' is unknown\. Give "):
        arguments(tmp_path, **{field: "some"})
    made = trainer_for(adapted(), corpus, tmp_path, optim="adamw_8bit", **given).create_optimizer()
    assert isinstance(made, AdamW8bit) and getattr(made, keyword) == value


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [("optim_args", "betas=0.5", "adam_beta1, "), ("optim_target_modules", ["attn"], "what requires a gradient")],
)
def test_what_is_for_other_optimizers_is_refused(
    field: str, value: Any, remedy: str, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^{field}: adamw_8bit does not heed it\. Leave it out: {remedy}"):
        trainer_for(adapted(), corpus, tmp_path, optim="adamw_8bit", **{field: value})
    trainer_for(adapted(), corpus, tmp_path, optim="lion_32bit", **{field: value})
    config = run_file(tmp_path, tmp_path, tmp_path, training={field: value})
    with pytest.raises(UserError, match=rf"^training\.{field}: adamw_8bit does not heed it"):
        training_arguments(config, None)


def test_whose_weights_can_have_masters(corpus: Corpus, tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="adamw_8bit", master_weights="all")
    with pytest.raises(UserError, match=r"^master_weights: .* is in torch\.float16\. Train in bf16 or fp32"):
        Trainer(model=adapted().half(), args=args, train_dataset=corpus)
    args.master_weights = "embeddings"
    with pytest.raises(UserError, match=r"^master_weights: it is embeddings, and none is trained\. Set .*: all, or"):
        Trainer(model=adapted(modules_to_save=[]), args=args, train_dataset=corpus)


def test_what_they_take_is_counted(corpus: Corpus, tmp_path: Path) -> None:
    """On the host, and of a script's layers on the card."""
    given: dict[str, Any] = {"optimizer_states": "fp32", "master_weights": "embeddings", "offload_optimizer": "all"}
    trainer = lean(model_of(BF16, fused=True), corpus, tmp_path, **given)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    tables = sum(p.numel() for name, p in trained.items() if "embed_tokens" in name or "lm_head" in name)
    states = sum(state_bytes(p.numel(), coded=False) for p in trained.values())
    assert bytes_on_host(trainer.model, trainer.args) == states + 2 * tables
    assert states == pytest.approx(8 * sum(p.numel() for p in trained.values()), rel=0.05)
    assert fused_of(trainer.model).updates.width == 10
    (weight,) = {next(iter(trained.values()))}
    assert training_bytes([weight], gradients=False, width=10) == 10 * weight.numel()
    assert training_bytes([weight], gradients=False) == 4 * weight.numel()
    assert fused_of(lean(model_of(BF16, fused=True), corpus, tmp_path).model).updates.width == 0
