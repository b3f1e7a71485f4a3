"""Nothing foreign is patched: no other package's module or class is changed, and no made-up source is run.

One check reads steep's source as syntax trees and is shown to bite on planted sources. The other, in a process of its
own, compares the libraries' modules and classes before and after a use of steep.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from tests.syntax import SOURCE, called_name, sources

# The only module that may set an instance's class.
INSTALLER = "steep.model.install"


# --- what the source says -----------------------------------------------------------------------------------------


class PatchFinder(ast.NodeVisitor):
    """Collects what would change another package for the whole process, or runs made-up source.

    A name is foreign in a scope when an import binds it there, or an assignment from a foreign module or class
    (`base = transformers.Trainer`); a parameter or a local variable of the same name hides it.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.scopes: list[dict[str, bool]] = []
        self.found: list[str] = []

    def report(self, node: ast.expr | ast.stmt, why: str) -> None:
        self.found.append(f"{self.module}:{node.lineno} {why}: {ast.unparse(node).splitlines()[0]}")

    # what is foreign

    def is_foreign_name(self, name: str) -> bool:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), False)

    def is_foreign(self, node: ast.expr) -> bool:
        """Whether the expression denotes another package's module, class or registry, rather than an instance."""
        if isinstance(node, ast.Name):
            return self.is_foreign_name(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Attribute) and node.attr == "__class__":
                return True  # whosever it is, other instances share it
            return ast.unparse(node) != "os.environ" and self.is_foreign(node.value)
        if isinstance(node, ast.Call):
            name = called_name(node)
            if name in ("import_module", "__import__"):
                target = node.args[0] if node.args else None
                return not (isinstance(target, ast.Constant) and str(target.value).split(".")[0] == "steep")
            return (
                name in ("type", "vars", "getattr")
                and len(node.args) in (1, 2, 3)
                and (name == "type" or self.is_foreign(node.args[0]))
            )
        return False

    def open_scope(self, node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef) -> None:
        scope: dict[str, bool] = {}
        self.scopes.append(scope)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            scope.update({arg.arg: False for arg in ast.walk(node.args) if isinstance(arg, ast.arg)})
        for inner in self.own_nodes(node):
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                for alias in inner.names:
                    package = inner.module or "" if isinstance(inner, ast.ImportFrom) else alias.name
                    relative = isinstance(inner, ast.ImportFrom) and inner.level > 0
                    name = (alias.asname or alias.name).split(".")[0]
                    scope[name] = not relative and package.split(".")[0] != "steep"
            elif isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                scope[inner.name] = False
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                scope.setdefault(inner.id, False)
        for inner in self.own_nodes(node):
            if isinstance(inner, ast.Assign) and self.is_foreign(inner.value):
                scope.update({target.id: True for target in inner.targets if isinstance(target, ast.Name)})

    def own_nodes(self, scope: ast.AST) -> Iterator[ast.AST]:
        """The nodes of a scope without those of the functions and classes inside it."""
        body = getattr(scope, "body", [])
        waiting = list(body) if isinstance(body, list) else [body]
        while waiting:
            node = waiting.pop(0)
            yield node
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                waiting.extend(ast.iter_child_nodes(node))

    def visit_scope(
        self, node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef
    ) -> None:
        self.open_scope(node)
        self.generic_visit(node)
        self.scopes.pop()

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_scope

    # what is forbidden

    def visit_target(self, node: ast.Attribute | ast.Subscript) -> None:
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            if isinstance(node, ast.Attribute) and node.attr == "__class__":
                if self.module != INSTALLER:
                    self.report(node, f"sets a class, which only {INSTALLER} does")
            elif self.is_foreign(node.value):
                self.report(node, "changes what another package owns")
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and self.is_foreign(node.value):
            self.report(node, "reaches into another package's names")
        self.generic_visit(node)

    visit_Attribute = visit_Subscript = visit_target

    def visit_Call(self, node: ast.Call) -> None:
        name = called_name(node)
        if name in ("setattr", "delattr", "__setattr__", "__delattr__") and node.args and self.is_foreign(node.args[0]):
            self.report(node, "changes what another package owns")
        elif name in ("getsource", "getsourcelines", "getsourcefile"):
            self.report(node, "fetches source text")
        elif isinstance(node.func, ast.Name) and name in ("exec", "eval"):
            self.report(node, "runs made-up source")
        elif name == "vars" and node.args and self.is_foreign(node.args[0]):
            self.report(node, "reaches into another package's names")
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        if names & {"unittest.mock", "builtins.exec", "builtins.eval"} or node.module == "unittest.mock":
            self.report(node, "imports a means of patching")

    def visit_Import(self, node: ast.Import) -> None:
        if any(alias.name == "unittest.mock" for alias in node.names):
            self.report(node, "imports a means of patching")


