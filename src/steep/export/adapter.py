"""The adapter handed on: `final/` as PEFT saved it, without the names of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from steep.export.adapter_weights import CONFIG

# What only its own run needs.
_LEFT_OUT = ("training_args.json", "README.md")


def write_adapter(final: Path, folder: Path, base: str, revision: str | None) -> None:
    """Copy an adapter and its tokenizer.

    Args:
        base: how the base is called where others find it; it replaces what may be a path of this machine.
        revision: of the base on the hub.
    """
    shutil.copytree(final, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
