"""A fused model in two processes (gloo, on the CPU): under DDP, as Trainer trains it, and under FSDP.

This file is also the program that torchrun starts; what each process found comes back as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed

from steep.model.install import fused_of, install
from steep.model.unwrap import unwrap
from steep.training.trainer import Trainer
from tests.faults.command import ForkServer, torchrun
from tests.faults.runs import finished
from tests.model import test_fused
from tests.model.test_fused import EXACT, loss_and_gradients, packed
from tests.ops.closeness import error
from tests.tiny import VOCAB_SIZE, tiny_model
from tests.training.helpers import adapted, arguments, losses

STEPS, MICRO_BATCHES = 3, 2
LEVELS = [0, 3, None]


# ---- in each process


def under_ddp(trained_dtype: str, fused: bool, folder: Path) -> dict[str, Any]:
    """A few steps of two micro-batches."""
    model = adapted(trained_dtype=trained_dtype)
    if trained_dtype == "bf16":
        model = model.bfloat16()
    if fused:
        install(model)
    tokens = torch.randint(3, VOCAB_SIZE, (32, 16), generator=torch.Generator().manual_seed(0))
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": MICRO_BATCHES, "optim": "adamw_8bit"}
    trainer = Trainer(model=model, args=arguments(folder, **settings), train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trained = [parameter.detach().double() for parameter in model.parameters() if parameter.requires_grad]
    return {
        "losses": list(losses(trainer).values()),
        "weights": [float(parameter.norm()) for parameter in trained],
        "calls": fused_of(model).calls if fused else 0,
    }


def same_model() -> Any:
    torch.manual_seed(0)
    return test_fused.adapted(tiny_model("llama"))


def under_fsdp() -> list[dict[str, Any]]:
    """Of fused and sharded models at each level: their errors against the mean over both processes' batches, as a
    whole model of the library has it."""
    from torch.distributed.fsdp import fully_shard

    rank, mesh = distributed.get_rank(), distributed.init_device_mesh("cpu", (2,))
    library = same_model()
    both = [loss_and_gradients(library, packed(seed=seed)) for seed in (0, 1)]
    truth = {name: (both[0][1][name] + both[1][1][name]) / 2 for name in both[0][1]}
    found: list[dict[str, Any]] = []
    for level in LEVELS:
        model = same_model()
        install(model, levels=level)
        for layer in unwrap(model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded: Any
        loss, sharded = loss_and_gradients(model, packed(seed=rank))
        gradients = {name: gradient.full_tensor() for name, gradient in sharded.items()}
        assert gradients.keys() == truth.keys()
        errors = {name: error(gradients[name], truth[name]) for name in truth}
        loss_error = float(abs(loss - both[rank][0]) / both[rank][0])
        found.append({"loss": loss_error, "gradients": max(errors.values()), "calls": fused_of(model).calls})
    return found


def main(folder: Path) -> None:
    ddp = {
        trained_dtype: {kind: under_ddp(trained_dtype, kind == "fused", folder) for kind in ("library", "fused")}
        for trained_dtype in ("fp32", "bf16")
    }
    found = {"ddp": ddp, "fsdp": under_fsdp()}
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


# ---- what they found


@pytest.fixture(scope="module")
def ranks(quick: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    finished(quick.python(torchrun(__file__, folder), folder))
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize(("trained_dtype", "bound"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_ddp_trains_it_as_it_trains_the_librarys(trained_dtype: str, bound: float, ranks: list[dict[str, Any]]) -> None:
    """bf16 gradients are added up in bf16: DDP has no other."""
    first, second = (each["ddp"][trained_dtype] for each in ranks)
    assert first == second  # losses are means over both; weights are the same
    fused, library = first["fused"], first["library"]
    assert fused["calls"] == STEPS * MICRO_BATCHES
    assert len(fused["losses"]) == STEPS and len(set(library["losses"])) == STEPS
    for loss, expected in zip(fused["losses"], library["losses"], strict=True):
        assert abs(loss - expected) < bound * expected


def test_fsdp_gives_it_the_gradients_of_a_whole_model(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert len(each["fsdp"]) == len(LEVELS)
        for found in each["fsdp"]:
            assert found["calls"] == 1 and found["loss"] < EXACT and found["gradients"] < EXACT, found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
