"""Plans for a card that is not here: its memory, dtypes and units, and none of this machine's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import Gemma2Config, Gemma2ForCausalLM

from steep.errors import UserError
from steep.model.step_bytes import work_bytes
from steep.plan import Plan, plan_run
from steep.planning.cards import CARDS, CONTEXT, card_named
from steep.planning.computation import Ground
from steep.planning.fusing import decide
from steep.planning.memory import WORKSPACES
from steep.planning.vram import vram_budget
from tests.command_line import Steep, assert_one_error_line
from tests.test_fused_run import config_of
from tests.test_run import run_file
from tests.tiny import save_tiny


@pytest.fixture
def planned(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> Any:
    def plan(card: str | None, **sections: dict[str, Any]) -> Plan:
        config = run_file(llama_folder, korean_corpus, tmp_path / "run", **{"model": {"base": "auto"}, **sections})
        return plan_run(config, card=card_named(card) if card else None)

    return plan


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_less_than_is_sold_and_what_cuda_holds_is_not_free(name: str) -> None:
    card = card_named(name)
    assert card == card_named(f" {name.lower()} ") and not card.is_here
    sold = {"T4": 16, "L4": 24, "3090": 24, "5090": 32, "A100-80": 80, "H100": 80, "H200": 141, "B200": 192}
    assert 0.9 < card.memory / (sold.get(name, card.memory / 1e9) * 1e9) < 1.1
    assert card.free == card.memory - CONTEXT
    assert card.has_bf16 == (name != "T4")
    assert card.has_fp8_units == (name not in ("T4", "3060", "3090", "A10", "A6000", "A100-40", "A100-80"))


def test_an_unknown_card_is_named() -> None:
    with pytest.raises(UserError, match=r"--card: 'H10' is unknown\. Did you mean 'H100'\? Known are: T4, .*B200\."):
        card_named("H10")


@pytest.mark.parametrize(
    ("card", "compute", "trained", "products"),
    [("T4", "fp16", "fp32", "none"), ("A100-40", "bf16", "bf16", "none"), ("4090", "bf16", "bf16", "both")],
)
def test_what_is_chosen_is_what_the_run_would_choose_there(
    planned: Any, card: str, compute: str, trained: str, products: str
) -> None:
    plan = planned(card)
    base = "fp8" if products == "both" else "nf4"
    assert (plan.base, plan.compute, plan.trained_dtype, plan.fused) == (base, compute, trained, True)
    assert plan.memory["libraries' workspaces"] == WORKSPACES and "16-bit copies" not in plan.memory
    assert plan.as_dict()["card"]["name"] == card
    over_fp8 = planned(card, model={"base": "fp8", "compute_dtype": "bf16"})
    assert over_fp8.choices.fp8_products == products


def test_a_plan_without_a_card_is_that_of_the_cpu(planned: Any) -> None:
    plan = planned(None)
    assert (plan.compute, plan.trained_dtype, plan.fused, plan.card) == ("fp32", "fp32", False, None)
    assert plan.as_dict()["card"] is None and "libraries' workspaces" not in plan.memory
    assert plan.duration is None and plan.as_dict()["duration"] is None


def test_what_is_not_fused_recomputes_as_on_a_gpu(planned: Any) -> None:
    off = {"model": {"base": "nf4", "fused": "off", "compute_dtype": "bf16", "trained_dtype": "fp32"}}
    sizes = {"data": {"max_length": 512}, "training": {"per_device_train_batch_size": 8}}
    here, there = planned(None, **off, **sizes), planned("L4", **off, **sizes)
    assert there.memory["activations"] < here.memory["activations"]
    assert there.duration is None


def test_time_is_that_of_all_steps(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers as small as these are over before they are launched.
    monkeypatch.setattr("steep.planning.rates.LAUNCHED", 0.0)
    fast, slow = (planned(name, data={"max_length": 512}) for name in ("H200", "L4"))
    for plan in (fast, slow):
        duration = plan.duration
        assert duration.hours == pytest.approx(plan.steps * duration.step / 3600)
        rows = plan.as_dict()["rows_per_step"]
        assert duration.tokens == pytest.approx(512 * rows / duration.step)
        figures = plan.as_dict()["duration"]
        assert figures.keys() == {"seconds_per_step", "tokens_per_second", "hours", "is_of_host", "measured"}
        assert figures["measured"] is None  # that card is not here
    assert slow.duration.step > 5 * fast.duration.step


@pytest.mark.parametrize("is_here", [False, True])
def test_units_that_a_card_lacks_are_said(planned: Any, monkeypatch: pytest.MonkeyPatch, is_here: bool) -> None:
    def said(card: str, **model: str) -> list[str]:
        if not is_here:
            plan = planned(card, model=model)
        else:
            monkeypatch.setattr("steep.plan.card_here", lambda: card_named(card))
            plan = planned(None, model=model)
        return [warning.split(" (")[0] for warning in plan.warnings if "units" in warning]

    assert said("T4") == said("T4", base="nf4", compute_dtype="fp16") == []
    assert said("T4", compute_dtype="bf16") == ["the T4 has no bf16 units"]
    assert said("T4", base="fp8") == ["the T4 has no fp8 units"]
    assert said("A100-80", base="fp8", compute_dtype="bf16") == ["the A100-80 has no fp8 units"]
    assert said("L4", base="fp8", compute_dtype="bf16") == []


@pytest.mark.parametrize(
    ("family", "compute", "warned"), [("gemma3", "fp16", True), ("gemma3", "fp32", False), ("llama", "fp16", False)]
)
def test_gemma_in_fp16_is_warned_of(
    family: str, compute: str, warned: bool, korean_corpus: Path, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    config = run_file(model, korean_corpus, tmp_path / "run", model={"compute_dtype": compute, "base": "nf4"})
    found = [warning for warning in plan_run(config, card=card_named("T4")).warnings if "known to exceed" in warning]
    assert len(found) == warned


def test_units_that_a_card_lacks_are_an_error(planned: Any) -> None:
    model = {"base": "fp8", "fp8_products": "both", "compute_dtype": "bf16"}
    assert planned("L40S", model=model).choices.fp8_products == "both"
    with pytest.raises(UserError, match=r"model\.fp8_products: .*no fp8 units"):
        planned("A100-80", model=model)


def test_levels_and_shares_are_of_that_card(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fits = planned("H100", training={"vram": "50%"})
    assert fits.choices.levels == [0, 0] and fits.shortfall is None
    monkeypatch.setattr(
        "steep.planning.computation.settle",
        lambda config, step, budget, before, host: seen.append(budget) or fits.choices,
    )
    for vram in ("auto", "50%", "20GB", "200GB"):
        planned("H100", training={"vram": vram})
    memory = card_named("H100").memory
    assert list(dict.fromkeys(seen)) == [round(0.9 * memory) - CONTEXT, round(0.5 * memory), 20 * 10**9, memory]


def test_the_command(steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    config = run_file(llama_folder, korean_corpus, tmp_path / "run")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    said = steep("plan", file, "--card", "t4", "--model.base", "nf4")
    assert said.code == 0, said
    plan = " ".join(said.out.replace("│", " ").split())  # where a long path breaks lines
    for part in ("T4, 14.56 GiB", "computed in fp16", "yes, at level 0", "estimated from the maker's figures"):
        assert part in plan, part
    assert_one_error_line(steep("plan", file, "--card", "T5"), "--card", "'T5' is unknown", "T4", "H200")
    assert "--card" in steep("plan", "--help").out


@pytest.mark.parametrize(("card", "compute"), [("T4", "fp16"), ("4090", "fp32"), ("4090", "bf16")])
def test_what_no_kernel_computes_is_counted(card: str, compute: str) -> None:
    """A soft cap is for the compiled attention alone, which old cards lack, as all do in fp32; and torch's own, which
    is left without a cap, takes a mask where there is a window."""

    def work(softcap: float | None, length: int, window: int = 4096) -> int:
        with torch.device("meta"):
            config = Gemma2Config(
                vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
                num_key_value_heads=4, head_dim=32, attn_logit_softcapping=softcap, sliding_window=window,
            )  # fmt: skip
            empty = Gemma2ForCausalLM(config).requires_grad_(False)
        training = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
        model = {"compute_dtype": compute}
        run = config_of(adapter={"r": 8}, model=model, training=training, data={"max_length": length})
        layer, _ = decide(run, empty, None, card_named(card))
        budget = vram_budget("auto", card_named(card))
        ground = Ground(SimpleNamespace(quantization=None), empty, layer, card_named(card), budget, None)  # pyright: ignore[reportArgumentType]
        step = ground.sized(run, ground.computation(run)).step
        assert step is not None
        return step.by_item([3, 3], "tokens", 2 * length)["work of a layer"]

    has_kernels, width = (card, compute) == ("4090", "bf16"), 4 if compute == "fp32" else 2
    for length in (512, 1024):  # of one document of two, and of those of all heads
        scores, mask = (0, 0) if has_kernels else (6 * 4 * 8 * length**2, (1 + width) * length**2)
        assert work(50.0, length) - work(None, length) == scores
        assert work(None, length, window=256) - work(None, length) == mask


@pytest.mark.parametrize(("layers", "kinds"), [(2, 2), (1, 1)])
def test_rope_is_turned_for_each_kind_of_layer(layers: int, kinds: int) -> None:
    """Layers with a window and without one have cos and sin of their own, in fp32 for each token."""
    with torch.device("meta"):
        config = Gemma2Config(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32,
        )  # fmt: skip
        empty = Gemma2ForCausalLM(config).requires_grad_(False)
    run = config_of(data={"max_length": 1024}, training={"per_device_train_batch_size": 2})
    layer, _ = decide(run, empty, None, card_named("H200"))
    ground = Ground(SimpleNamespace(quantization=None), empty, layer, card_named("H200"), 2**34, None)  # pyright: ignore[reportArgumentType]
    step = ground.sized(run, ground.computation(run)).step
    assert step is not None
    how = torch.bfloat16, torch.bfloat16, 3, 2048, "none", 2048, "gpu", step.form
    of_layer = max(work_bytes(each, *how) for each in step.layers)
    assert step._work(2048, 3, "gpu") - of_layer == kinds * 2 * 2048 * 16 * 4
