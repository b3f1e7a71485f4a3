"""The run file: a typed schema, read from YAML; ``--section.field value`` on the command line overrides any field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from steep.data.sources import MIN_LENGTH, Source
from steep.errors import UserError, did_you_mean
from steep.model.names import EMBEDDINGS, LINEAR_LAYERS

Base = Literal["auto", "nf4", "int8", "bf16", "fp16", "fp32"]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


Integer = Annotated[int, Strict()]
# YAML reads 3e-5 as text, which pydantic turns into a number; it would turn true into 1 as well.
Number = Annotated[float, BeforeValidator(_no_flag), AllowInfNan(False)]


class Section(BaseModel):
    """A section of the run file: no unknown keys, no coercion between unlike types."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Learned(Section):
    """New tokens that are learned from the text."""

    auto: Integer = Field(gt=0, description="How many.")


class ModelSection(Section):
    """The base model, and in what it is kept and computed."""

    name: str = Field(
        min_length=1, description="Hub name or local folder of a base (not instruct) model, or a .gguf file."
    )
    revision: str | None = Field(None, description="Commit, tag or branch on the hub.")
    base: Base = Field(
        "auto",
        description="What the frozen weights are kept in: nf4 (4 bit, double quantised), int8, bf16, fp16, fp32; "
        "auto: nf4.",
    )
    trained_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="What adapters and embeddings are trained in; bf16 halves their memory (rounded stochastically).",
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="What products run in; auto: bf16 on cards that have it, fp16 on others, fp32 on a CPU."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="transformers' attention backend; auto: what the library chooses for the model."
    )
    untie_embeddings: bool = Field(
        False, description="Train a head of its own from a checkpoint whose head is its embed_tokens."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    new_tokens: str | Learned | None = Field(
        None,
        description="Tokens that the tokenizer gets: a UTF-8 file with one a line, or auto: 2000, so many learned from "
        "the text of role train.",
    )

    @field_validator("new_tokens", mode="before")
    @classmethod
    def _file_or_number(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("say how many: new_tokens: {auto: 2000}, or --model.new_tokens.auto 2000")
        learned = isinstance(value, Mapping) and set(value) == {"auto"}
        number = value["auto"] if learned else None
        if isinstance(value, Learned | None) or (isinstance(value, str) and value):
            return value
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return value
        raise ValueError("give a file with one token a line, or auto: and a number above 0")


class AdapterSection(Section):
    """LoRA on the linear layers and fully trained embeddings, in PEFT's own names."""

    r: Integer = Field(256, gt=0, description="LoRA rank; lowered for a layer whose smaller side is below it.")
    lora_alpha: Number = Field(32, gt=0, description="LoRA's scale is lora_alpha / sqrt(r), or / r without use_rslora.")
    use_rslora: bool = Field(True, description="Rank-stabilised scaling (Kalajdzievski 2023).")
    lora_dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout before LoRA's A.")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        default_factory=lambda: list(LINEAR_LAYERS), description="Linear layers that get an adapter."
    )
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = Field(
        default_factory=lambda: list(EMBEDDINGS),
        description="Modules trained whole: the two embeddings, or [] for none.",
    )
    init_lora_weights: bool | str = Field(
        True,
        description="Where adapters begin. true: at no effect; loftq: at the quantisation's error; pissa: at the "
        "weights' principal directions.",
    )
    use_dora: bool = Field(False, description="DoRA: train each output row's length apart from its direction (slower).")


class DataSection(Section):
    """What is read, and how it becomes rows."""

    sources: list[Source] = Field(
        min_length=1, description="Files, folders, globs or hub data sets, each with its role."
    )
    max_length: Integer = Field(
        2048, ge=MIN_LENGTH, description="Tokens in a row, the longest context that is trained."
    )
    packing: Literal["sequential", "best_fit"] = Field(
        "sequential", description="How documents fill rows; best_fit splits none that fits into a row."
    )
    replay_share: Number = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the training tokens that `replay` sources get; 0.25 is advised for a new language.",
    )
    holdout: Number = Field(
        0.01, ge=0, lt=1, description="Share of the documents held out for evaluation, by hash of the text."
    )
    keep_duplicates: bool = Field(False, description="Train exact duplicates of a document too.")
    cache_dir: str | None = Field(None, description="Where tokenised text is kept; default: ~/.cache/steep.")


