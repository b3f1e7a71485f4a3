"""`steep train FILE --branch CHECKPOINT`: a run folder of its own, that says where it came from."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from steep import cli, run
from steep.config import parse_config
from steep.errors import UserError
from steep.manifest import read_manifest, write_manifest
from steep.plan import plan_run
from steep.result import evaluate_run
from steep.resume import branch_of
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.stopping import Interrupted
from steep.terminal import plan_tables
from steep.training.branch import read_branch
from steep.training.trainer import Trainer
from tests.test_run import lines, run_file
from tests.tiny import save_tiny, write_corpus
from tests.training.helpers import contents

DECAY = {"lr_scheduler_type": "warmup_stable_decay", "max_steps": 4, "save_steps": 2}


def parent_file(model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    training = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_total_limit": None}
    return run_file(model, corpus, folder, **{**sections, "training": {**training, **sections.get("training", {})}})


@pytest.fixture(scope="module")
def parent(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps at a constant rate, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(parent_file(llama_folder, korean_corpus, folder))
    return folder


def branch_file(model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    training = {"warmup_steps": None, **DECAY, **sections.get("training", {})}
    return parent_file(model, corpus, folder, **{**sections, "training": training})


@pytest.fixture(scope="module")
def branch(parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of decay from the parent's step 3."""
    folder = tmp_path_factory.mktemp("branches") / "ko-decay"
    train_run(branch_file(llama_folder, korean_corpus, folder), branch=parent / "checkpoint-3")
    return folder


def steps_of(file: Path) -> list[int]:
    return [row["step"] for row in lines(file)]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_its_files_begin_where_it_does(branch: Path, parent: Path) -> None:
    names = {path.name for path in branch.iterdir()}
    assert names == {
        "run.yaml", "plan.json", "environment.json", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "proof.json",
        "ledger.json", "parent.json", "final", "checkpoint-4", "checkpoint-6", "checkpoint-7",
    }  # fmt: skip
    assert steps_of(branch / "metrics.jsonl") == [4, 5, 6, 7]
    assert steps_of(branch / "evaluation.jsonl") == [0, 3, 7]
    assert steps_of(branch / "samples.jsonl") == [0, 0, 3, 3, 7, 7]
    rates = [row["learning_rate"] for row in lines(branch / "metrics.jsonl")]
    assert rates == pytest.approx([1e-2 * (1 - (step / 4) ** 0.5) for step in range(4)])
    assert read(branch / "proof.json")["ok"]
    assert (read(branch / "plan.json")["first_step"], read(branch / "plan.json")["steps"]) == (3, 4)


def test_it_says_where_it_came_from(branch: Path, parent: Path, korean_corpus: Path) -> None:
    assert read(branch / "parent.json") == {
        "checkpoint": str(parent / "checkpoint-3"),
        "step": 3,
        "digest": read_manifest(parent / "checkpoint-3").digest,
        "rate_factor": 1.0,
        "data_start": 0,
        "fingerprint": read(parent / "plan.json")["data"]["fingerprint"],
        "passed_over": [],
    }


def test_base_checkpoint_and_result_are_scored(branch: Path, parent: Path) -> None:
    """The base as the parent's base, the checkpoint as the parent at that step, each by a fresh look."""
    base, at_start, end = lines(branch / "evaluation.jsonl")
    assert base == lines(parent / "evaluation.jsonl")[0]
    assert base["loss"] > at_start["loss"] > end["loss"]
    scored = evaluate_run(branch)
    assert [scores[0].loss for scores in scored] == [base["loss"], end["loss"]]
    assert scored[1][0].step == 7
    first, again = (lines(folder / "samples.jsonl")[:2] for folder in (parent, branch))
    assert first == again


def test_its_ledger_is_of_its_own_steps(branch: Path, parent: Path) -> None:
    ledger, whole = read(branch / "ledger.json"), read(parent / "ledger.json")
    assert ledger["adds_up"]
    assert (ledger["rows_seen"], ledger["rows_seen_before"], whole["rows_seen"]) == (4 * 2, 3 * 2, 6 * 2)
    assert lines(branch / "metrics.jsonl")[-1]["tokens"] < lines(parent / "metrics.jsonl")[-1]["tokens"]


