"""What models and the parts of a decoder are called. Importing this loads nothing."""

from __future__ import annotations

from pathlib import Path

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")


def is_missing_path(name: str) -> bool:
    """Whether `name` can only be a path, since no name on the hub looks like it, and nothing is there."""
    like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", ".gguf"))
    return like_path and not Path(name).expanduser().exists()
