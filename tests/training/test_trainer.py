"""The trainer on tiny models: it learns, at the rates it was given, exactly, and says when it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import Subset

from steep.data.packed_dataset import collate
from steep.data.packing import Corpus
from steep.data.sampler import EpochSampler
from steep.errors import RunError, UserError
from steep.evaluation.perplexity import BATCH_TOKENS, within_a_step
from steep.model.adapters import add_adapters
from steep.model.load import load
from steep.model.unwrap import unwrap
from steep.training.trainer import Trainer
from tests.tiny import FAMILIES, VOCAB_SIZE
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
    ledger = corpus.ledger(trainer.times_trained.numpy(), trainer.times_seen.numpy())
    assert ledger["adds_up"], ledger["problems"]


def test_an_int8_base_learns(llama_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    model, _ = load(str(llama_folder), base="int8", compute_dtype="fp32")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert len(layers) == 14
    codes, scales = [layer.weight.clone() for layer in layers], [layer.weight.SCB.clone() for layer in layers]
    model = add_adapters(model, r=8, lora_alpha=8)
    trainer = trainer_for(model, corpus, tmp_path, max_steps=10, embedding_learning_rate=1e-2)
    trainer.train()
    seen = losses(trainer)
    assert sum(seen[step] for step in (8, 9, 10)) / 3 < 0.9 * seen[1]
    assert trainer.proof is not None and trainer.proof.report()["ok"]
    for layer, code, scale in zip(layers, codes, scales, strict=True):
        assert layer.weight.dtype == torch.int8 and torch.equal(layer.weight, code)
        assert torch.equal(layer.state.SCB, scale)
    layers[3].state.SCB[5] *= 2  # the proof covers the rows' scales as well
    assert [name.rsplit(".", 1)[-1] for name in trainer.proof.changed_frozen()] == ["SCB"]


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


@pytest.mark.parametrize("rows", [1, 2])
def test_no_more_is_scored_at_once_than_a_step_has(rows: int, corpus: Corpus, tmp_path: Path) -> None:
    """So scoring needs no more than what was planned for a step."""
    trainer = trainer_for(adapted(), corpus, tmp_path, per_device_train_batch_size=rows)
    seen: list[int] = []
    embeddings: Any = unwrap(trainer.model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    trainer.evaluate()
    length = corpus.train.max_length
    assert max(seen) == rows * length
    assert within_a_step(10**6, length) == BATCH_TOKENS == within_a_step(1, BATCH_TOKENS) == within_a_step(1, 10**6)


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
    assert rows[3]["tokens"] == rows[2]["tokens"] < rows[4]["tokens"] and rows[3]["tokens_per_second"] > 0
    assert rows[7]["tokens"] == (trainer.times_trained * torch.from_numpy(corpus.train.row_tokens)).sum()


def test_a_step_with_a_nan_gradient_is_not_applied(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    now = {"step": 0}
    dict(model.named_parameters())[name].register_hook(lambda grad: grad * math.nan if now["step"] == 3 else None)
    trainer = trainer_for(model, corpus, tmp_path, max_steps=7)
    snapshots: dict[int, dict[str, torch.Tensor]] = {}
    trainer.add_callback(
        AtStep(
            begin=lambda step: now.update(step=step),
            end=lambda step: snapshots.update({step: trained_weights(model)}),
        )
    )
    trainer.train()
    assert all(torch.equal(snapshots[2][name], snapshots[3][name]) for name in snapshots[2])
    assert not any(torch.equal(snapshots[4][name], snapshots[3][name]) for name in snapshots[3])
    assert [record.getMessage() for record in caplog.records if record.name == "steep"] == [
        f"step 3: the gradient of {name} is not finite; the step is not applied"
    ]
    assert list(losses(trainer)) == [1, 2, 3, 4, 5, 6, 7]  # the loss of step 3 was finite
    rows = {row["step"]: row for row in trainer.state.log_history if "tokens" in row}
    assert [step for step in rows if "grad_norm" not in rows[step]] == [3]
    assert [rows[step]["steps_not_finite"] for step in (2, 3, 4)] == [0, 1, 1]
    assert trainer.steps_not_finite == 1
    assert trainer.times_trained.sum() == 12  # the rows of step 3 were not trained
    assert trainer.proof is not None and trainer.proof.report()["ok"]


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


def test_of_several_gpus_the_first_is_used(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.warns(UserWarning) as caught:
        trainer = trainer_for(adapted(), corpus, tmp_path, use_cpu=False, max_steps=3)
        trainer.train()
    assert [str(warning.message) for warning in caught if "GPU" in str(warning.message)] == [
        "2 GPUs are visible; the first one is used"
    ]
    assert trainer.args.n_gpu == 1
    assert trainer.args.device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert trainer.model_wrapped is trainer.model  # else DataParallel's
    assert trainer.times_trained.sum() == 6  # two rows a step, not two for each GPU


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


def test_rows_are_one_packed_sequence_for_flash_attention(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' flash attention sees documents only in a batch of one; as one long row the loss is the same."""
    trainer = trainer_for(adapted(), corpus, tmp_path, per_device_train_batch_size=3, max_steps=2)
    shapes, losses_seen = [], []

    def look(flash: bool) -> None:
        model = adapted()
        trainer = trainer_for(model, corpus, tmp_path / str(flash), per_device_train_batch_size=3, max_steps=2)
        compute = trainer.compute_loss

        def recorded(model: Any, inputs: Any, **kwargs: Any) -> Any:
            shapes.append({name: tuple(value.shape) for name, value in inputs.items()})
            config.__dict__["_attn_implementation_internal"] = "sdpa"  # flash itself is for GPUs
            return compute(model, inputs, **kwargs)

        config = model.get_base_model().config
        monkeypatch.setattr(trainer, "compute_loss", recorded)
        trainer.add_callback(
            AtStep(begin=lambda step: config.__dict__.update(
                _attn_implementation_internal="flash_attention_2" if flash else "sdpa"))
        )  # fmt: skip
        trainer.train()
        config.__dict__["_attn_implementation_internal"] = "flash_attention_2" if flash else "sdpa"
        scored = trainer.evaluate(Subset(corpus.train, range(3)))["eval_loss"]
        losses_seen.append(losses(trainer) | {3: scored})

    look(flash=False)
    look(flash=True)
    length = trainer.corpus.train.max_length if trainer.corpus else 0
    assert [{*shape.values()} for shape in shapes] == [{(3, length)}] * 3 + [{(1, 3 * length)}] * 3
    assert losses_seen[1] == pytest.approx(losses_seen[0], rel=1e-5)


