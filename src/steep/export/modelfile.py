"""The Modelfile with which Ollama takes a GGUF file in."""

from __future__ import annotations

_LONGEST = 8192  # Ollama reserves memory for the whole of it


def modelfile(gguf_name: str, context: int) -> str:
    """`ollama create NAME -f Modelfile`, for a base model: the prompt is continued, in no chat template."""
    return (
        f"# ollama create NAME -f Modelfile && ollama run NAME\n"
        f"FROM ./{gguf_name}\n"
        f"# a base model: it continues the prompt\n"
        f'TEMPLATE """{{{{ .Prompt }}}}"""\n'
        f"PARAMETER num_ctx {min(context, _LONGEST)}\n"
    )
