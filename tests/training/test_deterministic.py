"""`deterministic: true`: what is set while it trains, and undone after; on a card, that the bits are the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.packing import Corpus
from steep.errors import RunError, UserError
from steep.kernels import OLDEST_FP8_CARD
from steep.training.deterministic import deterministic, prepare_cublas
from tests.test_run import lines, run_file
from tests.training.helpers import AtStep, adapted, losses, trainer_for


def flags() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "flash": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
        "launch": os.environ.get("CUDA_LAUNCH_BLOCKING"),
    }


ON = {
    "algorithms": True, "warn only": False, "fill": False, "cudnn": (True, False, True), "flash": "1", "launch": None,
}  # fmt: skip


def test_the_flags_are_those_of_the_training_alone(corpus: Corpus, tmp_path: Path) -> None:
    before, seen = flags(), {}
    assert before != ON
    for on in (True, False):
        trainer = trainer_for(adapted(lora_dropout=0.1), corpus, tmp_path / str(on), max_steps=2, deterministic=on)
        assert flags() == before
        trainer.add_callback(AtStep(begin=lambda step, on=on: seen.update({on: flags()})))
        trainer.train()
        assert flags() == before
        seen[on, "losses"] = losses(trainer)
    assert seen[True] == ON and seen[False] == before
    assert seen[True, "losses"] == seen[False, "losses"]  # a CPU is deterministic anyway


def test_they_are_put_back_as_they_were_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = flags()
        with pytest.raises(ValueError, match="inside"), deterministic(True):
            assert flags() == ON
            raise ValueError("inside")
        assert flags() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    values, index = torch.zeros(4), torch.tensor([0, 1])
    message = r"^put_ has no deterministic form in torch.*training\.deterministic.*to false"
    with pytest.raises(RunError, match=message), deterministic(True):
        values.put_(index, torch.ones(2))
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another error of torch's")


def test_cublas_has_to_know_before_its_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the environment is put back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    prepare_cublas("deterministic")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ  # there is no card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 512)
    with pytest.raises(UserError, match=r"^training\.deterministic: it needs CUBLAS_WORKSPACE_CONFIG before"):
        prepare_cublas("training.deterministic")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)  # bitsandbytes' import alone starts CUDA
    prepare_cublas("training.deterministic")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 512)
    prepare_cublas("training.deterministic")  # the next run of the process


@pytest.mark.gpu
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_on_a_card_the_bits_are_the_same(
    base: str,
    trained_dtype: str,
    fused: str,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice from the start, and once stopped and resumed, each in a process of its own, which tells cuBLAS itself."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    def train(name: str, *more: str) -> Path:
        folder = tmp_path / name
        config = run_file(
            llama_folder,
            korean_corpus,
            folder,
            model={"base": base, "trained_dtype": trained_dtype, "fused": fused},
            adapter={"lora_dropout": 0.0 if fused == "on" else 0.1},
            training={"deterministic": True, "gradient_accumulation_steps": 3, "save_total_limit": None},
        )
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "steep", "train", str(tmp_path / f"{name}.yaml"), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return folder

    def kept(folder: Path) -> tuple[Any, ...]:
        names = ("adapter_model", "optimizer", "random", "observations")
        fields = ("step", "loss", "grad_norm", "learning_rate", "tokens")
        return (
            [(folder / "checkpoint-6" / f"{name}.safetensors").read_bytes() for name in names],
            [[row[field] for field in fields] for row in lines(folder / "metrics.jsonl")],
            json.loads((folder / "ledger.json").read_text(encoding="utf-8")),
        )

    one, two = train("one"), train("two")
    if base == "fp8" and fused == "on" and torch.cuda.get_device_capability() >= OLDEST_FP8_CARD:
        assert json.loads((one / "plan.json").read_text(encoding="utf-8"))["fp8_products"] == "both"
    assert kept(one) == kept(two)
    shutil.rmtree(two / "checkpoint-6")
    shutil.rmtree(two / "final")
    assert kept(train("two", "--resume")) == kept(one)
