"""The checkpoints of a run: which there are, how many stay, and the random state they keep."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch


def checkpoints(run_dir: Path) -> list[Path]:
    """The published checkpoints of a run, oldest step first."""
    found = [
        path for path in run_dir.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def retain(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the one at path `best` stays."""
    if limit is None:
        return
    for path in checkpoints(run_dir)[: -max(1, limit)]:
        if best is None or path.resolve() != Path(best).resolve():
            shutil.rmtree(path)


def rng_state() -> dict[str, Any]:
    """State of every random generator that training draws from: Python, numpy, torch on the CPU and on each GPU."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
