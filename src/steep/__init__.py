"""steep: continued pretraining of open LLMs. Names load on first use, so that `import steep` costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steep.data.packing import pack as pack
    from steep.data.sources import Source as Source
    from steep.errors import RunError as RunError
    from steep.errors import Stopped as Stopped
    from steep.errors import UserError as UserError
    from steep.evaluation.perplexity import evaluate as evaluate
    from steep.generation import generate as generate
    from steep.hand_over import export_run as export_run
    from steep.initialise import init_run as init_run
    from steep.model.adapters import add_adapters as add_adapters
    from steep.model.install import fused_of as fused_of
    from steep.model.install import install as install
    from steep.model.install import uninstall as uninstall
    from steep.model.load import load as load
    from steep.model.new_tokens import grow_embeddings as grow_embeddings
    from steep.model.new_tokens import grow_tokenizer as grow_tokenizer
    from steep.model.original_module import offload_originals as offload_originals
    from steep.model.text_model import extract_text_model as extract_text_model
    from steep.plan import plan_run as plan_run
    from steep.result import evaluate_run as evaluate_run
    from steep.result import generate_run as generate_run
    from steep.run import train_run as train_run
    from steep.schema import RunConfig as RunConfig
    from steep.stopping import heed_signals as heed_signals
    from steep.training.arguments import TrainingArguments as TrainingArguments
    from steep.training.trainer import Trainer as Trainer

_PUBLIC = {
    "RunConfig": "schema",
    "RunError": "errors",
    "Source": "data.sources",
    "Stopped": "errors",
    "Trainer": "training.trainer",
    "TrainingArguments": "training.arguments",
    "UserError": "errors",
    "add_adapters": "model.adapters",
    "evaluate": "evaluation.perplexity",
    "evaluate_run": "result",
    "export_run": "hand_over",
    "extract_text_model": "model.text_model",
    "fused_of": "model.install",
    "generate": "generation",
    "generate_run": "result",
    "grow_embeddings": "model.new_tokens",
    "grow_tokenizer": "model.new_tokens",
    "heed_signals": "stopping",
    "init_run": "initialise",
    "install": "model.install",
    "load": "model.load",
    "offload_originals": "model.original_module",
    "pack": "data.packing",
    "plan_run": "plan",
    "train_run": "run",
    "uninstall": "model.install",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'steep' has no attribute {name!r}")
    return getattr(import_module(f"steep.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
