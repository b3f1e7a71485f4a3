"""A branch goes on from another run's checkpoint to the bit, on a schedule and with a ledger of its own."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from steep.data.packing import Corpus, pack
from steep.errors import RunError, UserError
from steep.manifest import write_manifest
from steep.training.branch import Branch, read_branch
from steep.training.schedules import schedule_of
from steep.training.trainer import Trainer
from tests.tiny import write_corpus
from tests.training.helpers import AtStep, Model, adapted, arguments, contents, losses, trained_weights, trainer_for
from tests.training.test_resume import assert_same, make
from tests.trees import tree_differences

PARENT: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 8,
    "gradient_accumulation_steps": 2,
}


def trainer(corpus: Corpus, folder: Path, branch: Branch | None = None, seed: int = 5, **settings: Any) -> Trainer:
    """A trainer with dropout and adapters drawn from `seed`: what a checkpoint does not bring would show."""
    torch.manual_seed(seed)
    model: Model = adapted(lora_dropout=0.1)
    if branch is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        torch.manual_seed(77)
    args = arguments(folder, **{**PARENT, "optim": "adamw_8bit", **settings})
    made = Trainer(model=model, args=args, train_dataset=corpus, branch=branch)
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = trainer(corpus, tmp_path_factory.mktemp("parent"))
    made.train()
    return made


def checkpoint(parent: Trainer, step: int) -> Path:
    return Path(str(parent.args.output_dir)) / f"checkpoint-{step}"


def rows_of(trainer: Trainer) -> list[list[int]]:
    """Records which rows each step has."""
    steps: list[list[int]] = []
    trainer.add_callback(AtStep(begin=lambda step: steps.append([])))
    step = trainer.training_step

    def note(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        steps[-1].extend(int(row) for row in inputs["row"])
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = note
    return steps


def test_on_its_parents_schedule_it_is_its_parent(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    """Weights, optimizer, random generators and place in the rows: the next steps are the parent's, to the bit."""
    before = contents(checkpoint(parent, 4))
    branch = trainer(
        corpus, tmp_path, read_branch(checkpoint(parent, 4)), lr_scheduler_type="constant", warmup_steps=0, max_steps=4
    )
    steps: list[int] = []
    branch.add_callback(AtStep(begin=steps.append))
    branch.train()
    assert steps == [5, 6, 7, 8] and branch.state.global_step == 8
    assert tree_differences(trained_weights(parent.model), trained_weights(branch.model)) == []
    assert parent.optimizer is not None and branch.optimizer is not None
    theirs, own = parent.optimizer.state_dict(), branch.optimizer.state_dict()
    assert tree_differences(theirs, own) == []
    expected = losses(parent)
    assert losses(branch) == {step: expected[step] for step in steps}
    assert branch.state.log_history[3]["tokens"] < parent.state.log_history[7]["tokens"]  # its own count
    assert contents(checkpoint(parent, 4)) == before


