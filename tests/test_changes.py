"""A run file that changed while its run was stopped: what is refused, what is let pass, and that it takes effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from steep.changes import _STAYS, HARMLESS, LENGTHS, changeable, judge_length, why_it_stays
from steep.config import load_config
from steep.errors import Stopped, UserError
from steep.hand_over import export_run
from steep.report.read import read_run
from steep.result import evaluate_run
from steep.resume import accept_changes, record_changes
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.stopping import Stop
from steep.terminal import Terminal
from steep.training.passed_through import HONOURED
from tests.test_run import lines, run_file
from tests.tiny import save_tiny
from tests.training.helpers import contents
from tests.training.test_checkpoint import OTHERS, written_by_another

CONSTANT = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_total_limit": None}


def cut(finished: Path, folder: Path, step: int = 3) -> Path:
    """A copy of a finished run of 6 steps, as it is when it was killed right after `checkpoint-{step}`."""
    shutil.copytree(finished, folder)
    for place in [folder / "final", *folder.glob("checkpoint-*")]:
        if place.name != f"checkpoint-{step}":
            shutil.rmtree(place)
    return folder


@pytest.fixture(scope="module")
def cosine(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cosine") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def constant(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constant") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=CONSTANT))
    return folder


def rates(folder: Path) -> list[float]:
    return [row["learning_rate"] for row in lines(folder / "metrics.jsonl")]


def listening() -> tuple[Terminal, list[str]]:
    """A terminal that shows nothing, and what it is told."""
    said: list[str] = []
    terminal = Terminal(quiet=True)
    terminal.say = lambda text: said.append(text)
    terminal.warn = lambda text: said.append(text)
    return terminal, said


# --- every field is one of three kinds


def test_every_field_has_been_thought_of() -> None:
    """A new field is harmless, changeable, or has its reason to stay: not the one for lack of another."""
    known = [f"{section}.{name}" for section, info in RunConfig.model_fields.items() for name in info.annotation.model_fields]  # type: ignore[union-attr]  # fmt: skip  # noqa: E501
    known += [f"training.{name}" for name in HONOURED]
    unsorted = [
        field
        for field in known
        if field not in HARMLESS and not changeable(field) and why_it_stays(field) == _STAYS["training."]
    ]
    assert unsorted == []
    assert set(known) >= HARMLESS | LENGTHS
    assert not [field for field in HARMLESS if changeable(field)]


# --- refused


@pytest.mark.parametrize(
    ("sections", "field", "remedy"),
    [
        ({"adapter": {"r": 16}}, r"adapter\.r: 8 → 16", r"start a new run.*which weights there are"),
        ({"training": {"seed": 7}}, r"training\.seed: 42 → 7", r"start a new run.*order of the rows"),
        ({"data": {"max_length": 32}}, r"data\.max_length: 64 → 32", "branch, which may have other text"),
        ({"training": {"weight_decay": 0.1}}, r"training\.weight_decay: 0\.0 → 0\.1", r"from step 4 on: --allow trai"),
        ({"training": {"adam_beta2": 0.9}}, r"adam_beta2: 0\.999 → 0\.9", r"--allow training\.adam_beta2"),
        ({"training": {"optim": "adamw_torch"}}, r"training\.optim: 'adamw_8bit' → 'adamw_torch'", "start a new run"),
        (
            {"training": {"optimizer_states": "fp32"}},
            r"training\.optimizer_states: '8bit' → 'fp32'",
            "start a new run.*are of that kind",
        ),
        (
            {"training": {"master_weights": "all"}},
            r"master_weights: 'none' → 'all'",
            r"--allow training\.master_weights",
        ),
        (
            {"training": {"max_steps": 9}},
            r"training\.max_steps: 6 → 9 \(at step 3 the rate was 0\.0091\d+ and would be 0\.009\d+\)",
            r"--allow training\.max_steps",
        ),
        ({"evaluation": {"max_tokens": 100}}, r"evaluation\.max_tokens: 100000 → 100", r"compared with those before"),
        (
            {"training": {"learning_rate": 1e-3}, "adapter": {"r": 4}},
            r"adapter\.r: 8 → 4; training\.learning_rate: 0\.01 → 0\.001",
            "start a new run",
        ),
    ],
)
def test_what_is_refused(
    sections: dict[str, Any],
    field: str,
    remedy: str,
    cosine: Path,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
) -> None:
    folder = cut(cosine, tmp_path / "ko")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    sections = {"adapter": {"lora_dropout": 0.1}, **sections}
    sections["adapter"] = {"lora_dropout": 0.1, **sections["adapter"]}
    with pytest.raises(UserError, match=rf"^--resume: the run file differs from the run's: .*{field}.*{remedy}"):
        train_run(run_file(llama_folder, korean_corpus, folder, **sections), resume=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ("learning_rate", r"--allow: learning_rate is not a field.*Did you mean 'training\.learning_rate'"),
        ("adapter.r", r"--allow: adapter\.r cannot change within a run: it decides which weights"),
        ("data.max_length", r"--allow: data\.max_length cannot change within a run: .*--branch checkpoint-N"),
        ("training.seed", r"--allow: training\.seed cannot change"),
        (
            "training.gradient_accumulation_steps",
            r"--allow: training\.gradient_accumulation_steps cannot change within a run: the place in the text",
        ),
    ],
)
def test_what_cannot_be_allowed(
    allow: str, message: str, cosine: Path, llama_folder: Path, korean_corpus: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_run(run_file(llama_folder, korean_corpus, cosine), resume=True, allow=[allow])


@pytest.mark.parametrize(("text", "problem"), OTHERS)
def test_a_checkpoint_of_another_version_is_refused_before_anything_is_written(
    text: str | None, problem: str, cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = cut(cosine, tmp_path / "run")
    written_by_another(folder / "checkpoint-3", text)
    before = contents(folder)
    config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training={"logging_steps": 2})
    with pytest.raises(UserError, match=rf"^--resume: .*checkpoint-3 {problem}"):
        train_run(config, resume=True)
    assert contents(folder) == before


def test_allow_is_of_a_run_that_goes_on(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--allow: it is of a run that goes on\. Give --resume too"):
        train_run(run_file(llama_folder, korean_corpus, tmp_path / "ko"), allow=["training.learning_rate"])


def test_a_run_cannot_end_before_where_it_is(
    constant: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = cut(constant, tmp_path / "ko")
    training = {**CONSTANT, "max_steps": 2}
    config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=training)
    for allow in ([], ["training.max_steps"]):
        with pytest.raises(UserError, match=r"^--resume: 3 steps are done already, and the run would end at") as told:
            train_run(config, resume=True, allow=allow)
        assert told.value.remedy.endswith(f"went on with: steep train {folder / 'run.yaml'} --resume")


# --- let pass


def test_a_longer_run_is_the_one_that_was_that_long_from_the_start(
    constant: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    training = {**CONSTANT, "max_steps": 9}
    whole = tmp_path / "whole"
    train_run(run_file(llama_folder, korean_corpus, whole, adapter={"lora_dropout": 0.1}, training=training))
    for folder in (cut(constant, tmp_path / "cut"), shutil.copytree(constant, tmp_path / "finished")):
        terminal, said = listening()
        config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=training)
        train_run(config, resume=True, terminal=terminal)
        step = 3 if folder.name == "cut" else 6
        assert f"from step {step + 1} on training.max_steps: 6 → 9 (the rates so far are the same with both)" in said
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"):
            one, two = (root / "checkpoint-9" / name for root in (whole, folder))
            assert one.read_bytes() == two.read_bytes()
        for row, expected in zip(lines(folder / "metrics.jsonl"), lines(whole / "metrics.jsonl"), strict=True):
            assert {**row, "tokens_per_second": 0, "peak_memory_bytes": 0, "save_seconds": 0} == {
                **expected, "tokens_per_second": 0, "peak_memory_bytes": 0, "save_seconds": 0,
            }  # fmt: skip
        ledger, expected = ((root / "ledger.json").read_text(encoding="utf-8") for root in (folder, whole))
        assert ledger == expected
        assert lines(folder / "changes.jsonl") == [{"step": step, "field": "training.max_steps", "old": 6, "new": 9}]


class AfterASecondStep(Stop):
    """Asks for an end when it is looked at for the second time."""

    looks = 0

    @property
    def asked(self) -> bool:
        self.looks += 1
        return self.looks >= 2

    @asked.setter
    def asked(self, value: bool) -> None:
        pass


def test_a_longer_run_that_is_stopped_is_not_finished(
    constant: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """Its old result would pass for that of all steps which its run file now has."""
    folder = shutil.copytree(constant, tmp_path / "ko")
    weights = (folder / "final" / "adapter_model.safetensors").read_bytes()
    terminal, said = listening()

    def go_on(steps: int, stop: Stop | None = None) -> None:
        settings = {**CONSTANT, "max_steps": steps}
        config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=settings)
        train_run(config, resume=True, stop=stop, terminal=terminal)

    go_on(6)
    assert (folder / "final" / "adapter_model.safetensors").read_bytes() == weights
    assert not any("is removed" in line for line in said)
    with pytest.raises(Stopped, match="stopped after step 8"):
        go_on(12, AfterASecondStep())
    assert f"steps are still to come: {folder / 'final'}, the result so far, is removed" in said
    assert read_run(folder).finished is False
    for use in (evaluate_run, lambda run: export_run(run, tmp_path / "out")):
        with pytest.raises(UserError, match=r"ko is not finished.*Finish it with: steep train .*run\.yaml --resume"):
            use(folder)
    go_on(12)
    assert read_run(folder).finished and evaluate_run(folder)[1][0].step == 12


def test_a_kill_after_the_result_is_removed_loses_nothing(
    constant: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is then that of the old run before it was told its result, which its own run file writes again."""
    folder = shutil.copytree(constant, tmp_path / "ko")
    before = {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}
    settings = {**CONSTANT, "max_steps": 12}
    config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=settings)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("steep.run.record_changes", killed)
        train_run(config, resume=True)
    assert not (folder / "final").exists()
    with pytest.raises(UserError, match="ko is not finished"):
        evaluate_run(folder)
    train_run(load_config(folder / "run.yaml"), resume=True)
    after = {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}
    assert after == before and "final/adapter_model.safetensors" in after


