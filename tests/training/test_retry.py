"""A step that runs out of the card's memory is computed again with less kept, and nothing of it is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from steep import ranks
from steep.data.packing import Corpus
from steep.model import leaner, loss
from steep.model.attention_half import AttentionHalf
from steep.model.choices import choices_of
from steep.model.install import fused_of, install
from steep.model.mlp_half import MlpHalf
from steep.training.adamw8bit import AdamW8bit
from steep.training.checkpoint import read_choices
from steep.training.retry import retry_of
from steep.training.trainer import Trainer
from tests.training.helpers import AtStep, adapted, losses, trained_weights, trainer_for
from tests.training.test_resume import assert_same

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB"
AT = 3  # the step that fails
PLACES: dict[str, tuple[Any, str]] = {
    "forward": (MlpHalf, "forward"),
    "loss": (loss, "linear_cross_entropy"),
    "backward": (MlpHalf, "backward"),
    "attention's backward": (AttentionHalf, "attend_backward"),
}


def fused(levels: Any = None, places: Any = None, **settings: Any) -> Any:
    """In bf16, whose update rounds at random."""
    model = adapted(trained_dtype="bf16", **settings).to(torch.bfloat16)
    return install(model, levels=levels, places=places)


def trainer(model: Any, corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
    given: dict[str, Any] = {"optim": "adamw_8bit", "learning_rate": 1e-3, "max_steps": 4, **settings}
    return trainer_for(model, corpus, folder, **given)


@contextmanager
def planted(trained: Trainer, place: str, calls: tuple[int, ...], at: int = AT) -> Iterator[list[int]]:
    """Memory runs out in step `at`, at those of its calls there; gives how many there were."""
    owner, name = PLACES[place]
    original, seen = getattr(owner, name), [0]

    def failing(*given: Any, **named: Any) -> Any:
        if trained.state.global_step + 1 == at:
            seen[0] += 1
            if seen[0] in calls:
                raise torch.OutOfMemoryError(OUT)
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield seen


def leaner_from(model: Any, step: int, levels: list[int], tile: int) -> AtStep:
    """Sets what a model keeps where a step begins."""

    def begin(number: int) -> None:
        if number == step:
            fused_of(model).levels, fused_of(model).tile = levels, tile

    return AtStep(begin)


@pytest.mark.parametrize(("place", "accumulation"), [*((place, 1) for place in PLACES), ("backward", 3)])
def test_it_is_the_step_of_a_leaner_run(
    place: str, accumulation: int, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With several micro-batches it is the last that fails, when there are gradients of others."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    model = fused()
    failed = trainer(model, corpus, tmp_path / "failed", **settings)
    failed.planned_bytes = 3 * 2**29
    of_one = 1 if place == "loss" else 2  # calls of a micro-batch: one a layer
    with planted(failed, place, (accumulation * of_one,)) as seen:
        failed.train()
    assert seen[0] == 2 * accumulation * of_one
    choices = choices_of(model)
    assert choices.levels is not None and choices.tile is not None and max(choices.levels) > 0
    twin = fused()
    undisturbed = trainer(twin, corpus, tmp_path / "leaner", **settings)
    undisturbed.add_callback(leaner_from(twin, AT, choices.levels, choices.tile))
    undisturbed.train()
    assert_same(undisturbed, failed)
    told = [record.message for record in caplog.records if "memory ran out" in record.message]
    assert len(told) == 1
    assert told[0].startswith("step 3: GPU memory ran out: 1.50 GiB were planned for a step, and the peak is not known")
    (incident,) = map(json.loads, (tmp_path / "failed" / "incidents.jsonl").read_text().splitlines())
    assert (incident["step"], incident["action"], incident["loss"]) == (AT, "leaner", None)
    assert len(incident["rows"]) == accumulation and "1.50 GiB were planned" in incident["kind"]
    assert not (tmp_path / "leaner" / "incidents.jsonl").exists()


@pytest.mark.parametrize(("place", "where"), [("backward", "gpu"), ("backward", "attention"), ("loss", "attention")])
def test_levels_change_no_loss_here(place: str, where: str, corpus: Corpus, tmp_path: Path) -> None:
    """So a step that runs out is in the end the one that it would have been; with what layers keep in host memory
    too, which the pass that was given up does not hold."""
    how = {"levels": 0, "places": where}
    whole, failed = (trainer(fused(**how), corpus, tmp_path / name) for name in ("whole", "failed"))
    whole.train()
    with planted(failed, place, (1,)):
        failed.train()
    ours, theirs = fused_of(failed.model), fused_of(whole.model)
    assert ours.levels != theirs.levels and ours.places == theirs.places == [where] * 2
    assert losses(failed) == losses(whole)
    assert not any("host memory" in line for line in ours.said)


def test_it_is_tried_until_nothing_leaner_is_left(corpus: Corpus, tmp_path: Path) -> None:
    model = fused()
    failed = trainer(model, corpus, tmp_path)
    found: list[Any] = []
    with planted(failed, "loss", tuple(range(1000))) as seen, pytest.raises(torch.OutOfMemoryError, match=OUT):
        before = leaner.make_leaner

        def noted(given: Any) -> str | None:
            kept = before(given)
            found.append((kept, fused_of(given).levels, fused_of(given).loss_way))
            return kept

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("steep.training.retry.make_leaner", noted)
            failed.train()
    assert seen[0] == len(found) > 2
    *tried, narrowed, (kept, *last) = found  # the loss comes when layers can do no more: of so few, cut by tokens
    levels = [[0, 0], *(levels for _, levels, _ in tried)]
    assert tried and all(sum(one) < sum(other) for one, other in pairwise(levels))
    assert {way for *_, way in tried} == {None} and narrowed[1:] == (levels[-1], "tokens")
    assert "the loss cut by tokens" in narrowed[0] and kept is None and last == list(narrowed[1:])
    assert failed.state.global_step == AT - 1 and int(failed.times_trained.sum()) == 2 * (AT - 1)


def test_no_more_is_kept_on_the_host(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lower level has more there, and whether the host has it was not asked."""
    found: dict[int, float] = {}

    def noted(levels: Any, tile: int, tokens: int, needed: Any) -> None:
        found.update({level: needed([level, level], tile) for level in (0, 1, 2, 3)})

    monkeypatch.setattr(leaner, "leaner_than", noted)
    failed = trainer(fused(levels=2, places="all"), corpus, tmp_path)
    with planted(failed, "backward", (1,)):
        failed.train()
    assert [math.isinf(found[level]) for level in (0, 1, 2, 3)] == [True, True, False, False]