def test_an_optimizer_of_the_callers_own(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=corpus, optimizers=(own, None))
    trainer.train()
    assert trainer.proof is not None and trainer.proof.report()["ok"]


def test_an_optimizer_that_misses_a_tensor_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    own = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora" in name], lr=1e-2)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=corpus, optimizers=(own, None))
    with pytest.raises(UserError, match=r"optimizers: 2 trainable tensors are in no group.*modules_to_save"):
        trainer.train()


def test_a_corpus_by_position(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(adapted(), arguments(tmp_path, max_steps=1), None, corpus)
    trainer.train()
    assert trainer.times_trained.sum() == 2


def test_a_group_at_rate_zero_does_not_hide_the_others(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    name = "model.layers.1.self_attn.v_proj.lora_B.default"
    module = next(module for full, module in model.named_modules() if full.endswith(name))
    module.register_forward_hook(lambda module, inputs, output: output.detach())
    trainer = trainer_for(model, corpus, tmp_path, embedding_learning_rate=0.0)
    with pytest.raises(RunError, match=r"v_proj"):
        trainer.train()


def test_an_interrupted_step_leaves_nothing_behind(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, corpus, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    step = trainer.training_step
    calls = []

    def interrupted(*given: Any, **settings: Any) -> torch.Tensor:
        loss = step(*given, **settings)
        calls.append(loss)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return loss

    trainer.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model.zero_grad()
    trainer.train()
    assert losses(trainer)[1] == pytest.approx(sum(float(loss) for loss in calls[1:]), rel=1e-6)
    assert trainer.times_seen.sum() == trainer.times_trained.sum() == 4


def test_a_row_that_comes_twice_in_a_step_does_not_add_up(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *given: [0, 0, 1, 2])
    trainer._sampler = EpochSampler(4, 0)
    trainer.train()
    assert trainer.times_seen[:4].tolist() == [2, 1, 1, 0]
    assert not corpus.ledger(trainer.times_trained.numpy(), trainer.times_seen.numpy())["adds_up"]


def opt_model() -> Any:
    """Its documents see each other: it makes its mask without positions."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
    config = transformers.AutoConfig.for_model(
        "opt", vocab_size=VOCAB_SIZE, word_embed_proj_dim=64, init_std=0.1, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_adapters(transformers.AutoModelForCausalLM.from_config(config), r=8, target_modules="all-linear")


def test_a_model_whose_documents_see_each_other_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OPTForCausalLM \(opt\) lets the documents of a row see each other") as raised:
        trainer_for(opt_model(), corpus, tmp_path)
    assert raised.value.field == "model.name"
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in (corpus.train[0], corpus.train[1])]
    Trainer(model=opt_model(), args=arguments(tmp_path), train_dataset=rows)  # rows of the caller's own are not packed


def test_looking_whether_documents_see_each_other_draws_nothing(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5).train()
    transformers.set_seed(7)  # as a Trainer does when it is made
    expected = torch.rand(3)
    trainer_for(model, corpus, tmp_path, seed=7)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())


def test_the_rows_of_a_batch_stay_on_the_cpu(corpus: Corpus) -> None:
    batch = collate([corpus.train[3], corpus.train[1]])
    assert isinstance(batch["row"], np.ndarray) and batch["row"].tolist() == [3, 1]
    length, lengths = corpus.train.max_length, batch.pop("document_lengths")
    assert isinstance(lengths, np.ndarray) and lengths.sum() == 2 * length
    starts = batch["position_ids"].flatten()[[0, *lengths.cumsum()[:-1]]]
    assert not starts.any() and int((batch["position_ids"] == 0).sum()) == len(lengths)
    assert {name: tuple(value.shape) for name, value in batch.items() if name != "row"} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (2, length)
    )
    assert torch.equal(batch["input_ids"][1], corpus.train[1]["input_ids"])


def test_operations_are_transformers_own_estimate(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path)
    for rows in (1, 3, 2):
        batch = {"input_ids": torch.zeros(rows, 64, dtype=torch.int64)}
        expected = transformers.Trainer.floating_point_ops(trainer, batch)
        assert trainer.floating_point_ops(batch) == expected > 0


def test_rows_out_of_order_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    """Of a data set of the caller's own nothing is counted, and it may come in any order."""
    with pytest.raises(UserError, match=r"^dataloader_in_order: a resumed run finds its rows by their order.*out\.$"):
        trainer_for(adapted(), corpus, tmp_path, dataloader_in_order=False)
    given = arguments(tmp_path, dataloader_in_order=False)
    Trainer(model=adapted(), args=given, train_dataset=[{"input_ids": [5, 6], "labels": [5, 6]}])


def test_a_model_that_averages_by_forward_takes_one_a_step(corpus: Corpus, tmp_path: Path) -> None:
    """Else a target in a row with few of them would count for more than others."""
    one = {"gradient_accumulation_steps": 1, "max_steps": 2}

    def model() -> Any:
        made: Any = adapted()
        made.base_model.model.accepts_loss_kwargs = False
        return made

    with pytest.raises(UserError, match=r"^model\.name: LlamaForCausalLM takes no num_items_in_batch, so each forward"):
        trainer_for(model(), corpus, tmp_path, gradient_accumulation_steps=2)
    trainer_for(model(), corpus, tmp_path, **one).train()
    own = {"args": arguments(tmp_path, gradient_accumulation_steps=2), "train_dataset": corpus}
    Trainer(model=model(), compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs["loss"], **own)
