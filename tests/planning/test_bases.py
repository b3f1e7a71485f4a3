"""The bases side by side: what a step over each needs, how long it takes, and whether it fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from steep.model.choices import Choices
from steep.ops.base_weight import DenseWeight
from steep.ops.lora import Projection
from steep.plan import plan_run
from steep.planning.bases import SHOWN, Base, bases_of, with_base
from steep.planning.cards import card_named
from steep.planning.computation import Sizes
from steep.planning.duration import Pace
from steep.planning.rates import rates_of
from steep.terminal import bases_table
from tests.command_line import Steep
from tests.planning.test_fitting import ground_of
from tests.test_fused_run import config_of
from tests.test_run import run_file

DENSE = 2048


def sized(name: str, base: str = "nf4", **sections: Any) -> tuple[dict[str, Base], Sizes, Pace]:
    """An 8B, 2 x 2048, on a card of that name."""
    training = {"per_device_train_batch_size": 2, **sections.pop("training", {})}
    config = config_of(model={"name": "x", "fused": "on", "base": base}, training=training, **sections)
    ground = ground_of(config, card_named(name))
    computation = ground.computation(config)
    sizes, pace = ground.sized(config, computation), Pace.of(config, rates_of(card_named(name)), [DENSE])
    assert pace is not None
    found = bases_of(config, ground, sizes, pace, {"nf4": 0.095}, base=base, compute=computation.compute)
    return found, sizes, pace


def time_of(base: Base) -> float:
    assert base.seconds_per_step is not None
    return base.seconds_per_step


def test_each_base_is_timed_as_the_run_would_be() -> None:
    """0.282 s over nf4 and 0.249 over fp8 were measured on an H200
    (`benchmarks/results/2026-11-29-h200-train.jsonl`)."""
    found, sizes, pace = sized("H200")
    assert list(found) == list(SHOWN) == ["nf4", "int8", "fp8", "bf16"]
    times = {name: time_of(base) for name, base in found.items()}
    assert times["nf4"] == pace.seconds(sizes) == pytest.approx(0.282, rel=0.05)
    assert times["fp8"] == min(times.values()) == pytest.approx(0.249, rel=0.05)
    assert all(base.fits for base in found.values())
    peaks = [found[name].peak_bytes or 0 for name in ("nf4", "fp8", "bf16")]
    assert peaks == sorted(peaks) and peaks[0] == sizes.peak
    assert [found[name].weight_error for name in SHOWN] == [0.095, None, None, None]
    others, own, _ = sized("H200", "fp8")
    assert others == found and own.peak == found["fp8"].peak_bytes


def test_what_fits_by_computing_again_takes_longer_and_what_does_not_has_no_time() -> None:
    roomy, tight = sized("H200")[0], sized("H200", training={"vram": "19GiB"})[0]
    assert [tight[name].fits for name in SHOWN] == [True, True, True, False]
    for name in ("int8", "fp8"):
        assert time_of(tight[name]) > 1.05 * time_of(roomy[name])
    assert tight["bf16"].seconds_per_step is None and (tight["bf16"].peak_bytes or 0) > 19 * 2**30
    assert time_of(sized("A100-80")[0]["fp8"]) > time_of(sized("A100-80")[0]["nf4"])  # without units for it


def test_a_resumed_run_compares_with_new_ones() -> None:
    """What it keeps, such as no products in fp8, is not taken for other bases."""
    config = config_of(model={"name": "x", "fused": "on", "base": "nf4"})
    new, ground = sized("H200")[0], ground_of(config, card_named("H200"))
    before = Choices(True, "bf16", [3] * 32, loss_way="tokens", tile=4096, fp8_products="none")
    config = config_of(model={"name": "x", "fused": "on", "base": "nf4"}, training={"per_device_train_batch_size": 2})
    ground = replace(ground, before=before)
    sizes, pace = ground.sized(config, ground.computation(config)), Pace.of(config, rates_of(ground.card), [DENSE])
    found = bases_of(config, ground, sizes, pace, {}, base="nf4", compute="bf16")
    assert found["fp8"].seconds_per_step == new["fp8"].seconds_per_step
    assert time_of(found["nf4"]) > 1.2 * time_of(new["nf4"])  # all is computed again
    done = bases_of(config, replace(ground, to_train=False), sizes, None, {}, base="nf4", compute="bf16")
    assert [done[name].peak_bytes is None for name in SHOWN] == [False, True, True, True]
    assert {base.seconds_per_step for base in done.values()} == {None}


def test_a_base_that_cannot_be_has_its_bytes_alone() -> None:
    """Products in fp32 have no use for weights in 16 bits."""
    config = config_of(model={"name": "x", "fused": "on", "base": "nf4", "compute_dtype": "fp32"})
    ground = ground_of(config, None)
    computation = ground.computation(config)
    sizes = ground.sized(config, computation)
    found = bases_of(config, ground, sizes, None, {}, base="nf4", compute="fp32")
    assert found["bf16"] == Base(sizes.shape.linear_bytes("bf16", "fp32"), None, None, None, None, None)
    assert found["int8"].peak_bytes is not None and found["int8"].fits is None  # there is no card


def test_what_may_be_in_host_memory_is_that_of_each_base() -> None:
    """Products in e4m3 leave less time to hide a copy: those of another base than the run's are counted by its own."""
    training = {"per_device_train_batch_size": 1, "vram": "13GiB", "host_memory": "64GiB"}
    data = {"max_length": 8192}
    card, peaks = card_named("H200"), []
    rates = rates_of(card)
    assert rates is not None and rates.hidden_from("both") > 1.1 * rates.hidden_from("none")
    for base in ("nf4", "fp8"):
        config = config_of(model={"name": "x", "base": base}, training=training, data=data)
        ground = replace(ground_of(config, card), rates=rates)
        computation = ground.computation(config)
        sizes = ground.sized(config, computation)
        assert sizes.step is not None and sizes.step.hidden == rates.hidden_from(computation.products)
        pace = Pace.of(config, rates, [DENSE])
        peaks.append(bases_of(config, ground, sizes, pace, {}, base=base, compute="bf16"))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("adapter", "impossible"), [({"init_lora_weights": "loftq"}, {"bf16"}), ({"use_dora": True}, {"int8"})], ids=str
)
def test_a_base_that_the_adapter_cannot_begin_over_has_no_step(adapter: dict[str, Any], impossible: set[str]) -> None:
    model = {"name": "x", "base": "nf4", "fused": "auto"}
    config = config_of(model=model, adapter=adapter)
    ground = replace(ground_of(config, card_named("H200")), layer=None)
    computation = ground.computation(config)
    sizes = ground.sized(config, computation)
    found = bases_of(config, ground, sizes, None, {}, base="nf4", compute=computation.compute)
    assert {name for name, base in found.items() if base.peak_bytes is None} == impossible
    assert all(found[name].fits is None and found[name].bytes > 0 for name in impossible)


