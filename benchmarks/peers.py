"""The peers of `benchmarks.train`: how each makes its model trainable, and the bare loop that times them.

`hf` is QLoRA as the libraries' documentation has it, with gradient checkpointing, `hf-lean` the same with everything
that trains in bf16. `hf-plain` is `hf` without checkpointing: each layer is computed forward once, in more memory.
`hf-flash` is `hf` with the flash-attn package and the batch as one row, so that documents are isolated without a
mask; `hf-varlen` the same with the flash kernels that torch brings. steep's own two are in `benchmarks/steep_run.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import LINEAR_LAYERS, nf4_config

ALPHA, LEARNING_RATE = 32, 5e-5
SHORTEST, LONGEST = 128, 1024  # documents of packed rows


@dataclass(frozen=True)
class Work:
    """What every peer has to do."""

    folder: str
    batch: int
    seq: int
    r: int
    steps: int
    packed: bool
    device: str
    cap_gib: float | None = None  # of steep


@dataclass
class Peer:
    """A model that is ready to train.

    Attributes:
        autocast: run forward passes under torch's, in bf16.
        isolates: documents of a packed row do not see each other.
        flat: it takes the rows of a batch as one (`flattened`).
    """

    model: Any
    optimizer: torch.optim.Optimizer
    autocast: bool = False
    isolates: bool = True
    flat: bool = False


def _bitsandbytes(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LEARNING_RATE)


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _library_model(work: Work, attention: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        work.folder, quantization_config=nf4_config(), dtype=torch.bfloat16, device_map={"": work.device},
        attn_implementation=attention,
    )  # fmt: skip
    model.config.use_cache = False
    return model


def _with_adapters(model: Any, work: Work, autocast_adapters: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=work.r, lora_alpha=ALPHA, use_rslora=True, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=model.config.tie_word_embeddings,
    )  # fmt: skip
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapters)


def hf(work: Work, attention: str | None = None, *, recomputes: bool = True) -> Peer:
    """fp32 norms, embeddings and adapters under bf16 autocast, gradient checkpointing, 8-bit AdamW."""
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        _library_model(work, attention), recomputes, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = _with_adapters(model, work, autocast_adapters=True)
    return Peer(model, _bitsandbytes(trained(model)), autocast=True)


def hf_plain(work: Work) -> Peer:
    """`hf` that keeps everything of its layers."""
    return hf(work, recomputes=False)


def hf_flash(work: Work) -> Peer:
    """`hf` with flash attention.

    Raises:
        ModuleNotFoundError: there is none.
    """
    attention = flash_package() or flash_of_the_hub()
    if attention is None:
        raise ModuleNotFoundError("hf-flash needs the package flash-attn, or kernels for the hub's, and a GPU")
    return dataclasses.replace(hf(work, attention), flat=True)


def flash_package() -> str | None:
    """transformers' name for the flash attention that is installed, where there is one and a GPU."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


def flash_of_the_hub() -> str | None:
    """transformers' name for the one that it would download."""
    from transformers.utils import is_kernels_available

    return "flash_attention_2" if is_kernels_available() else None


def hf_varlen(work: Work) -> Peer:
    """`hf` with torch's own flash kernels, as an attention function of transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("torch_varlen", varlen_attention)
    return dataclasses.replace(hf(work, "torch_varlen"), flat=True)


def varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *,
    scaling: float, cu_seq_lens_q: torch.Tensor, max_length_q: int, sliding_window: int | None = None,
    softcap: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' signature, for one row of documents: [1, heads, T, D] to [1, T, heads, D].

    Raises:
        ValueError: scores are capped: torch's kernels do not do that.
    """
    if softcap is not None:
        raise ValueError("hf-varlen does not cap attention scores: it would do another work")
    dtype = value.dtype if value.dtype != torch.float32 else torch.bfloat16  # rope gives fp32 under autocast
    q, k, v = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    return flash_kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None


def flash_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, scale: float,
    window: int | None,
) -> torch.Tensor:  # fmt: skip
    """[T, heads, D], causal in each document."""
    seen = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    given = q, k, v, ends, ends, longest, longest, 0.0, True, False
    return torch.ops.aten._flash_attention_forward(*given, scale=scale, **seen)[0]


