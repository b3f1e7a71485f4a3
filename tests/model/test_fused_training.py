"""200 steps with the fused forward and without: the curves differ by less than another order of the rows makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steep.model.install import install
from tests.model.test_fused import adapted
from tests.tiny import documents, tiny_model, tiny_tokenizer

STEPS, ROWS, LENGTH = 200, 4, 48


def rows_of_text() -> torch.Tensor:
    tokenizer = tiny_tokenizer()
    tokens = [token for text in documents("ko", 400) for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)


def curve(family: str, fused: bool, order: int, trained_dtype: str) -> torch.Tensor:
    """The loss of each step."""
    torch.manual_seed(0)
    model: Any = tiny_model(family)
    if trained_dtype == "bf16":
        model = model.bfloat16()
    model = adapted(model, trained_dtype=trained_dtype)
    if fused:
        install(model, levels=1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    rows = rows_of_text()
    drawn = torch.randint(len(rows), (STEPS, ROWS), generator=torch.Generator().manual_seed(order))
    losses: list[float] = []
    for step in drawn:
        loss = model(input_ids=rows[step], labels=rows[step], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def smooth(losses: torch.Tensor) -> torch.Tensor:
    return losses.unfold(0, 20, 10).mean(1)


@pytest.mark.parametrize(("family", "trained_dtype"), [("llama", "fp32"), ("gemma3", "bf16")])
def test_the_curves_differ_by_less_than_the_order_of_rows_makes(family: str, trained_dtype: str) -> None:
    library = smooth(curve(family, False, 1, trained_dtype))
    fused = smooth(curve(family, True, 1, trained_dtype))
    other = smooth(curve(family, False, 2, trained_dtype))
    assert library[-1] < 0.6 * library[0]  # it learns
    noise = (other - library).abs().mean()
    assert (fused - library).abs().mean() < (noise / 10 if trained_dtype == "fp32" else noise)
    assert (fused[-1] - library[-1]).abs() < noise
