"""What a model name stands for, found out before any weight is read: its config, and whether steep can train it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from steep.errors import UserError, did_you_mean, shown
from steep.foreign import fault_of_json, panics_held, reason, told_as_input, told_by
from steep.model.fp8_published import check_published, is_published_fp8
from steep.model.generation_config import check_generation_config
from steep.model.gguf import converted_folder
from steep.model.gguf_fidelity import check_config
from steep.model.gguf_file import GgufFile, read_gguf
from steep.model.gguf_vocabulary import tokenizer_in
from steep.model.look_up import find, is_taken_as_it_is
from steep.model.names import can_only_be_path
from steep.model.rope import stretch
from steep.model.safety import check_safe, refuse_link_outside

ODD_CONFIG = "Put its values back as they were, or download it again."
CONFIG = ("config.json",)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip
_CHAT = {"instruct", "it", "chat", "sft", "dpo", "rlhf"}
_BASE = {"base", "pt", "pretrained"}


@dataclass(frozen=True)
class ResolvedModel:
    """A causal language model that exists and can be trained.

    Attributes:
        name: hub name or folder that transformers' `from_pretrained` takes.
        arguments: what else `from_pretrained` needs (`revision`, `gguf_file`, `trust_remote_code`, `local_files_only`).
        config: its transformers config, with the run's own scaling of positions in it.
        rope_scaling: that scaling, if the run names one.
    """

    name: str
    arguments: dict[str, Any]
    config: PretrainedConfig
    rope_scaling: Mapping[str, Any] | None = None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's own quantisation settings, if it is stored quantised."""
        stored = getattr(self.config, "quantization_config", None)
        return stored if stored is None or isinstance(stored, dict) else stored.to_dict()

    @property
    def stretched(self) -> PretrainedConfig | None:
        """The config, if it is not the checkpoint's own."""
        return None if self.rope_scaling is None else self.config

    @property
    def stored_by(self) -> str | None:
        """The method by which the checkpoint is stored quantised, as transformers names it, if it is."""
        return None if self.quantization is None else str(self.quantization.get("quant_method", "bitsandbytes"))

    def file(self, name: str) -> Path | None:
        """Where a file of the checkpoint lies that is copied from there, downloaded if need be; None if it has no such.

        Raises:
            UserError: in a folder, it is a link to somewhere else; or see `steep.model.look_up.find`.
        """
        found = find(self.name, name, revision=self.arguments.get("revision"))
        if found is not None and Path(self.name).is_dir():
            refuse_link_outside(found, Path(self.name), "model.name")
        return found


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    field: str = "model.name",
) -> ResolvedModel:
    """Find the model called `name` and check that steep can continue its pretraining.

    Args:
        rope_scaling: of its positions, in place of its own (`steep.model.rope`).

    Raises:
        UserError: no such folder or hub model, offline, no config, not a causal language model, an unknown
            quantisation, or what `steep.model.safety` refuses.
    """
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        arguments["revision"] = revision
    if Path(name).expanduser().exists():
        name = str(Path(name).expanduser())
    gguf: GgufFile | None = None
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise UserError(field, f"there is no file {name}", "Give the path of a .gguf file or of a model folder.")
        if (folder := converted_folder(file)).is_dir():
            name = str(folder)
        else:
            gguf = read_gguf(file, field)
            name, arguments["gguf_file"] = str(file.parent), file.name
    elif not Path(name).is_dir() and can_only_be_path(name):
        raise UserError(field, f"there is no folder {name}", "Give an existing model folder or a name on the hub.")
    elif Path(name).is_dir():
        remedy = "Give a folder that save_pretrained wrote, or a hub name."
        if not (Path(name) / "config.json").is_file():
            is_adapter = (Path(name) / "adapter_config.json").is_file()
            what = "holds an adapter, not a model" if is_adapter else "has no config.json"
            raise UserError(field, f"the folder {name} {what}", remedy)
    config = read_config(name, arguments, field)
    if gguf is not None:
        check_config(gguf, config, field)
    resolved = ResolvedModel(name, arguments, config, rope_scaling)
    with told_as_input(field, f"the config.json of {name} cannot be understood", ODD_CONFIG):
        _check_causal(config, name, field)
        quantization = resolved.quantization or {}
        method = quantization.get("quant_method")
        if is_published_fp8(quantization):
            check_published(quantization, name, field)
        elif method not in (None, "bitsandbytes"):
            raise UserError(
                field,
                f"its weights are stored quantised by {method}, which cannot be trained over",
                "Give the 16-bit checkpoint, or one quantised by bitsandbytes or in e4m3 (fp8, compressed-tensors).",
            )
    check_safe(resolved, field)
    if is_taken_as_it_is(name, revision):
        arguments["local_files_only"] = True  # transformers would wait for the hub at each file that is not there
    check_generation_config(name, revision, field)
    if rope_scaling is not None:
        stretch(config, rope_scaling)
    return resolved


def read_tokenizer(model: ResolvedModel, field: str = "model.name") -> Any:
    """The tokenizer that comes with `model`.

    Raises:
        UserError: it has none, or one that cannot be read or used.
    """
    folder = Path(model.name)
    if folder.is_dir() and "gguf_file" not in model.arguments and not _holds_tokenizer(folder):
        remedy = "Put the files of the base model's tokenizer beside it (tokenizer.json, tokenizer_config.json)."
        raise UserError(field, f"the folder {folder} has no tokenizer", remedy)
    return _read_tokenizer(model.name, model.arguments, field)


