"""Which products of a run are in fp8: by what was asked, the base, the card, and the steps before."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from steep import fp8_choice
from steep.errors import UserError
from steep.fp8_choice import dequantised, in_fp8, resolve_fp8_products
from steep.model.choices import Choices
from steep.model.install import install
from steep.model.layer import Layer
from steep.model.read_layer import read_layer
from steep.model.step_bytes import kept_bytes, work_bytes
from steep.model.unwrap import unwrap
from steep.ops.fp8_groups import Fp8BackwardGroup
from steep.ops.fp8_linear import Fp8Group
from tests.model.test_fused import adapted
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


def chosen(
    asked: str = "auto",
    base: str = "fp8",
    compute: str = "bf16",
    before: str | None = None,
    *,
    fused: bool = True,
    on_card: bool = True,
) -> str:
    config = run_file(Path("model"), Path("text"), Path("run"), model={"fp8_products": asked})
    kept: Any = None if before is None else Choices(True, "bf16", fp8_products=before)  # pyright: ignore[reportArgumentType]
    layer = in_fp8(layer_of(), blocks=False) if fused else None
    return resolve_fp8_products(config, base, compute, kept, layer=layer, on_card=on_card)


def card(monkeypatch: pytest.MonkeyPatch, *, lacks: bool) -> None:
    monkeypatch.setattr(fp8_choice, "lacks_fp8_units", lambda: lacks)


def test_auto_is_both_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == "both"
    assert chosen(on_card=False) == "none"  # plain torch would compute the same, and slower
    assert chosen(base="nf4") == chosen(compute="fp32") == chosen(fused=False) == "none"
    card(monkeypatch, lacks=True)
    assert chosen() == "none"


def test_what_is_asked_for_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [chosen(asked, on_card=False) for asked in ("both", "backward", "none")] == ["both", "backward", "none"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": "nf4"}, "model.base is nf4"),
        ({"fused": False}, "not fused"),
        ({"compute": "fp32"}, "compute_dtype is fp32"),
    ]
    for faulty, reason in cases:
        with pytest.raises(UserError, match=rf"model\.fp8_products: .*{reason}"):
            chosen("both", **faulty)
        assert chosen("none", **faulty) == "none"
    card(monkeypatch, lacks=True)
    with pytest.raises(UserError, match="no fp8 units"):
        chosen("backward")


def test_a_run_goes_on_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(before="none") == "none" and chosen(before="backward", on_card=False) == "backward"
    assert chosen("both", before="none") == "both"  # where --allow let it be
    card(monkeypatch, lacks=True)
    assert chosen("none", before="both") == "none"
    with pytest.raises(UserError, match=r"--resume: .*no fp8 units.*--allow model\.fp8_products"):
        chosen(before="both")


def test_shapes_without_products_in_fp8() -> None:
    config = run_file(Path("model"), Path("text"), Path("run"), model={"fp8_products": "both"})
    uneven = in_fp8(layer_of(hidden_size=72, head_dim=36, intermediate_size=520), blocks=False)
    with pytest.raises(UserError, match=r"model\.fp8_products: .*rows of 72 weights are no multiple of 16"):
        resolve_fp8_products(config, "fp8", "bf16", None, layer=uneven, on_card=True)
    config.model.fp8_products = "auto"
    assert resolve_fp8_products(config, "fp8", "bf16", None, layer=uneven, on_card=True) == "none"
    assert dequantised(layer_of(), "bf16") and not dequantised(in_fp8(layer_of(), blocks=True), "bf16")
    (line,) = dequantised(
        in_fp8(layer_of(num_attention_heads=8, num_key_value_heads=8, head_dim=80), blocks=True), "bf16"
    )
    assert line.startswith(
        "1 of the 4 groups of products in each layer are not in fp8: blocks of 128 x 128 run across heads"
    )


@pytest.mark.parametrize("blocks", [False, True])
def test_a_layer_on_paper(blocks: bool) -> None:
    """What it keeps are rows of the same widths or less, and its work has no weight in 16 bit."""
    read, bf16 = layer_of(), torch.bfloat16
    stored = in_fp8(read, blocks=blocks)
    assert all(type(group) is Fp8Group for group in stored.groups(bf16, "both"))
    assert all(type(group) is Fp8BackwardGroup for group in stored.groups(bf16, "backward"))
    plain = kept_bytes(read, bf16, bf16)
    assert kept_bytes(stored, bf16, bf16, "none") == plain
    assert all(fp8 <= other for fp8, other in zip(kept_bytes(stored, bf16, bf16, "both"), plain, strict=True))
    work = {products: [work_bytes(stored, bf16, bf16, level, 64, products) for level in range(4)]
            for products in ("none", "both")}  # fmt: skip
    assert work["none"] == [work_bytes(read, bf16, bf16, level, 64) for level in range(4)]
    assert all(fp8 < other for fp8, other in zip(work["both"], work["none"], strict=True))  # short rows: weights count
    # With forward products in bf16, gate and up are computed again beside one's weight and outputs in fp32.
    _, _, gate_up, _ = stored.groups(bf16, "backward")
    there = gate_up.buffer_bytes + 64 * (gate_up.input_width + gate_up.gradient_width) * 2 + 512 * (256 * 2 + 64 * 4)
    by_level = [work_bytes(stored, bf16, bf16, level, 64, "backward") for level in range(4)]
    assert all(planned > there for planned in by_level[1:]) and work["both"][1] < by_level[1]
