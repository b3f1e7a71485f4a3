"""How a plan cuts the rows of a step into forwards, and that a run keeps it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.measuring import RESULTS
from steep import ranks
from steep.amounts import human_bytes
from steep.config import load_config, parse_config
from steep.errors import UserError
from steep.initialise import init_run
from steep.model.machine import Card
from steep.plan import plan_run
from steep.planning.bases import with_base
from steep.planning.cards import card_named
from steep.planning.duration import Pace
from steep.planning.fitting import changed, forwards_of
from steep.planning.memory import GIB, WORKSPACES, gaps
from steep.planning.micro_batch import AS_FAST, UNTIMED, with_micro_batch
from steep.planning.rates import rates_of
from steep.run import train_run
from steep.schema import FORWARDS, RunConfig
from steep.settings import check_batch, check_update, planned_steps, rows_per_step
from steep.terminal import plan_tables
from tests.command_line import Steep
from tests.planning.test_fitting import ground_of, settings_of, shortfall
from tests.test_out_of_memory import first_to_lower
from tests.test_run import lines, run_file


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 GiB are available, of which a new run may fill 128."""
    monkeypatch.setattr("steep.planning.vram.available_on_host", lambda: 10 * 2**34)
    monkeypatch.setattr("steep.planning.vram.room_on_host", lambda: 2**37)


def asking(rows: int, length: int = 2048, /, **sections: Any) -> RunConfig:
    """A run of so many rows a step."""
    given: dict[str, Any] = {
        "model": {"name": "x", "fused": "on", "base": "nf4"},
        "data": {"sources": [{"path": "x"}], "max_length": length},
        "training": {"output_dir": "x", "rows_per_step": rows},
    }
    return parse_config({name: {**part, **sections.get(name, {})} for name, part in given.items()})


def in_forwards(config: RunConfig, batch: int, forwards: int) -> RunConfig:
    """A step cut by hand, where the plan would do it."""
    return changed(config, {"training.rows_per_step": None, **forwards_of(batch, forwards)})


