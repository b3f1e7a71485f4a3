"""What attention's backward takes where it is not a kernel's that keeps nothing of its scores."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from steep.model.attention_bytes import BY_KERNEL, AttentionForm, in_heads
from steep.model.step_bytes import work_bytes
from steep.ops.attention import attention_backward, attention_forward
from steep.ops.packing import Packing
from steep.planning.cards import card_named
from tests.allocations import allocations
from tests.model.test_recompute import layer_of_8b
from tests.planning.test_fitting import ground_of
from tests.planning.test_micro_batch import asking, in_forwards, smallest_peak

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OLD, NEW = (7, 5), (9, 0)


@pytest.mark.parametrize("documents", [1, 2, 4])
def test_scores_are_of_one_document_at_a_time(documents: int) -> None:
    length, heads, noise = 512, 8, torch.Generator().manual_seed(0)
    sizes = (heads, 4, 4, heads)
    q, k, v, dout = (torch.randn(documents * length, each, 64, generator=noise).half() for each in sizes)
    packing = Packing.from_lengths([length] * documents, "cpu")
    how = {"scale": 0.125, "window": None, "softcap": 50.0, "backend": "reference"}
    out, saved = attention_forward(q, k, v, packing, **how)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile, torch.profiler.record_function("it"):
        attention_backward(dout, q, k, v, out, saved, packing, **how)
    measured = max(accumulate(allocations(profile, "it")))
    form = AttentionForm(length, "scores")
    counted = form.beyond_kernel(layer_of_8b(), documents * length, 2, heads)
    assert 0.7 * counted < measured < counted


def test_by_what_the_card_computes_it() -> None:
    plain = layer_of_8b()
    capped = replace(plain, attention=replace(plain.attention, softcap=50.0))
    for layer, without in ((plain, "mask"), (capped, "scores")):
        for dtype, capability in ((FP16, OLD), (FP32, NEW), (FP32, None)):
            assert AttentionForm.of(layer, dtype, 512, capability, 132) == AttentionForm(512, without)  # pyright: ignore[reportArgumentType]
        for capability in (NEW, None):
            assert AttentionForm.of(layer, BF16, 512, capability, None) == AttentionForm(512)
    assert AttentionForm.of(plain, BF16, 512, NEW, 132) == AttentionForm(512, shares=132)
    assert AttentionForm.of(capped, BF16, 512, NEW, 132) == AttentionForm(512)  # for the compiled one alone
    assert AttentionForm.here(plain, FP32, 512, torch.device("cpu")) == AttentionForm(512)


def test_a_mask_is_that_of_a_row_longer_than_the_window() -> None:
    layer = layer_of_8b()
    layer = replace(layer, attention=replace(layer.attention, window=1024))
    form = AttentionForm(2048, "mask")
    assert form.beyond_kernel(layer, 4 * 2048, 2, 32) == 3 * 2048**2
    assert form.beyond_kernel(layer, 4 * 2048, 4, 8) == 5 * 2048**2
    assert form._replace(row=1024).beyond_kernel(layer, 8192, 2, 32) == 0
    assert form.beyond_kernel(layer_of_8b(), 8192, 2, 32) == BY_KERNEL.beyond_kernel(layer, 8192, 2, 32) == 0


def test_deterministic_sums_of_dq() -> None:
    """As flash has it: multiprocessors, by the documents and heads of a launch, rounded up."""
    form = AttentionForm(2048, shares=132)
    assert [form.sums(rows * 2048, 32) for rows in (1, 2, 4, 5)] == [5, 3, 2, 1]
    layer, tokens = layer_of_8b(), 65_536  # two key and value heads at a time, with four query heads each
    more = in_heads(layer, tokens, 2, AttentionForm(tokens, shares=132)) - in_heads(layer, tokens, 2, BY_KERNEL)
    assert more == (17 - 1) * 4 * tokens * 8 * 128
    tile = "none", 4096, "gpu"
    whole = work_bytes(layer, BF16, BF16, 3, tokens, *tile, AttentionForm(tokens, shares=132))
    assert whole - work_bytes(layer, BF16, BF16, 3, tokens, *tile) == more
    assert BY_KERNEL.sums(10, 1) == 1


def test_a_plan_counts_them() -> None:
    """65,536 tokens of an 8B in one document: 4 GiB on an H200, fewer on a card with fewer multiprocessors."""
    lean = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    usual = smallest_peak("llama-3-8b", 1, 65_536, **lean)
    assert smallest_peak("llama-3-8b", 1, 65_536, **lean, deterministic=True) == pytest.approx(usual + 4.0, abs=0.3)
    config = asking(1, 65_536, training={"deterministic": True, "vram": "40GiB"}, model={"compute_dtype": "bf16"})
    config = in_forwards(config, 1, 1)
    shares = [
        ground.sized(config, ground.computation(config)).step.form.shares  # pyright: ignore[reportOptionalMemberAccess]
        for ground in (ground_of(config, card) for card in (card_named("L4"), card_named("H200"), None))
    ]
    assert shares == [58, 132, 188]
