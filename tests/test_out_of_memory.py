"""Memory that runs out anywhere in a run is one line: what was planned, what there was, and what to lower."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steep import hand_over, plan, result, run
from steep.errors import RunError
from steep.machine_faults import PINNED, is_the_machines, place_that_ran_out
from steep.model.block import Place
from steep.model.choices import Choices
from steep.model.machine import Card
from steep.out_of_memory import memory_told, what_to_lower
from steep.plan import Plan, plan_run
from steep.training.trainer import Trainer
from tests.command_line import Steep
from tests.test_run import run_file

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"


# As torch 2.11 says it on an H200, of page-locked memory and of a context that no longer fits on the card.
BY_CUDA = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/"
    "cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


def registered(text: str) -> torch.cuda.CudaError:
    """What `torch.cuda.check_error` raises; its class asks the runtime for the words."""
    error = torch.cuda.CudaError.__new__(torch.cuda.CudaError)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError(CUDA), "GPU"),
        (RuntimeError(CUDA), "GPU"),
        (RuntimeError("CUDA error: out of memory"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (registered("out of memory (cudaError.???)"), PINNED),
        (
            RuntimeError(f"Caught AcceleratorError in pin memory thread for device 0.\nOriginal Traceback:\n{BY_CUDA}"),
            PINNED,
        ),
        (MemoryError(), "host"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you"),
            "host",
        ),
        (RuntimeError("unable to mmap 16777296 bytes from file <a.safetensors>: Cannot allocate memory (12)"), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
    ],
)
def test_who_says_so(error: Exception, place: str | None) -> None:
    assert place_that_ran_out(error) == place
    with pytest.raises(type(error) if place is None else RunError), memory_told(None):
        raise error
    assert is_the_machines(error) == (place is not None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        registered("invalid argument (1)"),
    ],
)
def test_a_card_that_failed(error: Exception) -> None:
    assert is_the_machines(error) and place_that_ran_out(error) is None


@pytest.mark.parametrize(
    "error", [ValueError("CUDA error"), RuntimeError("the size of tensor a (2) must match"), OSError(errno.EIO, "")]
)
def test_what_is_not_the_machines_doing(error: Exception) -> None:
    assert not is_the_machines(error)


@pytest.mark.parametrize(("free", "place"), [(2**28, "GPU"), (70 * 2**30, PINNED), (None, "GPU")])
def test_one_text_for_the_card_and_for_locked_pages(
    free: int | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left on the card tells them apart."""

    def left() -> tuple[int, int]:
        if free is None:
            raise torch.AcceleratorError(BY_CUDA)
        return free, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", left)
    assert place_that_ran_out(torch.AcceleratorError(BY_CUDA)) == place