def cut(config: RunConfig, card: Card | None, shape: str = "llama-3-8b") -> tuple[int, int, str]:
    new, reason = with_micro_batch(config, ground_of(config, card, shape))
    assert reason is not None
    training = new.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == rows_per_step(config)
    return training.per_device_train_batch_size, training.gradient_accumulation_steps, reason


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("H200", "llama-3-8b", 16),
        ("4090", "llama-3-8b", 16),
        ("A100-40", "llama-3-8b", 64),
        ("3060", "llama-3.2-1b", 12),
    ],
)
def test_the_smallest_that_is_nearly_as_fast_as_any_is_chosen(name: str, shape: str, rows: int) -> None:
    """Worked out here once more, each way by itself."""
    config, card = asking(rows), card_named(name)
    ground, rates = ground_of(config, card, shape), rates_of(card)
    seconds: dict[int, float] = {}
    ways = [part for part in range(1, rows + 1) if rows % part == 0]
    for part in ways:
        one = in_forwards(config, part, rows // part)
        sizes, pace = ground.sized(one, ground.computation(one)), Pace.of(one, rates, [2048])
        assert pace is not None and ground.budget is not None
        if sizes.peak <= ground.budget:
            seconds[part] = pace.seconds(sizes) or 0.0
    part, _, reason = cut(config, card, shape)
    as_fast = [way for way in seconds if seconds[way] <= AS_FAST * min(seconds.values())]
    assert part == min(as_fast) and len(as_fast) < len(seconds)
    ways_that_fit = f"{len(seconds)} of {len(ways)} ways to cut {rows} rows fit"
    assert reason == f"the smallest whose predicted step is within 3% of the shortest: {ways_that_fit}"


def test_a_forward_is_no_larger_than_it_has_to_be() -> None:
    """On a small card more would be computed again; a large one has nothing to gain by more than it needs."""
    assert cut(asking(16), card_named("H200"))[:2] == (2, 8)
    assert cut(asking(64), card_named("A100-40"))[:2] == (1, 64)
    assert cut(asking(16), card_named("4090"))[:2] == (1, 16)
    assert cut(asking(1), card_named("H200"))[2].endswith("of the shortest: the only way")


@pytest.mark.parametrize("card", [None, Card("another", (9, 0), 2**37, 2**37)], ids=["CPU", "unknown card"])
def test_where_no_time_is_known_a_forward_has_some_thousand_tokens(card: Card | None) -> None:
    part, forwards, reason = cut(asking(24, 1024), card)
    assert (part, forwards) == (4, 6) and part * 1024 <= UNTIMED and "is not known" in reason
    assert cut(asking(24, 16384), card)[:2] == (1, 24)  # a row is the least
    assert cut(asking(7, 1024), card)[:2] == (1, 7)


def test_a_run_that_is_not_fused_takes_the_most_that_fit() -> None:
    config = asking(16, 1024, model={"fused": "off"}, training={"vram": "28GiB"})
    ground = ground_of(config, card_named("H200"))
    ground = replace(ground, layer=None)
    new, reason = with_micro_batch(config, ground)
    assert "is not known" in (reason or "") and new.training.per_device_train_batch_size == 2
    more = changed(config, forwards_of(4, 4))
    assert ground.sized(more, ground.computation(more)).peak > (ground.budget or 0)


@pytest.mark.parametrize("rows", [16, 256])
def test_where_nothing_fits_the_refusal_proposes_what_the_file_can_say(rows: int) -> None:
    """Without the two fields that the plan chooses itself; each proposal, planned, fits."""
    config, card = asking(rows), card_named("3060")
    part, _, reason = cut(config, card)
    assert part == 1 and "does not fit" in reason
    ground = ground_of(config, card)
    found = shortfall(with_micro_batch(config, ground)[0], ground)
    proposals = settings_of(found)
    assert proposals and found is not None and found.is_refused
    for settings in proposals:
        assert not set(settings) & set(forwards_of(1, 1))
        other = changed(config, settings)
        ground = ground_of(other, card)
        again, _ = with_micro_batch(other, ground)
        assert ground.sized(again, ground.computation(again)).peak <= (ground.budget or 0)
        check_update(again, "bf16")
    fewer = [settings["training.rows_per_step"] for settings in proposals if "training.rows_per_step" in settings]
    assert fewer == ([16] if rows == 256 else [])  # what fits without clipping in one forward


def test_updates_inside_backward_take_all_rows_at_once() -> None:
    lean = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    assert cut(asking(16, training=lean), card_named("H200"))[:2] == (16, 1)
    config = asking(64, training=lean)
    assert cut(config, card_named("4090"))[:2] == (64, 1)
    new, _ = with_micro_batch(config, ground_of(config, card_named("4090")))
    proposals = settings_of(shortfall(new, ground_of(config, card_named("4090"))))
    assert {"training.optimizer_in_backward": False} in proposals
    with pytest.raises(UserError, match=r"^training\.rows_per_step: 99,999 rows .* in one forward, .*16,384 at most"):
        cut(asking(99_999, training=lean), card_named("H200"))


def test_fp8_is_chosen_where_some_way_to_cut_a_step_fits_over_it() -> None:
    """Here all rows at once, whose gradients then are summed in no fp32; by two or one it does not."""
    config = asking(4, model={"base": "auto"}, training={"vram": "20GiB"})
    ground = ground_of(config, card_named("L40S"))
    halves = in_forwards(config, 2, 2)
    assert with_base(halves, ground)[0].model.base == "nf4"
    chosen, _ = with_base(config, ground)
    assert chosen == changed(config, {"model.base": "fp8"})
    assert with_micro_batch(chosen, ground)[0].training.per_device_train_batch_size == 4


def test_what_the_file_says_is_left_alone() -> None:
    config = changed(asking(16), {"training.rows_per_step": None})
    assert with_micro_batch(config, ground_of(config, card_named("H200"))) == (config, None)


@pytest.mark.parametrize("names", [FORWARDS, FORWARDS[:1], FORWARDS[1:]], ids=" ".join)
def test_rows_and_forwards_are_not_given_together(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^training\.rows_per_step: ") as error:
        asking(16, training=dict.fromkeys(names, 2))
    assert all(f"training.{name}" in str(error.value) for name in names)
    assert f"Leave {' and '.join(FORWARDS)} out" in str(error.value)


@pytest.mark.parametrize("rows", [0, -1, 1.5, "many"])
def test_rows_are_a_whole_number(rows: Any) -> None:
    with pytest.raises(UserError, match=r"^training\.rows_per_step: "):
        asking(rows)


def test_processes_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_steps(changed(asking(12), {"training.num_train_epochs": 2.0}), 59) == 10
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    check_batch(asking(12))
    assert rows_per_step(asking(12)) == 12
    new, _ = with_micro_batch(asking(12, 1024), ground_of(asking(12), None))
    assert (new.training.per_device_train_batch_size, new.training.gradient_accumulation_steps) == (4, 1)
    with pytest.raises(UserError, match=r"^training\.rows_per_step: 3 processes cannot share 16 rows.*such as 18"):
        check_batch(asking(16))


def test_a_new_run_file_asks_for_rows(tmp_path: Path, korean_corpus: Path) -> None:
    """As many as one that says nothing has."""
    file = init_run("x", [str(korean_corpus)], tmp_path / "ko.yaml")
    config = load_config(file)
    assert (
        config.training.rows_per_step
        == rows_per_step(parse_config({**yaml.safe_load(file.read_text()), "training": {"output_dir": "x"}}))
        == 16
    )
    assert load_config(file, ["--training.rows_per_step", "24"]).training.rows_per_step == 24
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        load_config(file, ["--training.gradient_accumulation_steps", "4"])
    by_hand = ["--training.rows_per_step", "null", "--training.gradient_accumulation_steps", "4"]
    assert rows_per_step(load_config(file, by_hand)) == 8
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


# ---- a run


def of_rows(rows: int, model: Path, corpus: Path, folder: Path, **training: Any) -> RunConfig:
    return run_file(model, corpus, folder, training={"rows_per_step": rows, **training})


@pytest.fixture
def short_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 64 tokens."""
    monkeypatch.setattr("steep.planning.micro_batch.UNTIMED", 128)


def weights(folder: Path) -> bytes:
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("short_forwards")
def test_a_run_keeps_how_its_steps_are_cut(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be chosen when it goes on; from the file that it was begun with, and from its own."""
    config = of_rows(4, llama_folder, korean_corpus, tmp_path / "run", max_steps=4, save_steps=2)
    train_run(config)
    by_hand = run_file(
        llama_folder, korean_corpus, tmp_path / "by hand",
        training={"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    train_run(by_hand)
    assert weights(tmp_path / "run") == weights(tmp_path / "by hand")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert [plan[name] for name in ("rows_per_step", *FORWARDS)] == [4, 2, 2]
    assert "up to 128 tokens" in plan["batch_reason"]
    own = load_config(tmp_path / "run" / "run.yaml")
    assert own.training.rows_per_step is None
    assert [getattr(own.training, name) for name in FORWARDS] == [2, 2]

    monkeypatch.setattr("steep.planning.micro_batch.UNTIMED", 10**6)  # all four at once, for a run that begins now
    assert plan_run(config).config.training.per_device_train_batch_size == 4
    expected = weights(tmp_path / "run")
    for again in (config, own):
        for name in ("checkpoint-4", "final"):
            (tmp_path / "run" / name).rename(tmp_path / f"{name} {id(again)}")
        train_run(again, resume=True)
        assert weights(tmp_path / "run") == expected
        assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    other = of_rows(8, llama_folder, korean_corpus, tmp_path / "run", max_steps=4, save_steps=2)
    with pytest.raises(UserError, match=r"^--resume: training\.rows_per_step is 8, and a step of the run has 4"):
        train_run(other, resume=True)
    with pytest.raises(UserError, match=r"^--allow: training\.rows_per_step cannot change within a run"):
        train_run(own, resume=True, allow=["training.rows_per_step"])


@pytest.mark.usefixtures("short_forwards")
def test_a_branch_cuts_steps_as_its_parent_does(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(of_rows(4, llama_folder, korean_corpus, tmp_path / "run", max_steps=2, save_steps=2))
    monkeypatch.setattr("steep.planning.micro_batch.UNTIMED", 10**6)
    branch = of_rows(4, llama_folder, korean_corpus, tmp_path / "branch", max_steps=1)
    train_run(branch, branch=tmp_path / "run" / "checkpoint-2")
    own = load_config(tmp_path / "branch" / "run.yaml").training
    assert (own.per_device_train_batch_size, own.gradient_accumulation_steps) == (2, 2)
    other = of_rows(8, llama_folder, korean_corpus, tmp_path / "other", max_steps=1)
    with pytest.raises(UserError, match=r"^--branch: training.rows_per_step is 8, and a step of the run has 4"):
        train_run(other, branch=tmp_path / "run" / "checkpoint-2")
    other = of_rows(8, llama_folder, korean_corpus, tmp_path / "other", max_steps=1)
    other.data.max_length *= 2
    train_run(other, branch=tmp_path / "run" / "checkpoint-2")
    own = load_config(tmp_path / "other" / "run.yaml").training
    assert (own.per_device_train_batch_size, own.gradient_accumulation_steps) == (8, 1), "of other rows: cut anew"


def test_the_command_says_what_was_chosen(
    steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(of_rows(12, llama_folder, korean_corpus, tmp_path / "run").to_yaml(), encoding="utf-8")

    def said(*words: str) -> str:
        shown = steep("plan", file, *words)
        assert shown.code == 0, shown
        return next(" ".join(line.split()) for line in shown.out.splitlines() if "forwards" in line)

    assert "1 a step, of 12 rows (the most up to 4,096" in said()
    assert "2 a step, of 6 rows (the most" in said("--data.max_length", "512")
    assert "1 a step, of 6 rows (the most" in said("--training.rows_per_step", "6")
    assert re.search(r"\d+ a step, of \d+ rows \(the smallest whose", said("--card", "H200"))


def test_what_is_advised_is_what_the_file_can_say(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    plan = plan_run(of_rows(10**6, llama_folder, korean_corpus, tmp_path / "run"))
    assert any("a whole pass over it. Lower training.rows_per_step." in warning for warning in plan.warnings)
    by_hand = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", training={FORWARDS[1]: 10**6}))
    assert any(f"Lower training.{FORWARDS[1]} or training.{FORWARDS[0]}." in warning for warning in by_hand.warnings)
    assert first_to_lower(plan_run(of_rows(4, llama_folder, korean_corpus, tmp_path / "run"))) == (
        "training.per_device_train_batch_size (now 4; with more gradient_accumulation_steps, now 1, a step stays what "
        "it is: give the two in place of rows_per_step)"
    )
    lean = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    planned = plan_run(of_rows(4, llama_folder, korean_corpus, tmp_path / "run", **lean))
    assert first_to_lower(planned) == "training.rows_per_step (now 4)"


def test_fragmentation_is_a_line_of_the_plan(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Beyond the total, which stays what is allocated; and a warning where the card has no room for it."""
    training = {"vram": "100%", "per_device_train_batch_size": 128}
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "auto"}, training=training)

    def planned(card: Card) -> tuple[int, int]:
        plan = plan_run(config, card=card).as_dict()
        figures, total = plan["fragmentation"], plan["memory_bytes"]["total"]
        passing = ("activations", "work of a layer", "logits and loss", "gradients")
        assert figures["bytes"] == round(sum(plan["memory_bytes"][name] for name in passing) * 0.4) > 0
        assert total == sum(plan["memory_bytes"].values()) / 2
        (table,) = [table for table in plan_tables(plan) if table.columns[0].header == "memory"]
        shown = [" ".join(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
        assert shown[-1].startswith("fragmentation, beyond the total up to ") and shown[-2].startswith("total")
        assert shown[-1].endswith(f", where the card has {human_bytes(card.memory - total)}")
        warned = any("gaps between allocations may take" in each for each in plan["warnings"])
        assert warned == (figures["bytes"] > card.memory - total)
        return total, figures["bytes"]

    large = card_named("H200")
    total, most = planned(large)
    assert most < large.memory - total
    tight = total + most // 2
    assert planned(replace(large, memory=tight, free=tight)) == (total, most)
    alone = plan_run(config).as_dict()
    assert alone["fragmentation"] is None and not alone["fused"]


PAGE = RESULTS.parent.parent / "docs" / "fused-step.md"
GROWING_SINCE = "2026-11-30T10:55"  # before that the benchmark had blocks of fixed sizes
# Rows of an 8B from LONG tokens on go through attention's backward one query head after the other since.
ONE_HEAD_SINCE, LONG = "2026-11-30T14:50", 174_763
MEASURED = [
    row
    for name in ("train", "planned")
    for file in sorted(RESULTS.glob(f"*-{name}.jsonl"))
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    if row["peer"].startswith("steep") and row["call"] >= GROWING_SINCE
]


def test_there_are_measured_rows() -> None:
    assert len(MEASURED) >= 16 and {row["shape"] for row in MEASURED} >= {"llama-3.2-1b", "llama-3.2-3b"}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['shape']} {row['seq']} {row['planned_gib']:.1f}")
def test_the_estimate_bounds_what_was_measured(row: dict[str, Any]) -> None:
    """By the levels that the run had. A tenth of the peak would be too little for an 8B at 65,536 tokens, and ten times
    too much for a 70B."""
    lean = {"optimizer_in_backward": True, "max_grad_norm": 0.0, "offload_optimizer": "all"}
    base, training = ("fp8" if "fp8" in row["peer"] else "nf4"), (lean if "lean" in row["peer"] else {})
    if "--training.offload_optimizer all" in row["steep_args"]:
        training = {**training, "offload_optimizer": "all"}
    config = asking(row["batch"], row["seq"], model={"base": base}, training=training)
    config = in_forwards(config, row["batch"], 1)
    ground = ground_of(config, card_named("H200"), row["shape"])
    step = ground.sized(config, ground.computation(config)).step
    assert step is not None
    memory = step.by_item(row["levels"], row["loss_way"], row["tile"], row["places"])
    beyond = row["peak_reserved_gib"] - row["peak_allocated_gib"]
    assert beyond <= gaps(memory) / GIB
    if row["call"] >= ONE_HEAD_SINCE or row["seq"] < LONG:
        assert (sum(memory.values()) + WORKSPACES) / GIB == pytest.approx(row["peak_allocated_gib"], rel=0.01, abs=0.1)


def smallest_peak(shape: str, rows: int, length: int, **training: Any) -> float:
    """GiB, states on the host."""
    training = {"vram": "1GiB", "host_memory": "130GiB", "offload_optimizer": "all", **training}
    config = in_forwards(asking(rows, length, training=training), rows, 1)
    ground = ground_of(config, card_named("H200"), shape)
    return sum(ground.sized(config, ground.computation(config)).memory.values()) / GIB


def test_the_page_says_what_clipping_costs() -> None:
    page = PAGE.read_text(encoding="utf-8").split("## Updates inside backward")[1].split("\n## ")[0]
    found = re.findall(r"\| (llama\S+), (\d+) × (\S+) \| (\S+) GiB \| (\S+) GiB \|", page)
    assert len(found) == 6
    for shape, rows, length, clipped, lean in found:
        given = shape, int(rows), int(length.replace(",", ""))
        assert f"{smallest_peak(*given):.2f}" == clipped
        assert f"{smallest_peak(*given, optimizer_in_backward=True, max_grad_norm=0.0):.2f}" == lean