def test_a_result_is_not_lost_to_a_run_that_would_begin_anew(
    constant: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(constant, tmp_path / "ko")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = contents(folder)
    settings = {**CONSTANT, "max_steps": 12}
    config = run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}, training=settings)
    with pytest.raises(UserError, match="is a result, and no checkpoint is left to go on from"):
        train_run(config, resume=True)
    assert contents(folder) == before


def test_a_decay_that_had_not_begun_moves_with_the_end(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """The number of steps is kept in steep's own schedule, which a checkpoint would bring back."""
    training = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1, "decay_steps": 3, "save_steps": 2}
    folder, whole = tmp_path / "ko", tmp_path / "whole"
    train_run(run_file(llama_folder, korean_corpus, folder, training={**training, "save_total_limit": None}))
    longer = {**training, "max_steps": 8}
    train_run(run_file(llama_folder, korean_corpus, whole, training=longer))
    for name in ("checkpoint-4", "checkpoint-6", "final"):
        shutil.rmtree(folder / name)
    train_run(run_file(llama_folder, korean_corpus, folder, training=longer), resume=True)
    assert rates(folder) == rates(whole)
    assert rates(folder)[-3:] == pytest.approx([1e-2, 1e-2 * (1 - (1 / 3) ** 0.5), 1e-2 * (1 - (2 / 3) ** 0.5)])
    one, two = (root / "checkpoint-8" / "adapter_model.safetensors" for root in (whole, folder))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("kind", "more", "done", "other"),
    [
        ("constant", {}, 5, None),
        ("constant_with_warmup", {"warmup_steps": 2}, 5, None),
        ("constant_with_warmup", {"warmup_steps": 0.5}, 1, None),  # step 1 is at a rate of 0 with both
        ("constant_with_warmup", {"warmup_steps": 0.5}, 2, 2),
        ("inverse_sqrt", {"warmup_steps": 2}, 5, None),
        ("warmup_stable_decay", {"warmup_steps": 2, "decay_steps": 2}, 5, None),
        ("warmup_stable_decay", {"warmup_steps": 2, "decay_steps": 3}, 6, None),  # its decay begins at the peak
        ("warmup_stable_decay", {"warmup_steps": 2, "decay_steps": 3}, 7, 7),
        ("linear", {"warmup_steps": 2}, 3, None),
        ("linear", {"warmup_steps": 2}, 4, 4),
        ("cosine", {"warmup_steps": 2, "min_lr_rate": 0}, 4, 4),  # transformers' own
        ("cosine_with_min_lr", {"warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, 4, 4),
        ("polynomial", {"warmup_steps": 2}, 4, 4),
    ],
)
def test_what_a_schedule_says_of_another_length(
    kind: str, more: dict[str, Any], done: int, other: int | None, tmp_path: Path
) -> None:
    before, now = (
        run_file(tmp_path, tmp_path, tmp_path, training={"lr_scheduler_type": kind, "max_steps": steps, **more})
        for steps in (8, 12)
    )
    before.training.report_to = "dvclive"  # which is not installed here
    note = judge_length(before, now, rows=20, done=done, start=None)
    assert (note is None) if other is None else (note or "").startswith(f"at step {other} the rate was ")


def test_logging_saving_and_evaluating_are_free(
    cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = cut(cosine, tmp_path / "ko")
    config = run_file(
        llama_folder,
        korean_corpus,
        folder,
        adapter={"lora_dropout": 0.1},
        training={"save_steps": 2, "logging_steps": 3, "eval_steps": 2, "run_name": "other", "adam_beta2": 0.999},
        evaluation={"prompts": ["a sailor"], "max_new_tokens": 2},
    )
    train_run(config, resume=True)
    one, two = (root / "final" / "adapter_model.safetensors" for root in (cosine, folder))
    assert one.read_bytes() == two.read_bytes()
    assert not (folder / "changes.jsonl").exists()


# --- allowed


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_an_allowed_rate_is_the_rate_of_the_next_step(
    optim: str, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ko"
    training = {**CONSTANT, "optim": optim}
    train_run(run_file(llama_folder, korean_corpus, folder, training=training))
    finished = [row["loss"] for row in lines(folder / "metrics.jsonl")]
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(folder / name)
    other = {"learning_rate": 1e-3, "loraplus_lr_ratio": 4, "weight_decay": 0.5, "adam_beta1": 0.5}
    config = run_file(llama_folder, korean_corpus, folder, training={**training, **other})
    train_run(config, resume=True, allow=[f"training.{name}" for name in other])
    rows = lines(folder / "metrics.jsonl")
    assert rates(folder) == pytest.approx([0, 5e-3, 1e-2, 1e-3, 1e-3, 1e-3])
    assert [row["embedding_learning_rate"] for row in rows[2:4]] == pytest.approx([1e-3, 1e-4])
    assert rows[3]["learning_rate_adapters_b"] == pytest.approx(4e-3)
    assert [row["loss"] for row in rows[:4]] == finished[:4]  # the fourth is measured before its update
    assert rows[4]["loss"] != finished[4]
    state = json.loads((folder / "checkpoint-6" / "optimizer.json").read_text(encoding="utf-8"))
    text = json.dumps(state)
    assert '"weight_decay", 0.5' in text and '{"tuple": [0.5, 0.999]}' in text
    assert '"weight_decay", 0.0]' not in text.replace('"name", "other"', "") and "0.9, 0.999" not in text
    assert lines(folder / "changes.jsonl") == [
        {"step": 3, "field": "training.learning_rate", "old": 1e-2, "new": 1e-3},
        {"step": 3, "field": "training.loraplus_lr_ratio", "old": 1.0, "new": 4.0},
        {"step": 3, "field": "training.weight_decay", "old": 0.0, "new": 0.5},
        {"step": 3, "field": "training.adam_beta1", "old": 0.9, "new": 0.5},
    ]


def test_an_allowed_change_is_the_runs_own_from_then_on(
    cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """The same command may be given again after a kill; a change whose steps were lost counts from where it goes on."""
    folder = cut(cosine, tmp_path / "ko")
    shutil.copytree(cosine / "checkpoint-6", folder / "checkpoint-6")
    slower = run_file(
        llama_folder,
        korean_corpus,
        folder,
        adapter={"lora_dropout": 0.3},
        training={"learning_rate": 1e-3, "max_steps": 9, "save_total_limit": None},
    )
    allow = ["training.learning_rate", "training.max_steps", "adapter.lora_dropout"]
    train_run(slower, resume=True, allow=allow)
    assert {row["step"] for row in lines(folder / "changes.jsonl")} == {6}
    first = rates(folder)
    for name in ("checkpoint-6", "checkpoint-9", "final"):
        shutil.rmtree(folder / name)
    train_run(slower, resume=True, allow=allow)
    assert {row["step"] for row in lines(folder / "changes.jsonl")} == {3}
    assert len(lines(folder / "changes.jsonl")) == 3
    assert rates(folder)[6:] == first[6:]  # a function of the step alone
    assert max(rates(folder)[3:6]) < min(first[3:6])  # they are lower now
    adapter = json.loads((folder / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["lora_dropout"] == 0.3
    slower.training.learning_rate = 1e-2
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 → 0\.01"):
        train_run(slower, resume=True)


RATE = "training.learning_rate"


@pytest.mark.parametrize(
    ("resumes", "recorded"),
    [
        ([(5, 2.0, True), (5, 1.0, True), (5, 2.0, True)], [(5, 1.0, 2.0), (5, 2.0, 1.0), (5, 1.0, 2.0)]),
        ([(5, 2.0, False), (5, 2.0, True)], [(5, 1.0, 2.0)]),
        ([(5, 2.0, False), (5, 1.0, True)], []),
        ([(5, 2.0, False), (5, 3.0, True)], [(5, 1.0, 3.0)]),
        ([(5, 2.0, True), (5, 1.0, False), (5, 2.0, True)], [(5, 1.0, 2.0)]),
        ([(5, 2.0, True), (9, 3.0, True), (7, 3.0, True)], [(5, 1.0, 2.0), (7, 2.0, 3.0)]),
    ],
)
def test_what_is_recorded_is_what_came_into_force(
    resumes: list[tuple[int, float, bool]], recorded: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    """Each resume is at a step, with a rate, and killed before its run file is written, or not."""
    folder, now = RunFolder(tmp_path), run_file(tmp_path, tmp_path, tmp_path, training={"learning_rate": 1.0})
    folder.write_text("run.yaml", now.to_yaml())
    for step, rate, outlives in resumes:
        config = now.model_copy(deep=True)
        config.training.learning_rate = rate
        record_changes(folder, accept_changes(folder, config, step, [RATE]), config, step)
        if outlives:
            folder.write_text("run.yaml", config.to_yaml())
    assert lines(folder / "changes.jsonl") == [
        {"step": step, "field": RATE, "old": old, "new": new} for step, old, new in recorded
    ]


def test_model_and_text_may_lie_elsewhere_but_stay_the_same(
    cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    folder = cut(cosine, tmp_path / "ko")
    model = shutil.copytree(llama_folder, tmp_path / "model")
    corpus = shutil.copytree(korean_corpus, tmp_path / korean_corpus.name)
    config = run_file(model, corpus, folder, adapter={"lora_dropout": 0.1})
    with pytest.raises(UserError, match=r"model\.name: .*; data\.sources\.0\.path: "):
        train_run(config, resume=True)
    allow = ["model.name", "data.sources.0.path"]
    text = (corpus / "corpus.jsonl").read_text(encoding="utf-8")
    (corpus / "corpus.jsonl").write_text(text[: text.index("\n") + 1] + text, encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.sources\[0\] .*: corpus\.jsonl has changed"):
        train_run(config, resume=True, allow=allow)
    (corpus / "corpus.jsonl").write_text(text, encoding="utf-8")
    save_tiny("llama", model, seed=5)
    before = (folder / "run.yaml").read_bytes()
    with pytest.raises(UserError, match=r"^--resume: model\.name is another base than the one below .*checkpoint-"):
        train_run(config, resume=True, allow=allow)
    assert (folder / "run.yaml").read_bytes() == before and not (folder / "changes.jsonl").exists()
    save_tiny("llama", model)
    train_run(config, resume=True, allow=allow)
    one, two = (root / "final" / "adapter_model.safetensors" for root in (cosine, folder))
    assert one.read_bytes() == two.read_bytes()


# --- text and ground


def test_files_that_changed_are_named(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "more").mkdir(parents=True)
    texts = (korean_corpus / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for number, name in enumerate(["a.jsonl", "b.jsonl", "more/c.jsonl"]):
        (corpus / name).write_text("".join(texts[50 * number : 50 * number + 50]), encoding="utf-8")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(texts[150:]), encoding="utf-8")
    sources = {"data": {"sources": [{"path": str(corpus)}, {"path": str(other)}]}}
    config = run_file(llama_folder, corpus, tmp_path / "ko", **sources)
    train_run(config)
    (corpus / "b.jsonl").unlink()
    (corpus / "d.jsonl").write_text(texts[0].replace("river", "lake"), encoding="utf-8")
    with (corpus / "more" / "c.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more document"}\n')
    expected = r"data\.sources\[0\] \(.*corpus\): b\.jsonl is gone, d\.jsonl is new, more/c\.jsonl has changed\. Put"
    with pytest.raises(UserError, match=rf"^--resume: the text is not what the run began with: {expected}"):
        train_run(config, resume=True)


def test_a_source_more_or_less_is_a_difference(
    cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    two = [{"path": str(korean_corpus)}, {"path": str(tmp_path / "more.txt")}]
    config = run_file(llama_folder, korean_corpus, cosine, adapter={"lora_dropout": 0.1}, data={"sources": two})
    with pytest.raises(UserError, match=r"differs from the run's: data\.sources\.1: None → '.*more\.txt'\. Put it b"):
        train_run(config, resume=True)


def test_other_versions_are_said(cosine: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    folder = cut(cosine, tmp_path / "ko")
    file = folder / "environment.json"
    environment = json.loads(file.read_text(encoding="utf-8"))
    environment["packages"]["torch"] = "1.0"
    file.write_text(json.dumps(environment), encoding="utf-8")
    terminal, said = listening()
    train_run(
        run_file(llama_folder, korean_corpus, folder, adapter={"lora_dropout": 0.1}), resume=True, terminal=terminal
    )
    (line,) = [text for text in said if "not surely to the same bits" in text]
    assert "torch: 1.0 → 2." in line
