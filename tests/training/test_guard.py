"""What becomes of steps that are out of the ordinary: a row of noise planted among sentences, and planted losses."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from steep.data.packing import Corpus, pack
from steep.data.sampler import epoch_order
from steep.errors import RunError, UserError
from steep.training.branch import read_branch
from steep.training.skip_list import SkipList, Skipped
from steep.training.trainer import Trainer
from tests.test_run import lines
from tests.tiny import documents
from tests.training.helpers import AtStep, adapted, arguments, losses, trained_weights, trainer_for
from tests.training.test_fp16 import Fp16, fp16  # noqa: F401
from tests.training.test_resume import assert_same
from tests.training.test_trainer import poison
from tests.trees import tree_differences

NOISE = 60  # the number of its document


class Planted(NamedTuple):
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    row: int
    seed: int
    step: int
    steps: int
    text: str


@pytest.fixture(scope="module")
def planted(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Sentences, and one document of rare characters that fills a row, which comes late in the only epoch."""
    folder = tmp_path_factory.mktemp("planted")
    draw = random.Random(0)
    text = "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(21))
    texts = documents("en", 120)
    texts.insert(NOISE, text)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8")
    corpus = pack(
        [{"path": str(folder / "text.jsonl"), "domain": "sentences"}],
        tokenizer,
        max_length=64,
        holdout=0.0,
        strategy="best_fit",
        cache_dir=folder / "tokens",
    )
    train = corpus.train
    (piece,) = [piece for piece, document in enumerate(train.document) if document == NOISE]
    row = int((train.row_first <= piece).sum()) - 1
    steps = len(train) // 2
    seed, step = next(
        (seed, step)
        for seed in range(100)
        if steps - 6 > (step := epoch_order(len(train), seed, 0).tolist().index(row) // 2 + 1) > steps - 16
    )
    return Planted(corpus, tokenizer, row, seed, step, steps, text)


def make(planted: Planted, folder: Path, action: str, **settings: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": planted.steps,
        "data_seed": planted.seed,
        "embedding_learning_rate": 1e-2,
        "spike_action": action,
        "spike_window": 64,
        "save_strategy": "steps",
        "save_steps": 15,
        "save_total_limit": 10,
        **settings,
    }
    torch.manual_seed(5)
    trainer = trainer_for(adapted(lora_dropout=0.1), planted.corpus, folder, **given)
    trainer.processing_class = planted.tokenizer
    return trainer


def rows_by_step(planted: Planted) -> list[list[int]]:
    order = epoch_order(len(planted.corpus.train), planted.seed, 0).tolist()
    return [order[2 * step : 2 * step + 2] for step in range(planted.steps)]


def assert_named(planted: Planted, incident: dict[str, Any], action: str) -> None:
    assert (incident["step"], incident["kind"], incident["action"]) == (planted.step, "spike in gradient norm", action)
    assert incident["grad_norm"] > 3 * incident["median"] > 0 and incident["z"] >= 6 and incident["loss"] > 3
    rows = rows_by_step(planted)[planted.step - 1]
    assert [row["row"] for row in incident["rows"]] == rows
    (noise,) = next(row["pieces"] for row in incident["rows"] if row["row"] == planted.row)
    assert noise == {"source": "text.jsonl", "domain": "sentences", "role": "train", "document": NOISE,
                     "first_token": 0, "tokens": 64, "text": f"{planted.text}</s>"[:200]}  # fmt: skip
    other = next(row["pieces"] for row in incident["rows"] if row["row"] != planted.row)
    assert all(piece["text"].startswith(documents("en", 120)[piece["document"] - (piece["document"] > NOISE)][:20])
               for piece in other if piece["first_token"] == 0)  # fmt: skip


def assert_skipped(planted: Planted, trainer: Trainer) -> None:
    """The rows of the step are counted as skipped, all others as trained once."""
    rows = rows_by_step(planted)[planted.step - 1]
    assert trainer.times_skipped.nonzero().flatten().tolist() == sorted(rows)
    assert trainer.times_trained.sum() == 2 * planted.steps - 2 and trainer.times_trained[rows].sum() == 0
    ledger = trainer.ledger()
    assert ledger["adds_up"], ledger["problems"]
    assert (ledger["rows_skipped"], ledger["rows_refused"]) == (2, 0)
    (source,) = ledger["sources"]
    train = planted.corpus.train
    pieces = [piece for row in rows for piece in range(train.row_first[row], train.row_first[row + 1])]
    assert source["tokens"]["skipped"] == sum(int(train.length[p]) - int(train.start[p] > 0) for p in pieces) > 100
    assert source["documents"]["skipped"] >= 2
    assert trainer.guard.steps_skipped == 1


def assert_same_logs_too(whole: Trainer, other: Trainer) -> None:
    """`assert_same`, where some steps have no loss."""
    rows: list[dict[str, Any]] = [*whole.state.log_history, *other.state.log_history]
    for row in rows:
        row.update({key: None for key in ("loss", "grad_norm") if key not in row})
    assert_same(whole, other)


def test_off_and_warn_apply_it(planted: Planted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    off = make(planted, tmp_path / "off", "off")
    off.train()
    assert not (tmp_path / "off" / "incidents.jsonl").exists() and "spike" not in caplog.text
    warn = make(planted, tmp_path / "warn", "warn")
    warn.train()
    (incident,) = lines(tmp_path / "warn" / "incidents.jsonl")
    assert_named(planted, incident, "warn")
    assert f"step {planted.step}: spike in gradient norm: " in caplog.text and "the step is applied" in caplog.text
    assert_same(off, warn)
    assert warn.times_skipped.sum() == 0 and warn.times_trained.sum() == 2 * planted.steps


def test_skip_does_not_apply_it(planted: Planted, tmp_path: Path) -> None:
    trainer = make(planted, tmp_path, "skip")
    after: dict[int, dict[str, torch.Tensor]] = {}
    trainer.add_callback(AtStep(end=lambda step: after.update({step: trained_weights(trainer.model)})))
    trainer.train()
    (incident,) = lines(tmp_path / "incidents.jsonl")
    assert_named(planted, incident, "skip")
    assert tree_differences(after[planted.step - 1], after[planted.step]) == []
    assert tree_differences(after[planted.step], after[planted.step + 1]) != []
    assert_skipped(planted, trainer)
    rows = {row["step"]: row for row in trainer.state.log_history if "tokens" in row}
    assert list(rows) == list(range(1, planted.steps + 1))  # the place in the data and the schedule move on
    assert [rows[step]["steps_skipped"] for step in (planted.step - 1, planted.step, planted.steps)] == [0, 1, 1]
    assert rows[planted.step]["tokens"] == rows[planted.step - 1]["tokens"] and rows[planted.step]["tokens_per_second"]


def test_a_killed_run_writes_its_incidents_once(planted: Planted, tmp_path: Path) -> None:
    whole = make(planted, tmp_path / "whole", "skip")
    whole.add_callback(poison(whole.model, {planted.step - 1, planted.step + 3}))
    whole.train()
    killed = make(planted, tmp_path / "killed", "skip")
    killed.add_callback(poison(killed.model, {planted.step - 1, planted.step + 3}))

    def stop(step: int) -> None:
        if step == planted.step + 4:
            raise KeyboardInterrupt

    killed.add_callback(AtStep(begin=stop))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    file = tmp_path / "killed" / "incidents.jsonl"
    assert [row["step"] for row in lines(file)] == [planted.step + offset for offset in (-1, 0, 3)]
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "ki')  # as a kill may leave it
    again = make(planted, tmp_path / "killed", "skip")
    again.add_callback(poison(again.model, {planted.step - 1, planted.step + 3}))
    again.train(resume_from_checkpoint=True)
    assert_same_logs_too(whole, again)
    assert file.read_bytes() == (tmp_path / "whole" / "incidents.jsonl").read_bytes()
    assert [row["kind"] for row in lines(file)] == ["loss not finite", "spike in gradient norm", "loss not finite"]


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_rollback_is_a_run_that_knew_of_it(save_strategy: str, planted: Planted, tmp_path: Path) -> None:
    """Without a checkpoint it goes back to its beginning."""
    back = make(planted, tmp_path / "back", "rollback", save_strategy=save_strategy)
    begun: list[int] = []
    back.add_callback(AtStep(begin=begun.append))
    back.train()
    last = (planted.step - 1) // 15 * 15 if save_strategy == "steps" else 0
    assert begun == [*range(1, planted.step + 1), *range(last + 1, planted.steps + 1)]
    (incident,) = lines(tmp_path / "back" / "incidents.jsonl")
    assert_named(planted, incident, "rollback")
    assert_skipped(planted, back)
    rows = rows_by_step(planted)[planted.step - 1]
    skipped = json.loads((tmp_path / "back" / "skipped_steps.json").read_text(encoding="utf-8"))
    measured = {"loss": incident["loss"], "grad_norm": incident["grad_norm"]}
    assert skipped == {"steps": [{"step": planted.step, "rows": rows, **measured}]}
    row = next(row for row in back.state.log_history if row["step"] == planted.step)
    assert "loss" not in row and "grad_norm" not in row

    told = make(planted, tmp_path / "told", "off")
    SkipList(tmp_path / "told").add(planted.step, Skipped(rows, incident["loss"], incident["grad_norm"]))
    shutil.copytree(tmp_path / "back" / "checkpoint-0", tmp_path / "told" / "checkpoint-0")
    told.train(resume_from_checkpoint=True)
    assert_same_logs_too(told, back)


def test_the_first_checkpoint_is_the_beginning(planted: Planted, tmp_path: Path) -> None:
    whole = make(planted, tmp_path / "whole", "rollback", max_steps=20)
    whole.train()
    torch.manual_seed(99)
    again = make(planted, tmp_path / "again", "off", max_steps=20)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-0"))
    plain = make(planted, tmp_path / "plain", "off", max_steps=20)
    plain.train()
    assert_same(whole, again)
    assert_same(whole, plain)


@pytest.mark.parametrize("step", [8, 60])
def test_the_first_checkpoint_of_a_branch(step: int, planted: Planted, tmp_path: Path) -> None:
    """Within an epoch of its parent, and at the beginning of the next one."""
    parent = make(planted, tmp_path / "parent", "off", max_steps=step, save_steps=step)
    parent.train()

    def branch(folder: str, action: str) -> Trainer:
        torch.manual_seed(7)
        return Trainer(
            model=adapted(lora_dropout=0.1),
            args=arguments(tmp_path / folder, max_steps=6, data_seed=planted.seed, spike_action=action,
                           save_strategy="no", embedding_learning_rate=1e-2),
            train_dataset=planted.corpus,
            branch=read_branch(tmp_path / "parent" / f"checkpoint-{step}"),
        )  # fmt: skip

    plain, first = branch("plain", "off"), branch("first", "rollback")
    plain.train()
    first.train()
    assert [path.name for path in (tmp_path / "first").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    again = branch("first", "rollback")
    again.train(resume_from_checkpoint=True)
    assert_same(plain, first)
    assert_same(plain, again)
    assert plain.state.global_step == step + 6


def test_a_kill_before_the_list_is_written_decides_the_same(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(planted, tmp_path / "whole", "rollback")
    whole.train()
    killed = make(planted, tmp_path / "killed", "rollback")

    def die(self: SkipList, step: int, skipped: Skipped) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SkipList, "add", die)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    assert [row["step"] for row in lines(tmp_path / "killed" / "incidents.jsonl")] == [planted.step]
    again = make(planted, tmp_path / "killed", "rollback")
    again.train(resume_from_checkpoint=True)
    assert_same_logs_too(whole, again)
    for name in ("incidents.jsonl", "skipped_steps.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def raise_losses(trainer: Trainer, steps: set[int], factor: float = 20.0) -> None:
    """Plant a loss, and with it a gradient, in each of `steps`."""
    now = {"step": 0}
    trainer.add_callback(AtStep(begin=lambda step: now.update(step=step)))

    def raised(module: Any, inputs: Any, output: Any) -> None:
        if now["step"] in steps:
            output["loss"] = output["loss"] * factor

    trainer.model.register_forward_hook(raised)


QUICK: dict[str, Any] = {"learning_rate": 1e-4, "spike_window": 8, "spike_threshold": 8.0}


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_spikes_end_the_run(action: str, corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=30, spike_action=action, **QUICK)
    raise_losses(trainer, {10, 12, 13, 15, 16})
    with pytest.raises(RunError, match="4 of the last 8 steps were spikes") as raised:
        trainer.train()
    assert "training.learning_rate (now 0.0001)" in str(raised.value)
    found = lines(tmp_path / "incidents.jsonl")
    assert [(row["step"], row["action"]) for row in found] == [
        *((step, action) for step in (10, 12, 13)),
        (15, "skip"),
    ]
    assert trainer.state.global_step == 15 and (tmp_path / "checkpoint-15").is_dir()
    assert trainer.times_trained.sum() == 2 * 11 and trainer.ledger()["adds_up"]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_what_recurs_is_trained(action: str, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kind of text is not removed from the run; one row that stands out in another way still is."""
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=50, spike_action=action, **QUICK)
    raise_losses(trainer, {12, 18, 24, 30, 36, 42, 48})
    raise_losses(trainer, {45}, factor=100.0)
    trainer.train()
    found = lines(tmp_path / "incidents.jsonl")
    found.sort(key=lambda row: row["step"])  # lines behind a checkpoint that is gone back to are written once more
    assert [(row["step"], row["action"]) for row in found] == [
        *((step, action) for step in (12, 18, 24, 30, 36)),
        (42, "recurs"),
        (45, action),
    ]
    domains = {piece["domain"] for row in found[5]["rows"] for piece in row["pieces"]}
    said = next(line for line in caplog.messages if "but a kind of text" in line)
    assert said.startswith("step 42: spike in ") and all(domain in said for domain in domains)
    assert trainer.guard.steps_skipped == 6 and trainer.times_trained.sum() == 2 * 44


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_bad_rows_that_seldom_come_are_skipped_each(
    action: str, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However alike they are: what may be a kind of text is said, with what to set."""
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=65, spike_action=action, **QUICK)
    bad = [12, 22, 32, 42, 52, 62]
    raise_losses(trainer, set(bad))
    trainer.train()
    found = lines(tmp_path / "incidents.jsonl")
    assert [(row["step"], row["action"]) for row in found] == [(step, action) for step in bad]
    assert trainer.guard.steps_skipped == 6 and trainer.times_trained.sum() == 2 * 59
    hints = [line for line in caplog.messages if "raise training.spike_window (now 8)" in line]
    assert [line.split(":")[0] for line in hints] == [f"step {step}" for step in bad[3:]]
    assert "3 steps before it stood out as far (this one is of " in hints[0]


def test_spikes_that_are_warned_of_end_nothing(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=20, spike_action="warn", **QUICK)
    raise_losses(trainer, set(range(10, 21)))
    trainer.train()
    assert 1 <= len(lines(tmp_path / "incidents.jsonl")) <= 3  # what was applied is known from then on


def test_rows_of_another_run_are_not_passed_over(corpus: Corpus, tmp_path: Path) -> None:
    trainer_for(adapted(), corpus, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    SkipList(tmp_path).add(4, Skipped([0], 9.0, 1.0))
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=6)
    with pytest.raises(RunError, match=r"skipped_steps.json names other rows for step 4"):
        trainer.train(resume_from_checkpoint=True)
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=6)
    trainer.train()  # a run that begins forgets it
    assert trainer.times_trained.sum() == 12 and not (tmp_path / "skipped_steps.json").exists()


@pytest.mark.parametrize(
    "damage",
    ["", "{}", '{"steps": [{"step": "x", "rows": []}]}', '{"steps": [{"step": 3, "rows": [1]}]}', '{"steps": 3}', "[]"],
)
def test_a_damaged_list_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "skipped_steps.json").write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=r"skipped_steps.json is damaged"):
        SkipList(tmp_path).read()


def test_a_checkpoint_that_is_gone(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=12, spike_action="rollback", **QUICK)
    raise_losses(trainer, {10})

    def lose(step: int) -> None:
        if step == 5:
            trainer.finish_saving()
            shutil.rmtree(tmp_path / "checkpoint-0")

    trainer.add_callback(AtStep(end=lose))
    with pytest.raises(RunError, match=r"step 10 is a spike, and .* holds no whole checkpoint"):
        trainer.train()


def test_a_damaged_checkpoint_is_not_gone_back_to(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 12, "spike_action": "rollback", "save_strategy": "steps", "save_steps": 5, **QUICK}
    trainer = trainer_for(adapted(), corpus, tmp_path, **settings)
    raise_losses(trainer, {9})
    begun: list[int] = []

    def spoil(step: int) -> None:
        if step == 7 and len(begun) == 7:
            trainer.finish_saving()
            (tmp_path / "checkpoint-5" / "optimizer.safetensors").write_text("x")

    trainer.add_callback(AtStep(begin=begun.append, end=spoil))
    trainer.train()
    assert begun == [*range(1, 10), *range(1, 13)]
    assert f"{tmp_path / 'checkpoint-5'} is passed over: optimizer.safetensors has 1 bytes" in caplog.text


def test_a_checkpoint_of_another_run_is_not_gone_back_to(corpus: Corpus, tmp_path: Path) -> None:
    """In a script a folder may be used again."""
    trainer_for(adapted(), corpus, tmp_path, max_steps=9, save_strategy="steps", save_steps=9).train()
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=12, spike_action="rollback", **QUICK)
    raise_losses(trainer, {10})
    begun: list[int] = []
    trainer.add_callback(AtStep(begin=begun.append))
    trainer.train()
    assert begun == [*range(1, 11), *range(1, 13)]