def test_both_are_on_the_board(
    parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[Any] = []
    real = run.board

    def noted(*given: Any, **named: Any) -> Any:
        table = real(*given, **named)
        titles.append(str(table.title))
        return table

    monkeypatch.setattr(run, "board", noted)
    before = contents(parent)
    result = train_run(branch_file(llama_folder, korean_corpus, tmp_path / "run"), branch=parent / "checkpoint-6")
    assert titles == ["base → trained", "ko/checkpoint-6 → branch"]
    assert result["steps"] == 4
    assert (result["before"][0].step, result["after"][0].step) == (0, 10)
    assert contents(parent) == before, "the parent is left as it was"


@pytest.mark.parametrize("adapter", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_other_adapters_go_on_to_the_bit(
    adapter: dict[str, Any], llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """PiSSA's frozen start comes from the checkpoint too."""
    whole, folder = tmp_path / "ko", tmp_path / "run"
    train_run(parent_file(llama_folder, korean_corpus, whole, adapter=adapter))
    going_on = {"lr_scheduler_type": "constant", "max_steps": 3}
    config = branch_file(llama_folder, korean_corpus, folder, adapter=adapter, training=going_on)
    train_run(config, branch=whole / "checkpoint-3")
    one, two = (root / "final" / "adapter_model.safetensors" for root in (whole, folder))
    assert one.read_bytes() == two.read_bytes()
    assert lines(folder / "evaluation.jsonl")[-1]["loss"] == lines(whole / "evaluation.jsonl")[-1]["loss"]


def test_resumed_from_half_way(branch: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Also when the parent is gone by then."""
    folder = tmp_path / "ko-decay"
    shutil.copytree(branch, folder)
    for name in ("final", "checkpoint-6", "checkpoint-7"):
        shutil.rmtree(folder / name)
    kept = read(folder / "parent.json")
    (folder / "parent.json").write_text(json.dumps(kept | {"checkpoint": "/gone/checkpoint-3"}), encoding="utf-8")
    train_run(branch_file(llama_folder, korean_corpus, folder), resume=True)
    fields = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "tokens")
    expected, got = lines(branch / "metrics.jsonl"), lines(folder / "metrics.jsonl")
    assert [[row[field] for field in fields] for row in got] == [[row[field] for field in fields] for row in expected]
    one, two = (root / "final" / "adapter_model.safetensors" for root in (branch, folder))
    assert one.read_bytes() == two.read_bytes()
    for name in ("proof.json", "ledger.json"):
        assert read(folder / name) == read(branch / name)
    assert lines(folder / "evaluation.jsonl") == lines(branch / "evaluation.jsonl")
    own = parse_config(yaml.safe_load((folder / "run.yaml").read_text("utf-8")))
    train_run(own, resume=True)  # it is finished: nothing changes
    assert one.read_bytes() == two.read_bytes() and len(lines(folder / "metrics.jsonl")) == 4


def test_a_branch_stopped_before_its_first_checkpoint_begins_again(
    parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = branch_file(llama_folder, korean_corpus, tmp_path / "run", training={"save_steps": 3})
    start = shutil.copytree(parent, tmp_path / "ko") / "checkpoint-3"
    real, steps = Trainer.training_step, iter([1, 2])

    def stop(self: Trainer, *given: Any, **named: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(self, *given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", stop)
        train_run(config, branch=start)
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [4, 5]
    note = (start / "README.md").read_text("utf-8")
    (start / "README.md").write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match=r"^--resume: .*checkpoint-3, which this branch began from, has changed"):
        train_run(config, resume=True)
    (start / "README.md").write_text(note, encoding="utf-8")
    train_run(config, resume=True)
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [4, 5, 6, 7]
    assert steps_of(tmp_path / "run" / "evaluation.jsonl") == [0, 3, 7]


def test_other_text_starts_a_ledger_of_its_own(parent: Path, llama_folder: Path, tmp_path: Path) -> None:
    """And it may have rows and batches of another size: the long rows of a last phase."""
    other = write_corpus(tmp_path / "other", 30)
    config = branch_file(
        llama_folder, other, tmp_path / "run", data={"max_length": 128},
        training={"per_device_train_batch_size": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    )  # fmt: skip
    train_run(config, branch=parent / "checkpoint-6")
    ledger = read(tmp_path / "run" / "ledger.json")
    assert ledger["adds_up"] and ledger["rows_seen"] == 4 and "rows_seen_before" not in ledger
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [7, 8, 9, 10]
    (name,) = {row["domain"] for row in lines(tmp_path / "run" / "evaluation.jsonl")}
    assert name == "other"
    rates = [row["learning_rate"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 4))) for step in range(4)])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("adapter", {"r": 4}, r"^--branch: the run file differs from that of .*: adapter\.r: 8 → 4"),
        ("model", {"base": "bf16"}, r"model\.base: 'fp32' → 'bf16'"),
        ("training", {"weight_decay": 0.1}, r"training\.weight_decay: 0\.0 → 0\.1"),
        ("training", {"seed": 1}, r"training\.seed: 42 → 1"),
        ("training", {"optim": "adamw_torch"}, r"training\.optim"),
        ("training", {"optimizer_states": "fp32"}, r"training\.optimizer_states: '8bit' → 'fp32'"),
        ("training", {"gradient_accumulation_steps": 2}, r"^--branch: the place in the rows is counted in steps"),
        ("training", {"lr_scheduler_type": "polynomial"}, r"^training\.lr_scheduler_type: polynomial cannot begin at"),
        ("training", {"decay_steps": 9}, r"^training\.decay_steps: the phases are longer than the 4 steps"),
        ("training", {"warmup_lr_rate": 0.1, "warmup_steps": 1}, r"^training\.warmup_lr_rate: a branch warms up from"),
    ],
)
def test_what_a_branch_may_not_change(
    section: str, change: dict[str, Any], message: str, parent: Path, llama_folder: Path, korean_corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = branch_file(llama_folder, korean_corpus, tmp_path / "run", **{section: change})
    with pytest.raises(UserError, match=message):
        train_run(config, branch=parent / "checkpoint-3")
    assert not (tmp_path / "run").exists()


def test_a_branch_may_add_up_gradients_otherwise(
    parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    config = branch_file(llama_folder, korean_corpus, tmp_path / "run", training={"grad_accum_dtype": "bf16"})
    train_run(config, branch=parent / "checkpoint-3")
    assert read(tmp_path / "run" / "proof.json")["ok"]


def test_another_tokenizer_is_refused(parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """With other text nothing else would notice it."""
    copy = shutil.copytree(parent, tmp_path / "ko")
    tree = read(copy / "checkpoint-3" / "tokenizer.json")
    names = list(tree["model"]["vocab"])
    one, two = names[300], names[301]
    tree["model"]["vocab"][one], tree["model"]["vocab"][two] = 301, 300
    (copy / "checkpoint-3" / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    write_manifest(copy / "checkpoint-3")
    with pytest.raises(UserError, match=r"^--branch: the tokenizer is not the one of"):
        train_run(branch_file(llama_folder, korean_corpus, tmp_path / "run"), branch=copy / "checkpoint-3")


def test_what_was_put_beside_the_checkpoint_is_not_read(
    parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """transformers takes up whatever lies in a folder that it reads a tokenizer from."""
    copy = shutil.copytree(parent, tmp_path / "ko")
    for name, text in {"added_tokens.json": "{", "chat_template.jinja": "{{ x }}", "config.json": "{"}.items():
        (copy / "checkpoint-3" / name).write_text(text)
    (copy / "checkpoint-3" / "special_tokens_map.json").write_text('{"eos_token": "<another>"}')
    start = branch_file(llama_folder, korean_corpus, tmp_path / "run")
    train_run(start, branch=copy / "checkpoint-3")
    assert read(tmp_path / "run" / "parent.json")["digest"] == read_manifest(parent / "checkpoint-3").digest
    tokenizer = read_branch(copy / "checkpoint-3").tokenizer()
    assert tokenizer.chat_template is None and tokenizer.eos_token != "<another>"


def test_another_base_is_refused_before_it_trains(korean_corpus: Path, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    train_run(parent_file(base, korean_corpus, tmp_path / "ko"))
    save_tiny("llama", base, seed=5)
    with pytest.raises(UserError, match=r"^--branch: model\.name is another base than the one below .*checkpoint-3"):
        train_run(branch_file(base, korean_corpus, tmp_path / "run"), branch=tmp_path / "ko" / "checkpoint-3")
    assert list((tmp_path / "run").iterdir()) == []


def test_places_that_cannot_be(
    branch: Path, parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    config = branch_file(llama_folder, korean_corpus, parent)
    with pytest.raises(
        UserError, match=r"^training\.output_dir: .* holds another run\. A branch has a folder of its own"
    ):
        train_run(config, branch=parent / "checkpoint-3")
    with pytest.raises(UserError, match=r"^--branch: it begins a run, and --resume goes on with one"):
        train_run(config, branch=parent / "checkpoint-3", resume=True)
    config = branch_file(llama_folder, korean_corpus, tmp_path / "run")
    with pytest.raises(UserError, match="is no whole checkpoint: it is not called checkpoint-N"):
        train_run(config, branch=parent / "final")
    alone = shutil.copytree(parent / "checkpoint-3", tmp_path / "alone" / "checkpoint-3")
    with pytest.raises(UserError, match=r"^--branch: .*alone is not the folder of a run"):
        train_run(config, branch=alone)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_at_a_rate_of_zero_has_to_be_warmed_up(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "ko", training={"min_lr_rate": 0}))
    start = tmp_path / "ko" / "checkpoint-6"
    with pytest.raises(UserError, match=r"^--branch: the rate of the checkpoint is 0\. .*training\.warmup_steps"):
        train_run(branch_file(llama_folder, korean_corpus, tmp_path / "run"), branch=start)
    again = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    train_run(branch_file(llama_folder, korean_corpus, tmp_path / "run", training=again), branch=start)
    rates = [row["learning_rate"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 5.5e-3])


def test_plain_warm_up_over_a_pretrained_base_is_re_warming(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    """What Ibrahim et al. 2024 call so needs no field of its own: up from the rate that pretraining ended at, and down
    to it again."""
    schedule = {"warmup_steps": 2, "warmup_lr_rate": 0.1, "max_steps": 6}
    train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training=schedule))
    rates = [row["learning_rate"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert rates[:4] == pytest.approx([1e-3, 5.5e-3, 1e-2, 8.68e-3], rel=1e-3)


def test_the_plan_shows_the_schedule(parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    plan = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run")).as_dict()
    assert plan["schedule"] == "0 → 1 in 1 steps, 1 → 0.1 in 5 (cosine)"
    cells = [str(cell) for table in plan_tables(plan) for column in table.columns for cell in column.cells]
    assert "cosine: 0 → 1 in 1 steps, 1 → 0.1 in 5 (cosine)" in cells


def test_a_branch_is_not_published_half(
    parent: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds no run before it says whose branch it is: a resume would take it for a run of its own."""
    written: list[str] = []
    real = RunFolder.write_text

    def noted(self: RunFolder, name: str, text: str) -> None:
        written.append(name)
        real(self, name, text)

    monkeypatch.setattr(RunFolder, "write_text", noted)
    train_run(branch_file(llama_folder, korean_corpus, tmp_path / "run"), branch=parent / "checkpoint-3")
    assert written.index("parent.json") < written.index("run.yaml")
    assert branch_of(RunFolder(tmp_path / "run")) is not None and branch_of(RunFolder(parent)) is None


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `steep train` asks of `train_run`."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(run, "train_run", lambda config, **given: calls.append({"config": config, **given}))
    return calls


def test_a_bare_name_is_looked_up_in_the_run_that_the_file_names(
    asked: list[dict[str, Any]], parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["steep", "train", parent / "run.yaml", "--branch", "checkpoint-3", "--training.output_dir", "elsewhere"]
    monkeypatch.setattr(cli.sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked[0]["branch"] == parent / "checkpoint-3"
    assert asked[0]["config"].training.output_dir == "elsewhere" and not asked[0]["resume"]


def test_a_path_is_a_path(asked: list[dict[str, Any]], parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["steep", "train", parent / "run.yaml", "--branch", parent / "checkpoint-6"]
    monkeypatch.setattr(cli.sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked[0]["branch"] == parent / "checkpoint-6"


def test_a_stopped_branch_says_how_to_go_on(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its own run file: the one it was started with is the parent's."""

    def stop(self: object, *given: object, **named: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(Trainer, "training_step", stop)
    folder = tmp_path / "my run's ü 한국"
    words = ["steep", "train", parent / "run.yaml", "--branch", "checkpoint-3", "--training.output_dir", folder]
    monkeypatch.setattr(cli.sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit):
        cli.main()
    _, command = capfd.readouterr().err.rsplit(" with: ", 1)
    assert shlex.split(command) == ["steep", "train", str(folder / "run.yaml"), "--resume"]
