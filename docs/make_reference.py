"""Write docs/run-file.md from the schema of the run file: `python docs/make_reference.py`.

Names, types, ranges, defaults and descriptions come from `steep.schema` and `steep.data.sources`, the lists of further
settings from `steep.training.passed_through`. tests/test_reference.py holds the page to what this script writes.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from steep.data.sources import SUPPORTED_SUFFIXES, Source
from steep.schema import Learned, RunConfig
from steep.training.passed_through import HONOURED, REFUSED

PAGE = Path(__file__).with_name("run-file.md")
_BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "null"}

_HEAD = """\
<!-- Made by docs/make_reference.py from the schema. Change src/steep/schema.py, then run the script again. -->

# The run file

A run is one YAML file. `steep init` writes one with every field and a comment. `steep plan FILE` checks it.

The file has these sections: {sections}.
Only the fields marked "required" have to be there.
A name that is not listed here is an error, and the message names the nearest known one.

Each field can be overridden on the command line, for `plan` and for `train`:

```bash
steep train ko.yaml --training.learning_rate 3e-5 --data.max_length=4096
steep train ko.yaml --data.sources.0.path other.jsonl --evaluation.prompts '["Once upon a time"]'
```

The value is read as YAML. A list is reached by number, from 0.

The smallest run file:

```yaml
model:
  name: mistralai/Mistral-7B-v0.3
data:
  sources:
    - path: corpus/
training:
  output_dir: runs/ko
```
"""

_FURTHER = """\
## Further settings of `training`

These arguments of `transformers.TrainingArguments` may stand in the section `training` too. They are handed on as they
are, after a check of their type. Their meaning is in transformers' own documentation. A name also has to exist in the
installed version of transformers.
"""

_REFUSED = """\
## Settings that are refused

These arguments exist in transformers, but `steep` cannot honour them in a run file. They are an error and never
silently ignored.
"""


def render() -> str:
    """The whole page."""
    sections = RunConfig.model_fields
    parts = [_HEAD.format(sections=", ".join(f"`{name}`" for name in sections))]
    for name, info in sections.items():
        model = info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        parts.append(f"## `{name}`\n\n{_sentence(model)}\n\n{_table(model)}")
        if name == "data":
            parts.append(f"### `data.sources`\n\n{_sentence(Source)}\n\n{_table(Source)}\n{_formats()}")
    parts.append(_FURTHER + "\n" + _wrapped(sorted(HONOURED)))
    parts.append(_REFUSED + "\n" + _refused_table())
    return "\n".join(parts)


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _table(model: type[BaseModel]) -> str:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, info in model.model_fields.items():
        cells = (f"`{name}`", _type(info), _default(info), info.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(info: FieldInfo) -> str:
    bounds = {}
    for constraint in info.metadata:
        bounds |= {key: getattr(constraint, key) for key in _BOUNDS if getattr(constraint, key, None) is not None}
    limits = " ".join(f"{word} {bounds[key]:.15g}" for key, word in _BOUNDS.items() if key in bounds)
    return _kind(info.annotation) + (f", {limits}" if limits else "")


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is list:
        inner = arguments[0]
        return "list of sources" if inner is Source else f"list of {_kind(inner)}"
    if origin is dict:
        return "settings"
    if annotation is Learned:
        return "`auto: NUMBER`"
    return _PLAIN[annotation]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value).strip(chr(34))}`"


def _formats() -> str:
    return (
        "Files that are read: "
        + ", ".join(f"`{suffix}`" for suffix in SUPPORTED_SUFFIXES)
        + ".\n"
        + "A .txt or .md file is one document; a line of .jsonl and a row of .csv or .parquet is one document.\n"
    )


def _wrapped(names: list[str]) -> str:
    lines, line = [], ""
    for name in names:
        word = f"`{name}`" + ("." if name == names[-1] else ",")
        if line and len(line) + len(word) + 1 > 118:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line]) + "\n"


def _refused_table() -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(name)
    lines = ["| settings | why |", "|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
