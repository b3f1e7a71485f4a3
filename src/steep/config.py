"""Reading a run file; ``--section.field value`` on the command line overrides any field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from steep.credentials import refuse_credentials
from steep.data.sources import Source
from steep.errors import UserError, shown
from steep.invalid import explained
from steep.schema import RunConfig, TrainingSection


class _Loader(yaml.SafeLoader):
    """Plain values and nothing else; everything that is wrong is a `yaml.MarkedYAMLError`, with its line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key may stand once; YAML itself takes the last of two without a word."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key is a list or a section", key.start_mark)
            if key.value in seen:
                problem = f"{key.value!r} stands twice in a section"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Numbers and dates that are none (2020-13-45, !!int abc, 5,000 digits) raise whatever Python raises there."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ConstructorError(None, None, f"{shown(node.value)} is no {kind}", node.start_mark) from error


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        YAMLError: with `problem` and `problem_mark`.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = yaml.Mark("", len(before), before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        problem = f"the character U+{error.character:04X} is not allowed"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark) from error
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="its brackets are nested too deeply") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply command-line overrides (``--training.learning_rate 3e-5`` or
    ``--section.field=value``).

    In the run.yaml of a run folder, `training.output_dir` is that folder, wherever it lies now.

    Raises:
        UserError: with the field and the remedy, for everything that is wrong in the file or the overrides.
    """
    path = Path(path)
    if not path.is_file():
        remedy = "Write one with: steep init --model NAME --data FOLDER -o FILE"
        if (path / "run.yaml").is_file():
            remedy = f"The file of that run is {path / 'run.yaml'}"
        raise UserError("run file", f"{path} {'is no file' if path.exists() else 'does not exist'}", remedy)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("run file", f"{path} cannot be read: {error.strerror}", "Give a file you may read.") from error
    except UnicodeDecodeError as error:
        raise UserError("run file", f"{path} is not UTF-8 at byte {error.start}", "Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError("run file", f"{path} is not valid YAML{place}: {problem}", "Mend that line.") from error
    if not isinstance(tree, dict):
        raise UserError("run file", f"{path} holds no sections", "Write one with: steep init")
    return parse_config(merge(_where_it_lies(tree, path), parse_overrides(overrides)))


def _where_it_lies(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run folder may have been moved or copied: its own run file is that of the folder which it lies in."""
    folder, training = path.absolute().parent, tree.get("training")
    is_own = path.name == "run.yaml" and all((folder / name).is_file() for name in ("plan.json", "environment.json"))
    if not (is_own and isinstance(training, dict)):
        return tree
    return {**tree, "training": {**training, "output_dir": str(folder)}}


def recorded_config(run_yaml: Path, field: str = "run folder") -> RunConfig:
    """The run file that a run folder keeps.

    Raises:
        UserError: it is damaged.
    """
    try:
        tree = read_yaml(run_yaml.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(field, f"{run_yaml} is damaged: {error}", "Put it back as the run wrote it.") from error
    if not isinstance(tree, dict):
        raise UserError(field, f"{run_yaml} is damaged: it holds no sections", "Put it back as the run wrote it.")
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a tree of plain values.

    Raises:
        UserError: for the first thing that is wrong, with the number of further ones; a token or a password in it.
    """
    refuse_credentials(tree)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explained(error, _fields_at) from error
    if config.training.further:
        from steep.training.passed_through import check_further

        further = check_further(config.training.further, list(TrainingSection.model_fields))
        for name, value in further.items():
            setattr(config.training, name, value)
    _make_absolute(config)
    return config


def _make_absolute(config: RunConfig) -> None:
    """Model and text are found again from any folder, also when the run file is read out of the run folder."""
    model = Path(config.model.name).expanduser()
    if model.exists():
        config.model.name = str(model.absolute())
    if isinstance(config.model.new_tokens, str):
        config.model.new_tokens = str(Path(config.model.new_tokens).expanduser().absolute())
    config.data.sources = [
        source.model_copy(update={"path": str(Path(source.path).expanduser().absolute())}) if source.path else source
        for source in config.data.sources
    ]
    config.training.output_dir = str(Path(config.training.output_dir).expanduser())


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn ``--a.b value`` and ``--a.b=value`` into a tree; values are read as YAML (numbers, true, null, [lists])."""
    tree: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word:
            raise UserError(word, "it is no option of this command", "Override a field with --section.field value.")
        key, equals, value = word.removeprefix("--").partition("=")
        if "" in key.split("."):
            raise UserError(word, "a part of the field's name is missing", "Write --section.field VALUE.")
        if not equals:
            if not words:
                raise UserError(word, "its value is missing", f"Write {word} VALUE.")
            value = words.pop(0)
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(word, f"{parent} is given a value of its own too", "Give one of the two.")
        try:
            node[last] = read_yaml(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(word, f"{shown(value)} is not valid YAML", "Quote it, or close its brackets.") from error
    return tree


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """`base` with the leaves of `changes` in place; ``sources.0.path`` reaches into lists by number."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value, f"{section}{key}.")
        elif isinstance(value, Mapping) and isinstance(old, list):
            for index in map(str, value):
                if not (index.isdecimal() and int(index) <= len(old)):
                    raise UserError(
                        f"{section}{key}.{index}",
                        f"there are {len(old)} of them",
                        f"Give a number from 0; {len(old)} adds one.",
                    )
            items = {str(i): item for i, item in enumerate(old)}
            by_index = merge(items, {str(index): change for index, change in value.items()})
            merged[key] = list(by_index.values())
        else:
            merged[key] = value
    return merged


def _fields_at(location: Sequence[int | str]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        section = Source if part == "sources" else section.model_fields[part].annotation
    return list(section.model_fields)