def test_a_loss_that_needs_less_is_that_of_a_run_with_it(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaner, "leaner_than", lambda *given: None)  # layers can do no more
    model, twin = fused(), fused()
    failed, undisturbed = (trainer(each, corpus, tmp_path / str(id(each))) for each in (model, twin))
    with planted(failed, "loss", (1,)):
        failed.train()

    def narrow(step: int) -> None:
        if step == AT:
            fused_of(twin).loss_way = "tokens"

    undisturbed.add_callback(AtStep(narrow))
    undisturbed.train()
    assert_same(undisturbed, failed)
    assert choices_of(model).loss_way == "tokens" and fused_of(model).levels == [0, 0]


def test_checkpoints_and_resume_keep_it(corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer(fused(), corpus, tmp_path / "run", **settings)
    with planted(whole, "backward", (2,)):
        whole.train()
    levels = fused_of(whole.model).levels
    assert read_choices(tmp_path / "run" / "checkpoint-2").levels == [0, 0]
    kept = read_choices(tmp_path / "run" / "checkpoint-4")
    assert (kept.levels, kept.chosen_for, kept.tile) == (levels, 0, fused_of(whole.model).tile) and levels != [0, 0]
    resumed = trainer(fused(), corpus, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert fused_of(resumed.model).levels == levels
    assert_same(whole, resumed)


def test_what_is_drawn_at_random_is_drawn_again(corpus: Corpus, tmp_path: Path) -> None:
    """Whoever draws in a forward pass draws the same in the second try, and the next step what follows."""
    drawn: dict[str, list[float]] = {"whole": [], "failed": []}
    for name, found in drawn.items():
        run = trainer(fused(), corpus, tmp_path / name, gradient_accumulation_steps=2, per_device_train_batch_size=1)
        original = run.compute_loss_context_manager

        def entered(found: list[float] = found, original: Any = original) -> Any:
            found.append(float(torch.rand(())))
            return original()

        with pytest.MonkeyPatch.context() as patch, planted(run, "backward", (3,) if name == "failed" else ()):
            patch.setattr(run, "compute_loss_context_manager", entered)
            run.train()
    first, again = drawn["failed"][4:6], drawn["failed"][6:8]
    assert first == again and drawn["failed"][:6] + drawn["failed"][8:] == drawn["whole"]


# ---- where it is not tried again


@pytest.mark.parametrize("reason", ["not fused", "in backward", "several processes", "another error", "host"])
def test_it_ends_the_run(reason: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_grad_norm": 0.0, "optimizer_in_backward": reason == "in backward"}
    model = adapted() if reason == "not fused" else fused()
    failed = trainer(model, corpus, tmp_path, **settings)
    error: BaseException = {
        "another error": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    }.get(reason, torch.OutOfMemoryError(OUT))
    if reason == "several processes":  # while that is asked, and for no more: there is one

        def asked(*given: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(ranks, "world_size", lambda: 2)
                return retry_of(*given)

        monkeypatch.setattr("steep.training.trainer.retry_of", asked)
    calls = []

    def failing(*given: Any, **named: Any) -> Any:
        calls.append(1)
        raise error

    monkeypatch.setattr(failed, "compute_loss", failing)
    with pytest.raises(type(error)):
        failed.train()
    assert len(calls) == 1 and (reason == "not fused" or fused_of(model).levels is None)


def test_an_update_is_never_tried_again(corpus: Corpus, tmp_path: Path) -> None:
    """Weights may have changed by then."""
    model = fused()
    failed, before = trainer(model, corpus, tmp_path), []
    original = AdamW8bit.step

    def step(self: AdamW8bit, *given: Any, **named: Any) -> Any:
        if failed.state.global_step + 1 == AT:
            before.append(trained_weights(model))
            raise torch.OutOfMemoryError(OUT)
        return original(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match=OUT):
        patch.setattr(AdamW8bit, "step", step)
        failed.train()
    assert len(before) == 1 and fused_of(model).levels == [0, 0]


def test_gradients_of_the_first_try_would_be_seen(corpus: Corpus, tmp_path: Path) -> None:
    """A planted fault: they are not dropped."""
    whole, failed = (trainer(fused(), corpus, tmp_path / name, max_grad_norm=0.0) for name in ("whole", "failed"))
    whole.train()

    def keep(step: int) -> None:
        assert failed._retry is not None
        failed._retry._drop_gradients = lambda: None

    failed.add_callback(AtStep(keep))
    with planted(failed, "attention's backward", (2,)):
        failed.train()
    assert losses(failed) != losses(whole)
