from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from steep.errors import UserError
from steep.evaluation.adapters import base_model
from steep.evaluation.perplexity import evaluate
from steep.evaluation.score import DomainScore
from tests.evaluation.oracle import ignore_pefts_warning, oracle, random_documents, with_adapters
from tests.tiny import tiny_model

pytestmark = ignore_pefts_warning

DOCUMENTS = random_documents(2, 33, 70, 20)


def base_and_trained(model: nn.Module) -> tuple[list[DomainScore], list[DomainScore]]:
    with base_model(model):
        base = evaluate(model, {"d": DOCUMENTS}, max_length=32)
    return base, evaluate(model, {"d": DOCUMENTS}, max_length=32, step=5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_base_is_the_untouched_model(family: str, tied: bool) -> None:
    model = with_adapters(tied, family)
    untouched = evaluate(tiny_model(family, tied=tied), {"d": DOCUMENTS}, max_length=32)
    base, trained = base_and_trained(model)
    assert base == untouched
    assert trained[0].step == 5
    assert trained[0].loss == pytest.approx(oracle(model, DOCUMENTS, 32, 16)[0], rel=2e-6)
    assert abs(trained[0].loss - base[0].loss) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_requires_grad_comes_back(tied: bool) -> None:
    """Also of parts of the active adapter that were frozen, which `disable_adapter()` alone unfreezes."""
    model = with_adapters(tied)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "layers.0" in name:
            parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    assert len(set(flags.values())) == 2
    bare = copy.deepcopy(model)
    with bare.disable_adapter():
        pass
    assert {name: parameter.requires_grad for name, parameter in bare.named_parameters()} != flags

    base_and_trained(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    with pytest.raises(KeyboardInterrupt), base_model(model):
        raise KeyboardInterrupt
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_without_adapters_there_is_no_base() -> None:
    with pytest.raises(UserError, match="has no adapters"):
        base_and_trained(tiny_model("llama"))
