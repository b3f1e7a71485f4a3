"""`steep doctor`: what it says of this machine, and of machines with planted faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import tomllib
from collections import namedtuple
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steep import cli, doctor
from steep.doctor import as_lines, examine

OFFLINE = {"HF_HUB_OFFLINE": "1"}
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(f"{package}; extra == '{extra}'" for extra, packages in EXTRAS.items() for package in packages),
]


def look(**given: Any) -> dict[str, Any]:
    return examine(**{"requirements": REQUIREMENTS, "variables": OFFLINE, **given})


def findings(report: dict[str, Any], kind: str) -> dict[str, str]:
    return {
        each["about"]: f"{each['problem']}. {each['remedy']}" for each in report["findings"] if each["kind"] == kind
    }


def importing(**others: Any) -> Callable[[str], Any]:
    """Imports what is there, but for some names: another module, or an exception to raise."""

    def importer(name: str) -> Any:
        other = others.get(name)
        if isinstance(other, Exception):
            raise other
        return import_module(name) if other is None else other

    return importer


def having(**versions: str | None) -> Callable[[str], str]:
    """The installed versions, but for some: another one, or None where the package is missing."""

    def installed(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            return metadata.version(name)
        found = versions[key]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    return installed


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    usage = namedtuple("usage", "total used free")(2**40, 0, 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(shutil, "which", lambda name: str(program))


def fake_torch(*capabilities: tuple[int, int], built: list[str] | None = None, cuda: str | None = "13.0") -> Any:
    """A torch that knows only how to describe its cards."""
    cards = [SimpleNamespace(name=f"Card {major}.{minor}", major=major, minor=minor) for major, minor in capabilities]
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(cards),
            device_count=lambda: len(cards),
            get_device_properties=cards.__getitem__,
            mem_get_info=lambda number: (60 * 2**30, 80 * 2**30),
            get_arch_list=lambda: ["sm_80", "sm_90", "compute_90"] if built is None else built,
        ),
        linspace=lambda *given, device: (_ for _ in ()).throw(RuntimeError(f"nothing computes on {device}\nmore")),
    )


# --- this machine ------------------------------------------------------------------------------------------------


def test_a_machine_where_all_is_well() -> None:
    report = look()
    assert findings(report, "broken") == {}
    assert report["can_train"] and report["verdict"].startswith("steep can train here, on ")
    assert set(report["packages"]) == {re.split(r"[<>=;]", each)[0].strip() for each in PROJECT["dependencies"]}
    assert all(package["imports"] for package in report["packages"].values())
    assert report["packages"]["torch"]["version"] == metadata.version("torch")
    assert re.fullmatch(r"works on (cpu|cuda), the 8-bit optimizer too", report["four_bit"])
    has_card = bool(report["device"]["cards"])
    assert report["fused"]["used"] == has_card and (
        has_card or report["fused"]["why"].startswith("no: there is no GPU")
    )
    assert json.loads(json.dumps(report)) == report
    lines = list(as_lines(report))
    assert lines[-1] == report["verdict"]
    assert [line for line in lines if line.startswith("fused step")] == [f"fused step  {report['fused']['why']}"]


@pytest.mark.parametrize(
    ("capability", "triton", "says"),
    [("8.6", "3.7", None), ("7.0", "3.7", "compute capability 7.5"), ("9.0", None, "need triton")],
)
def test_what_a_card_can_fuse(capability: str, triton: str | None, says: str | None) -> None:
    found = doctor._fused({"cards": [{"compute_capability": capability}]}, triton)
    assert found == {"used": True, "why": doctor.FUSED} if says is None else says in found["why"]


def test_every_extra_has_a_purpose() -> None:
    assert set(doctor.EXTRAS) == set(EXTRAS)
    optional = look(installed=having(gguf=None, wandb=None))["optional"]
    assert optional["gguf"] == {
        "version": None,
        "for": "base models in .gguf files, export --to gguf",
        "install": "pip install 'steep[gguf]'",
    }
    assert optional["wandb"]["install"] == "pip install wandb"
    assert optional["tensorboard"]["version"] == metadata.version("tensorboard")


# --- packages ----------------------------------------------------------------------------------------------------


def test_a_missing_package() -> None:
    report = look(installed=having(peft=None))
    assert findings(report, "broken") == {"peft": "it is not installed. pip install 'peft>=0.21'"}
    assert report["verdict"] == "steep cannot train here; mend: peft"


@pytest.mark.parametrize("found", ["5.10.2", "6.0.0"])
def test_a_version_outside_the_range(found: str) -> None:
    report = look(installed=having(transformers=found))
    (said,) = findings(report, "broken").values()
    assert said.startswith(f"{found} is outside the range that steep supports (<6,>=5.17). pip install 'transformers")
    assert not report["can_train"]


@pytest.mark.parametrize(
    "error",
    [
        ImportError("huggingface-hub>=1.5.0,<2.0 is required\nTry something"),
        OSError("libcudart.so.13: cannot open shared object file"),
        AttributeError("module 'numpy' has no attribute 'bool'"),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["torch", "transformers", "yaml", "bitsandbytes"])
def test_a_package_that_breaks_when_it_is_imported(name: str, error: Exception) -> None:
    report = look(importer=importing(**{name: error}))
    package = {"yaml": "pyyaml"}.get(name, name)
    broken = findings(report, "broken")
    assert list(broken) == [package]
    first = str(error).split("\n")[0]
    assert f"it cannot be imported ({type(error).__name__}{f': {first}' if first else ''})" in broken[package]
    assert not report["packages"][package]["imports"]
    assert list(as_lines(report))[-1] == f"steep cannot train here; mend: {package}"
    if name in ("torch", "bitsandbytes"):
        assert report["four_bit"] == "not tried"


def test_packages_that_do_not_go_together() -> None:
    report = look(importer=importing(**{"steep.run": ImportError("cannot import name 'x' from 'peft'")}))
    assert findings(report, "broken")["steep"].startswith("its packages do not go together (ImportError: cannot import")


def test_steep_without_its_metadata() -> None:
    assert list(findings(look(requirements=[]), "broken")) == ["steep"]


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.2")
    assert findings(look(), "broken")["python"].startswith("3.10.2 is not among those supported")


# --- cards -------------------------------------------------------------------------------------------------------


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    report = look(importer=importing(torch=fake_torch(cuda=None)))
    assert findings(report, "note")["card"].startswith("no NVIDIA card is found")
    assert report["device"] == {"cuda": None, "driver": None, "on_board": [], "cards": []}


def test_a_torch_without_cuda_beside_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100, 80GB, 580.65.06")
    report = look(importer=importing(torch=fake_torch(cuda=None)))
    said = findings(report, "warning")["torch"]
    assert "it was built without CUDA, and NVIDIA H100, 80GB is there. Install a build for CUDA" in said
    assert report["device"]["driver"] == "580.65.06"


def test_a_card_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA A40, 470.82")
    said = findings(look(importer=importing(torch=fake_torch())), "warning")["torch"]
    assert "it cannot use NVIDIA A40 (CUDA 13.0 in torch, driver 470.82)" in said
    assert "CUDA_VISIBLE_DEVICES" in said


def test_a_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "Failed to initialize NVML, driver mismatch", code=18)
    assert look(importer=importing(torch=fake_torch()))["device"]["on_board"] == []


def test_cards_and_what_they_can_do() -> None:
    report = look(importer=importing(torch=fake_torch((7, 5), (9, 0), built=["sm_75", "sm_90"])))
    old, new = report["device"]["cards"]
    assert old == {
        "name": "Card 7.5", "memory_bytes": 80 * 2**30, "free_bytes": 60 * 2**30, "compute_capability": "7.5",
        "bf16": False, "built_for": True,
    }  # fmt: skip
    assert (new["bf16"], new["compute_capability"]) == (True, "9.0")
    notes = [each["problem"] for each in report["findings"] if each["kind"] == "note" and each["about"] == "card"]
    assert notes == ["Card 7.5 has no bf16", "there are 2 cards"]
    (line,) = (line for line in as_lines(report) if "Card 9.0" in line and line.startswith("card"))
    assert line == "card        Card 9.0, 80.0 GiB (60.0 free), compute capability 9.0, bf16"
    # The fake computes nothing, as a bitsandbytes without its CUDA library does.
    said = findings(report, "broken")["bitsandbytes"]
    assert said.startswith(
        "it does not compute on cuda (RuntimeError: nothing computes on cuda). `python -m bitsandbytes`"
    )
    assert report["four_bit"] == "does not work on cuda"


def test_a_card_that_is_too_new_for_the_build() -> None:
    report = look(importer=importing(torch=fake_torch((12, 0), built=["sm_80", "sm_90"])))
    assert "has no code for Card 12.0 (compute capability 12.0)" in findings(report, "broken")["torch"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((10, 3), ["sm_100a"], True),
        ((7, 0), ["sm_80", "compute_80"], False),
        ((9, 0), [], True),
    ],
)
def test_what_a_build_runs_on(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert doctor._built_for(capability, built) is runs


def test_a_card_that_another_process_holds() -> None:
    torch = fake_torch((9, 0))
    torch.cuda.mem_get_info = lambda number: (_ for _ in ()).throw(RuntimeError("CUDA-capable device(s) is/are busy"))
    report = look(importer=importing(torch=torch))
    assert "torch cannot use it (RuntimeError: CUDA-capable device(s)" in findings(report, "broken")["card"]


@pytest.mark.parametrize(
    ("quantized", "reason"), [(lambda values: values * 0, "NF4 is off by 1"), (lambda values: values, "moves nothing")]
)
def test_an_arithmetic_that_is_wrong(quantized: Callable[[Any], Any], reason: str) -> None:
    library = SimpleNamespace(
        functional=SimpleNamespace(
            quantize_4bit=lambda values, **given: (values, None), dequantize_4bit=lambda codes, state: quantized(codes)
        ),
        optim=SimpleNamespace(AdamW8bit=lambda weights, lr: SimpleNamespace(step=lambda: None)),
    )
    report = look(importer=importing(bitsandbytes=library, **{"steep.run": SimpleNamespace()}))
    assert reason in findings(report, "broken")["bitsandbytes"]


# --- cache and hub -----------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "file" / "cache"))
    assert "Set STEEP_CACHE" in findings(look(), "broken")["cache"]
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "not" / "made" / "yet"))
    assert "cache" not in findings(look(), "broken")


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * 2**30))
    report = look()
    assert findings(report, "warning")["cache"].startswith("3.0 GiB are free where")
    assert report["can_train"]


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_is_switched_off(name: str) -> None:
    def asked(*given: Any, **settings: Any) -> None:
        raise AssertionError("the hub was asked")

    hub = SimpleNamespace(get_session=asked, constants=SimpleNamespace(ENDPOINT="https://hub"))
    report = look(variables={name: "1"}, importer=importing(huggingface_hub=hub))
    assert report["hub"]["state"] == f"off ({name})"
    assert findings(report, "note")["hub"].startswith(f"it is off ({name})")


def test_a_hub_that_answers_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def state(head: Callable[[], None]) -> dict[str, Any]:
        def answer(url: str, timeout: float) -> None:
            asked.append((url, timeout))
            head()

        session = SimpleNamespace(head=answer)
        hub = SimpleNamespace(get_session=lambda: session, constants=SimpleNamespace(ENDPOINT="https://hub"))
        return look(variables={}, importer=importing(huggingface_hub=hub))

    def fails() -> None:
        raise ConnectionError("no route\nat all")

    assert state(lambda: None)["hub"] == {"state": "reachable: https://hub", "endpoint": "https://hub"}
    report = state(fails)
    assert report["hub"]["state"] == "not reachable: https://hub"
    assert "https://hub cannot be reached (ConnectionError: no route). Give" in findings(report, "note")["hub"]
    assert report["can_train"]
    assert asked == [("https://hub", 4)] * 2
    monkeypatch.setattr(doctor, "_HUB_SECONDS", -0.9)
    started = time.monotonic()
    report = state(lambda: time.sleep(3))
    assert time.monotonic() - started < 2
    assert "no answer in" in findings(report, "note")["hub"]


# --- the command -------------------------------------------------------------------------------------------------


def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["steep", "doctor", *words])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), capfd.readouterr().out


def test_the_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", look)
    code, out = say(monkeypatch, capfd)
    assert code == 0 and out.splitlines()[-1].startswith("steep can train here")
    code, out = say(monkeypatch, capfd, "--json")
    assert code == 0 and json.loads(out)["can_train"] is True

    def noisy(name: str) -> Any:
        print("a library speaks")
        return import_module(name)

    monkeypatch.setattr(doctor, "examine", lambda: look(importer=noisy, installed=having(torch="2.3.1")))
    code, out = say(monkeypatch, capfd, "--json")
    assert code == 1 and json.loads(out)["verdict"] == "steep cannot train here; mend: torch"
    code, out = say(monkeypatch, capfd)
    assert code == 1 and out.splitlines()[-1] == "steep cannot train here; mend: torch"
    assert any(line.startswith("broken: torch: 2.3.1 is outside the range") for line in out.splitlines())
