"""The run file as a typed schema: its sections and fields, with their defaults, bounds and descriptions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from steep.data.sources import MIN_LENGTH, Number, Place, Source
from steep.errors import UserError
from steep.model.names import DEFAULT_RANK, EMBEDDINGS, LINEAR_LAYERS

Base = Literal["auto", "nf4", "int8", "fp8", "bf16", "fp16", "fp32"]


Integer = Annotated[int, Strict()]
MOST_NEW_TOKENS = 1_000_000  # room for as many as asked is taken at once, 70 bytes each
FORWARDS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # what rows_per_step stands in place of
_LARGEST_SEED = 2**32 - 1  # numpy's
VRAM = re.compile(r"(?P<number>\d{1,9}(\.\d{1,9})?)\s*(?P<unit>%|GiB|GB|MiB|MB)", re.IGNORECASE)


class Section(BaseModel):
    """A section of the run file: no unknown keys, no coercion between unlike types."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Learned(Section):
    """New tokens that are learned from the text."""

    auto: Integer = Field(gt=0, le=MOST_NEW_TOKENS, description="How many.")


class ModelSection(Section):
    """The base model, and in what it is kept and computed."""

    name: Place = Field(
        min_length=1, description="Hub name or local folder of a base (not instruct) model, or a .gguf file."
    )
    revision: str | None = Field(None, description="Commit, tag or branch on the hub.")
    base: Base = Field(
        "auto",
        description="What the frozen weights are kept in: nf4 (4 bit, double quantised), int8, fp8 (e4m3, a "
        "scale a row), bf16, fp16, fp32; auto: what a checkpoint is stored in if that is quantised; else fp8 where the "
        "card multiplies in it, the steps are fused and one fits; else nf4. The plan says why; a run keeps it.",
    )
    trained_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="What adapters and embeddings are trained in; bf16 halves their memory (rounded stochastically). "
        "auto: bf16 in a fused run with products in bf16 and optim adamw_8bit, else fp32.",
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="What products run in; auto: bf16 on cards that have it, fp16 on others, fp32 on a CPU."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="transformers' attention backend; auto: what the library chooses for the model. A fused run "
        "computes attention with backends of its own.",
    )
    fused: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Train and score with steep's own fused layers: faster, in less memory. auto: on a GPU where "
        "model, options and card allow it; the plan says why not. on: or it is an error; on a CPU too, to try it out.",
    )
    fp8_products: Literal["auto", "both", "backward", "none"] = Field(
        "auto",
        description="Which products of a fused run over a base in fp8 run on the card's fp8 units: both directions, "
        "the backward pass alone, or none (weights are dequantised: slower, closer to them). auto: both on a card that "
        "has such units, else none. Its checkpoints keep it.",
    )
    rope_scaling: dict[str, Any] | None = Field(
        None,
        description="For rows longer than the model was made for: how its rotary positions are stretched, in the terms "
        "of transformers' rope_parameters, such as {rope_type: yarn, factor: 4.0}; also linear, llama3, "
        "longrope. Default: the model's own.",
    )
    untie_embeddings: bool = Field(
        False, description="Train a head of its own from a checkpoint whose head is its embed_tokens."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    new_tokens: Place | Learned | None = Field(
        None,
        description="Tokens that the tokenizer gets: a UTF-8 file with one a line, or auto: 2000, so many learned from "
        "the text of role train.",
    )

    @field_validator("fused", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) else value  # which YAML reads bare on and off as

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _kind_and_factor(cls, value: Any) -> Any:
        if value is None or isinstance(value, Mapping):
            return value
        raise ValueError("give a kind and a factor: {rope_type: yarn, factor: 4.0}, or --model.rope_scaling.factor 4.0")

    @field_validator("new_tokens", mode="before")
    @classmethod
    def _file_or_number(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("say how many: new_tokens: {auto: 2000}, or --model.new_tokens.auto 2000")
        learned = isinstance(value, Mapping) and set(value) == {"auto"}
        number = value["auto"] if learned else None
        if isinstance(value, Learned | None) or (isinstance(value, str) and value):
            return value
        if isinstance(number, int) and not isinstance(number, bool) and 0 < number <= MOST_NEW_TOKENS:
            return value
        raise ValueError(f"give a file with one token a line, or auto: and a number from 1 to {MOST_NEW_TOKENS:,}")


class AdapterSection(Section):
    """LoRA on the linear layers and fully trained embeddings, in PEFT's own names."""

    r: Integer = Field(
        DEFAULT_RANK,
        gt=0,
        description="LoRA rank; lowered for a layer whose smaller side is below it. Only the default may be above all.",
    )
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
    cache_dir: Place | None = Field(None, description="Where tokenised text is kept; default: ~/.cache/steep.")


class TrainingSection(BaseModel):
    """transformers' TrainingArguments by their own names (more of them than are listed here), and steep's."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    output_dir: Place = Field(min_length=1, description="Folder of the run; never written over another run.")
    num_train_epochs: Number = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: Integer = Field(-1, ge=-1, description="Stop after so many steps; -1: when the epochs end.")
    rows_per_step: Integer | None = Field(
        None,
        ge=1,
        description="Rows of one optimizer step, of all processes together, in place of the next two fields: the plan "
        "then chooses these, within 3 % of the fastest that fit, and says why. A run keeps them.",
    )
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
    optimizer_in_backward: bool = Field(
        False,
        description="Update each tensor within the backward pass, as soon as its gradient is whole, and free that: a "
        "step never holds all gradients. Exact, so only with max_grad_norm: 0, one forward a step, "
        "adamw_8bit, one process. The first NaN or infinite step ends the run at its last checkpoint.",
    )
    offload_optimizer: Literal["none", "embeddings", "all"] = Field(
        "none",
        description="Whose optimizer states live in page-locked host memory: none, of the trained embeddings, or all. "
        "They come and go on streams of their own. The same weights to the bit, with adamw_8bit only.",
    )
    optimizer_states: Literal["8bit", "fp32"] = Field(
        "8bit",
        description="In what adamw_8bit keeps its moments: codes of 8 bits with a scale to each 256 of them, but of "
        "tensors of less than 4,096 elements; or fp32, which takes four times the memory.",
    )
    master_weights: Literal["none", "embeddings", "all"] = Field(
        "none",
        description="Whose bf16 weights have an fp32 master with adamw_8bit: none's, which are rounded stochastically, "
        "those of the trained embeddings, or all. The master is what is updated, and the weight is the bf16 nearest to "
        "it. It takes 2 bytes a value, where the optimizer's states live.",
    )
    grad_accum_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="In what a fused run in one process adds up the gradients of several forwards of a step, with "
        "adamw_8bit and where weights train in bf16: bf16 takes half the memory, and rounds the sum at each forward.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in the backward pass: much less memory; default: on a GPU. In a fused run: "
        "true as much as can be, false nothing that takes long, default as much as `vram` makes necessary.",
    )
    vram: str = Field(
        "auto",
        description="Memory of the card that a step may fill, such as 22GiB or 80%; auto: 90 % of it, less what "
        "others and the driver hold there when the run is planned. A fused run keeps what fits, and computes the rest "
        "again in the backward pass. A step that needs more is refused, also where the card has more than an amount "
        "that is given here; an amount above what the card has is taken at its word.",
    )
    host_memory: str = Field(
        "auto",
        description="Memory of the host that a run may fill with what layers keep for the backward pass, optimizer "
        "states (offload_optimizer) and the copy of a checkpoint, of all its processes there, such as 64GiB; auto: 80 "
        "% of what is available when the run is planned, and none for a card that is not here. Some virtual machines "
        "report less than they have.",
    )
    deterministic: bool = Field(
        False,
        description="On a GPU, take only kernels that give the same bits each time, so that a resumed run ends in "
        "those of one never stopped; slower. A CPU does so anyway.",
    )
    seed: Integer = Field(42, ge=0, le=_LARGEST_SEED, description="Of adapters, data order and dropout.")
    logging_steps: Number = Field(1, gt=0, description="Steps between two log lines.")
    save_steps: Number = Field(500, gt=0, description="Steps between two checkpoints; the end is always saved.")
    save_total_limit: Integer | None = Field(
        2, ge=1, description="Checkpoints that are kept: so many of the newest, and the best beside them; null: all."
    )
    metric_for_best_model: str | None = Field(
        None,
        description="Where eval_steps and save_steps meet, the checkpoint with the lowest one stays: "
        "eval_DOMAIN_bits_per_byte or eval_DOMAIN_loss; default: bits per byte of the first domain that is trained.",
    )
    eval_steps: Number | None = Field(
        None, gt=0, description="Steps between two evaluations; default: start and end only."
    )
    report_to: str | list[str] = Field("none", description="Trackers: tensorboard, wandb, mlflow, ... or none.")
    max_nonfinite_steps: Integer = Field(3, ge=1, description="Stop after so many NaN or infinite steps in a row.")
    spike_action: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn",
        description="What is done with a step whose loss or gradient norm jumps: off, warn (say it), skip (do not "
        "apply it), rollback (go back to the last checkpoint and pass over its rows). A kind of text that jumps more "
        "than five times in four spike_windows is trained; what comes more seldom is skipped each time, and said. A "
        "step with fewer rows than the others, as the last of an epoch may have, is not looked at.",
    )
    spike_threshold: Number = Field(
        6.0, gt=0, description="A jump is so many robust standard deviations above the median of the steps before."
    )
    spike_window: Integer = Field(
        256,
        ge=8,
        le=100_000,
        description="Steps that median and deviation are taken over. With more, rarer text is trained.",
    )

    @field_validator("vram", mode="before")
    @classmethod
    def _an_amount(cls, value: Any) -> Any:
        found = VRAM.fullmatch(value.strip()) if isinstance(value, str) else None
        most = 100 if found and found["unit"] == "%" else math.inf
        if value == "auto" or (found and 0 < float(found["number"]) <= most):
            return value
        raise ValueError("give an amount in GiB, GB, MiB or MB such as 22GiB, a share of the card such as 80%, or auto")

    @field_validator("host_memory", mode="before")
    @classmethod
    def _an_amount_of_the_host(cls, value: Any) -> Any:
        found = VRAM.fullmatch(value.strip()) if isinstance(value, str) else None
        if value == "auto" or (found and found["unit"] != "%" and float(found["number"]) > 0):
            return value
        raise ValueError("give an amount in GiB, GB, MiB or MB such as 64GiB, or auto")

    @field_validator("spike_action", mode="before")
    @classmethod
    def _off_is_false(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off so

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a run without a step trains nothing: give a number above 0, or -1 for whole epochs")
        return value

    @model_validator(mode="after")
    def _rows_or_forwards(self) -> TrainingSection:
        given = [f"training.{name}" for name in FORWARDS if name in self.model_fields_set]
        if self.rows_per_step is not None and given:
            raise UserError(
                "training.rows_per_step",
                f"the plan chooses how its rows are cut into forwards, and {' and '.join(given)} "
                f"{'say' if len(given) > 1 else 'says'} it too",
                f"Leave {' and '.join(FORWARDS)} out, or leave out rows_per_step (on the command line: "
                "--training.rows_per_step null).",
            )
        return self

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
        """The resolved run file: every field with its value, but for those that the plan is to choose."""
        tree = self.model_dump(mode="json")
        if self.training.rows_per_step is not None:
            tree["training"] = {name: value for name, value in tree["training"].items() if name not in FORWARDS}
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