def patch_violations(module: str, source: str) -> list[str]:
    finder = PatchFinder(module)
    finder.visit(ast.parse(source))
    return finder.found


def test_nothing_foreign_is_patched() -> None:
    assert [fault for module, source in sources().items() for fault in patch_violations(module, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import transformers\ntransformers.Trainer = Mine",
        "import transformers\ndef f():\n    transformers.models.llama.modeling_llama.LlamaMLP.forward = mine",
        "import transformers as hf\nhf.x: int = 3",
        "from transformers import Trainer\nTrainer.training_step = mine",
        "from transformers import Trainer\nTrainer.calls += 1",
        "from transformers import Trainer\ndel Trainer.training_step",
        "from transformers import Trainer\nsetattr(Trainer, 'training_step', mine)",
        "from transformers import Trainer\nsetattr(Trainer.args, 'x', 1)",
        "from transformers import Trainer\nbase = Trainer\nbase.training_step = mine",
        "from transformers import Trainer\ntype.__setattr__(Trainer, 'x', 1)",
        "from transformers.models import REGISTRY\nREGISTRY['x'] = mine",
        "def f():\n    from peft import LoraConfig\n    LoraConfig.x, y = 1, 2",
        "def f():\n    import torch\n    for torch.x in range(3):\n        pass",
        "import torch\ndef f():\n    torch.backends.cudnn.benchmark = True",
        "import sys\nsys.modules['flash_attn'] = fake",
        "from importlib import import_module\nmodule = import_module('transformers')\nmodule.x = 1",
        "import importlib\nimportlib.import_module('transformers').x = 1",
        "__import__('transformers').x = 1",
        "def f(model):\n    type(model).forward = mine",
        "def f(model):\n    setattr(type(model), 'forward', mine)",
        "def f(model):\n    model.__class__.forward = mine",
        "def f(model):\n    model.__class__ = Fused",
        "import transformers\nvars(transformers)['x'] = 1",
        "import transformers\ntransformers.__dict__.update(x=1)",
        "import transformers\ngetattr(transformers, 'Trainer').x = 1",
        "from unittest import mock",
        "from unittest.mock import patch",
        "exec('x = 1')",
        "y = eval('x')",
        "import inspect\ntext = inspect.getsource(f)",
        "from inspect import getsource\ntext = getsource(f)",
    ],
)
def test_a_patch_is_found(source: str) -> None:
    assert patch_violations("steep.x", source) != []


@pytest.mark.parametrize(
    "source",
    [
        "def f(model):\n    model.config.use_cache = False\n    setattr(model, 'x', 1)\n    model.eval()",
        "from transformers import config\ndef f(config):\n    config.use_cache = False",
        "import torch\ndef f():\n    x = torch.zeros(3)\n    x[0] = 1\n    x.requires_grad = True",
        "import torch\nclass A(torch.nn.Module):\n    def __init__(self):\n        self.x = type(self)",
        "import logging\nlog = logging.getLogger('steep')\nlog.propagate = False",
        "x = {}\nx['a'] = 1",
        "from steep.ops import rope\ndef f():\n    rope.calls.count += 1",
        "import os\ndef main():\n    os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True'",
        "def f(kernel, grid, out):\n    kernel[grid](out)\n    out[:] = 0",
    ],
)
def test_what_is_steeps_own_is_let_pass(source: str) -> None:
    assert patch_violations("steep.x", source) == []