class TrainingSection(BaseModel):
    """transformers' TrainingArguments by their own names (more of them than are listed here), and steep's."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    output_dir: str = Field(min_length=1, description="Folder of the run; never written over another run.")
    num_train_epochs: Number = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: Integer = Field(-1, ge=-1, description="Stop after so many steps; -1: when the epochs end.")
    per_device_train_batch_size: Integer = Field(2, gt=0, description="Rows in one forward.")
    gradient_accumulation_steps: Integer = Field(8, gt=0, description="Forwards in one step.")
    learning_rate: Number = Field(5e-5, gt=0, description="Peak rate of the adapters.")
    embedding_learning_rate: Number | None = Field(
        None,
        gt=0,
        description="Peak rate of embed_tokens and lm_head; default: learning_rate / 10.",
    )
    loraplus_lr_ratio: Number = Field(
        1.0, gt=0, description="LoRA+: LoRA's B trains at this multiple of learning_rate; 16 is its authors' advice."
    )
    lr_scheduler_type: str = Field(
        "cosine", description="cosine, linear, warmup_stable_decay, constant_with_warmup, constant, ..."
    )
    warmup_steps: Number | None = Field(
        None, ge=0, description="Steps of linear warm-up; below 1: their share of all steps; default: 0.05, in a "
        "branch 0.",
    )  # fmt: skip
    warmup_lr_rate: Number | None = Field(
        None, ge=0, le=1, description="Share of the peak rates at which the warm-up starts; default: 0."
    )
    min_lr_rate: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the peak rates at which the decay ends; default: 0.1 for cosine and linear, 0 for "
        "warmup_stable_decay.",
    )
    decay_steps: Number | None = Field(
        None,
        gt=0,
        description="warmup_stable_decay: last steps, in which the rate falls; below 1: their share of all steps; "
        "default: 0.2, in a branch all.",
    )
    decay_type: Literal["1-sqrt", "linear", "cosine"] | None = Field(
        None, description="warmup_stable_decay: how the rate falls; default: 1-sqrt."
    )
    cooldown_steps: Number | None = Field(
        None,
        gt=0,
        description="constant_with_warmup and warmup_stable_decay: steps after the warm-up in which the rate falls "
        "to stable_lr_rate; below 1: their share of all steps; default: none.",
    )
    stable_lr_rate: Number | None = Field(
        None, gt=0, lt=1, description="Share of the peak rates at which a cool-down ends and the rate stays."
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's weight decay; never on norms and biases.")
    max_grad_norm: Number = Field(1.0, ge=0, description="Clip the global gradient norm here; 0: never.")
    optim: str = Field("adamw_8bit", description="adamw_8bit, adamw_torch or any other of transformers.")
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass: much less memory; default: on a GPU."
    )
    seed: Integer = Field(42, ge=0, description="Of adapters, data order and dropout.")
    logging_steps: Number = Field(1, gt=0, description="Steps between two log lines.")
    save_steps: Number = Field(500, gt=0, description="Steps between two checkpoints; the end is always saved.")
    save_total_limit: Integer | None = Field(2, ge=1, description="Checkpoints that are kept.")
    eval_steps: Number | None = Field(
        None, gt=0, description="Steps between two evaluations; default: start and end only."
    )
    report_to: str | list[str] = Field("none", description="Trackers: tensorboard, wandb, mlflow, ... or none.")
    max_nonfinite_steps: Integer = Field(3, ge=1, description="Stop after so many NaN or infinite steps in a row.")

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a run without a step trains nothing: give a number above 0, or -1 for whole epochs")
        return value

    @property
    def further(self) -> dict[str, Any]:
        """The TrainingArguments given beyond the fields listed here."""
        return dict(self.model_extra or {})


class EvaluationSection(Section):
    """Held-out loss by domain, and sample texts."""

    stride: Integer | None = Field(
        None, gt=0, description="New tokens a window of a long document scores; default: half a row."
    )
    max_tokens: Integer | None = Field(100_000, gt=0, description="Held-out tokens scored a domain at the most.")
    prompts: list[str] = Field(
        default_factory=list, description="Texts completed before and after training (samples.jsonl)."
    )
    max_new_tokens: Integer = Field(64, gt=0, description="Length of each sample.")


class RunConfig(Section):
    """A whole run file."""

    model: ModelSection
    adapter: AdapterSection = Field(default_factory=lambda: AdapterSection.model_validate({}))
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))

    @model_validator(mode="after")
    def _rates_need_embeddings(self) -> RunConfig:
        if self.training.embedding_learning_rate is not None and not set(self.adapter.modules_to_save) & set(
            EMBEDDINGS
        ):
            raise UserError(
                "training.embedding_learning_rate",
                "it is set but no embedding is trained (adapter.modules_to_save is empty)",
                f"Set adapter.modules_to_save: [{', '.join(EMBEDDINGS)}] or leave the rate out.",
            )
        if self.model.new_tokens is not None and not self.adapter.modules_to_save:
            raise UserError(
                "model.new_tokens",
                "new tokens need trained embeddings, and adapter.modules_to_save is empty",
                f"Set adapter.modules_to_save: [{', '.join(EMBEDDINGS)}] or leave new_tokens out.",
            )
        if self.model.trained_dtype == "bf16" and self.model.compute_dtype in ("fp16", "fp32"):
            raise UserError(
                "model.trained_dtype",
                f"bf16 cannot be trained with compute_dtype {self.model.compute_dtype}",
                "Set model.compute_dtype: bf16, or model.trained_dtype: fp32.",
            )
        if self.model.untie_embeddings and "lm_head" not in self.adapter.modules_to_save:
            raise UserError(
                "model.untie_embeddings",
                "a head of its own that is not trained would stay what embed_tokens was",
                "Put lm_head into adapter.modules_to_save, or leave it out.",
            )
        return self

    def to_yaml(self) -> str:
        """The resolved run file: every field with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _EachKeyOnce(yaml.SafeLoader):
    """YAML itself takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice in a section, again in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply command-line overrides (``--training.learning_rate 3e-5`` or
    ``--section.field=value``).

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
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise UserError("run file", f"{path} cannot be read: {error.strerror}", "Give a file you may read.") from error
    except UnicodeDecodeError as error:
        raise UserError("run file", f"{path} is not UTF-8 at byte {error.start}", "Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError("run file", f"{path} is not valid YAML{place}: {problem}", "Mend that line.") from error
    if not isinstance(tree, dict):
        raise UserError("run file", f"{path} holds no sections", "Write one with: steep init")
    return parse_config(merge(tree, parse_overrides(overrides)))


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a tree of plain values.

    Raises:
        UserError: for the first thing that is wrong, with the number of further ones.
    """
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from error
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
            node[last] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(word, f"{value!r} is not valid YAML", "Quote it, or close its brackets.") from error
    return tree


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """`base` with the leaves of `changes` in place; ``sources.0.path`` reaches into lists by number."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value, f"{section}{key}.")
        elif isinstance(value, Mapping) and isinstance(old, list):
            for index in value:
                if not (index.isdecimal() and int(index) <= len(old)):
                    raise UserError(
                        f"{section}{key}.{index}",
                        f"there are {len(old)} of them",
                        f"Give a number from 0; {len(old)} adds one.",
                    )
            by_index = merge({str(i): item for i, item in enumerate(old)}, value)
            merged[key] = list(by_index.values())
        else:
            merged[key] = value
    return merged


def _explain(error: ValidationError) -> UserError:
    errors = error.errors()
    first = errors[0]
    # Union members stand in the location too ("list[str]"): names of types, not of fields.
    location = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    left = len(errors) - 1
    more = f" ({left} more {'problem' if left == 1 else 'problems'} after this one.)" if left else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        hint = did_you_mean(str(first["loc"][-1]), known) or f"Known here: {', '.join(known)}."
        return UserError(field, "it is not a field of the run file", hint + more)
    if first["type"] == "missing":
        return UserError(field, "it is missing", f"Add it to the run file.{more}")
    given, message = first.get("input"), first["msg"].removeprefix("Value error, ")
    remedy = _remedy(first)
    if remedy is None:  # the message is all there is to say
        return UserError(field, f"{given!r} is not valid", f"{message[0].upper()}{message[1:]}.{more}")
    return UserError(field, f"{given!r} is not valid", f"{remedy}{more}")


_REMEDIES = {
    "greater_than": "Give a number above {gt}.",
    "greater_than_equal": "Give {ge} or more.",
    "less_than": "Give a number below {lt}.",
    "less_than_equal": "Give {le} or less.",
    "literal_error": "Give one of {expected}.",
    "finite_number": "Give a finite number.",
    "too_short": "Give at least {min_length}.",
    "string_too_short": "Give a text.",
    "list_type": "Write a list: [{given}].",
    "int_type": "Give a whole number.",
    "int_parsing": "Give a whole number.",
    "int_from_float": "Give a whole number.",
    "float_type": "Give a number.",
    "float_parsing": "Give a number.",
    "string_type": "Give a text.",
    "bool_type": "Write true or false.",
    "bool_parsing": "Write true or false.",
}


def _remedy(error: Any) -> str | None:
    remedy = _REMEDIES.get(error["type"])
    return remedy and remedy.format(**error.get("ctx", {}), given=error.get("input"))


def _fields_at(location: Sequence[int | str]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        section = Source if part == "sources" else section.model_fields[part].annotation
    return list(section.model_fields)
