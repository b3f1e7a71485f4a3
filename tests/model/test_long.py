"""Loss and every gradient at 65,536 tokens, against the library's forward in fp32: one document, and many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steep.model.install import install, uninstall
from steep.model.load import load
from tests.model.test_fused import adapted, loss_and_gradients, packed
from tests.model.test_fused_gpu import SHAPE, assert_as_exact, truth_of
from tests.tiny import save_tiny

pytestmark = pytest.mark.gpu

TOKENS = 2**16


def many_lengths() -> list[int]:
    """Of documents that fill TOKENS: from 2 tokens to 4,096."""
    generator, lengths = torch.Generator().manual_seed(0), list[int]()
    while (left := TOKENS - sum(lengths)) > 2 * 4096:
        lengths.append(int(torch.randint(2, 4096, (), generator=generator)))
    return [*lengths, left // 2, left - left // 2]


def by_document(
    model: Any, batch: dict[str, torch.Tensor], lengths: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the batch, a document at a time."""
    total, targets = torch.zeros(()), int((batch["labels"] != -100).sum())
    sums: dict[str, torch.Tensor] = {}
    parts = (batch[name][0].split(lengths) for name in ("input_ids", "labels"))
    for tokens, labels in zip(*parts, strict=True):
        loss, gradients = loss_and_gradients(model, {"input_ids": tokens[None], "labels": labels[None]})
        share = int((labels != -100).sum()) / targets
        total = total + share * loss.cpu()
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0) + share * gradient.float()
    return total, sums


@pytest.mark.parametrize("documents", ["one", "many"])
@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_on_a_card(base: str, documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over fp8 with products in 16 bit, so that the library has the same arithmetic."""
    # In fp32 torch has no attention for grouped heads but the one that holds all scores: 128 GiB of them.
    monkeypatch.setattr("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False)
    folder = save_tiny("llama", tmp_path, **{**SHAPE, "max_position_embeddings": TOKENS})
    model, _ = load(str(folder), base=base, compute_dtype="bf16")
    model = adapted(model, r=64, trained_dtype="bf16")
    lengths = [TOKENS] if documents == "one" else many_lengths()
    batch = {name: tensor.cuda() for name, tensor in packed([lengths]).items()}
    loss, truth = by_document(truth_of(model), batch, lengths)
    _, library = by_document(model, batch, lengths)
    for level, tile in ((0, None), (3, None), (3, 1024)):
        install(model, levels=level, tile=tile, fp8_products="none")
        fused_loss, fused = loss_and_gradients(model, batch)
        assert abs(fused_loss.cpu() - loss) < 1e-3 * loss
        assert_as_exact(fused, library, truth, f"at level {level}, tile {tile}")
        uninstall(model)
