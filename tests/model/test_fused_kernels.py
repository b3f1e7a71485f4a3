"""Whole models over the kernels, in Triton's interpreter, against themselves over plain torch: what the kernels give
each other, at every level, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction

from steep.model.install import fused_of, install
from steep.model.load import load
from steep.ops.backend import interpreted
from tests.model.test_fused import EXACT, adapted, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import FAMILIES, save_tiny, tiny_model

LENGTHS = ([2, 2], [1, 3])  # the interpreter is slow
EVERYWHERE = ("rms_norm", "lora_fill", "copy_rows", "swiglu", "cross_entropy")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules of steep.kernels whose kernels ran."""
    modules: set[str] = set()
    run = InterpretedFunction.run

    def spy(self: Any, *given: Any, **options: Any) -> Any:
        modules.add(self.fn.__module__.rpartition(".")[2])
        return run(self, *given, **options)

    monkeypatch.setattr(InterpretedFunction, "run", spy)
    return modules


def assert_kernels_agree(model: Any, levels: list[int]) -> None:
    batch, fused = packed(LENGTHS), fused_of(model)
    fused.levels = levels
    loss, gradients = loss_and_gradients(model, batch)
    with interpreted():
        found_loss, found = loss_and_gradients(model, batch)
    assert fused.calls == 2
    assert abs(found_loss - loss) <= EXACT * loss
    for name, gradient in gradients.items():
        assert error(found[name], gradient) <= EXACT, f"{name}: {error(found[name], gradient):.2e}"
        assert error(found[name] / 2, gradient) > EXACT, f"{name}: a halved gradient passes"


# Every family, and every level with norms of either kind; test_fused.py has each with each, over plain torch.
@pytest.mark.parametrize(
    ("family", "levels"),
    [(family, [0, 3]) for family in FAMILIES if family != "qwen2"]
    + [(f, [2, 1]) for f in ("llama", "qwen2", "gemma3")],
)
def test_every_family(family: str, levels: list[int], launched: set[str]) -> None:
    assert_kernels_agree(install(adapted(tiny_model(family))), levels)
    assert launched == {*EVERYWHERE, "qk_norm" if family in ("qwen3", "gemma3") else "rope"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_in_tiles(family: str, launched: set[str]) -> None:
    """Each kernel on parts of wider buffers' rows."""
    model = install(adapted(tiny_model(family)), levels=0, tile=5)
    assert_kernels_agree(model, [3, 0])
    assert launched == {*EVERYWHERE, "qk_norm" if family == "qwen3" else "rope"}


def test_a_base_in_4_bit(tmp_path: Path, launched: set[str]) -> None:
    model, _ = load(str(save_tiny("llama", tmp_path, hidden_size=128)), base="nf4", compute_dtype="fp32")
    assert_kernels_agree(install(adapted(model)), [0, 3])
    assert launched == {*EVERYWHERE, "rope", "nf4"}