def test_only_the_installer_sets_a_class() -> None:
    source = "def install(layer):\n    layer.__class__ = Fused"
    assert patch_violations(INSTALLER, source) == []
    assert patch_violations(INSTALLER, source + "\n    layer.__class__.forward = mine") != []


# --- what a use of steep does -------------------------------------------------------------------------------------

# Modules and classes that others have patched, or that steep stands on.
WATCHED = [
    "torch",
    "torch.nn.functional",
    "torch.autograd.Function",
    "torch.nn.Linear",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.utils.checkpoint",
    "transformers",
    "transformers.AutoModelForCausalLM",
    "transformers.PreTrainedModel",
    "transformers.Trainer",
    "transformers.TrainingArguments",
    "transformers.GenerationMixin",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.modeling_llama.LlamaAttention",
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "transformers.models.llama.modeling_llama.LlamaMLP",
    "transformers.models.llama.modeling_llama.LlamaModel",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer",
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
    "peft",
    "peft.PeftModel",
    "peft.PeftModelForCausalLM",
    "peft.tuners.lora.layer",
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.layer.LoraLayer",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.utils.other.ModulesToSaveWrapper",
    "bitsandbytes",
    "bitsandbytes.functional",
    "bitsandbytes.nn.Linear4bit",
    "bitsandbytes.nn.Params4bit",
    "accelerate.Accelerator",
    "datasets.Dataset",
]


def changes(before: dict[str, dict[str, object]]) -> list[str]:
    """What differs now. A module may gain names (transformers loads its own lazily); nothing else may differ."""
    found: list[str] = []
    for dotted, names in before.items():
        thing = resolve_name(dotted)
        now = dict(vars(thing))
        found += [f"{dotted}.{name} changed" for name in names if name not in now or now[name] is not names[name]]
        if inspect.isclass(thing):
            found += [f"{dotted}.{name} is new" for name in now if name not in names]
    return found


def use_steep(model: Path, corpus: Path) -> None:
    """The whole way through the command line: a run file, a plan, and four steps of training."""
    from steep.cli import main

    small = ["--data.max_length", "64", "--training.rows_per_step", "2", "--training.max_steps", "4"]
    for command in (
        ["init", "--model", str(model), "--data", str(corpus)],
        ["plan", "run.yaml", *small],
        ["train", "run.yaml", *small],
    ):
        sys.argv = ["steep", *command]
        try:
            main()
        except SystemExit as exit:
            assert not exit.code, f"steep {command[0]} ended with {exit.code}"


def compare_before_and_after(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_tiny, write_corpus

    os.chdir(folder)  # runs are written below the folder that the command is given in
    model, corpus = save_tiny("llama", folder / "model"), write_corpus(folder / "corpus")
    # What the libraries do to each other on first use comes before the snapshot: importing one may complete another,
    # and transformers notes things on its own classes, and on torch's Module, when it loads a model.
    AutoModelForCausalLM.from_pretrained(model)
    for dotted in WATCHED:
        resolve_name(dotted)
    before = {dotted: dict(vars(resolve_name(dotted))) for dotted in WATCHED}
    planted = resolve_name("transformers.Trainer")
    planted.planted = True
    found = changes(before)
    assert found == ["transformers.Trainer.planted is new"], found  # the comparison bites
    del planted.planted
    for module in sources():
        if not module.endswith("__main__"):
            import_module(module.removesuffix(".__init__"))
    assert not (found := changes(before)), found
    use_steep(model, corpus)
    assert not (found := changes(before)), found


def test_a_use_of_steep_changes_nothing_foreign(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_patching", str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(root)])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


if __name__ == "__main__":
    compare_before_and_after(Path(sys.argv[1]))
