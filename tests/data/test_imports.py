"""No two files of the package need each other, not even for a type."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.syntax import sources


def imported(tree: ast.Module) -> set[str]:
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {f"{node.module}" for node in froms} | {
        f"{node.module}.{name.name}" for node in froms for name in node.names
    }


def test_imports_run_in_no_circle():
    trees = {module: ast.parse(text) for module, text in sources().items() if module.startswith("steep.data.")}
    graph = {module: imported(tree) & trees.keys() for module, tree in trees.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("steep.data.sources") < order.index("steep.data.readers") < order.index("steep.data.packing")
