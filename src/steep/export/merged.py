"""The merged model: a folder in the plain layout of transformers, written shard by shard from the base's checkpoint.

Each linear layer's W + s·BA is summed in fp32 and rounded once. The model is never built: in memory are one shard, and
one layer of the base and of the adapter.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import AutoModelForCausalLM

from steep.errors import RunError, UserError
from steep.export.adapter_weights import AdapterWeights
from steep.export.base_weights import BaseWeights, Kind
from steep.model.adapters import is_tied, linear_shapes
from steep.model.base_tensors import BaseTensors
from steep.model.resolve import ResolvedModel, read_tokenizer, read_tokenizer_folder
from steep.model.rope import rope_of_far_tokens
from steep.tensor_files import write_tensors

SHARD_BYTES = 5 * 10**9
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all that will be."""


class Merger:
    """A base model and an adapter, checked against each other, to be written as one model.

    Attributes:
        tensors: the base's, as its checkpoint stores them.
        dtype: of every tensor written: the checkpoint's own (its input embedding's) if that has 16 bits, else bf16.
        tied: whether the head of the merged model is its input embedding.
        stored_quantised: whether the base exists in 4 or 8 bits only, so that it has no original to merge into.
        num_bytes: size of the weights.

    Args:
        resolved: the base, a folder or hub name in safetensors (a GGUF file after `steep.model.load.as_folder`).
        adapter: what was trained over it.
        base: what the run kept the base's linear layers in: ``nf4``, ``int8``, ``fp8``, ``bf16``, ``fp16`` or
            ``fp32``.
        compute_dtype: what the run computes in on this machine.

    Raises:
        UserError: the adapter does not fit the base, or the base's tensors are not those of the model.
    """

    def __init__(
        self, resolved: ResolvedModel, adapter: AdapterWeights, *, base: str, compute_dtype: torch.dtype
    ) -> None:
        if resolved.arguments.get("trust_remote_code") and hasattr(resolved.config, "auto_map"):
            raise UserError(
                "--to",
                f"{Path(resolved.name).name} runs code of its own, which stays with its checkpoint",
                "Hand on the adapter: --to adapter.",
            )
        self._resolved, self._adapter, self._base, self._compute_dtype = resolved, adapter, base, compute_dtype
        self.tensors = BaseTensors(resolved.name, revision=resolved.arguments.get("revision"))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(resolved.config, trust_remote_code=False)
        self._architecture = type(empty).__name__
        self._linear = {f"{name}.weight" for name in linear_shapes(empty)}
        self._table, self._head = _embedding_names(empty)
        tied_base = is_tied(empty)
        self.tied = tied_base and not self._unties()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        self._check_names(tied_base)
        self._take_vocabulary()
        self.stored_quantised = self._stored("original").stored_quantised
        dtype = self.tensors[self._table].dtype
        self.dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        if self.tied:
            del self._shapes[self._head]
        self.num_bytes = sum(2 * torch.Size(shape).numel() for shape in self._shapes.values())

    def write(
        self,
        folder: Path,
        kind: Kind,
        *,
        tokenizer: Path,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Write weights, config, generation config and tokenizer into `folder`.

        Args:
            kind: which base to merge into: the ``original`` weights, or ``dequantised``, as the run had them.
            tokenizer: a folder with the run's tokenizer.

        Raises:
            RunError: a value is not finite, in the sum or in 16 bits.
        """
        folder.mkdir(parents=True, exist_ok=True)
        base = self._stored(kind)
        planned = {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in self._shapes.items()}
        split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
        written = 0
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = self._rounded(name, self._weight(base, name))
                written += shard[name].nbytes
                if progress is not None:
                    progress(written, self.num_bytes)
            write_tensors(shard, folder / file, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._write_config(folder)
        self._write_tokenizer(folder, tokenizer)

    def _stored(self, kind: Kind) -> BaseWeights:
        return BaseWeights(
            self.tensors,
            kind=kind,
            base=self._base,
            linear=self._linear,
            compute_dtype=self._compute_dtype,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def _weight(self, base: BaseWeights, name: str) -> torch.Tensor:
        if name in self._adapter.whole:
            return self._adapter.embedding(name)
        # The head of a base that was tied, written for the first time: untied, only one of the two was trained.
        weight = base[name if name in base.names else self._table]
        module = name.removesuffix(".weight")
        return self._adapter.merged(module, weight) if module in self._adapter.modules else weight

    def _rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        rounded = weight.to(self.dtype)
        if not rounded.isfinite().all():
            raise RunError(f"{name} has values that are not finite in {self.dtype}: the result would be no model")
        return rounded.cpu().contiguous()

    def _unties(self) -> bool:
        """Whether the adapter trained a head of its own over a tied base."""
        return bool(self._adapter.whole) and not self._adapter.config.ensure_weight_tying

    def _check_names(self, tied_base: bool) -> None:
        stored = self._stored("original").names
        for name in self._shapes:
            if name not in stored and not (tied_base and name == self._head):
                raise UserError(
                    "model.name",
                    f"its checkpoint has no tensor {name}, which {self._architecture} has",
                    "A checkpoint that transformers rebuilds as it loads it cannot be merged: use --to adapter.",
                )
        unknown = self._adapter.weights - set(self._shapes)
        if unknown:
            raise UserError(
                "run folder", f"the adapter changes {min(unknown)}, which the base has not", "Give the run's own base."
            )
        if self.tied and self._head.removesuffix(".weight") in self._adapter.modules:
            raise UserError(
                "run folder", "the adapter has LoRA on a tied head", "It cannot be merged; use --to adapter."
            )
        if self.tied and self._adapter.whole:
            names = {self._table, self._head}
            if self._adapter.whole != names or not torch.equal(*map(self._adapter.embedding, names)):
                raise UserError(
                    "run folder", "the adapter's two copies of a tied embedding differ", "Put it back, or train again."
                )

    def _take_vocabulary(self) -> None:
        """Rows that were added for new tokens."""
        rows = {}
        for name in (self._table, self._head):
            width = self._shapes[name][1]
            rows[name] = self._shapes[name][0]
            if name in self._adapter.whole:
                rows[name], trained_width = self._adapter.embedding_shape(name)
                if trained_width != width or rows[name] < self._shapes[name][0]:
                    raise UserError(
                        "run folder",
                        f"the adapter's {name} is {rows[name]} x {trained_width}, and the base's {self._shapes[name]}",
                        "Give the run's own base.",
                    )
            self._shapes[name] = (rows[name], width)
        if rows[self._table] != rows[self._head]:
            raise UserError(
                "run folder",
                f"input and output have {rows[self._table]} and {rows[self._head]} tokens",
                "Train both embeddings when the vocabulary grows.",
            )

    @property
    def config(self) -> Any:
        """The config that the merged model will have, as far as the merge changes it."""
        config = copy.deepcopy(self._resolved.config)
        config.vocab_size, config.tie_word_embeddings = self._shapes[self._table][0], self.tied
        return config

    def _write_config(self, folder: Path) -> None:
        """The checkpoint's own file, in the form that other readers know, with what the merge changes."""
        file = self._resolved.file("config.json")
        assert file is not None  # it was resolved by this file
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name in ("quantization_config", "_name_or_path", "dtype", "torch_dtype", "auto_map"):  # no code goes along
            config.pop(name, None)
        config["architectures"] = [self._architecture]
        config["torch_dtype"] = str(self.dtype).removeprefix("torch.")  # the older name, which every reader knows
        config["tie_word_embeddings"] = self.tied
        config["vocab_size"] = self._shapes[self._table][0]
        if (stretched := self._resolved.stretched) is not None:
            text: Any = stretched.get_text_config()
            config["max_position_embeddings"] = text.max_position_embeddings
            scaled = rope_of_far_tokens(text)
            assert scaled is not None
            config["rope_parameters"] = dict(text.rope_parameters)
            # Readers from before transformers 5 know these two names; Gemma 3's rope of windows keeps its own.
            config["rope_scaling"], config["rope_theta"] = dict(scaled), scaled["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        generation = self._resolved.file("generation_config.json")
        if generation is not None:
            shutil.copyfile(generation, folder / generation.name)

    def _write_tokenizer(self, folder: Path, tokenizer: Path) -> None:
        """The base's own files where the run left its vocabulary alone: converters read more of them than are saved."""
        trained = read_tokenizer_folder(tokenizer)
        if trained.get_vocab() != read_tokenizer(self._resolved).get_vocab():
            trained.save_pretrained(folder)
            return
        for name in _TOKENIZER_FILES:
            file = self._resolved.file(name)
            if file is not None:
                shutil.copyfile(file, folder / name)


def _embedding_names(model: Any) -> tuple[str, str]:
    """The weights of input and output embeddings by name, a tied head's too."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and module in (model.get_input_embeddings(), model.get_output_embeddings()):
            found[module] = f"{name}.weight"
    return found[model.get_input_embeddings()], found[model.get_output_embeddings()]