def _read_tokenizer(name: str, arguments: dict[str, Any], field: str) -> Any:
    with panics_held(), told_by(lambda error: _unreadable(error, name, arguments, field, TOKENIZER)):
        if "gguf_file" in arguments:
            tokenizer = tokenizer_in(read_gguf(Path(name) / arguments["gguf_file"], field), field)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        # Some faults show when it is used.
        for special in (False, True):
            tokenizer.decode(tokenizer("a", add_special_tokens=special)["input_ids"])
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if not isinstance(token, int | None):
                raise TypeError(f"the number of a special token is {token!r}")
    return tokenizer


def _holds_tokenizer(folder: Path) -> bool:
    kinds = ("token", "vocab", "spiece", "sentencepiece", "merges", "tekken")
    return any(file.name.startswith(kinds) or file.suffix in (".model", ".tiktoken") for file in folder.iterdir())


def read_tokenizer_folder(folder: Path, field: str = "run folder") -> Any:
    """A tokenizer that was saved in `folder`, with new tokens in it.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(field, f"{folder} is not there, and holds the run's tokenizer", "Put it back, or train again.")
    # Without a word on it transformers asks on the terminal whether code that lies there should run.
    return _read_tokenizer(str(folder), {"trust_remote_code": False}, field)


def looks_like_chat(model: ResolvedModel, tokenizer: Any) -> bool:
    """Whether this is an instruct model: by a part of its name, or by a chat template in its tokenizer.

    A template says nothing of Qwen, whose base models have one too, nor against a name that says base.
    """
    name = f"{Path(model.name).name} {model.arguments.get('gguf_file', '')}".lower()
    parts = set(re.split(r"[-_. ]", name))
    if parts & _CHAT or parts & _BASE or model.config.model_type.startswith("qwen"):
        return bool(parts & _CHAT)
    return bool(getattr(tokenizer, "chat_template", None))


def read_config(name: str, arguments: dict[str, Any], field: str) -> PretrainedConfig:
    """The config of the model called `name`.

    Raises:
        UserError: it cannot be had.
    """
    with told_by(lambda error: _unreadable(error, name, arguments, field, CONFIG)):
        return AutoConfig.from_pretrained(name, **arguments)


def _unreadable(
    error: BaseException, name: str, arguments: dict[str, Any], field: str, files: Sequence[str]
) -> UserError:
    """What is said where a library could not read `files` of a checkpoint, those that it has."""
    if "trust_remote_code" in str(error):
        remedy = "If you trust that code, set model.trust_remote_code: true."
        return UserError(field, f"{name} needs code that comes with the checkpoint", remedy)
    if "gguf_file" in arguments:
        problem = f"{Path(name) / arguments['gguf_file']} cannot be read: {reason(error)}"
        return UserError(field, problem, "Give a whole .gguf file, or the model's safetensors checkpoint.")
    if Path(name).is_dir():
        there = [Path(name) / file for file in files if (Path(name) / file).is_file()]
        for file in there:
            if fault := fault_of_json(file):
                return UserError(field, f"{file} is damaged: {fault}", "Put it back, or download it again.")
        which = f" ({', '.join(file.name for file in there)})" if there and len(files) > 1 else ""
        what = f"the tokenizer of {name}{which}" if files is TOKENIZER else f"the config.json of {name}"
        return UserError(field, f"{what} cannot be read: {reason(error)}", "Put it back, or download it again.")
    offline = is_offline_mode()
    of_hub = "is not in the local cache, and the hub is off (HF_HUB_OFFLINE)" if offline else "could not be had"
    where = f"is no folder here, and {of_hub}"
    here = Path.cwd() / Path(name).parent
    near = [str(Path(name).parent / place.name) for place in here.iterdir()] if here.is_dir() else []
    remedies = [
        did_you_mean(name, near),
        "Unset HF_HUB_OFFLINE to download it." if offline else "Check spelling and network (hf download NAME); a "
        "gated model needs hf auth login.",
        "A local folder works too.",
    ]  # fmt: skip
    return UserError(
        field,
        f"{name} {where}: {reason(error)}" if not offline else f"{name} {where}",
        " ".join(remedy for remedy in remedies if remedy),
    )


def text_config_of(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of the text model inside a multimodal one, where transformers has a causal LM of that type alone."""
    text = getattr(config, "text_config", None)
    if text is None or config.is_encoder_decoder or config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return None
    # Some multimodal models stand in the list of causal ones too, under a type of their own.
    return text if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, "").endswith("ForCausalLM") else None


def _check_causal(config: PretrainedConfig, name: str, field: str) -> None:
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        problem = f"the config.json of {name} has architectures {shown(architectures)}, which is no list of names"
        raise UserError(field, problem, ODD_CONFIG)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    text, inner = text_config_of(config), getattr(config, "text_config", None)
    if text is not None:
        folder = f"{Path(name).name}-text"
        raise UserError(
            field,
            f"{name} is a multimodal model ({config.model_type}); its text model ({text.model_type}) can be trained",
            "Write that into a folder of its own, and give the folder: "
            f'python -c "import steep; steep.extract_text_model({name!r}, {folder!r})"',
        )
    if config.is_encoder_decoder:
        kind = f"an encoder-decoder model ({config.model_type})"
    elif inner is not None:
        kind = f"a multimodal model ({config.model_type}), and its text model ({inner.model_type}) cannot stand alone"
    elif any(architecture.endswith("ForConditionalGeneration") for architecture in architectures):
        kind = f"a model that is conditioned on more than text ({architectures[0]})"
    elif architectures and not any(a in causal or a.endswith("ForCausalLM") for a in architectures):
        kind = f"not a causal language model ({architectures[0]})"
    elif not architectures and (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        kind = f"not known to be a causal language model (model_type {config.model_type})"
    else:
        return
    raise UserError(
        field, f"{name} is {kind}", "Continued pretraining needs a decoder: Llama, Mistral, Qwen, Gemma and their like."
    )
