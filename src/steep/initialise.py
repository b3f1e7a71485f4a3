"""`steep init`: a commented run file, written from the schema itself."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from steep.data.sources import Source
from steep.errors import UserError
from steep.model.names import can_only_be_path
from steep.schema import FORWARDS, AdapterSection, DataSection, EvaluationSection, ModelSection, TrainingSection

_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "data": DataSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
}
_ROWS = math.prod(TrainingSection.model_fields[name].default for name in FORWARDS)  # as many as a file without them has
_SOURCE_FIELDS = ("path", "hub", "role", "domain", "text_field")


def init_run(
    model: str, data: Sequence[str], output: str | Path, *, replay: Sequence[str] = (), output_dir: str | None = None
) -> Path:
    """Write a run file with good defaults, each field with a comment.

    Args:
        model: hub name or folder of the base model.
        data: paths (or ``hub:NAME``) of the text to learn.
        output: the file to write.
        replay: the same of general text in the model's old language.
        output_dir: folder of the run; default: ``runs/`` and the file's stem.

    Raises:
        UserError: the file exists already or cannot be written, or the text is not there.
    """
    output = Path(output)
    if output.exists():
        raise UserError("-o", f"{output} exists already", "Give another name or delete it.")
    if not data:
        raise UserError("--data", "no text is named", "Give a file, a folder, a glob or hub:NAME.")
    if not model.strip():
        raise UserError("--model", "no model is named", "Give a hub name, a folder or a .gguf file.")
    if can_only_be_path(model) and not Path(model).expanduser().exists():
        raise UserError("--model", f"there is no {model}", "Give an existing folder or .gguf file, or a hub name.")
    for place in (*data, *replay):
        if place == "hub:":
            raise UserError("--data or --replay", "hub: names no data set", "Give hub:NAME.")
        if not place.startswith("hub:") and not glob.glob(str(Path(place).expanduser()), recursive=True):
            raise UserError(
                "--data or --replay", f"there is no {place!r}", "Check the spelling; a hub data set is hub:NAME."
            )
    sources = [_source(place, "train") for place in data] + [_source(place, "replay") for place in replay]
    given: dict[str, dict[str, Any]] = {
        "model": {"name": model},
        "data": {"sources": sources},
        "training": {"output_dir": output_dir or f"runs/{output.stem}", "rows_per_step": _ROWS},
    }
    lines = ["# A run of steep: continued pretraining. Check it with `steep plan`, start it with `steep train`."]
    for name, section in _SECTIONS.items():
        lines += ["", f"# {(section.__doc__ or '').strip().splitlines()[0]}", f"{name}:"]
        for field, info in section.model_fields.items():
            value = given.get(name, {}).get(field, info.get_default(call_default_factory=True))
            lines.append(f"  # {info.description}")
            instead = "# " if field in FORWARDS else ""  # of rows_per_step
            lines += _source_lines(value) if field == "sources" else [f"  {instead}{field}: {_yaml(value)}"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("-o", f"{output} cannot be written: {error.strerror}", "Give a place you may write.") from error
    return output


def _source(place: str, role: str) -> dict[str, str]:
    kind, name = ("hub", place.removeprefix("hub:")) if place.startswith("hub:") else ("path", place)
    return {kind: name, "role": role}


def _source_lines(sources: Sequence[dict[str, str]]) -> list[str]:
    lines = [f"  #   {name}: {Source.model_fields[name].description}" for name in _SOURCE_FIELDS] + ["  sources:"]
    for source in sources:
        first, *rest = [f"{key}: {_yaml(value)}" for key, value in source.items()]
        lines += [f"    - {first}", *(f"      {line}" for line in rest)]
    return lines


def _yaml(value: Any) -> str:
    # JSON is YAML; plain words and numbers stay bare for the eye.
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum() and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
