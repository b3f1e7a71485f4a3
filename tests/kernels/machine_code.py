"""Builds kernels to machine code for cards that are not there, and says what each needs of a card.

    python -m tests.kernels.machine_code [--planted]

Prints one line of JSON a build. A process of its own, since one process either interprets kernels or compiles them:
TRITON_INTERPRET must not be set. Nothing is read from or left in Triton's cache.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import json
import multiprocessing
import pkgutil
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import steep.kernels
from steep.kernels.compilation import Compilation, Type

# Compute capability: KiB of shared memory that a block can have.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ALL_BUILT_FOR = 90  # what is launched there is launched on the others too, but for tiles; two fifths of all builds


def dtype_on(capability: int) -> torch.dtype:
    """What activations are in on such a card."""
    return torch.float16 if capability < 80 else torch.bfloat16


def kernel_modules() -> list[ModuleType]:
    """Every module of steep.kernels that launches a kernel."""
    names = [module.name for module in pkgutil.iter_modules(steep.kernels.__path__)]
    modules = [importlib.import_module(f"steep.kernels.{name}") for name in names]
    return [module for module in modules if launched(module)]


def launched(module: ModuleType) -> set[str]:
    """Names of the kernels for which the module has a call `kernel[grid](...)` or `variants.launch(kernel, ...)`."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    named = [call.func.value for call in calls if isinstance(call.func, ast.Subscript)]
    named += [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "launch"]
    return {name.id for name in named if isinstance(name, ast.Name) and hasattr(module, name.id)}


def compilations_of(module: ModuleType, capability: int) -> list[Compilation]:
    """Those that are launched on such a card."""
    found: list[Compilation] = module.compilations(dtype_on(capability))
    card = divmod(capability, 10)
    return [each for each in found if each.oldest <= card and (each.until is None or card < each.until)]


def compilations(capability: int) -> list[Compilation]:
    return [compilation for module in kernel_modules() for compilation in compilations_of(module, capability)]


def settings(compilation: Compilation) -> set[tuple[str, object]]:
    """Everything that is chosen for it, by name."""
    constants = {name: repr(value) for name, value in compilation.constants.items()}
    launch = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    return set({**compilation.signature, **constants, **launch, "multiples": compilation.multiples}.items())


def built_for(capability: int) -> list[Compilation]:
    """For `ALL_BUILT_FOR` all of them; for another card as many as show every value of every setting of each kernel."""
    everything = compilations(capability)
    if capability == ALL_BUILT_FOR:
        return everything
    found: list[Compilation] = []
    for kernel in dict.fromkeys(each.kernel for each in everything):
        own = [each for each in everything if each.kernel is kernel]
        unseen = set().union(*map(settings, own))
        while unseen:
            found.append(max(own, key=lambda each: len(settings(each) & unseen)))
            unseen -= settings(found[-1])
    return found


def pointers(kinds: tuple[Type, ...], before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where they stand among arguments and in tuples of them."""
    for place, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from pointers(kind, (*before, place))
        elif kind.startswith("*"):
            yield (*before, place)


def build(compilation: Compilation, capability: int) -> dict[str, object]:
    """Shared memory, registers a thread, bytes spilled and columns added in e4m3, or the error, of one build."""
    kernel = compilation.kernel
    signature = {
        name: "constexpr" if name in compilation.constants else compilation.signature[name] for name in kernel.arg_names
    }
    # A launch specialises on pointers that are multiples of 16 bytes, as those of torch's tensors are.
    attributes = {place: [["tt.divisibility", 16]] for place in pointers(tuple(signature.values()))}
    source = ASTSource(kernel, signature, dict(compilation.constants), attributes)
    for place, argument in enumerate(kernel.arg_names):
        if argument in compilation.multiples and argument not in compilation.constants:
            attributes[place,] = [["tt.divisibility", 16]]
    options = {"num_warps": compilation.num_warps}
    if compilation.num_stages is not None:
        options["num_stages"] = compilation.num_stages
    log = io.StringIO()
    name = f"{kernel.__module__.removeprefix('steep.kernels.')}.{kernel.__name__}"
    told: dict[str, object] = {"kernel": name, "constants": str(dict(compilation.constants)), "capability": capability}
    try:
        with contextlib.redirect_stdout(log):
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # of LLVM's, ptxas' or Triton's own: each is a build that failed
        return told | {"error": f"{type(error).__name__}: {error}"[:2000]}
    used = re.search(r"Used (\d+) registers", log.getvalue())
    spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
    assert used and spilled, log.getvalue()
    told |= {"shared": built.metadata.shared, "registers": int(used[1]), "spilled": int(spilled[1])}
    return told | {"e4m3_summed": e4m3_summed(built.asm["ptx"])}


def e4m3_summed(ptx: str) -> int:
    """How many columns Hopper's cores add in e4m3 into one sum, at most, before something waits for it."""
    longest, runs = 0, Counter[str]()
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line:
            runs.clear()
        product = re.search(r"wgmma\.mma_async\S*k(\d+)\.f32\.e4m3\S*\s+\{\s*(%\w+)", line)
        if product:
            runs[product[2]] += int(product[1])
            longest = max(longest, runs[product[2]])
    return longest


@triton.jit
def _wide_kernel(x, y, out, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    rows, depth = tl.arange(0, SIZE), tl.arange(0, DEPTH)
    left = tl.load(x + rows[:, None] * DEPTH + depth[None, :])
    right = tl.load(y + depth[:, None] * SIZE + rows[None, :])
    tl.store(out + rows[:, None] * SIZE + rows[None, :], tl.dot(left, right))


def planted() -> Compilation:
    """A product of two tiles that stand in shared memory together: 128 KiB, too much for many cards."""
    signature = {"x": "*fp16", "y": "*fp16", "out": "*fp32"}
    return Compilation(_wide_kernel, signature, {"SIZE": 128, "DEPTH": 256}, num_warps=8)


def _work(job: tuple[int, int]) -> dict[str, object]:
    capability, place = job
    return build(built_for(capability)[place], capability)


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        if sys.argv[1:] == ["--planted"]:
            results: Iterator[dict[str, object]] = iter([build(planted(), capability) for capability in (86, 90)])
            print("\n".join(map(json.dumps, results)))
            return
        jobs = [(capability, place) for capability in SHARED_KIB for place in range(len(built_for(capability)))]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for result in pool.imap_unordered(_work, jobs):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
