"""Every kernel is machine code for every card, and fits on it. No GPU is needed: `machine_code.py` builds them in a
process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest

from steep.kernels import OLDEST_CARD
from tests.kernels.machine_code import (
    ALL_BUILT_FOR,
    ENDLESS,
    SHARED_KIB,
    built_for,
    compilations,
    kernel_modules,
    launched,
    settings,
)  # fmt: skip

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
    assert len(own) == len(built_for(capability))
    assert [(build["kernel"], build["constants"], found) for build in own if (found := faults(build))] == []


@pytest.mark.parametrize("capability", [89, 90, 120])
def test_sums_in_e4m3_are_split(capability: int, builds: list[Build]) -> None:
    """The cores add them in a short accumulator: as many columns as are read at a time, 128 at most, and what adds
    these in fp32 waits for each."""
    products = [
        build
        for build in builds
        if build["kernel"] == "fp8_linear.fp8_product_kernel" and build["capability"] == capability
    ]
    depths = [ast.literal_eval(str(build["constants"]))["DEPTH"] for build in products]
    assert [build["e4m3_summed"] for build in products] == depths != []
    assert max(depths) <= 128


def test_one_sum_over_all_columns_is_seen() -> None:
    builds = run("--one-sum")
    assert [(build["capability"], build["e4m3_summed"]) for build in builds] == [
        (capability, ENDLESS) for capability in (89, 90, 120)
    ]


def test_a_kernel_with_too_much_shared_memory_fails() -> None:
    small, large = run("--planted")
    (fault,) = faults(small)
    assert "shared" in fault
    assert faults(large) == []  # the same kernel fits on a larger card


def test_the_oldest_card_is_built_for() -> None:
    assert divmod(min(SHARED_KIB), 10) == OLDEST_CARD


def test_every_kernel_that_is_launched_is_built() -> None:
    built = [each.kernel for capability in SHARED_KIB for each in built_for(capability)]
    for module in kernel_modules():
        assert [name for name in launched(module) if getattr(module, name) not in built] == [], module.__name__


def test_every_value_of_every_setting_is_built_for_every_card() -> None:
    """All that differs in flags alone is built for one of them."""
    assert built_for(ALL_BUILT_FOR) == compilations(ALL_BUILT_FOR)
    for capability in SHARED_KIB:
        launched_there, built = compilations(capability), built_for(capability)
        shown = {(each.kernel, *setting) for each in built for setting in settings(each)}
        assert shown == {(each.kernel, *setting) for each in launched_there for setting in settings(each)}
