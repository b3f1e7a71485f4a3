"""What is copied for a checkpoint has nothing more to do with the training that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steep.model.adapters import add_adapters, save_adapter
from steep.model.embeddings import untie
from steep.model.load import load
from steep.training.checkpoint import rng_states
from steep.training.snapshot import HostMemory, Snapshot
from steep.training.state_files import load_state
from tests.training.helpers import adapted, contents, trainer_for
from tests.trees import tree_differences


def test_a_copy_shares_no_memory() -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    given = [shared, shared.T, shared[1], torch.tensor(3), torch.zeros(0, 5), torch.tensor([True])]
    expected = [tensor.clone() for tensor in given]
    copies = HostMemory().copies(given)
    for tensor in given:
        tensor.zero_() if tensor.dtype != torch.bool else tensor.fill_(False)
    assert tree_differences(expected, copies) == []
    assert all(copy.is_contiguous() for copy in copies)


def test_a_state_is_that_of_its_moment(tmp_path: Path) -> None:
    state: dict[Any, Any] = {"step": 3, "list": [1, 2], "inner": {"a": torch.ones(4)}, (1, 2): torch.zeros(2)}
    snapshot = Snapshot()
    snapshot.add_state("x", state)
    snapshot.take(HostMemory())
    state["inner"]["a"].mul_(7)
    state["list"].append(3)
    state["inner"]["b"] = 1
    state["step"] = 4
    snapshot.write(tmp_path)
    expected = {"step": 3, "list": [1, 2], "inner": {"a": torch.ones(4)}, (1, 2): torch.zeros(2)}
    assert tree_differences(expected, load_state(tmp_path, "x")) == []


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch", "adafactor"])
def test_training_that_goes_on_does_not_reach_it(optim: str, corpus: Any, tmp_path: Path) -> None:
    """Every live tensor is spoilt between the snapshot and the write; the files are those written at once."""
    trainer = trainer_for(adapted(), corpus, tmp_path, optim=optim, max_steps=3)
    trainer.train()
    (tmp_path / "now").mkdir()
    (tmp_path / "later").mkdir()
    trainer._snapshot(tmp_path / "now", rng_states()).write(tmp_path / "now")
    state = trainer._frozen_state()
    rows = len(state.log_history)
    later = trainer._snapshot(tmp_path / "later", rng_states())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(7)
        for states in trainer.optimizer.state.values():
            for value in states.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(7)
        trainer.times_seen.fill_(7)
        trainer.times_trained.fill_(7)
    trainer.optimizer.param_groups[0]["lr"] = 7.0
    trainer.lr_scheduler.step()
    trainer.state.global_step = 7
    trainer.state.log_history.append({"step": 7})
    torch.rand(1)
    later.write(tmp_path / "later")
    assert contents(tmp_path / "now") == contents(tmp_path / "later")
    assert len(state.log_history) == rows and state.global_step == 3


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no embeddings": {"modules_to_save": []},
    "one embedding": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_written_as_peft_writes_it(
    kind: str, base: str, llama_folder: Path, corpus: Any, tmp_path: Path
) -> None:
    model, _ = load(str(llama_folder), base=base, compute_dtype="fp32")
    model = add_adapters(model, r=8, lora_alpha=8, **KINDS[kind])
    assert_as_peft(model, corpus, tmp_path)


@pytest.mark.parametrize("untied", [False, True])
def test_a_tied_adapter_is_written_as_peft_writes_it(untied: bool, corpus: Any, tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    model = tiny_model("llama", tied=True)
    if untied:
        untie(model)
    assert_as_peft(add_adapters(model, r=8, lora_alpha=8), corpus, tmp_path)


def assert_as_peft(model: Any, corpus: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    (tmp_path / "peft").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_adapter(model, tmp_path / "peft")
    trainer = trainer_for(model, corpus, tmp_path)
    trainer.create_optimizer_and_scheduler(4)
    trainer._prepare_for_training(4, None, None)
    trainer._snapshot(tmp_path / "snapshot", rng_states()).write(tmp_path / "snapshot")
    written = contents(tmp_path / "snapshot")
    assert {name: written[name] for name in contents(tmp_path / "peft")} == contents(tmp_path / "peft")


@pytest.mark.gpu
def test_copies_of_a_gpu_go_into_memory_that_is_used_again() -> None:
    """Right, at the same place each time, out of reach of what the card does next; and given back at the end."""
    memory = HostMemory()
    given = [
        torch.randn(1000, 777, device="cuda"),
        torch.randn(64, 65, device="cuda", dtype=torch.bfloat16).T,
        torch.arange(3, device="cuda", dtype=torch.uint8),
        torch.tensor(5.0, device="cuda"),
        torch.zeros(0, 4, device="cuda"),
        torch.ones(7),
    ]
    places = []
    for _ in range(2):
        expected = [tensor.cpu().clone() for tensor in given]
        copies = memory.copies(given)
        for tensor in given:
            tensor.add_(1)
        torch.cuda.synchronize()
        assert tree_differences(expected, copies) == []
        assert all(copy.device.type == "cpu" and copy.is_contiguous() for copy in copies)
        of_gpu = [copy for copy, tensor in zip(copies, given, strict=True) if tensor.is_cuda]
        assert all(copy.is_pinned() for copy in of_gpu if copy.numel())
        places.append([copy.data_ptr() for copy in of_gpu])
    assert places[0] == places[1]
    larger = torch.randn(4000, 1000, device="cuda")
    assert torch.equal(memory.copies([larger])[0], larger.cpu())
    memory.release()
    memory.release()
    assert torch.equal(memory.copies([larger])[0], larger.cpu())
