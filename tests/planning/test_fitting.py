"""A step that does not fit its card: when it is refused, and what is proposed instead."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shapes import empty_model
from steep import run
from steep.errors import UserError
from steep.model.choices import Choices
from steep.model.layer import Layer
from steep.model.machine import Card
from steep.plan import plan_run
from steep.planning.cards import card_named
from steep.planning.computation import Ground
from steep.planning.fitting import Alternative, Shortfall, _host_has, _Trials, changed, shortfall_of, with_rank
from steep.planning.fusing import decide
from steep.planning.memory import WORKSPACES, shape_of
from steep.planning.vram import host_budget, remarks, vram_budget
from steep.run import train_run
from steep.schema import RunConfig
from steep.settings import check_batch, could_be_lean, training_arguments
from tests.test_fused_run import config_of, empty_llama
from tests.test_run import run_file

BATCH, PARTS = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
# Fewer rows at a time make more parts, whose gradients wait for each other, or are clipped; embeddings that stay as
# they are have no states to be elsewhere.
TOGETHER = (
    {BATCH, PARTS, "training.optimizer_in_backward", "training.max_grad_norm"},
    {"adapter.modules_to_save", "training.offload_optimizer"},
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 GiB are available, of which a new run may fill 128."""
    monkeypatch.setattr("steep.planning.vram.available_on_host", lambda: 10 * 2**34)
    monkeypatch.setattr("steep.planning.vram.room_on_host", lambda: 2**37)


@cache
def read(shape: str, rank: int) -> tuple[Any, Layer]:
    """The model on the meta device, and a layer of it with PEFT's own adapters."""
    empty = empty_model(shape)
    layer, _ = decide(config_of(adapter={"r": rank}), empty, None, None)
    assert layer is not None
    return empty, layer


def ground_of(config: RunConfig, card: Card | None, shape: str = "llama-3-8b", before: Choices | None = None) -> Ground:
    (empty, layer), resolved = read(shape, config.adapter.r), SimpleNamespace(quantization=None)
    budget = vram_budget(config.training.vram, card)
    host = 0 if config.training.host_memory == "auto" else host_budget(config.training.host_memory, card)
    return Ground(resolved, empty, layer, card, budget, before, host=host)  # pyright: ignore[reportArgumentType]


def shortfall(config: RunConfig, ground: Ground, is_branch: bool = False) -> Shortfall | None:
    computation = ground.computation(config)
    return shortfall_of(config, ground, computation, ground.sized(config, computation), is_branch=is_branch)


def settings_of(found: Shortfall | None) -> list[dict[str, Any]]:
    assert found is not None
    return [each.settings for each in found.nearest]


