"""Which attention backend a layer gets, and how often torch is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steep.model import backends
from steep.model.choices import choices_of, take_over
from steep.model.install import fused_of, install
from tests.model.test_fused import adapted, packed
from tests.tiny import SLIDING_WINDOW, tiny_model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for name in ("usable_backends", "table_backend"):
        own = getattr(backends, name)

        def spy(*given: Any, name: str = name, own: Any = own, **options: Any) -> Any:
            found.append(name)
            return own(*given, **options)

        monkeypatch.setattr(backends, name, spy)
    return found


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # one kind of layer, two
def test_torch_is_asked_once_for_a_kind_of_layer(family: str, trained: bool, asked: list[str]) -> None:
    model = install(adapted(tiny_model(family)))
    if trained:
        model(**packed(), use_cache=False).loss.backward()
    model.eval()
    with torch.no_grad():
        model(**packed(), use_cache=False)
        before = list(asked)
        for _ in range(2):
            model(**packed(), use_cache=False)
    assert before and asked == before


def test_what_training_chooses_later_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not where the dtype of an evaluation forbids it."""
    usable = {torch.float32: ["reference"], torch.bfloat16: ["flash", "reference"]}
    monkeypatch.setattr(backends, "usable_backends", lambda device, dtype, *_: usable[dtype])
    monkeypatch.setattr(backends, "table_backend", lambda *_, deterministic: "reference")
    model = install(adapted(tiny_model("llama")))
    layer = fused_of(model).layer(model.get_base_model().model.layers[0])
    packing, choices = backends.Packing.from_lengths([5, 3], "cpu"), fused_of(model).backends
    for chosen, found in ((None, ["reference"] * 2), ("flash", ["flash", "reference"]), ("sdpa", ["reference"] * 2)):
        choices.chosen = {} if chosen is None else {"documents of uneven lengths": chosen}
        dtypes = torch.bfloat16, torch.float32
        assert [choices.backend(layer.attention, packing, dtype, trains=False) for dtype in dtypes] == found


def test_training_in_another_dtype_does_without_what_that_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was chosen first stays, for what it was chosen for."""
    usable = {torch.float32: ["reference"], torch.bfloat16: ["flash", "reference"]}
    monkeypatch.setattr(backends, "usable_backends", lambda device, dtype, *_: usable[dtype])
    monkeypatch.setattr(backends, "table_backend", lambda device, dtype, *_, deterministic: usable[dtype][0])
    model = install(adapted(tiny_model("llama")))
    layer = fused_of(model).layer(model.get_base_model().model.layers[0])
    packing, choices = backends.Packing.from_lengths([5, 3], "cpu"), fused_of(model).backends
    dtypes = torch.bfloat16, torch.float32, torch.bfloat16
    found = [choices.backend(layer.attention, packing, dtype, trains=True) for dtype in dtypes]
    assert found == ["flash", "reference", "flash"]
    assert choices.chosen == {"documents of uneven lengths": "flash"}


@pytest.mark.parametrize("longest", [SLIDING_WINDOW, SLIDING_WINDOW + 1])
def test_a_window_that_no_document_outgrows_is_none(longest: int) -> None:
    """So both kinds of a model's layers take one backend, which may be one without windows."""
    model = install(adapted(tiny_model("gemma3")))
    model(**packed([[longest, 5]]), use_cache=False).loss.backward()
    plain = "documents of uneven lengths"
    windows = [f"{plain}, a window of {SLIDING_WINDOW}"] if longest > SLIDING_WINDOW else []
    assert sorted(fused_of(model).backends.chosen) == [plain, *windows]


def test_what_was_chosen_here_goes_before_what_a_checkpoint_holds() -> None:
    begun, model = (install(adapted(tiny_model("llama"))) for _ in range(2))
    fused_of(begun).backends.chosen = {"one": "flash", "another": "flash"}
    fused_of(model).backends.chosen = {"one": "sdpa"}
    take_over(model, choices_of(begun))
    assert fused_of(model).backends.chosen == {"one": "sdpa", "another": "flash"}