AUTO = {"name": "x", "base": "auto"}


@pytest.mark.parametrize(
    ("name", "sections", "base", "reason"),
    [
        ("H200", {}, "fp8", "the card multiplies in fp8, and a step fits"),
        ("4090", {"training": {"per_device_train_batch_size": 1}}, "fp8", "a step fits"),
        ("H200", {"training": {"vram": "12GiB"}}, "nf4", " more than it may fill"),
        ("A100-80", {}, "nf4", "the card has no fp8 units"),
        ("H200", {"model": {**AUTO, "fused": "off"}}, "nf4", "of fused steps"),
        ("H200", {"model": {**AUTO, "fp8_products": "none"}}, "nf4", "model.fp8_products is none"),
        ("H200", {"model": {**AUTO, "fp8_products": "backward"}}, "fp8", "the card multiplies in fp8, and a step fits"),
        ("H200", {"model": {**AUTO, "compute_dtype": "fp32"}}, "nf4", "model.compute_dtype is fp32"),
        ("H200", {"model": {**AUTO, "base": "nf4"}}, "nf4", None),
        (None, {}, "auto", "for a card that is here or named"),
    ],
    ids=str,
)
def test_auto_is_fp8_where_the_card_multiplies_in_it_and_a_step_fits(
    name: str | None, sections: dict[str, Any], base: str, reason: str | None
) -> None:
    config = config_of(**{"model": AUTO, **sections})
    ground = ground_of(config, None if name is None else card_named(name))
    if config.model.fused == "off":
        ground = replace(ground, layer=None)
    chosen, why = with_base(config, ground)
    assert chosen.model.base == base and (reason in (why or "") if reason else why is None), why
    assert chosen == config or chosen.model.model_copy(update={"base": "auto"}) == config.model
    computation = ground.computation(chosen)
    assert computation.base == ("fp8" if base == "fp8" else "nf4")
    if base == "fp8":
        assert computation.products == config.model.fp8_products.replace("auto", "both")
        assert ground.sized(chosen, computation).peak <= (ground.budget or 0)
        assert with_base(config, replace(ground, before=Choices(True, "bf16"))) == (config, None), "it goes on"
        ground.resolved.quantization = {"load_in_4bit": True}  # pyright: ignore[reportAttributeAccessIssue]
        assert with_base(config, ground) == (config, None)


