"""Small trainers for the tests of training: a tiny model with adapters, a packed corpus, arguments for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steep.data.packing import Corpus
from steep.model.adapters import add_adapters
from steep.ops.adamw8bit import Launch, adamw8bit_reference
from steep.training import adamw8bit
from steep.training.arguments import TrainingArguments
from steep.training.snapshot import HostMemory, Snapshot
from steep.training.trainer import Trainer
from tests.tiny import tiny_model

Model = Any


def adapted(family: str = "llama", tied: bool | None = None, **settings: Any) -> Model:
    """A tiny fp32 model with adapters and trained embeddings, the same for the same arguments."""
    model = tiny_model(family, tied)
    model.config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return add_adapters(model, **{"r": 8, "lora_alpha": 8, **settings})


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def trainer_for(model: Model, corpus: Corpus, folder: Path, **settings: Any) -> Trainer:
    made = Trainer(model=model, args=arguments(folder, **settings), train_dataset=corpus)
    made.remove_callback(transformers.PrinterCallback)
    return made


def trained_weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer: Trainer) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in trainer.state.log_history if "loss" in row}


def save_state(state: Any, folder: Path, name: str) -> None:
    """The two files of a state, as a checkpoint has them."""
    snapshot = Snapshot()
    snapshot.add_state(name, state)
    snapshot.take(HostMemory())
    snapshot.write(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def update_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU let `AdamW8bit` update as on a card, with the reference of each kernel: tests/ops hold it to that."""
    reference = adamw8bit_reference
    monkeypatch.setattr(adamw8bit, "uses_kernels", lambda tensor: True)
    monkeypatch.setattr(Launch, "run", lambda self, factor=None: reference(self.updates, self.maps, factor))


class AtStep(transformers.TrainerCallback):
    """Calls `begin` with the number of the step that begins, and `end` with that of the step that ended."""

    def __init__(self, begin: Callable[[int], None] | None = None, end: Callable[[int], None] | None = None) -> None:
        self._begin, self._end = begin, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begin:
            self._begin(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._end:
            self._end(state.global_step)
