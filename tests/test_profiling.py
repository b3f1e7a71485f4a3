"""What `benchmarks.train --profile` makes of a card's events; that there are any is tried on a card."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import steep_run, train
from benchmarks.peers import Work
from benchmarks.profiling import Event, account, class_of
from benchmarks.shapes import write


def test_time_is_counted_by_class_and_where_no_kernel_runs() -> None:
    events = [
        Event("nvjet_tst_128x256_64x4", 0, 4000),
        Event("Memcpy HtoD (Pinned -> Device)", 1000, 3000),  # behind it
        Event("rms_norm_kernel", 3500, 4500),  # of another stream, for half of its time
        Event("Memcpy DtoH (Device -> Pinned)", 4400, 5400),  # for a tenth
        Event("Memset (Device)", 5500, 5600),
        Event("adamw8bit_kernel", 6000, 8000),
    ]
    found = account(events[::-1], steps=2)
    assert found["step_ms"] == 4
    assert found["idle_ms"] == 0.75
    assert found["hidden_share"] == pytest.approx(2100 / 3000)
    assert found["by_class_ms"] == {
        "products": 2, "copies to and from the host": 1.5, "adamw8bit": 1, "rms_norm": 0.5, "copies": 0.05,
    }  # fmt: skip
    assert account(events[:1], steps=1)["hidden_share"] is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp8_product_kernel", "fp8_linear"),
        ("gated_backward_kernel", "swiglu"),
        ("qk_norm_kernel", "qk_norm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_30_128x128x64_4x1x1_kernel0", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "others"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_a_class_is_known_by_the_name(name: str, kind: str) -> None:
    assert class_of(name) == kind


def test_no_two_kernels_have_one_name() -> None:
    """A profile tells them apart by it alone."""
    from tests.kernels.machine_code import kernel_modules, launched

    names = [name for module in kernel_modules() for name in launched(module)]
    assert len(names) == len(set(names)) > 20
    assert all(class_of(name) != "others" for name in names)


def test_a_profile_needs_a_gpu_and_steps_that_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ("--device cpu --profile 2 --steps 8", "--profile is of a GPU's kernels"),
        ("--profile 5 --steps 8", "nor the 5 of the profile"),
    ):
        with pytest.raises(SystemExit, match=reason):
            train.refuse(train.parse(words.split()), ["steep"])
    assert "profile" not in capsys.readouterr().out


class _Profile:
    """In the place of torch's."""

    calls: ClassVar[list[str]] = []

    def __init__(self, **how: Any) -> None:
        assert how == {"activities": [torch.profiler.ProfilerActivity.CUDA]}

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def events(self) -> list[Any]:
        on_card, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        times = (on_card, 0, 3000), (on_host, 0, 9000), (on_card, 3500, 4000)
        return [
            SimpleNamespace(name="x_kernel", device_type=kind, time_range=SimpleNamespace(start=begin, end=end))
            for kind, begin, end in times
        ]


def test_the_last_steps_are_in_the_profile_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(str(write("tiny", tmp_path / "weights", "cpu")), 2, 96, 8, 5, False, "cpu")
    monkeypatch.setattr(torch.profiler, "profile", _Profile)
    monkeypatch.setattr(sys, "argv", sys.argv)  # it is set
    result = steep_run.steep_train(work, 384, tmp_path, time.time(), ["--model.fused", "on"], profiled=2)
    assert _Profile.calls == ["start", "stop"]
    assert len(result["losses"]) == 5 and len(result["seconds"]) == 3
    assert result["profile"]["step_ms"] == 2 and result["profile"]["idle_ms"] == 0.25
