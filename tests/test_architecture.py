"""The shape that the code keeps: imports go one way, nothing runs at import, and `import steep` loads nothing heavy.

The checks read the source as syntax trees, and each is shown to bite on planted sources. `test_patching.py` holds the
third rule, that nothing foreign is patched.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.syntax import SOURCE, called_name, sources

# A module may import from the layers before its own, and from its own.
LAYERS = (
    "errors", "amounts", "invalid", "machine_faults", "foreign", "credentials", "ranks", "stopping", "allocator",
    "storage", "manifest", "recorded", "tensor_files", "kernels", "ops", "data", "model", "evaluation", "training",
    "export", "generation", "schema", "config", "initialise", "trackers", "settings", "planning", "run_folder",
    "vocabulary", "plan", "changes", "resume", "terminal", "out_of_memory", "opening", "result", "run",
    "verify_resume", "hand_over", "report", "doctor", "cli", "__main__",
)  # fmt: skip


# --- imports go one way ---------------------------------------------------------------------------------------


def layer_of(module: str) -> str:
    """The name below `steep`: "steep.ops.rope" and "steep.ops" are in layer "ops"; `steep` itself is ""."""
    parts = module.split(".")
    return "" if len(parts) == 1 or parts[1:] == ["__init__"] else parts[1]


def imported_modules(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Each dotted name of steep that the module imports, wherever the import stands, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                start = ".".join([*module.split(".")[: -node.level], *start.split(".")]).strip(".")
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "steep":
                yield node.lineno, name


def import_violations(module: str, source: str) -> list[str]:
    own = layer_of(module)
    if own == "":  # steep/__init__.py only lists what is public, and loads it on first use
        return []
    if own not in LAYERS:
        return [f"{module}: '{own}' is in no layer; add it to LAYERS in {Path(__file__).name}"]
    found: list[str] = []
    for line, name in imported_modules(module, ast.parse(source)):
        other = layer_of(name)
        if other not in LAYERS:
            found.append(f"{module}:{line} imports {name}: '{other or name}' is in no layer")
        elif LAYERS.index(other) > LAYERS.index(own):
            found.append(f"{module}:{line} imports {name}: '{other}' comes after '{own}'")
    return found


def test_imports_go_one_way() -> None:
    assert [fault for module, source in sources().items() for fault in import_violations(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("steep.ops.rope", "from steep.model.load import load", "'model' comes after 'ops'"),
        ("steep.ops.rope", "import steep.cli", "'cli' comes after 'ops'"),
        ("steep.ops.rope", "from ..model import load", "'model' comes after 'ops'"),
        ("steep.ops.__init__", "from ..model import load", "'model' comes after 'ops'"),
        ("steep.errors", "from . import cli", "'cli' comes after 'errors'"),
        ("steep.ops.rope", "def f():\n    from steep import training", "'training' comes after 'ops'"),
        ("steep.ops.rope", "from importlib import import_module\nimport_module('steep.run')", "'run' comes after"),
        ("steep.ops.rope", "if TYPE_CHECKING:\n    from steep.config import RunConfig", "'config' comes after 'ops'"),
        ("steep.run", "from steep import Trainer", "'Trainer' is in no layer"),
        ("steep.run", "import steep", "'steep' is in no layer"),
        ("steep.utils", "", "'utils' is in no layer"),
        ("steep.helpers.text", "", "'helpers' is in no layer"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, fault: str) -> None:
    (found,) = import_violations(module, source)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("steep.model.load", "import torch\nfrom steep.errors import UserError\nfrom ..ops import rope"),
        ("steep.ops.rope", "from steep.ops.nf4 import dequantise\nfrom .nf4 import dequantise"),
        ("steep.ops.__init__", "from . import rope"),
        ("steep.cli", "def main():\n    from steep.run import train_run"),
        ("steep.__init__", "from steep.cli import main"),
    ],
)
def test_a_right_import_is_let_pass(module: str, source: str) -> None:
    assert import_violations(module, source) == []


# --- and in no circle, within a layer either ---------------------------------------------------------------------


def import_circle(modules: dict[str, str]) -> list[str]:
    """Modules of which each imports the one before it and the first the last; none where there is no such circle.
    What only a type checker imports is left out."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        tree = ast.parse(source)
        for_checkers = [
            node for node in tree.body if isinstance(node, ast.If) and is_only_for_checkers_or_scripts(node)
        ]
        tree.body = [node for node in tree.body if node not in for_checkers]
        names = {name for _, name in imported_modules(module, tree)}
        packages = {f"{name.rpartition('.')[0]}.__init__" for name in names - modules.keys()}
        found = {part for name in names for part in (name, name.rpartition(".")[0])} | packages
        graph[module] = (found & modules.keys()) - {module}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_go_in_no_circle() -> None:
    assert import_circle(sources()) == []