def test_an_nf4_base_in_bf16_too(llama_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    """With 8-bit states and stochastic rounding."""
    constant = {"lr_scheduler_type": "constant", "min_lr_rate": 0.0, "warmup_steps": 0}
    whole = make(llama_folder, corpus, tmp_path / "whole", "bf16", **constant, max_steps=7)
    whole.train()
    torch.manual_seed(99)
    branch = make(llama_folder, corpus, tmp_path / "branch", "bf16", **constant, max_steps=2)
    branch.branch = read_branch(tmp_path / "whole" / "checkpoint-5")
    branch.train()
    assert tree_differences(trained_weights(whole.model), trained_weights(branch.model)) == []
    assert branch.times_trained.sum() < whole.times_trained.sum() and branch.ledger()["adds_up"]


def test_it_decays_from_the_rate_of_the_checkpoint(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    """From the first step on, in every group, and in `lr` as the optimizer has it."""
    branch = trainer(
        corpus, tmp_path, read_branch(checkpoint(parent, 8)), lr_scheduler_type="warmup_stable_decay", warmup_steps=0
    )
    first = trained_weights(parent.model)
    branch.train()
    rows = [row for row in branch.state.log_history if "loss" in row]
    factors = [1 - math.sqrt(step / 8) for step in range(8)]
    assert [row["step"] for row in rows] == list(range(9, 17))
    assert [row["learning_rate_adapters_a"] for row in rows] == pytest.approx([1e-2 * factor for factor in factors])
    assert [row["embedding_learning_rate"] for row in rows] == pytest.approx([1e-3 * factor for factor in factors])
    assert tree_differences(first, trained_weights(branch.model)) != []
    assert branch.proof is not None and branch.proof.report()["ok"]


def test_a_changed_peak_rate_scales_it(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    branch = trainer(
        corpus, tmp_path, read_branch(checkpoint(parent, 4)), lr_scheduler_type="linear", warmup_steps=0, max_steps=4,
        learning_rate=4e-3, embedding_learning_rate=2e-3, save_strategy="no",
    )  # fmt: skip
    branch.train()
    rows = [row for row in branch.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [row["embedding_learning_rate"] for row in rows] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])


@pytest.mark.parametrize("stop", [6, 12])
def test_a_branch_resumes_to_the_bit(stop: int, parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    """Within the parent's epoch and beyond it, from its own checkpoints."""
    settings = {"lr_scheduler_type": "cosine", "min_lr_rate": 0.1, "warmup_steps": 0, "max_steps": 10, "save_steps": 2}
    start = read_branch(checkpoint(parent, 4))
    whole = trainer(corpus, tmp_path / "whole", start, **settings)
    seen = rows_of(whole)
    whole.train()
    resumed = trainer(corpus, tmp_path / "resumed", start, seed=6, **settings)
    again = rows_of(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert again == seen[stop - 4 :]
    assert_same(whole, resumed)
    assert whole.ledger() == resumed.ledger()
    assert whole.lr_scheduler is not None and resumed.lr_scheduler is not None
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()


def test_the_newest_checkpoint_of_its_own_comes_first(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    """`resume_from_checkpoint=True`: the parent's checkpoint only where the branch has none."""
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 2, "save_steps": 1}
    start = read_branch(checkpoint(parent, 4))
    for expected in ([5, 6], []):
        branch = trainer(corpus, tmp_path, start, **settings)
        steps: list[int] = []
        branch.add_callback(AtStep(begin=steps.append))
        branch.train(resume_from_checkpoint=True)
        assert steps == expected


def test_the_same_text_goes_on_with_rows_not_yet_seen(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
    early = torch.zeros_like(parent.times_seen)
    branch = trainer(corpus, tmp_path, read_branch(checkpoint(parent, 4)), **settings, max_steps=6)
    seen = rows_of(branch)
    branch.train()
    for row in [row for step in seen for row in step]:
        early[row] += 1
    assert torch.equal(branch.times_seen, early)
    with_parent = branch.times_seen + branch.times_seen_before
    assert branch.times_seen_before.sum() == 4 * 4
    assert int(with_parent.max() - with_parent.min()) <= 1
    assert int(branch.times_seen.max()) == 2, "some row came at an epoch's end and at the next one's start"
    ledger = branch.ledger()
    assert ledger["adds_up"], ledger["problems"]
    assert (ledger["rows_seen"], ledger["rows_seen_before"]) == (sum(map(len, seen)), 16)
    again = corpus.ledger(branch.times_trained.numpy(), branch.times_seen.numpy())
    assert not again["adds_up"], "a run of its own may not hand out a row twice before all are once"


def test_a_branch_that_begins_the_rows_again_does_not_add_up(
    parent: Trainer, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no"}
    monkeypatch.setattr(Trainer, "data_start", property(lambda self: 4))
    branch = trainer(corpus, tmp_path, read_branch(checkpoint(parent, 4)), **settings, max_steps=3)
    branch.train()
    assert branch.ledger()["problems"] == [
        "rows were handed to the model 0 to 2 times: some twice in an epoch, or not at all"
    ]


def test_a_branch_of_a_branch(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 2, "save_steps": 2}
    one = trainer(corpus, tmp_path / "one", read_branch(checkpoint(parent, 4)), **settings)
    one.train()
    two = trainer(corpus, tmp_path / "two", read_branch(tmp_path / "one" / "checkpoint-6"), **settings)
    two.train()
    assert tree_differences(trained_weights(parent.model), trained_weights(two.model)) == []
    assert two.times_seen_before.sum() == 6 * 4 and two.ledger()["adds_up"]


def test_other_text_begins_at_its_first_row(
    parent: Trainer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its ledger counts from zero, and a branch of that branch goes on in it."""
    other = pack(write_corpus(tmp_path / "text", 30), tokenizer, max_length=64, cache_dir=tmp_path / "tokens")
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 1, "save_steps": 3}
    start = read_branch(checkpoint(parent, 8))
    branch = trainer(other, tmp_path / "one", start, **settings, max_steps=6)
    seen = rows_of(branch)
    branch.train()
    fresh = trainer(other, tmp_path / "fresh", **settings, max_steps=6)
    order = rows_of(fresh)
    fresh.train()
    assert seen == order
    assert branch.times_seen_before.sum() == 0 and branch.ledger()["adds_up"]
    assert "rows_seen_before" not in branch.ledger()
    assert branch.state.epoch == fresh.state.epoch
    last = trainer(other, tmp_path / "two", read_branch(tmp_path / "one" / "checkpoint-12"), **settings, max_steps=2)
    seen = rows_of(last)
    last.train()
    assert seen == order[4:]
    assert last.times_seen_before.sum() == 4 * 4 and last.ledger()["adds_up"]


def test_epochs_of_a_branch_are_its_own(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 0, "save_strategy": "no"}
    branch = trainer(
        corpus, tmp_path, read_branch(checkpoint(parent, 8)), **settings, max_steps=-1, num_train_epochs=1
    )  # fmt: skip
    branch.train()
    per_epoch = math.ceil(math.ceil(len(corpus.train) / 2) / 2)
    assert branch.state.global_step == branch.state.max_steps == 8 + per_epoch
    rows = [row for row in branch.state.log_history if "loss" in row]
    assert rows[-1]["learning_rate"] == pytest.approx(1e-2 / per_epoch)


def test_a_cooled_parent_goes_on_at_its_constant_rate(corpus: Corpus, tmp_path: Path) -> None:
    """Also where the factor is no round number: it is kept as it was, not worked out from the rates."""
    cooled = {"cooldown_steps": 2, "stable_lr_rate": 0.3}
    first = trainer(corpus, tmp_path / "parent", **cooled)
    first.train()
    start = read_branch(tmp_path / "parent" / "checkpoint-4")
    assert start.rate_factor == 0.3
    # The parent's own fields may stay: what the checkpoint has behind it is left out.
    branch = trainer(corpus, tmp_path / "branch", start, max_steps=4, **{**cooled, "warmup_steps": 0})
    branch.train()
    assert tree_differences(trained_weights(first.model), trained_weights(branch.model)) == []
    assert [row["learning_rate"] for row in branch.state.log_history if "loss" in row] == [3e-3] * 4


def test_a_resumed_run_may_save_at_other_steps(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    """transformers would go on with the intervals of the checkpoint."""
    resumed = trainer(corpus, tmp_path, save_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint(parent, 4)))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_it_is_recorded_what_it_came_from(parent: Trainer, corpus: Corpus) -> None:
    place = checkpoint(parent, 4)
    start = read_branch(place)
    assert (start.checkpoint, start.step, start.rate_factor, start.data_start) == (str(place), 4, 1.0, 0)
    assert start.fingerprint == corpus.fingerprint
    assert start.name == f"{place.parent.name}/checkpoint-4"
    assert start.digest == hashlib.sha256((place / "manifest.json").read_bytes()).hexdigest()


def test_one_changed_byte_is_noticed(parent: Trainer, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(parent, 4), tmp_path / "checkpoint-4"))
    start = read_branch(folder)
    (folder / "left-by-a-tracker.txt").write_text("x")  # is no part of it
    start.verify()
    note = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(note[:-1] + b"?")
    with pytest.raises(UserError, match=r"^--resume: .*checkpoint-4, which this branch began from, has changed"):
        start.verify()
    write_manifest(folder)  # another checkpoint, and a whole one
    with pytest.raises(UserError, match=r"^--resume: .*checkpoint-4, which this branch began from, has changed\. "):
        start.verify()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is gone"):
        start.verify()


def test_another_base_is_refused(parent: Trainer, corpus: Corpus, tmp_path: Path) -> None:
    start = read_branch(checkpoint(parent, 4))
    branch = trainer(corpus, tmp_path, start, lr_scheduler_type="constant", warmup_steps=0)
    with torch.no_grad():
        next(p for name, p in branch.model.named_parameters() if "layers.0.self_attn.q_proj.base" in name).mul_(2)
    with pytest.raises(RunError, match="not the base model that the run began with: 1 of"):
        branch.train()
    assert branch.state.global_step == 4 and branch.proof is None  # nothing was seen that could be told


def test_what_is_no_checkpoint_is_refused(parent: Trainer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--branch: there is no folder .*checkpoint-9"):
        read_branch(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*checkpoint-8\. There are checkpoint-9\."):
        read_branch(tmp_path / "checkpoint-8")
    with pytest.raises(UserError, match="is no whole checkpoint: it has no manifest"):
        read_branch(tmp_path / "checkpoint-9")
    (tmp_path / "final").symlink_to(checkpoint(parent, 4))
    with pytest.raises(UserError, match="it is not called checkpoint-N"):
        read_branch(tmp_path / "final")
    (tmp_path / "checkpoint-4").symlink_to(checkpoint(parent, 4))
    with pytest.raises(UserError, match="it is a symbolic link"):
        read_branch(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "schedule", "random", "observations"])
def test_a_file_that_was_cut_off_is_found_before_the_base_is_loaded(name: str, parent: Trainer, tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoint(parent, 4), place)
    file = place / f"{name}.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"^--branch: .*whole checkpoint: {name}\.safetensors has .* bytes.*another"):
        read_branch(place)
    file.unlink()
    with pytest.raises(UserError, match=rf"is no whole checkpoint: {name}\.safetensors is missing"):
        read_branch(place)


def test_a_schedule_of_several_factors_cannot_be_branched(corpus: Corpus, tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters() if p.requires_grad], lr=1e-3)
    factors = [lambda step, own=number: 1 / (1 + own) for number in range(len(optimizer.param_groups))]
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    Trainer(model=model, args=args, train_dataset=corpus, optimizers=(optimizer, schedule)).train()
    with pytest.raises(UserError, match=r"the learning rate of .*checkpoint-2 is not one factor for all groups"):
        read_branch(tmp_path / "checkpoint-2")


def test_a_plain_schedule_is_still_transformers(corpus: Corpus, tmp_path: Path) -> None:
    made = trainer_for(adapted(), corpus, tmp_path, lr_scheduler_type="linear")
    made.train()
    assert schedule_of(made.args, 6) is None
    assert made.rate_factor() == 0
