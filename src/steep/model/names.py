"""What the parts of a decoder are called, in transformers' models. Importing this loads nothing."""

from __future__ import annotations

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
