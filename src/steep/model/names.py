"""What models and the parts of a decoder are called. Importing this loads nothing."""

from __future__ import annotations

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
DEFAULT_RANK = 256


def can_only_be_path(name: str) -> bool:
    """Whether no name on the hub looks like `name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", ".gguf"))
