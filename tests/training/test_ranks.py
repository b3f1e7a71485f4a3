"""What processes agree on: in one process nothing happens, and what depends on their number alone is plain arithmetic.

`tests/test_torchrun.py` has real processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn

from steep import ranks
from steep.config import parse_config
from steep.data.packed_dataset import IGNORE
from steep.data.packing import Corpus
from steep.data.sampler import FILLER
from steep.errors import RunError, UserError
from steep.model.fp8_linear import Fp8Linear
from steep.ops.fp8 import quantise_weight
from steep.schema import RunConfig
from steep.settings import planned_epochs, planned_steps, rows_per_step
from steep.training import parallel
from steep.training.arguments import TrainingArguments
from steep.training.checkpoint import own_rng_state, rng_states


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def test_one_process_talks_to_nobody() -> None:
    with ranks.joined():
        assert ranks.is_main() and ranks.world_size() == 1
        assert ranks.gathered(np.array([1.5])).tolist() == [[1.5]]
        assert ranks.gathered_bytes(b"x") == [b"x"]
        assert ranks.agreed(True) and not ranks.agreed(False)
        here = object()
        assert ranks.from_main(lambda: here) is here
    assert not torch.distributed.is_initialized()


def test_a_cluster_that_sets_one_variable_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks.world_size() == 1 and ranks.is_main()


@pytest.mark.parametrize(("rows", "steps"), [(59, 10), (48, 8), (49, 10), (1, 2)])
def test_steps_are_those_of_one_process_with_the_same_rows_a_step(
    rows: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(accumulation: int) -> RunConfig:
        training = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "output_dir": "runs/ko"}
        training["gradient_accumulation_steps"] = accumulation
        return parse_config({"model": {"name": "m"}, "data": {"sources": [{"path": "c"}]}, "training": training})

    alone = config(6)
    assert (rows_per_step(alone), planned_steps(alone, rows)) == (12, steps)
    pretend(monkeypatch, 1, 2)
    assert (rows_per_step(config(3)), planned_steps(config(3), rows)) == (12, steps)
    assert planned_epochs(config(3), rows) == 2


def test_a_filler_row_has_no_target(corpus: Corpus) -> None:
    row = corpus.train[FILLER]
    assert row["row"] == FILLER and (row["labels"] == IGNORE).all()
    assert row["position_ids"].tolist() == list(range(corpus.train.max_length))
    assert (row["input_ids"] == corpus.train.pad_id).all()
    with pytest.raises(IndexError):
        corpus.train[FILLER - 1]


def test_a_process_takes_its_own_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [*rng_states(), *rng_states()]
    with pytest.raises(UserError, match=r"trained in 2 processes, and here are 1.*--nproc-per-node 2"):
        own_rng_state(states)
    pretend(monkeypatch, 1, 2)
    assert own_rng_state(states) is states[1]
    with pytest.raises(UserError, match=r"trained in 1 process, and here are 2.*without torchrun"):
        own_rng_state(states[:1])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("field", "wrong", "mend it"), 2),
        (RunError("stopped"), 1),
        (OSError(28, "no space"), 2),
        (ZeroDivisionError("a bug"), 1),
        (typer.Exit(3), 3),
        (SystemExit(143), 143),
    ],
)
def test_the_exit_code_of_an_error(error: BaseException, code: int) -> None:
    assert ranks.exit_code(error) == code


def test_the_highest_seed_is_drawn_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1, 2)
    drawn = []
    for seed in (41, 2**32 - 2, 2**32 - 1):
        parallel.draw_apart(seed)
        drawn.append(torch.initial_seed())
    assert drawn == [42, 2**32 - 1, 0]


def test_processes_that_transformers_would_train_apart_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    parallel.settle_arguments(args)
    pretend(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=r"use_cpu: torchrun started 2 processes.*Give use_cpu=True"):
        parallel.settle_arguments(args)


def test_frozen_weights_in_e4m3_are_compared_in_place_of_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(value: float) -> Any:
        return nn.ModuleDict(
            {
                "proj": Fp8Linear(quantise_weight(torch.full((4, 8), value)), None, torch.float32),
                "head": nn.Linear(8, 4),
            }
        )

    sent: list[bytes] = []
    monkeypatch.setattr(ranks, "gathered_bytes", lambda found: [*sent, found])
    one, other = model(1.0), model(1.0)
    parallel.leave_out_e4m3(one)
    assert one._ddp_params_and_buffers_to_ignore == ["proj.weight", "proj.scale"]
    monkeypatch.setattr(ranks, "gathered_bytes", lambda found: sent.append(found) or sent)
    parallel.leave_out_e4m3(other)
    with pytest.raises(RunError, match="the processes hold other frozen weights"):
        parallel.leave_out_e4m3(model(2.0))
    plain: Any = nn.Linear(8, 4)
    parallel.leave_out_e4m3(plain)
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")