def test_a_run_that_began_elsewhere_goes_back_there(corpus: Corpus, tmp_path: Path) -> None:
    """It passes over what the run did that it began from, and leaves another one's checkpoints alone."""
    settings: dict[str, Any] = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "spike_action": "rollback"}
    first = trainer_for(adapted(), corpus, tmp_path / "first", **QUICK, **settings)
    raise_losses(first, {10})
    first.train()
    other = trainer_for(adapted(), corpus, tmp_path / "here", max_steps=3, save_strategy="steps", save_steps=3)
    other.train()
    shutil.rmtree(tmp_path / "first" / "checkpoint-12")
    start = str(tmp_path / "first" / "checkpoint-4")

    here = trainer_for(adapted(), corpus, tmp_path / "here", **QUICK, **{**settings, "save_steps": 20})
    raise_losses(here, {10, 13}, factor=60.0)
    begun: list[int] = []
    here.add_callback(AtStep(begin=begun.append))
    here.train(resume_from_checkpoint=start)
    assert begun == [*range(5, 14), *range(5, 15)]
    assert here.guard.steps_skipped == 2 and here.times_skipped.sum() == 4 and here.ledger()["adds_up"]
    found = lines(tmp_path / "here" / "incidents.jsonl")
    assert [(row["step"], row["kind"]) for row in found] == [
        (10, "spike in the run that this one began from"),
        (13, "spike in loss"),
    ]
    assert found[0]["rows"] == lines(tmp_path / "first" / "incidents.jsonl")[0]["rows"]