@pytest.mark.parametrize("line", ["from steep.b import g", "import steep.b", "def f():\n    from . import b"])
def test_a_circle_is_found(line: str) -> None:
    modules = {"steep.a": line, "steep.b": "from steep.c import x", "steep.c": "from steep import a", "steep.d": line}
    assert set(import_circle(modules)) == {"steep.a", "steep.b", "steep.c"}
    assert import_circle({**modules, "steep.c": "if TYPE_CHECKING:\n    from steep import a"}) == []
    assert import_circle({**modules, "steep.c": ""}) == []


# --- kernels are imported where they are launched -----------------------------------------------------------------


def early_kernel_imports(module: str, source: str) -> list[str]:
    """Imports at the top of a module that need Triton, which a CPU build of torch comes without."""
    if layer_of(module) == "kernels":
        return []
    top = ast.Module([node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    found = [(line, name) for line, name in imported_modules(module, top) if name.startswith("steep.kernels.")]
    for node in top.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]  # pyright: ignore[reportAttributeAccessIssue]
        found += [(node.lineno, name) for name in names if name.split(".")[0] == "triton"]
    small = ("steep.kernels.OLDEST_CARD", "steep.kernels.OLDEST_FP8_CARD", "steep.kernels.compilation")
    return [f"{module}:{line} imports {name} at its top" for line, name in found if not name.startswith(small)]


def test_kernels_are_imported_where_they_are_launched() -> None:
    assert [fault for module, source in sources().items() for fault in early_kernel_imports(module, source)] == []


@pytest.mark.parametrize(
    "source", ["from steep.kernels import rope", "import steep.kernels.rope", "import triton", "from triton import jit"]
)
def test_an_early_import_of_a_kernel_is_found(source: str) -> None:
    assert len(early_kernel_imports("steep.ops.rope", source)) >= 1
    assert early_kernel_imports("steep.ops.rope", f"def f():\n    {source}") == []
    assert early_kernel_imports("steep.kernels.rope", source) == []


# --- nothing runs at import -----------------------------------------------------------------------------------


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_only_for_checkers_or_scripts(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` and `if __name__ == "__main__":`, without an else."""
    if not isinstance(node, ast.If) or node.orelse:
        return False
    test = ast.unparse(node.test)
    return test in ("TYPE_CHECKING", "typing.TYPE_CHECKING") or test.startswith("__name__ == ")


def binds_plain_names(node: ast.stmt) -> bool:
    """An assignment to names: `os.environ["X"] = ...` and `torch.x = ...` are more than a definition."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return False
    parts = [part for target in targets for part in ast.walk(target)]
    return not any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in parts)


def import_time_violations(module: str, source: str) -> list[str]:
    found: list[str] = []

    def check(body: list[ast.stmt], in_class: bool) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                check(node.body, in_class=True)
            elif in_class and isinstance(node, ast.Pass):
                pass
            elif not (
                isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef))
                or is_docstring(node)
                or binds_plain_names(node)
                or is_only_for_checkers_or_scripts(node)
            ):
                found.append(f"{module}:{node.lineno} runs at import: {ast.unparse(node).splitlines()[0]}")

    check(ast.parse(source).body, in_class=False)
    return found


def test_nothing_runs_at_import() -> None:
    assert [fault for module, source in sources().items() for fault in import_time_violations(module, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "print('hello')",
        "patch_everything()",
        "logging.getLogger('transformers').setLevel(40)",
        "os.environ['A'] = '1'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "for name in names:\n    globals()[name] = 1",
        "with torch.no_grad():\n    x = 1",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "if torch.cuda.is_available():\n    import triton",
        "if TYPE_CHECKING:\n    import torch\nelse:\n    run()",
        "assert torch.cuda.is_available()",
        "class A:\n    print('in a class body')",
        "del x",
    ],
)
def test_what_runs_at_import_is_found(source: str) -> None:
    assert len(import_time_violations("steep.x", source)) == 1


def test_definitions_are_let_pass() -> None:
    source = '''"""A docstring."""
from __future__ import annotations
import torch
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from steep.schema import RunConfig
LIMIT: int = 3
FIRST, SECOND = 1, 2
app = typer.Typer()
__all__ = ["f"]
__all__ += ["A"]
@app.command()
def f(): print("when called")
class A(torch.nn.Module):
    """A docstring."""
    size = 3
    def forward(self): pass
class B(Exception):
    pass
if __name__ == "__main__":
    f()
'''
    assert import_time_violations("steep.x", source) == []


# --- what an import really loads ----------------------------------------------------------------------------------


def test_importing_steep_and_its_command_line_loads_neither_torch_nor_transformers() -> None:
    heavy = ["torch", "transformers", "peft", "datasets", "bitsandbytes"]
    program = f"import sys, steep, steep.cli; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
