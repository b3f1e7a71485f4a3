"""Builds kernels to machine code for cards that are not there, and says what each needs of a card.

    python -m tests.kernels.machine_code [--planted | --one-sum]

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
from dataclasses import replace
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import steep.kernels
from steep.kernels import fp8_linear
from steep.kernels.compilation import Compilation, Type

# Compute capability: KiB of shared memory that a block can have.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ENDLESS = 2**30  # columns of a sum whose beginning is not in sight
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


_MOVE = re.compile(r"\s*mov\.b32\s+(%\w+), (\S+);")
_SYNC = re.compile(r"\smma\.sync\S*k(\d+)\.\S*e4m3\.e4m3\S*\s+\{\s*([^}]*?)\s*\}.*\{\s*(%\w+)[^{]*\};")
_ASYNC = re.compile(r"\swgmma\.mma_async\S*k(\d+)\.f32\.e4m3\S*\s+\{\s*(%\w+).*, (\S+), 1, 1;")


def e4m3_summed(ptx: str) -> int:
    """How many columns the cores of Ada, Hopper (wgmma) and later ones without tensor memory add in e4m3 into one sum,
    at most, that began at zero within the same pass of a loop; ENDLESS where it goes on with what was there before.
    Hopper's cores are waited for, too: so many at most before something waits for them."""
    lines = ptx.splitlines()
    zeros = _zeros(lines)
    longest, sums, unawaited = 0, dict[str, int](), Counter[str]()
    for line in lines:
        if line.startswith("$L__BB"):  # what is in registers comes from elsewhere
            sums.clear()
        elif "wgmma.wait_group" in line:
            unawaited.clear()
        elif move := _MOVE.match(line):
            known = 0 if move[2] in zeros else sums.get(move[2])
            sums.pop(move[1], None)
            if known is not None:
                sums[move[1]] = known
        elif product := _SYNC.search(line):
            into = product[2].split(",")[0]
            sums[into] = sums.get(product[3], ENDLESS) + int(product[1])
            longest = max(longest, sums[into])
        elif product := _ASYNC.search(line):
            before = 0 if product[3] == "0" else sums.get(product[2], ENDLESS)
            sums[product[2]] = before + int(product[1])
            unawaited[product[2]] += int(product[1])
            longest = max(longest, sums[product[2]], unawaited[product[2]])
    return min(longest, ENDLESS)


def _zeros(lines: list[str]) -> set[str]:
    """The number 0, and registers that never hold anything else."""
    found: dict[str, bool] = {}
    for line in lines:
        if move := _MOVE.match(line):
            found[move[1]] = found.get(move[1], True) and move[2] == "0"
        elif product := _SYNC.search(line):
            found |= dict.fromkeys(product[2].split(", "), False)
    return {"0", *(register for register, is_zero in found.items() if is_zero)}


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


def one_sum(capability: int) -> Compilation:
    """A product in e4m3 that goes on with one sum over all columns, as it is for cards with tensor memory only."""
    kernel = fp8_linear.fp8_product_kernel
    split = next(each for each in built_for(capability) if each.kernel is kernel and each.constants["SPLIT"])
    return replace(split, constants={**split.constants, "SPLIT": False})


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
        if sys.argv[1:] == ["--one-sum"]:
            for capability in (89, 90, 120):
                print(json.dumps(build(one_sum(capability), capability)))
            return
        jobs = [(capability, place) for capability in SHARED_KIB for place in range(len(built_for(capability)))]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for result in pool.imap_unordered(_work, jobs):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