def test_what_to_do_about_locked_pages(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    for plan_, advice in ((planned, "lower adapter.r (now 8)"), (None, "ulimit -l")):
        with pytest.raises(RunError) as raised, memory_told(plan_):
            raise registered("out of memory (2)")
        text = str(raised.value)
        assert text.startswith("page-locked host memory ran out: ") and advice in text
        assert "GPU" not in text and "\n" not in text


def test_torch_itself_says_it_so() -> None:
    """The host's allocator refuses what no machine has."""
    told = r"^host memory ran out: [\d.]+ GiB are available to this process\. Free some"
    with pytest.raises(RunError, match=told), memory_told(None):
        torch.empty(2**50)


def test_what_a_card_says(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 21 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 20 * 2**30)
    with pytest.raises(RunError) as raised, memory_told(planned):
        raise torch.OutOfMemoryError(CUDA)
    text = str(raised.value)
    assert text.startswith("GPU memory ran out: ") and "were planned for a step" in text
    assert "the card has 24.00 GiB, of which 22.00 GiB were free for this run (it had 20.00 GiB in use" in text
    assert "\n" not in text and "The last checkpoint is as it was. A run that goes on may change training." in text


def test_what_a_begun_run_may_change_of_it(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Which `--resume` then takes."""
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    planned.choices = Choices(True, "bf16", [2, 2])
    planned.card = Card("fake", (9, 0), 2**34, 2**34)
    with pytest.raises(RunError) as raised, memory_told(planned):
        raise torch.OutOfMemoryError(CUDA)
    assert str(raised.value).split("A run that goes on may change ")[1] == (
        "training.offload_optimizer, training.gradient_checkpointing with --allow training.gradient_checkpointing"
    )
    with (
        pytest.raises(RunError, match="A run that goes on may change none of these"),
        memory_told(planned, loading=True),
    ):
        raise torch.OutOfMemoryError(CUDA)


def first_to_lower(plan: Plan) -> str:
    return "".join(next(iter(what_to_lower(plan).items())))


def test_what_to_lower_first(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    def names(sections: dict[str, dict[str, Any]], loading: bool = False, place: str = "GPU") -> list[str]:
        planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **sections))
        return list(what_to_lower(planned, loading=loading, place=place))

    wide = {"training": {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "optim": "adamw_torch"}}
    everything = [
        "training.per_device_train_batch_size", "training.gradient_checkpointing", "training.optim", "data.max_length",
        "model.base", "adapter.r", "adapter.modules_to_save",
    ]  # fmt: skip
    assert names(wide) == everything
    assert names(wide, loading=True) == everything[-3:]
    narrow = {
        "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
        "model": {"base": "nf4", "compute_dtype": "bf16"},
        "adapter": {"modules_to_save": []},
    }
    assert names(narrow) == ["data.max_length", "model.trained_dtype", "adapter.r"]
    in_bf16 = {**narrow, "model": {**narrow["model"], "fused": "on", "trained_dtype": "bf16"}}
    several = {**narrow["training"], "gradient_accumulation_steps": 2}
    assert "training.grad_accum_dtype" in names({**in_bf16, "training": several})
    for lower in (narrow["training"], {**several, "grad_accum_dtype": "bf16"}, {**several, "optim": "adamw_torch"}):
        assert "training.grad_accum_dtype" not in names({**in_bf16, "training": lower})
    wider = {"training.master_weights", "training.optimizer_states"}
    assert not wider & {*names(in_bf16)}
    asked = {**narrow["training"], "optimizer_states": "fp32", "master_weights": "all"}
    assert wider < {*names({**in_bf16, "training": asked})}
    assert wider & {*names({**narrow, "training": asked})} == {"training.optimizer_states"}  # weights train in fp32
    of_tables = {**in_bf16, "adapter": {}, "training": {**asked, "master_weights": "embeddings"}}
    for offload, on_card in (("all", set()), ("embeddings", {"training.optimizer_states"})):  # the rest is on the host
        training = {**of_tables["training"], "offload_optimizer": offload}
        assert wider & {*names({**of_tables, "training": training})} == on_card
        assert wider < {*names({**of_tables, "training": training}, place="host")}
    narrow["training"] |= {"max_grad_norm": 0}
    assert names(narrow)[0] == "training.optimizer_in_backward"
    narrow["training"] |= {"optimizer_in_backward": True, "per_device_train_batch_size": 2}
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **narrow))
    assert first_to_lower(planned) == "training.per_device_train_batch_size (now 2)"
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run", **wide))
    assert first_to_lower(planned) == (
        "training.per_device_train_batch_size (now 4; with more gradient_accumulation_steps, now 1, a step stays what "
        "it is)"
    )


def test_what_could_be_in_host_memory(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    """Of a run on a card; where it is the host's that ran out, less of it."""
    planned = plan_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))

    def named(place: str = "GPU", **training: Any) -> list[str]:
        config = planned.config.model_copy(deep=True)
        for name, value in training.items():
            setattr(config.training, name, value)
        found = what_to_lower(replace(on_card, config=config), place=place)
        return [name + note for name, note in found.items() if "offload" in name or "host_memory" in name]

    choices = Choices(True, "bf16", [3, 3], places=["x", "x"])
    on_card = replace(planned, card=Card("fake", (9, 0), 2**34, 2**34), choices=choices)
    states = "training.offload_optimizer: all (now none; nothing else changes)"
    assert named() == [states] and named(offload_optimizer="all") == []
    assert named(optim="adamw_torch") == []
    some: list[list[Place] | None] = [None, ["x", "gpu"]]
    for places in some:  # the last layer's can go too
        on_card.choices = replace(choices, places=places)
        assert named() == [states, "training.host_memory: more than was planned with (now auto)"]
    on_card.choices = replace(choices, levels=[3, 2], places=None)  # training.vram has more of it there
    assert named() == [states]
    on_card.choices = choices
    assert named("host") == ["training.host_memory (now auto)"]
    assert list(what_to_lower(on_card, place="host")) == [  # nothing that is of the card alone, or has more on the host
        "training.host_memory", "training.per_device_train_batch_size", "data.max_length", "adapter.r",
        "adapter.modules_to_save",
    ]  # fmt: skip
    assert named(PINNED, offload_optimizer="all")[0] == "training.offload_optimizer (now all)"
    on_card.card = None
    assert named() == named("host") == []


