"""Every kernel is machine code for every card, and fits on it. No GPU is needed: `machine_code.py` builds them in a
process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from steep.kernels import OLDEST_CARD
from tests.kernels.machine_code import SHARED_KIB, compilations, compilations_of, kernel_modules, launched

pytestmark = pytest.mark.timeout(2400)  # some hundred builds, many minutes on two busy cores

REGISTERS = 255
# Bytes a thread keeps in memory for want of registers: none, but for one number where ptxas prefers another warp on the
# card, and 16 of the fp8 product, whose large tile takes every register, where it ends with a residual in fp32.
SPILLED_BYTES = {"adamw8bit.adamw8bit_kernel": 8, "fp8_linear.fp8_product_kernel": 64}

Build = dict[str, object]


def run(*words: str) -> list[Build]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.machine_code", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def builds() -> list[Build]:
    return run()


def faults(build: Build) -> list[str]:
    """What stands against running this build on its card."""
    if "error" in build:
        return [str(build["error"])]
    shared, spilled = SHARED_KIB[int(str(build["capability"]))] * 1024, SPILLED_BYTES.get(str(build["kernel"]), 0)
    limits = {"shared": shared, "registers": REGISTERS, "spilled": spilled}
    return [f"{build[what]} {what}, {limit} allowed" for what, limit in limits.items() if int(str(build[what])) > limit]


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_fits_on_the_card(capability: int, builds: list[Build]) -> None:
    own = [build for build in builds if build["capability"] == capability]
    assert len(own) == len(compilations(capability))
    assert [(build["kernel"], build["constants"], found) for build in own if (found := faults(build))] == []


def test_sums_in_e4m3_are_split_on_hopper(builds: list[Build]) -> None:
    """Its cores add them in a short accumulator: 128 columns at a time, and what adds these in fp32 waits for each."""
    products = [
        build for build in builds if build["kernel"] == "fp8_linear.fp8_product_kernel" and build["capability"] == 90
    ]
    assert [build["e4m3_summed"] for build in products] == [128] * len(products) != []


def test_a_kernel_with_too_much_shared_memory_fails() -> None:
    small, large = run("--planted")
    (fault,) = faults(small)
    assert "shared" in fault
    assert faults(large) == []  # the same kernel fits on a larger card


def test_the_oldest_card_is_built_for() -> None:
    assert divmod(min(SHARED_KIB), 10) == OLDEST_CARD


def test_every_kernel_that_is_launched_is_built() -> None:
    for module in kernel_modules():
        built = [each.kernel for capability in SHARED_KIB for each in compilations_of(module, capability)]
        assert [name for name in launched(module) if getattr(module, name) not in built] == [], module.__name__
