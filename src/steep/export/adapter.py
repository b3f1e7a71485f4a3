"""The adapter handed on: `final/` without the names of this machine, in the plainest form that PEFT's format has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from steep.export.adapter_weights import PREFIX, WEIGHTS, AdapterWeights
from steep.model.adapter_config import CONFIG
from steep.tensor_files import write_tensors

# What only its own run needs.
_LEFT_OUT = ("training_args.json", "README.md")
# What PEFT and tokenizers write; what somebody else put there, such as a pickle, is not handed on in the user's name.
_KEPT = (".json", ".safetensors", ".jinja", ".model", ".txt")


def write_adapter(adapter: AdapterWeights, folder: Path, base: str, revision: str | None) -> None:
    """Copy an adapter and its tokenizer.

    Without trained embeddings vLLM and llama.cpp take the adapter, and each has a reading of its own: llama.cpp's
    converter scales by alpha / r even where rsLoRA is on, vLLM gives every layer one rank and scale. So the scale is
    folded into B, and lower ranks are filled up with zeros. What the adapter computes is the same.

    Args:
        base: how the base is called where others find it; it replaces what may be a path of this machine.
        revision: of the base on the hub.
    """
    shutil.copytree(adapter.folder, folder, dirs_exist_ok=True, ignore=_ignored)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    if not adapter.whole:
        config |= _write_folded(adapter, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ignored(folder: str, names: list[str]) -> list[str]:
    return [
        name for name in names if name in _LEFT_OUT or not (Path(name).suffix in _KEPT or Path(folder, name).is_dir())
    ]


def _write_folded(adapter: AdapterWeights, file: Path) -> dict[str, Any]:
    """Write s·B as B, in fp32, since it need not fit into 16 bits, and all ranks as the highest.

    Returns:
        What the adapter's config then has to say.
    """
    modules = sorted(adapter.modules)
    r = max(adapter.rank(module) for module in modules)
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        a, b = adapter.halves(module)
        more = r - adapter.rank(module)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(b * adapter.scale(module), (0, more))
        if adapter.config.use_dora:  # its lengths are of W + s·BA, which stays as it is
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = adapter.magnitude(module)
    write_tensors(tensors, file, {"format": "pt"})
    return {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