def test_what_rows_nobody_knows_are_not_passed_over(tmp_path: Path) -> None:
    """Without a `Corpus` there is nothing to tell by whether two runs train the same rows."""

    def trainer(folder: str, token: int) -> Trainer:
        ids = [[token, *range(number, number + 6)] for number in range(5, 13)]
        rows: Any = [{"input_ids": row, "labels": row} for row in ids]
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return Trainer(model=adapted(), args=arguments(tmp_path / folder, **settings), train_dataset=rows)

    trainer("first", 3).train()
    SkipList(tmp_path / "first").add(4, Skipped([], 9.0, 1.0))
    here = trainer("here", 4)
    here.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert here.guard.steps_skipped == 0 and losses(here).keys() == {1, 2, 3, 4}
    assert not (tmp_path / "here" / "skipped_steps.json").exists()


@pytest.mark.parametrize("batch", [2, 1])
def test_a_branch_passes_over_what_its_parent_did(
    batch: int, planted: Planted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where its steps have the same rows: in other batches it looks for spikes itself."""
    parent = make(planted, tmp_path / "parent", "rollback")
    parent.train()

    def branch() -> Trainer:
        torch.manual_seed(7)
        return Trainer(
            model=adapted(lora_dropout=0.1),
            args=arguments(tmp_path / "branch", max_steps=planted.steps - 15, data_seed=planted.seed, seed=3,
                           per_device_train_batch_size=batch, save_strategy="steps", save_steps=planted.steps - 18,
                           spike_action="off"),
            train_dataset=planted.corpus,
            branch=start,
        )  # fmt: skip

    start = read_branch(tmp_path / "parent" / "checkpoint-15")
    assert [item["step"] for item in start.passed_over] == [planted.step]
    SkipList(tmp_path / "parent").take({})  # the parent may go on, and its list with it: what counts is the beginning
    whole = branch()
    whole.train()
    if batch == 1:
        assert "passed over 1 steps that have other rows here: they are trained" in caplog.text
        assert whole.guard.steps_skipped == 0
        return
    assert (tmp_path / "branch" / "skipped_steps.json").exists()
    rows = rows_by_step(planted)[planted.step - 1]
    assert whole.times_skipped.nonzero().flatten().tolist() == sorted(rows) and whole.ledger()["adds_up"]
    (line,) = lines(tmp_path / "branch" / "incidents.jsonl")
    assert (line["step"], line["action"], [row["row"] for row in line["rows"]]) == (planted.step, "rollback", rows)
    shutil.rmtree(tmp_path / "branch" / f"checkpoint-{planted.steps}")
    again = branch()
    again.train(resume_from_checkpoint=True)
    assert_same_logs_too(whole, again)
    assert lines(tmp_path / "branch" / "incidents.jsonl") == [line]


def test_scores_of_steps_that_are_trained_again_are_dropped(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=12, eval_strategy="steps", eval_steps=3, save_steps=6,
                          save_strategy="steps", spike_action="rollback", **QUICK)  # fmt: skip
    raise_losses(trainer, {11})
    begun: list[int] = []
    trainer.add_callback(AtStep(begin=begun.append))
    trainer.train()
    assert begun == [*range(1, 12), *range(7, 13)]
    assert [scores[0].step for scores in trainer.evaluations] == [3, 6, 9, 12]
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [3, 6, 9, 12]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_last_step_of_an_epoch_may_be_the_one(action: str, corpus: Corpus, tmp_path: Path) -> None:
    """And the first one after it is not finite."""
    last = len(corpus.train) // 2
    assert len(corpus.train) % 2 == 0
    saved = (last - 1) // 5 * 5
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": last + 4,
        "spike_action": action, "save_strategy": "steps", "save_steps": 5, **QUICK,
    }  # fmt: skip

    def run(folder: str, resume: bool = False) -> Trainer:
        trainer = trainer_for(adapted(lora_dropout=0.1), corpus, tmp_path / folder, **settings)
        raise_losses(trainer, {last})
        trainer.add_callback(poison(trainer.model, {last + 1}))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert whole.ledger()["adds_up"] and whole.times_seen.sum() == len(corpus.train) + 8
    assert (whole.guard.steps_skipped, whole.steps_not_finite) == (1, 1)
    found = lines(tmp_path / "whole" / "incidents.jsonl")
    assert [(row["step"], len(row["rows"])) for row in found] == [(last, 2), (last + 1, 2)]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again").glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > saved:
            shutil.rmtree(path)
    assert_same_logs_too(whole, run("again", resume=True))
    assert lines(tmp_path / "again" / "incidents.jsonl") == found


def without_numbers(corpus: Corpus) -> list[dict[str, Any]]:
    """The rows as a data set of the caller's own, which has no ledger."""
    rows = (corpus.train[row] for row in range(len(corpus.train)))
    return [{key: value for key, value in row.items() if key != "row"} for row in rows]


@pytest.mark.parametrize(("batch", "accumulation", "known"), [(3, 1, True), (1, 3, True), (1, 3, False)])
@pytest.mark.parametrize("action", ["warn", "skip", "rollback"])
def test_a_short_step_is_not_judged(
    action: str, batch: int, accumulation: int, known: bool, corpus: Corpus, tmp_path: Path
) -> None:
    """The last one of an epoch, which scatters more than the full ones do: neither it, nor those after it by it."""
    last = -(-len(corpus.train) // 3)
    assert len(corpus.train) % 3
    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": last + 3,
        "spike_action": action, "remove_unused_columns": False, **QUICK, "spike_window": 32,
    }  # fmt: skip
    rows: Any = corpus if known else without_numbers(corpus)
    trainer = Trainer(model=adapted(), args=arguments(tmp_path, **settings), train_dataset=rows)
    raise_losses(trainer, {last, last + 2})
    trainer.train()
    (incident,) = lines(tmp_path / "incidents.jsonl")
    assert (incident["step"], incident["action"]) == (last + 2, action)
    assert len(trainer.guard.state()["detector"]["losses"]["window"]) == last + 2
    if known:
        assert trainer.times_trained.sum() == len(corpus.train) + (9 if action == "warn" else 6)


def test_a_short_step_that_is_passed_over_is_not_remembered(corpus: Corpus, tmp_path: Path) -> None:
    """A list that was written when such steps were judged."""
    last = -(-len(corpus.train) // 3)
    settings: dict[str, Any] = {"per_device_train_batch_size": 3, "max_steps": last, "spike_action": "rollback"}
    trainer = trainer_for(adapted(), corpus, tmp_path, **settings, **QUICK)
    rows = epoch_order(len(corpus.train), trainer.args.seed, 0)[3 * (last - 1) :].tolist()
    trainer.guard.skip_list.add(last, Skipped(rows, 1e6, 1e6))
    shutil.copy(tmp_path / "skipped_steps.json", tmp_path / "list")
    before = {**settings, **QUICK, "max_steps": last - 1, "save_strategy": "steps"}
    trainer_for(adapted(), corpus, tmp_path, **before).train()
    shutil.copy(tmp_path / "list", tmp_path / "skipped_steps.json")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.guard.steps_skipped == 1 and trainer.times_skipped.nonzero().flatten().tolist() == sorted(rows)
    assert max(trainer.guard.state()["detector"]["losses"]["window"]) < 100


def test_rows_that_nobody_knows(corpus: Corpus, tmp_path: Path) -> None:
    """A data set of the caller's own has no ledger: its incidents have no rows, and its steps are passed over too."""
    args = arguments(tmp_path, max_steps=12, spike_action="rollback", remove_unused_columns=False, **QUICK)
    rows: Any = without_numbers(corpus)
    trainer = Trainer(model=adapted(), args=args, train_dataset=rows)
    raise_losses(trainer, {10})
    trainer.train()
    (incident,) = lines(tmp_path / "incidents.jsonl")
    assert (incident["step"], incident["rows"]) == (10, [])
    assert trainer.guard.steps_skipped == 1 and list(losses(trainer)) == [*range(1, 10), 11, 12]


def test_rollback_with_a_loss_scaler(fp16: Fp16, tmp_path: Path) -> None:  # noqa: F811
    settings: dict[str, Any] = {"max_steps": 13, "save_strategy": "steps", "save_steps": 9, **QUICK}
    low = 2.0**8  # the planted loss does not overflow
    back = fp16(adapted(), low, folder="back", spike_action="rollback", **settings)
    raise_losses(back, {10})
    back.train()
    told = fp16(adapted(), low, folder="told", spike_action="off", **settings)
    shutil.copytree(tmp_path / "back" / "checkpoint-9", tmp_path / "told" / "checkpoint-9")
    shutil.copy(tmp_path / "back" / "skipped_steps.json", tmp_path / "told")
    told.train(resume_from_checkpoint=True)
    assert back.guard.steps_skipped == told.guard.steps_skipped == 1
    assert back.steps_scaler_skipped == told.steps_scaler_skipped == 0
    assert tree_differences(trained_weights(told.model), trained_weights(back.model)) == []
    scalers = [trainer.accelerator.scaler for trainer in (back, told)]
    assert scalers[0] is not None and scalers[1] is not None
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_a_run_that_is_not_finite_is_saved_before_it_ends(corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 9, "max_nonfinite_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(adapted(), corpus, tmp_path, **settings)
    trainer.add_callback(poison(trainer.model, {4, 5, 6}))
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row.*`--resume` goes on behind them"):
        trainer.train()
    assert trainer.state.global_step == 6
    found = lines(tmp_path / "incidents.jsonl")
    assert [(row["step"], row["kind"], row["action"], row["loss"]) for row in found] == [
        (step, "loss not finite", "refused", None) for step in (4, 5, 6)
    ]
    assert [len(row["rows"]) for row in found] == [2, 2, 2]
    again = trainer_for(adapted(), corpus, tmp_path, **settings)
    begun: list[int] = []
    again.add_callback(AtStep(begin=begun.append))
    again.add_callback(poison(again.model, {7}))  # the count begins anew
    again.train(resume_from_checkpoint=True)
    assert begun == [7, 8, 9] and again.steps_not_finite == 4
    assert again.times_trained.sum() == 2 * 5 and again.ledger()["rows_refused"] == 8
    assert [row["step"] for row in lines(tmp_path / "incidents.jsonl")] == [4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["not finite", "spikes"])
def test_a_resumed_run_counts_on(kind: str, corpus: Corpus, tmp_path: Path) -> None:
    """It ends where the run never stopped does, for the same reason, from each of its checkpoints."""
    folder = tmp_path / "run"

    def end() -> tuple[int, str]:
        if kind == "spikes":
            settings = {"max_steps": 30, "spike_action": "skip", **QUICK}
        else:
            settings = {"max_steps": 9, "max_nonfinite_steps": 3}
        trainer = trainer_for(adapted(), corpus, folder, save_strategy="steps", save_steps=1, **settings)
        if kind == "spikes":
            raise_losses(trainer, {10, 12, 13, 15, 16})
        else:
            trainer.add_callback(poison(trainer.model, {2, 4, 5, 6, 7}))
        with pytest.raises(RunError) as raised:
            trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        return trainer.state.global_step, str(raised.value)

    whole = end()
    incidents = (folder / "incidents.jsonl").read_bytes()
    assert whole[0] == {"not finite": 6, "spikes": 15}[kind]
    for step in {"not finite": (5, 4, 3), "spikes": (14, 9)}[kind]:
        for later in range(step + 1, whole[0] + 1):
            shutil.rmtree(folder / f"checkpoint-{later}")
        assert end() == whole
        assert (folder / "incidents.jsonl").read_bytes() == incidents


def test_the_last_step_may_be_the_one_too_many(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_for(adapted(), corpus, tmp_path, max_steps=6, max_nonfinite_steps=2)
    trainer.add_callback(poison(trainer.model, {5, 6}))
    with pytest.raises(RunError, match="the last of them step 6"):
        trainer.train()
    assert (tmp_path / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("spike_action", "undo", "Give off, warn, skip, rollback"),
        ("spike_threshold", 0.0, "above 0"),
        ("spike_threshold", math.nan, "above 0"),
        ("spike_window", 7, "Give 8 or more"),
        ("spike_window", 2**70, "Give 100000 or less"),
        ("save_only_model", True, "Leave it out, or set spike_action: skip"),
    ],
)
def test_settings_that_cannot_be(setting: str, value: Any, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{setting}: .*{remedy}"):
        arguments(tmp_path, **{"spike_action": "rollback", setting: value})
