"""Which products of a run are in fp8: by what was asked, the base, the card, and the steps before."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.errors import UserError
from steep.model.choices import Choices
from steep.model.install import install
from steep.model.layer import Layer
from steep.model.machine import Card
from steep.model.read_layer import read_layer
from steep.model.step_bytes import work_bytes
from steep.model.unwrap import unwrap
from steep.ops.fp8_groups import Fp8BackwardGroup
from steep.ops.fp8_linear import Fp8Group
from steep.ops.lora import LoraGroup
from steep.plan import plan_run
from steep.planning import computation
from steep.planning.fp8_choice import dequantised, in_fp8, kept_in_16_bits, resolve_fp8_products
from steep.planning.fused_memory import FusedStep
from steep.planning.fusing import fused_step
from tests.fp8_checkpoints import compressed, publish
from tests.model.test_fused import adapted
from tests.model.test_recompute import kept_bytes
from tests.test_run import run_file
from tests.tiny import tiny_model


@cache
def layer_of(**shape: Any) -> Layer:
    """A layer on the meta device."""
    wide: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = install(adapted(tiny_model("llama", **{**wide, "head_dim": 128, **shape})))
    layer = unwrap(model.to("meta")).model.layers[0]
    return read_layer(layer, layer.traits)


LAYER = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEAR = [f"model.layers.{number}.{name}" for number in range(3) for name in LAYER]


def stored(layer: Layer, *, blocks: bool = False) -> Layer:
    """The layer with all weights in e4m3."""
    (only,) = in_fp8(layer, LINEAR, (), blocks=blocks)
    return only


ADA, AMPERE = (Card("fake", (8, capability), 2**34, 2**34) for capability in (9, 6))


def chosen(
    asked: str = "auto",
    base: str = "fp8",
    compute: str = "bf16",
    before: str | None = None,
    *,
    fused: bool = True,
    card: Card | None = ADA,
) -> str:
    config = run_file(Path("model"), Path("text"), Path("run"), model={"fp8_products": asked})
    kept: Any = None if before is None else Choices(True, "bf16", fp8_products=before)  # pyright: ignore[reportArgumentType]
    layers = [stored(layer_of())] if fused else None
    return resolve_fp8_products(config, base, compute, kept, layers=layers, card=card)


def test_auto_is_both_where_they_can_be() -> None:
    assert chosen() == "both"
    assert chosen(card=None) == "none"  # plain torch would compute the same, and slower
    assert chosen(base="nf4") == chosen(compute="fp32") == chosen(fused=False) == "none"
    assert chosen(card=AMPERE) == "none"


def test_what_is_asked_for_is_done_or_refused() -> None:
    assert [chosen(asked, card=None) for asked in ("both", "backward", "none")] == ["both", "backward", "none"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": "nf4"}, "model.base is nf4"),
        ({"fused": False}, "not fused"),
        ({"compute": "fp32"}, "compute_dtype is fp32"),
    ]
    for faulty, reason in cases:
        with pytest.raises(UserError, match=rf"model\.fp8_products: .*{reason}"):
            chosen("both", **faulty)
        assert chosen("none", **faulty) == "none"
    with pytest.raises(UserError, match="no fp8 units"):
        chosen("backward", card=AMPERE)


def test_a_run_goes_on_as_it_began() -> None:
    assert chosen(before="none") == "none" and chosen(before="backward", card=None) == "backward"
    assert chosen("both", before="none") == "both"  # where --allow let it be
    assert chosen("none", before="both", card=AMPERE) == "none"
    with pytest.raises(UserError, match=r"--resume: .*no fp8 units.*--allow model\.fp8_products"):
        chosen(before="both", card=AMPERE)


def test_shapes_without_products_in_fp8() -> None:
    config = run_file(Path("model"), Path("text"), Path("run"), model={"fp8_products": "both"})
    uneven = [stored(layer_of(hidden_size=72, head_dim=36, intermediate_size=520))]
    with pytest.raises(UserError, match=r"model\.fp8_products: .*rows of 72 weights are no multiple of 16"):
        resolve_fp8_products(config, "fp8", "bf16", None, layers=uneven, card=ADA)
    config.model.fp8_products = "auto"
    assert resolve_fp8_products(config, "fp8", "bf16", None, layers=uneven, card=ADA) == "none"
    assert dequantised([layer_of()], "bf16") and not dequantised([stored(layer_of(), blocks=True)], "bf16")
    heads = layer_of(num_attention_heads=8, num_key_value_heads=8, head_dim=80)
    (line,) = dequantised([stored(heads, blocks=True)], "bf16")
    assert line.startswith(
        "1 of the 4 groups of products in each layer are not in fp8: blocks of 128 x 128 run across heads"
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_a_layer_on_paper(blocks: bool) -> None:
    """What it keeps are rows of the same widths or less, and its work has no weight in 16 bit."""
    read, bf16 = layer_of(), torch.bfloat16
    paper = stored(read, blocks=blocks)
    assert all(type(group) is Fp8Group for group in paper.groups(bf16, "both"))
    assert all(type(group) is Fp8BackwardGroup for group in paper.groups(bf16, "backward"))
    plain = kept_bytes(read, bf16, bf16)
    assert kept_bytes(paper, bf16, bf16, "none") == plain
    assert all(fp8 <= other for fp8, other in zip(kept_bytes(paper, bf16, bf16, "both"), plain, strict=True))
    work = {products: [work_bytes(paper, bf16, bf16, level, 64, products) for level in range(4)]
            for products in ("none", "both")}  # fmt: skip
    assert work["none"] == [work_bytes(read, bf16, bf16, level, 64) for level in range(4)]
    assert all(fp8 < other for fp8, other in zip(work["both"], work["none"], strict=True))  # short rows: weights count
    # With forward products in bf16, gate and up are computed again beside one's weight and outputs in fp32.
    _, _, gate_up, _ = paper.groups(bf16, "backward")
    there = gate_up.buffer_bytes + 64 * (gate_up.input_width + gate_up.gradient_width) * 2 + 512 * (256 * 2 + 64 * 4)
    by_level = [work_bytes(paper, bf16, bf16, level, 64, "backward") for level in range(4)]
    assert all(planned > there for planned in by_level[1:]) and work["both"][1] < by_level[1]


# ---- layers that a published checkpoint has in 16 bits


def test_layers_are_planned_as_they_are_stored() -> None:
    kept = {"model.layers.1.mlp.down_proj", *(name for name in LINEAR if name.startswith("model.layers.2."))}
    first, second, third = in_fp8(layer_of(), LINEAR, kept, blocks=False)
    bf16 = torch.bfloat16
    kinds = [[type(group) for group in layer.groups(bf16, "both")] for layer in (first, second, third)]
    assert kinds == [[Fp8Group] * 4, [Fp8Group] * 3 + [LoraGroup], [LoraGroup] * 4]
    config = run_file(Path("model"), Path("text"), Path("run"), model={"fp8_products": "auto"})
    for layers, products in (([first], "both"), ([third, first], "both"), ([third], "none")):
        assert resolve_fp8_products(config, "fp8", "bf16", None, layers=layers, card=ADA) == products
    assert dequantised([first, second], "bf16") == [
        "1 of the 4 groups of products in some layers are not in fp8: no weight is in e4m3 (down)"
    ]
    assert work_bytes(second, bf16, bf16, 0, 64, "both") > work_bytes(first, bf16, bf16, 0, 64, "both")


def test_which_layers_a_published_checkpoint_keeps(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by its tensors: patterns and prefixes of the config's lists differ from writer to writer."""
    given = {"base": "auto", "fused": "on", "compute_dtype": "bf16", "fp8_products": "both"}
    steps: list[FusedStep] = []
    monkeypatch.setattr(
        computation, "fused_step", lambda *given, **how: steps.append(fused_step(*given, **how)) or steps[-1]
    )
    planned = {}
    for name in ("whole", "published"):
        folder = llama_folder if name == "whole" else publish(llama_folder, tmp_path / name, compressed())
        model = {**given, "base": "fp8"} if name == "whole" else given
        planned[name] = plan_run(run_file(folder, korean_corpus, tmp_path / f"run-{name}", model=model))
    layers = steps[-1].layers  # which no other base is tried for
    assert len(steps[0].layers) == 1 and len(layers) == 2
    assert [type(layer.groups(torch.bfloat16, "both").down) for layer in layers] == [Fp8Group, LoraGroup]
    shape, whole = planned["published"].shape, planned["whole"]
    assert shape.linear_kept == 64 * 128  # of IGNORED
    item = "frozen linear weights"
    assert planned["published"].memory[item] == whole.memory[item] + shape.linear_kept
    assert planned["published"].as_dict()["bases"]["fp8"]["bytes"] == shape.linear + shape.linear_kept
    assert any(
        "1 of the 4 groups of products in some layers are not in fp8" in told for told in planned["published"].warnings
    )
    elsewhere = replace(planned["published"].resolved, name="nobody/nothing")
    assert kept_in_16_bits(elsewhere, LINEAR) == set() == kept_in_16_bits(whole.resolved, LINEAR)