def raises(*given: Any, **settings: Any) -> Any:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("place", "name", "loading"),
    [
        (run, "load_base", True),
        (run, "add_adapters", True),
        (Trainer, "evaluate_documents", False),
        (run, "sample", False),
        (Trainer, "training_step", False),
        (Trainer, "_save_checkpoint", False),
        (Trainer, "save_model", False),
    ],
)
def test_anywhere_in_a_run(
    place: Any,
    name: str,
    loading: bool,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, name, raises)
    with pytest.raises(RunError, match=r"^GPU memory ran out: .* were planned for a step") as raised:
        run.train_run(run_file(llama_folder, korean_corpus, tmp_path / "run"))
    assert ("max_length" in str(raised.value)) != loading


def test_the_last_checkpoint_stays(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step, calls = run_file(llama_folder, korean_corpus, tmp_path / "run"), Trainer.training_step, []

    def at_last(self: Trainer, *given: Any, **settings: Any) -> Any:
        calls.append(1)
        return step(self, *given, **settings) if len(calls) < 5 else raises()

    with monkeypatch.context() as patch, pytest.raises(RunError, match="GPU memory ran out"):
        patch.setattr(Trainer, "training_step", at_last)
        run.train_run(config)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    run.train_run(config, resume=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory of this machine ran out. Free some of it, or take one that has more."),
        (
            torch.AcceleratorError(BY_CUDA),
            "the memory of the card ran out before the run had any: others hold it (nvidia-smi lists them). "
            "Wait for them, or choose another card (CUDA_VISIBLE_DEVICES).",
        ),
    ],
)
def test_before_a_run(
    error: Exception, said: str, steep: Steep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*given: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(plan, "plan_run", fails)
    (tmp_path / "run.yaml").write_text(
        "model: {name: m}\ndata: {sources: [{path: p}]}\ntraining: {output_dir: o}\n", encoding="utf-8"
    )
    ended = steep("plan", tmp_path / "run.yaml")
    assert ended.code == 1 and ended.err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("place", "name", "use"),
    [
        (result, "evaluate", lambda folder, out: result.evaluate_run(folder)),
        (result, "generate_side_by_side", lambda folder, out: result.generate_run(folder, "the river")),
        (hand_over, "load_result", lambda folder, out: hand_over.export_run(folder, out)),
    ],
)
def test_with_a_finished_run(
    place: Any,
    name: str,
    use: Any,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.train_run(run_file(llama_folder, korean_corpus, tmp_path / "run", evaluation={"prompts": []}))
    monkeypatch.setattr(place, name, raises)
    with pytest.raises(RunError, match=r"^GPU memory ran out: .* are available to this process.*Free some of it"):
        use(tmp_path / "run", tmp_path / "out")
