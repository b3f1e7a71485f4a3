from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.training.arguments import TrainingArguments
from steep.training.groups import kind_of, parameter_groups
from tests.tiny import tiny_model
from tests.training.helpers import adapted, arguments


@pytest.mark.parametrize("tied", [True, False])
def test_every_trained_tensor_is_in_one_group(tied: bool, tmp_path: Path) -> None:
    model = adapted("llama", tied)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    args = arguments(tmp_path, learning_rate=1e-3, embedding_learning_rate=2e-4, weight_decay=0.5)
    groups = parameter_groups(model, args, set(trained))
    assert [group["name"] for group in groups] == ["adapters_a", "adapters_b", "embeddings"]
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(trained)
    assert set(members) == {id(p) for p in trained.values()}
    assert [len(group["params"]) for group in groups] == [14, 14, 1 if tied else 2]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 2e-4]
    assert {group["weight_decay"] for group in groups} == {0.5}


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    model = adapted("qwen2", modules_to_save=[])
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "q_proj.base_layer.bias")):
            parameter.requires_grad_(True)
    decayed = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    groups = parameter_groups(model, arguments(tmp_path, weight_decay=0.1), decayed)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("adapters_a", 0.1),
        ("adapters_b", 0.1),
        ("other", 0.0),
    ]


def test_doras_lengths_do_not_decay(tmp_path: Path) -> None:
    """They start at the lengths of the base's rows, not at 0."""
    model = add_adapters(tiny_model("llama"), r=4, use_dora=True)
    decayed = [name for name, _ in model.named_parameters()]
    groups = {group["name"]: group for group in parameter_groups(model, arguments(tmp_path, weight_decay=0.1), decayed)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "adapters_a": 0.1, "adapters_b": 0.1, "embeddings": 0.1, "other": 0.0
    }  # fmt: skip
    assert len(groups["other"]["params"]) == 14  # one for each linear layer


def test_groups_of_an_optimizers_own_are_divided_further(tmp_path: Path) -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    given = [{"params": trained[:5], "rank": 4}, {"params": trained[5:]}]
    groups = parameter_groups(model, arguments(tmp_path), set(), given)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert sum(len(group["params"]) for group in groups if group.get("rank") == 4) == 5


def test_a_rate_for_embeddings_that_do_not_train_is_refused(tmp_path: Path) -> None:
    model = adapted(modules_to_save=[])
    with pytest.raises(UserError, match="embedding_learning_rate: it is set but no embedding is trained"):
        parameter_groups(model, arguments(tmp_path, embedding_learning_rate=1e-5), set())


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "big"])
def test_a_rate_that_is_none_is_refused(rate: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^embedding_learning_rate: .* is not a learning rate"):
        TrainingArguments(output_dir=str(tmp_path), embedding_learning_rate=rate)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), arguments(tmp_path), set())


def test_kinds() -> None:
    assert kind_of("x.q_proj.lora_A.default.weight", ()) == "adapters_a"
    assert kind_of("x.embed_tokens.lora_embedding_B.default", ()) == "adapters_b"
    assert kind_of("x.norm.weight", ()) == "other"
    assert kind_of("x.lm_head.weight", {"x.lm_head.weight"}) == "embeddings"