def hf_lean(work: Work) -> Peer:
    """Everything that trains in bf16, no autocast."""
    model = _library_model(work).requires_grad_(False)
    model = _with_adapters(model, work, autocast_adapters=False)
    for parameter in trained(model):
        parameter.data = parameter.data.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Peer(model, _bitsandbytes(trained(model)))


def hf_liger(work: Work) -> Peer:
    """`hf` with Liger's kernels in transformers' classes."""
    import liger_kernel.transformers as kernels  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig

    family = AutoConfig.from_pretrained(work.folder).model_type
    getattr(kernels, f"apply_liger_kernel_to_{family}")()
    return hf(work)


def unsloth(work: Work) -> Peer:
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    model, _ = FastLanguageModel.from_pretrained(
        work.folder, max_seq_length=work.seq, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=work.r, lora_alpha=ALPHA, use_rslora=True, lora_dropout=0, bias="none",
        target_modules=[*LINEAR_LAYERS, "embed_tokens", "lm_head"], use_gradient_checkpointing="unsloth",
        max_seq_length=work.seq,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    return Peer(model, _bitsandbytes(trained(model)), autocast=True, isolates=False)


PEERS: dict[str, Callable[[Work], Peer]] = {
    "hf": hf,
    "hf-flash": hf_flash,
    "hf-varlen": hf_varlen,
    "hf-lean": hf_lean,
    "hf-plain": hf_plain,
    "hf-liger": hf_liger,
    "unsloth": unsloth,
}


def batches(work: Work, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Fresh random tokens for each step, the same for every peer on such a device.

    A packed row has documents of SHORTEST to LONGEST tokens, the last one cut; their positions begin at 0, and the
    first token of each is predicted by none.
    """
    generator = torch.Generator(work.device).manual_seed(0)
    lengths = random.Random(0)
    for _ in range(work.steps):
        shape = (work.batch, work.seq)
        tokens = torch.randint(vocab_size, shape, generator=generator, device=work.device)
        if not work.packed:
            yield {"input_ids": tokens, "labels": tokens}
            continue
        positions = torch.empty(shape, dtype=torch.int64)
        for row in positions:
            start = 0
            while start < work.seq:
                length = min(lengths.randint(SHORTEST, LONGEST), work.seq - start)
                row[start : start + length] = torch.arange(length)
                start += length
        positions = positions.to(work.device)
        yield {
            "input_ids": tokens,
            "labels": tokens.masked_fill(positions == 0, -100),
            "position_ids": positions,
        }


def flattened(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch as one row of documents, with all that flash attention asks for: it reads nothing back then."""
    rows, length = batch["input_ids"].shape
    positions = batch.get("position_ids", torch.arange(length, device=batch["labels"].device).expand(rows, length))
    one_row = positions.reshape(-1)
    starts = (one_row == 0).nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([len(one_row)])]).to(torch.int32)
    longest = int(one_row.max()) + 1
    return {
        "input_ids": batch["input_ids"].reshape(1, -1),
        "labels": batch["labels"].masked_fill(positions == 0, -100).reshape(1, -1),
        "position_ids": one_row[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bare_loop(peer: Peer, work: Work, begun: float) -> dict[str, Any]:
    """Seconds of each step, losses, and seconds from `begun` (`time.time()`) to the end of the first step.

    Raises:
        ValueError: rows are packed, and this peer's documents would see each other.
    """
    if work.packed and not peer.isolates:
        raise ValueError("this peer does not isolate packed documents: it would do another work")
    model, optimizer = peer.model.train(), peer.optimizer
    parameters = trained(model)
    seconds, losses, first = [], [], 0.0
    for given in batches(work, model.config.vocab_size):
        batch = flattened(given) if peer.flat else given
        synchronize(work.device)
        start = time.perf_counter()
        with torch.autocast(work.device, torch.bfloat16) if peer.autocast else contextlib.nullcontext():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        synchronize(work.device)
        seconds.append(time.perf_counter() - start)
        first = first or time.time() - begun
        if losses[-1] != losses[-1]:
            raise FloatingPointError(f"the loss of step {len(losses)} is not a number: no work to time")
    return {"seconds": seconds, "losses": losses, "first_step_s": first}
