"""What the JSON files of a run folder hold, and the one place where they are read: another value than these is damage,
and is told with its file and its place before anything is made of it. Meaning and units: docs/run-folder.md.

A run folder may come from somebody else, from another version, or from a disk that failed. What a later version adds is
let pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from steep.errors import UserError, shown

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # of which thousands can be added up
Finite = Annotated[float, Field(allow_inf_nan=False)]


Level = Annotated[int, Field(ge=0, le=3)]  # steep.model.block.LEVELS
Place = Literal["gpu", "x", "attention", "all"]  # steep.model.block.PLACES


class Parameters(TypedDict):
    frozen: Count
    adapters: Count
    trained_embeddings: Count
    trained: Count


class PlannedSource(TypedDict):
    name: str
    domain: str
    role: str
    revision: NotRequired[str | None]
    streamed: NotRequired[bool]
    documents: Count
    tokens: Count
    digest: NotRequired[str]
    file_digests: NotRequired[dict[str, str]]


class Mixing(TypedDict):
    replay_share_achieved: Number


class PlannedText(TypedDict):
    fingerprint: str
    rows: Annotated[int, Field(ge=1, lt=2**63)]
    max_length: Count
    sources: list[PlannedSource]
    mixing: Mixing


class PlannedBase(TypedDict):
    bytes: Count
    peak_bytes: NotRequired[Count | None]
    fits: NotRequired[bool | None]
    seconds_per_step: NotRequired[Number | None]
    weight_error: Number | None


class PlannedDuration(TypedDict):
    seconds_per_step: Number
    tokens_per_second: Number
    hours: Number
    measured: NotRequired[dict[str, Number | None] | None]


class Fragmentation(TypedDict):
    bytes: Count
    left_bytes: Count | None


class Plan(TypedDict):
    model: str
    base: str
    compute_dtype: str
    trained_dtype: str
    parameters: Parameters
    data: PlannedText
    first_step: NotRequired[Count]
    steps: Count
    rows_per_step: Count
    per_device_train_batch_size: NotRequired[Count]
    gradient_accumulation_steps: NotRequired[Count]
    batch_reason: NotRequired[str | None]
    processes: NotRequired[Count]
    epochs: Number
    learning_rate: Number
    embedding_learning_rate: Number
    memory_bytes: dict[str, Count]
    fragmentation: NotRequired[Fragmentation | None]
    bases: NotRequired[dict[str, PlannedBase]]
    duration: NotRequired[PlannedDuration | None]
    fused: NotRequired[bool]
    fused_reason: NotRequired[str | None]
    levels: NotRequired[list[Level] | None]
    places: NotRequired[list[Place] | None]
    loss_way: NotRequired[Literal["tokens", "vocabulary", "narrow"] | None]
    tile: NotRequired[Count | None]
    fp8_products: NotRequired[Literal["both", "backward", "none"] | None]
    warnings: list[str]


class Environment(TypedDict):
    python: str
    platform: str
    cpus: Count | None
    gpus: list[str]
    cuda: str | None
    packages: dict[str, str]


class SourceAccount(TypedDict):
    name: str
    domain: str
    role: str
    documents: dict[str, Count]
    tokens: dict[str, Count]


class Ledger(TypedDict):
    sources: list[SourceAccount]
    targets: Count
    targets_reached: Count
    targets_trained: Count
    rows_trained: Count
    rows_skipped: NotRequired[Count]
    rows_refused: Count
    epochs: Number
    adds_up: bool
    problems: list[str]


class TensorProof(TypedDict):
    group: str
    learning_rate: Number
    updates: Count
    elements: Count
    changed_share: Number
    trained: bool


class Proof(TypedDict):
    complete: bool
    trained: dict[str, TensorProof]
    frozen_tensors: Count
    frozen_changed: list[str]


class Score(TypedDict):
    step: Count
    domain: str
    role: Literal["train", "replay", "heldout"]
    loss: Number | None
    perplexity: Finite | None
    bits_per_byte: Number | None
    tokens: Count
    bytes: Count
    documents: Count
    fp8_products: NotRequired[Literal["both", "backward", "none"] | None]


class Sample(TypedDict):
    step: Count
    prompt: str
    completion: str


class Piece(TypedDict):
    source: str
    document: Count
    text: str | None


class IncidentRow(TypedDict):
    row: Count
    pieces: list[Piece]


class Incident(TypedDict):
    step: Count
    kind: str
    action: str
    loss: Number | None
    grad_norm: Number | None
    median: NotRequired[Number | None]
    rows: list[IncidentRow]


class ChangedField(TypedDict):
    step: Count
    field: str
    old: Any
    new: Any


class SkippedStep(TypedDict):
    step: Count
    rows: list[Count]
    loss: Number
    grad_norm: Number


class Parent(TypedDict):
    checkpoint: Annotated[str, Field(min_length=1)]
    step: Count
    digest: str
    rate_factor: Number
    data_start: Count
    fingerprint: str | None
    passed_over: list[SkippedStep]


class SkippedSteps(TypedDict):
    steps: list[SkippedStep]


class NewToken(TypedDict):
    id: Count
    text: str


class NewTokens(TypedDict):
    asked: Count
    words: list[str] | None
    tokens: list[NewToken]


class StatefulCallback(TypedDict):
    args: dict[str, Any]
    attributes: dict[str, Any]


class TrainerState(TypedDict):
    global_step: Count
    epoch: NotRequired[Number | None]
    total_flos: NotRequired[Number]
    num_input_tokens_seen: NotRequired[Count]
    train_batch_size: NotRequired[Count | None]
    log_history: NotRequired[list[dict[str, Any]]]
    best_metric: NotRequired[Number | None]
    best_global_step: NotRequired[Count | None]
    stateful_callbacks: NotRequired[dict[str, StatefulCallback | list[StatefulCallback]]]


class CheckpointFormat(TypedDict):
    format: Count
    steep: str
    transformers: NotRequired[str]


class TrainingArguments(TypedDict):
    metric_for_best_model: NotRequired[str | None]
    per_device_train_batch_size: NotRequired[Count]
    gradient_accumulation_steps: NotRequired[Count]
    seed: NotRequired[Count]
    data_seed: NotRequired[Count | None]


class Choices(TypedDict):
    fused: bool
    trained_dtype: str
    levels: list[Level] | None
    chosen_for: Count
    loss_way: Literal["tokens", "vocabulary", "narrow"] | None
    tile: NotRequired[Count | None]
    places: NotRequired[list[Place] | None]
    fp8_products: NotRequired[Literal["both", "backward", "none"] | None]
    backends: dict[str, str]


Metrics = Mapping[str, Number | None]

# By name in the run folder; the last four, of which only what is read again is here, in its checkpoints.
# Lines are added to those of `GROWING` one by one, so a crash can cut the last one off; others are replaced as a whole.
SHAPES: dict[str, Any] = {
    "plan.json": Plan,
    "environment.json": Environment,
    "ledger.json": Ledger,
    "proof.json": Proof,
    "parent.json": Parent,
    "skipped_steps.json": SkippedSteps,
    "new_tokens.json": NewTokens,
    "metrics.jsonl": Metrics,
    "evaluation.jsonl": Score,
    "samples.jsonl": Sample,
    "incidents.jsonl": Incident,
    "changes.jsonl": ChangedField,
    "format.json": CheckpointFormat,
    "trainer_state.json": TrainerState,
    "training_args.json": TrainingArguments,
    "choices.json": Choices,
}
GROWING = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "incidents.jsonl")


def read_json(file: Path, remedy: str = "Mend or delete the file.") -> dict[str, Any]:
    """A JSON file of a run folder; empty if it does not exist.

    Raises:
        UserError: it is damaged.
    """
    if not file.exists():
        return {}
    try:
        return parsed(file)
    except ValueError as error:
        raise UserError("run folder", f"{file} is damaged: {error}", remedy) from error


def parsed(file: Path, *, nan: bool = False) -> dict[str, Any]:
    """The same, for whoever has another name for the damage.

    Args:
        nan: it is a file of transformers', which writes NaN where there is one.

    Raises:
        ValueError: it is damaged.
    """
    return checked(_parsed(file.read_bytes(), nan), SHAPES[file.name])


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of a run folder, each of a step; none if it does not exist. A last line cut off by
    a crash is left out.

    Raises:
        UserError: it is damaged.
    """
    if not file.exists():
        return []
    *lines, last = file.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = _parsed(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
            rows.append(checked(row, SHAPES[file.name]))
        except ValueError as error:
            problem = f"{file} is damaged: line {number}: {error}"
            raise UserError("run folder", problem, "Mend or delete the broken line.") from error
    # A line that a crash cut off still has its beginning; it may end within a letter.
    if last and not (file.name in GROWING and last.startswith(b"{")):
        problem = f"{file} is damaged: its last line is not whole"
        raise UserError("run folder", problem, "Mend or delete the broken line.")
    return rows


def checked(tree: Any, shape: Any) -> Any:
    """`tree` itself, once it is known to have the shape.

    Raises:
        ValueError: it has not; the message says where.
    """
    try:
        _adapter(shape).validate_python(tree, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "missing":
            raise ValueError(f"it has no {place}") from error
        should = first["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
        raise ValueError(f"{place or 'it'} is {shown(first['input'])}, and not {should}") from error
    return tree


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _parsed(content: bytes, nan: bool = False) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=None if nan else _refuse)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:  # thousands of brackets
        raise ValueError("it is nested too deeply") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not have")