def test_what_would_keep_fp8_is_said_with_what_is_missing() -> None:
    """And planned: with it `auto` is fp8."""

    def chosen(**training: Any) -> tuple[str, str]:
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, **training}
        config = config_of(model=AUTO, training=sizes)
        config, why = with_base(config, ground_of(config, card_named("4090")))
        return config.model.base, why or ""

    assert chosen(vram="19.5GiB")[0] == "nf4" and "would" not in chosen(vram="10GiB")[1]
    why = chosen(vram="19.5GiB")[1]
    missing = re.search(r"a step needs (\S+) GiB, (\S+) (GiB|MiB) more than it may fill; with (\S+): (\S+) \(", why)
    assert missing, why
    needed, more, unit, name, value = missing.groups()
    assert float(needed) - 19.5 == pytest.approx(float(more) / (1 if unit == "GiB" else 1024), abs=0.01)
    assert chosen(vram="19.5GiB", **{name.split(".")[1]: value})[0] == "fp8"


def test_products_that_are_not_in_fp8_are_named() -> None:
    """Where the rows of `down` do not begin at multiples of 16 bytes; and where no group's do."""
    config = config_of(model=AUTO)
    ground = ground_of(config, card_named("H200"))
    assert ground.layer is not None

    def narrower(projection: Projection) -> Projection:
        rows, columns = projection.weight.shape
        adapters = tuple(replace(lora, a=lora.a.detach()[:, :-8].requires_grad_()) for lora in projection.adapters)
        return replace(projection, weight=DenseWeight(torch.empty(rows, columns - 8, device="meta")), adapters=adapters)

    down = replace(ground.layer, down=narrower(ground.layer.down))
    chosen, why = with_base(config, replace(ground, layer=down))
    assert chosen.model.base == "fp8"
    assert why == (
        "the card multiplies in fp8, and a step fits; 1 of the 4 groups of products in each layer are not in fp8: rows "
        "of 14328 weights are no multiple of 16 (down)"
    )
    chosen, why = with_base(config, replace(ground, layer=ground.layer.mapped(narrower)))
    assert (chosen.model.base, why) == ("nf4", "rows of 4088 weights are no multiple of 16 (q, k, v)")


def test_a_run_says_why_it_is_over_its_base_and_goes_on_over_it(
    steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "auto"})
    for card, base, reason in (("H200", "fp8", "multiplies in fp8"), ("A100-80", "nf4", "no fp8 units")):
        plan = plan_run(config, card=card_named(card))
        figures = plan.as_dict()
        assert figures["base"] == base == plan.config.model.base
        assert reason in figures["base_reason"]
        assert figures["memory_bytes"]["total"] == figures["bases"][base]["peak_bytes"]
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        said = " ".join(steep("plan", file, "--card", card).out.replace("│", " ").split())
        assert f"frozen in {base} (" in said and reason in said, said
    grown = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "auto", "new_tokens": {"auto": 16}})
    assert plan_run(grown, card=card_named("H200")).base == "fp8"  # worked out for the tables as they have become
    alone = plan_run(config).as_dict()
    assert alone["base"] == "nf4" and "for a card that is here or named" in alone["base_reason"]


def test_the_table(steep: Steep, llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"base": "nf4"})
    figures = plan_run(config, card=card_named("L4")).as_dict()
    assert figures["bases"]["nf4"]["seconds_per_step"] == figures["duration"]["seconds_per_step"]
    figures["bases"]["bf16"] |= {"fits": False, "seconds_per_step": None}
    figures["bases"]["int8"] |= {"peak_bytes": None, "seconds_per_step": None}
    rows = [list(map(str, column.cells)) for column in bases_table(figures).columns]
    by_name = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    assert list(by_name) == ["nf4", "int8", "fp8", "16 bits"]
    assert by_name["nf4"][2].endswith(" s") and by_name["nf4"][3].endswith("%")
    assert by_name["int8"][1:3] == ("–", "–")
    assert by_name["16 bits"][1].endswith(", does not fit") and by_name["16 bits"][2:] == ("–", "–")
    assert "rows a forward" not in " ".join(rows[2])
    figures["bases"]["nf4"]["rows"] *= 2  # a plan may cut a step otherwise over another base
    in_words = list(map(str, bases_table(figures).columns[2].cells))
    assert in_words[0].endswith(f", {figures['bases']['nf4']['rows']} rows a forward") and in_words[1] == "–"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    said = steep("plan", file, "--card", "L4")
    shown = " ".join(said.out.replace("│", " ").split())
    assert said.code == 0 and all(part in shown for part in ("bases", "memory of a step", "a step")), said