def peak_of(config: RunConfig, card: Card, shape: str) -> float:
    """As the run itself would plan it; infinite where that refuses its settings."""
    ground = ground_of(config, card, shape)
    try:
        training_arguments(config, None, fused=True, branch=False)
    except UserError:
        return math.inf
    return ground.sized(config, ground.computation(config)).peak


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "8B, large batch": ("4090", "llama-3-8b", {"training": {BATCH.split(".")[1]: 16}}),
    "8B in bf16": ("4090", "llama-3-8b", {"model": {"base": "bf16"}}),
    "8B in fp32 states": ("4090", "llama-3-8b", {"training": {"optim": "adamw_torch"}}),
    "8B, long rows": ("3090", "llama-3-8b", {"data": {"max_length": 131072}, "training": {BATCH.split(".")[1]: 1}}),
    "8B on a small card": ("T4", "llama-3-8b", {"model": {"base": "auto"}}),
    "8B, all of it": (
        "4090", "llama-3-8b",
        {
            "model": {"base": "bf16"}, "adapter": {"r": 512},
            "training": {"optim": "adamw_torch", BATCH.split(".")[1]: 8},
        },
    ),
    "70B": ("A100-80", "llama-3-70b", {"data": {"max_length": 8192}}),
    "states of embeddings on the host": (
        "4090", "llama-3-8b",
        {
            "adapter": {"r": 8}, "data": {"max_length": 256},
            "training": {"offload_optimizer": "embeddings", "vram": "7GiB", BATCH.split(".")[1]: 1},
        },
    ),
    "8B on a card for games": ("3060", "llama-3-8b", {}),
    "8B there, of a step of 16 rows": ("3060", "llama-3-8b", {"training": {PARTS.split(".")[1]: 8}}),
    "8B there, in fp32": (
        "3060", "llama-3-8b",
        {
            "model": {"base": "bf16", "trained_dtype": "fp32"},
            "training": {"optim": "adamw_torch", PARTS.split(".")[1]: 8},
        },
    ),
    "70B that is a rank without clipping, or shorter too": (
        "L40S", "llama-3-70b", {"training": {BATCH.split(".")[1]: 1, PARTS.split(".")[1]: 1}},
    ),
    "updates inside backward": (
        "4090", "llama-3-8b",
        {
            "data": {"max_length": 8192},
            "training": {
                "optimizer_in_backward": True, "max_grad_norm": 0.0, "vram": "12GiB", BATCH.split(".")[1]: 96,
                PARTS.split(".")[1]: 1,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_proposed_fits_and_nothing_of_it_can_be_left_out(name: str) -> None:
    card, shape, sections = CASES[name]
    config, there = config_of(**sections), card_named(card)
    found = shortfall(config, ground_of(config, there, shape))
    assert found is not None and 1 <= len(found.nearest) <= 3
    assert found.is_refused
    for each in found.nearest:
        assert peak_of(changed(config, each.settings), there, shape) == each.peak <= found.budget
        steps = [changed(config, each.settings), config]
        rows = [c.training.per_device_train_batch_size * c.training.gradient_accumulation_steps for c in steps]
        assert rows[0] == rows[1] or f"with {rows[0]} in place of {rows[1]} rows a step" in each.changes
        assert ("without clipping" in each.changes) == ("training.max_grad_norm" in each.settings)
        parts = turned(each)
        for left_out in parts if len(parts) > 1 else []:
            fewer = {name: value for name, value in each.settings.items() if name not in left_out}
            assert peak_of(changed(config, fewer), there, shape) > found.budget
    plain = [each for each in found.nearest if not each.changes]
    assert plain and len(plain) >= len(found.nearest) - 1, "who wants to clip is told what that costs"
    assert all(len(turned(each)) <= 1 for each in plain[1:])


def turned(found: Alternative) -> list[set[str]]:
    """The names of what is proposed, those in one that only go together."""
    names = set(found.settings)
    bound = [names & group for group in TOGETHER if len(names & group) > 1]
    return [*bound, *({name} for name in names.difference(*bound))]


def test_what_changes_the_result_least_comes_first() -> None:
    config = config_of(training={"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3})
    first, *others = settings_of(shortfall(config, ground_of(config, card_named("4090"))))
    assert first.keys() == {BATCH, PARTS} and first[BATCH] * first[PARTS] == 48
    more = next(part for part in range(first[BATCH] + 1, 17) if 48 % part == 0)
    whole = changed(config, {BATCH: more, PARTS: 48 // more})
    assert shortfall(whole, ground_of(whole, card_named("4090"))) is not None  # no larger part fits
    assert [list(each) for each in others] == [["training.host_memory"], ["data.max_length"]]
    config = config_of(training={"optim": "adamw_torch"})
    assert settings_of(shortfall(config, ground_of(config, card_named("4090"))))[0] == {"training.optim": "adamw_8bit"}
    config = config_of(training={"gradient_checkpointing": False, "per_device_train_batch_size": 4})
    first, *_ = settings_of(shortfall(config, ground_of(config, card_named("4090"))))
    assert first == {"training.gradient_checkpointing": None}


def test_the_smallest_combination() -> None:
    config = config_of(model={"base": "bf16"}, training={"optim": "adamw_torch", "per_device_train_batch_size": 8})
    first, *others = settings_of(shortfall(config, ground_of(config, card_named("4090"))))
    assert len(first) > 1 and not others, (first, others)


def test_rows_that_a_window_of_the_evaluation_needs_stay() -> None:
    config = config_of(data={"max_length": 65536}, training={"per_device_train_batch_size": 1})
    ground = ground_of(config, card_named("4090"))
    lengths = [each["data.max_length"] for each in settings_of(shortfall(config, ground)) if "data.max_length" in each]
    assert lengths and all(length < 65536 and length.bit_count() == 1 for length in lengths)
    config.evaluation.stride = lengths[0]
    left = [each.get("data.max_length", 65536) for each in settings_of(shortfall(config, ground))]
    assert left and min(left) > lengths[0]


def test_a_layer_of_another_rank_is_that_of_the_run() -> None:
    for start in (True, "pissa"):
        of_rank = []
        for rank in (8, 64, 2):
            config = config_of(
                adapter={"r": rank, "init_lora_weights": start, "target_modules": ["q_proj", "down_proj"]}
            )
            layer, _ = decide(config, empty_llama(), None, None)
            assert layer is not None
            of_rank.append(layer)

        def shapes(layer: Any) -> list[Any]:
            projections = (*layer.qkv, layer.o, *layer.gate_up, layer.down)
            return [[(m.shape, m.dtype, m.requires_grad, m.is_meta) for m in each.tensors()] for each in projections]

        for layer in of_rank:
            for rank, own in zip((8, 64, 2), of_rank, strict=True):
                assert shapes(with_rank(layer, rank)) == shapes(own)
        assert shapes(of_rank[0]) != shapes(of_rank[1])


# ---- host memory


def test_what_the_host_may_have_is_proposed() -> None:
    """Where it makes a step fit, and the host has it: states, updates inside backward, what layers keep."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    config = config_of(training={**sizes, "vram": "13GiB"}, data={"max_length": 4096})
    card = Card("fake", (9, 0), round(80e9), round(80e9), is_here=False)
    found = settings_of(shortfall(config, ground_of(config, card)))
    assert found[0] == {"training.optimizer_in_backward": True}
    assert {"training.offload_optimizer": "embeddings"} in found
    config = config_of(training={**sizes, "vram": "24GiB"}, data={"max_length": 65536})
    found = settings_of(shortfall(config, ground_of(config, card)))
    assert "training.host_memory" in found[0], found
    clipped = config_of(training={**sizes, "max_grad_norm": 1.0, "vram": "13GiB"}, data={"max_length": 4096})
    names = {name for each in settings_of(shortfall(clipped, ground_of(clipped, card))) for name in each}
    assert "training.optimizer_in_backward" not in names and "training.offload_optimizer" in names


def test_rank_and_length_stay_where_a_step_without_clipping_fits() -> None:
    """All its rows in one forward, as long as the host has room, and fewer where it has not. What is clipped is named
    next."""
    config = config_of(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8})
    found = shortfall(config, ground_of(config, card_named("3060")))
    assert found is not None
    lean, clipped = found.nearest
    names = {"training.offload_optimizer", "training.host_memory", "training.optimizer_in_backward"}
    assert lean.settings.keys() == names | {"training.max_grad_norm", BATCH, PARTS}
    assert (lean.settings[BATCH], lean.settings[PARTS], lean.changes) == (16, 1, ("without clipping",))
    assert "adapter.r" in clipped.settings and clipped.changes == () and "without clipping" in found.remedy
    here = replace(card_named("3060"), is_here=True)
    small = replace(ground_of(config, here), host=12 * 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steep.planning.vram.available_on_host", lambda: 15 * 2**30)
        patch.setattr("steep.planning.vram.room_on_host", lambda: 12 * 2**30)
        found = shortfall(config, small)
    assert found is not None and 1 <= found.nearest[0].settings.get(BATCH, 2) < 16
    assert found.nearest[0].changes[1].endswith("in place of 16 rows a step")


def test_the_same_step_inside_backward_and_outside() -> None:
    """Nothing is clipped: its parts are one forward there, and one forward is parts here."""
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0, "vram": "14GiB"}
    config = config_of(training=parts)
    first = settings_of(shortfall(config, ground_of(config, card_named("4090"))))[0]
    assert first == {"training.optimizer_in_backward": True, BATCH: 4, PARTS: 1}
    whole = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    config = config_of(training={**whole, "optimizer_in_backward": True})
    first = settings_of(shortfall(config, ground_of(config, card_named("4090"))))[0]
    assert first.keys() == {"training.optimizer_in_backward", BATCH, PARTS} and first[BATCH] * first[PARTS] == 64
    assert first["training.optimizer_in_backward"] is False


def test_narrower_states_are_proposed() -> None:
    """No masters, where these alone are too much; then 8-bit states."""
    card = Card("fake", (9, 0), round(80e9), round(80e9), is_here=False)

    def short(vram: str, **given: str) -> Shortfall | None:
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "vram": vram, **given}
        config = config_of(training=settings, data={"max_length": 2048})
        return shortfall(config, ground_of(config, card))

    wide = {"optimizer_states": "fp32", "master_weights": "all"}
    assert short("18GiB") is None and short("26GiB", **wide) is None
    none, of_8_bit = {"training.master_weights": "none"}, {"training.optimizer_states": "8bit"}
    assert settings_of(short("24GiB", **wide))[1:] == [none, of_8_bit]
    found = settings_of(short("22GiB", **wide))
    assert of_8_bit in found and none not in found


def test_sums_in_bf16_are_proposed() -> None:
    """Where several forwards are added up in fp32, which is 4 bytes a value in place of 2; or would be with the
    optimizer, or the parts of a batch, that fit."""
    card = Card("fake", (9, 0), round(80e9), round(80e9), is_here=False)
    several = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "vram": "17GiB"}
    config = config_of(training=several, data={"max_length": 2048})
    found = settings_of(shortfall(config, ground_of(config, card)))
    assert {"training.grad_accum_dtype": "bf16"} in found, found
    config = config_of(training={**several, "grad_accum_dtype": "bf16"}, data={"max_length": 2048})
    assert shortfall(config, ground_of(config, card)) is None
    config = config_of(training={**several, "vram": "13GiB", "optim": "adamw_torch"}, data={"max_length": 2048})
    (found,) = settings_of(shortfall(config, ground_of(config, card)))
    assert found == {
        "training.offload_optimizer": "embeddings", "training.optim": "adamw_8bit",
        "training.grad_accum_dtype": "bf16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("training", "compute", "could"),
    [
        ({}, "bf16", True),
        ({}, "fp32", True),
        ({}, "fp16", False),
        ({"max_grad_norm": 1.0}, "bf16", False),
        ({"gradient_accumulation_steps": 2}, "bf16", False),
        ({"optim": "adamw_torch"}, "bf16", False),
        ({"spike_action": "skip"}, "bf16", False),
        ({"spike_action": "warn"}, "bf16", True),
        ({"optimizer_in_backward": True}, "bf16", False),
        ({"world": 2}, "bf16", False),
    ],
    ids=str,
)
def test_when_updates_inside_backward_change_nothing_else(
    training: dict[str, Any], compute: str, could: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(training)
    world = settings.pop("world", 1)
    monkeypatch.setattr("steep.ranks.world_size", lambda: world)
    config = config_of(training={"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, **settings})
    assert could_be_lean(config, compute) == could


def test_no_base_is_proposed_that_the_run_would_refuse() -> None:
    """loftq begins at an error that nf4 and int8 have; DoRA does not begin over int8."""
    config = config_of(adapter={"r": 8, "init_lora_weights": "loftq"}, model={"base": "nf4"})
    trials = _Trials(config, ground_of(config, card_named("H200")), 2**40)
    assert trials._peak({"model.base": "int8"}) < math.inf == trials._peak({"model.base": "bf16"})


def test_no_more_of_the_host_is_proposed_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    config = config_of(training={**sizes, "vram": "24GiB"}, data={"max_length": 65536})
    card = Card("fake", (9, 0), round(80e9), round(80e9))
    for there, proposed in ((2**38, True), (2**30, False)):
        monkeypatch.setattr("steep.planning.vram.available_on_host", lambda there=there: there)
        monkeypatch.setattr("steep.planning.vram.room_on_host", lambda there=there: 0.8 * there)
        names = {name for each in settings_of(shortfall(config, ground_of(config, card))) for name in each}
        assert ("training.host_memory" in names) == proposed
        assert proposed or "training.offload_optimizer" not in names


def test_amounts_that_do_nothing_or_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steep.planning.vram.available_on_host", lambda: 2**30)
    card = Card("fake", (9, 0), round(80e9), round(80e9))
    given = config_of(training={"vram": "80%", "host_memory": "64GiB", "offload_optimizer": "all"}).training
    names = "training.vram and training.host_memory and training.offload_optimizer"
    assert remarks(given, None, {"states": 2**31}) == [f"there is no GPU, and without one nothing is done by {names}."]
    (beyond,) = remarks(given, card, {"states": 2**31})
    assert "fills 2.00 GiB of host memory, and the system reports 1.00 GiB available" in beyond
    for training, there, needed in (
        ({}, None, 2**31),
        ({"vram": "24GiB", "host_memory": "64GiB"}, None, 2**31),  # planned for a card of that size
        ({"host_memory": "64GiB"}, card, 2**30),
        ({}, card, 2**31),  # an error, of what auto is
        ({"host_memory": "64GiB"}, replace(card, is_here=False), 2**31),
    ):
        assert remarks(config_of(training=training).training, there, {"states": needed}) == []


# ---- when a run is refused


def test_too_little_of_the_host_is_told_before_a_text_is_read(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a new run keeps can be chosen again."""
    monkeypatch.setattr("steep.plan.pack", lambda *given, **how: pytest.fail("the text is tokenised"))
    training = {"offload_optimizer": "all", "host_memory": "0.001MiB", "optim": "adamw_8bit"}
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "nf4"}, training=training)
    with pytest.raises(UserError, match=r"optimizer states in host memory.*leaves the states on the card\.$") as error:
        plan_run(config, card=card_named("L4"), refuses=True)
    assert error.value.field == "training.host_memory"


def test_a_new_run_is_held_to_its_share_of_the_host(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 % of what is available, which layers, states and a checkpoint's copy share. One that goes on may have all."""
    training = {"offload_optimizer": "all", "optim": "adamw_8bit"}
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "nf4"}, training=training)
    card = Card("fake", (8, 9), round(24e9), round(24e9))
    needed = sum(plan_run(config, card=card).host.values())
    for available, goes_on, refused in ((1.2, False, True), (1.3, False, False), (1.2, True, False), (0.9, True, True)):
        there = round(available * needed)
        monkeypatch.setattr("steep.planning.vram.available_on_host", lambda there=there: there)
        monkeypatch.setattr("steep.planning.vram.room_on_host", lambda there=there: round(0.8 * there))
        choices = plan_run(config, card=card).choices if goes_on else None
        warned = plan_run(config, card=card, choices=choices).warnings
        assert any("steep train refuses it: training.host_memory" in each for each in warned) == refused, available
        choices_of = SimpleNamespace(trained_dtype="bf16")
        sizes: Any = SimpleNamespace(shape=None, memory=None, on_host=0, choices=choices_of)
        monkeypatch.setattr("steep.planning.fitting.host_bytes", lambda *_: {"all": needed})
        assert _host_has(config, card, sizes, goes_on) != refused


def far(vram: str = "auto", *, free: float = 24e9, memory: float = 24e9, before: Choices | None = None) -> Shortfall:
    """How a step of 29 GB falls short of a card."""
    card = Card("fake", (8, 9), round(memory), round(free))
    config = config_of(training={"vram": vram, "gradient_checkpointing": True, "per_device_train_batch_size": 26})
    ground = ground_of(config, card, before=before)
    found = shortfall(config, ground)
    assert found is not None and found.peak == pytest.approx(29e9, rel=0.1)
    return found


def test_auto_refuses_above_what_it_would_fill() -> None:
    assert far().is_refused
    nearly = far(memory=31e9, free=31e9)  # it would go in, with no room for gaps
    assert nearly.is_refused and nearly.peak < 31e9
    text = str(far(free=20e9).error())
    assert text.startswith("training.vram: a step needs about 2") and "(18.63 GiB are free)" in text
    assert "What fits, nearest first: training." in text and "training.host_memory: 32GiB (" in text
    assert "; or data.max_length: 512 (" in text
    assert "To try it all the same" not in text and "\n" not in text  # the whole card has not as much
    assert "To try it all the same: training.vram: 28GiB." in nearly.remedy


def test_what_is_set_by_hand_is_taken_at_its_word() -> None:
    for vram, memory, refused in (
        ("10GB", 80e9, True),  # the card has it, and others are to have it too
        ("10%", 80e9, True),
        ("10GB", 24e9, True),
        ("100%", 24e9, True),
        ("25GB", 24e9, True),
        ("40GB", 24e9, False),  # who says so knows better
    ):
        found = far(vram, memory=memory, free=memory)
        assert found.is_refused == refused, vram
        assert ("To try it all the same" in found.remedy) == (refused and found.peak <= memory)
        assert ("steep train refuses it" in str(found)) == refused
        assert ("steep train begins all the same" in str(found)) == (not refused)
    near = replace(far("10GB", memory=80e9, free=80e9), peak=20.650 * 2**30, budget=round(20.648 * 2**30))
    assert "a step needs about 20.65 GiB, 2.0 MiB too much, and 20.65 GiB of" in near.problem
    escape = far(memory=31e9, free=31e9).remedy.rpartition("training.vram: ")[2].rstrip(".")
    assert not far(escape).is_refused


def test_a_run_that_goes_on_keeps_what_it_has() -> None:
    before = Choices(True, "bf16", [3] * 32, loss_way="tokens")
    assert far(before=before, memory=80e9, free=24e9).is_refused
    there = far(before=before, memory=31e9, free=31e9)
    assert not there.is_refused and there.nearest == []  # its levels filled the card when it began
    assert "To try it all the same" not in far(before=before).remedy  # training.vram stays
    config = config_of(training={"per_device_train_batch_size": 8})
    ground = ground_of(config, card_named("4090"), before=replace(before, levels=[0] * 32))
    found = shortfall(config, ground)
    assert settings_of(found) == [{"training.gradient_checkpointing": True}]
    assert found is not None and "with --allow training.gradient_checkpointing." in found.remedy


def test_a_branch_may_have_other_rows() -> None:
    before = Choices(True, "bf16", None, loss_way="tokens")
    config = config_of(training={"per_device_train_batch_size": 16})
    found = shortfall(config, ground_of(config, card_named("4090"), before=before), is_branch=True)
    assert [each.keys() for each in settings_of(found)] == [{"data.max_length"}]
    assert found is not None and "--allow" not in found.remedy and "all the same" not in found.remedy


def test_what_does_not_fit_walks_through_the_model_once_for_each_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than a hundred settings that are tried."""
    asked: list[str] = []
    monkeypatch.setattr(
        "steep.planning.computation.shape_of",
        lambda *given: asked.append(given[1].model_dump_json()) or shape_of(*given),
    )
    config = config_of()
    found = shortfall(config, ground_of(config, card_named("4090"), "llama-3-70b"))
    assert found is not None and found.nearest == [] and len(asked) == len(set(asked)) <= 8


def test_a_model_that_gets_rows_is_counted_again() -> None:
    config, empty = config_of(adapter={"r": 8}), empty_llama()
    layer, _ = decide(config, empty, None, None)
    resolved: Any = SimpleNamespace(quantization=None)
    ground = Ground(resolved, empty, layer, card_named("4090"), 2**34, None)
    for rows in (384, 400):
        empty.resize_token_embeddings(rows, mean_resizing=False)
        assert ground.sized(config, ground.computation(config)).shape.vocabulary == rows


def test_what_nothing_helps() -> None:
    config = config_of(training={"vram": "2GiB", "per_device_train_batch_size": 1})
    found = shortfall(config, ground_of(config, card_named("T4")))
    assert (
        found is not None
        and found.nearest == []
        and "take a smaller model, a larger training.vram, or a card with more" in found.remedy
    )


def test_without_a_card_nothing_is_refused() -> None:
    config = config_of(training={"vram": "8GiB"}, model={"compute_dtype": "bf16"})
    found = shortfall(config, ground_of(config, None))
    assert found is not None and not found.is_refused and "of the card may be filled" in found.problem
    assert settings_of(found)
    config.training.vram = "auto"
    assert shortfall(config, ground_of(config, None)) is None


def test_a_budget_of_ones_own_is_named() -> None:
    config = config_of(training={"vram": "12GiB"})
    found = shortfall(config, ground_of(config, card_named("4090")))
    assert found is not None and found.is_refused
    assert "To try it all the same: training.vram: 14GiB." in found.remedy
    config = config_of(training={"vram": "1GiB"})
    found = shortfall(config, ground_of(config, card_named("4090")))
    assert found is not None and "a larger training.vram, or a card" in found.remedy


@pytest.mark.parametrize(
    ("rows", "length", "field"),
    [(10**12, 2048, "training.per_device_train_batch_size"), (1, 10**12, "data.max_length"), (16_384, 2048, None)],
)
def test_a_batch_that_no_card_holds_is_refused_at_once(rows: int, length: int, field: str | None) -> None:
    config = config_of(training={"per_device_train_batch_size": rows}, data={"max_length": length})
    if field is None:
        check_batch(config)
        return
    with pytest.raises(UserError, match=rf"{field}: .* than a card holds"):
        check_batch(config)


def test_an_alternative_in_words() -> None:
    told = str(Alternative({"training.gradient_checkpointing": None, "adapter.r": 64}, 3 * 2**30))
    assert told == "training.gradient_checkpointing: null with adapter.r: 64 (3.00 GiB)"
    told = str(Alternative({"training.optimizer_in_backward": True}, 3 * 2**30, ("without clipping",)))
    assert told == "training.optimizer_in_backward: true (3.00 GiB, without clipping)"


# ---- from the run file


def test_a_plan_says_what_the_host_has_no_room_for(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    file = run_file(
        llama_folder, korean_corpus, tmp_path, training={"offload_optimizer": "all", "host_memory": "0.01MiB"}
    )
    found = plan_run(file, card=card_named("4090"))
    assert any("steep train refuses it: training.host_memory" in warning for warning in found.warnings)


def test_train_refuses_before_it_loads_and_plan_says_it(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_with(**training: Any) -> RunConfig:
        sizes = {"per_device_train_batch_size": 8, **training}
        model = {"base": "nf4", "compute_dtype": "bf16", "fused": "on"}
        return run_file(llama_folder, korean_corpus, tmp_path / "run", model=model, training=sizes)

    whole = sum(plan_run(config_with(vram="1MiB")).memory.values())
    between = round((WORKSPACES + 0.7 * (whole - WORKSPACES)) / 0.9)
    card = Card("fake", (8, 6), between, between)
    monkeypatch.setattr("steep.plan.card_here", lambda: card)
    monkeypatch.setattr("steep.plan.measured_here", lambda *given: None)  # it is not there
    monkeypatch.setattr(run, "check_base", lambda *given: pytest.fail("the base is read"))
    with pytest.raises(UserError) as raised:
        train_run(config_with())
    assert raised.value.field == "training.vram" and f"{BATCH}: " in raised.value.remedy
    assert not (tmp_path / "run").exists()
    plan = plan_run(config_with())
    assert plan.shortfall is not None and str(plan.shortfall) in plan.warnings
    assert "and steep train refuses it. What fits, nearest first: " in str(plan.shortfall)
    told = plan.as_dict()["shortfall"]
    assert told["refused"] and told["nearest"][0]["settings"].keys() == {BATCH, PARTS}
    assert told["nearest"][0]["bytes"] <= told["budget_bytes"] < whole
    nearest = config_with(**{name.split(".")[1]: value for name, value in told["nearest"][0]["settings"].items()})
    assert plan_run(nearest, refuses=True).shortfall is None
    assert plan_run(config_with(vram="1GiB"), refuses=True).choices.levels is not None
    monkeypatch.setattr("steep.plan.card_here", lambda: None)
    assert plan_run(config_with(vram="1MiB"), refuses=True).shortfall is not None
