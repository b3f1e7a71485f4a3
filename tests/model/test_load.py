from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import set_tqdm_hook

from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.attention import attention
from steep.model.fp8_linear import Fp8Linear
from steep.model.load import load, load_resolved
from steep.model.loading_progress import tensors_told
from steep.model.resolve import resolve
from steep.storage import cache_folder
from tests.tiny import FAMILIES, save_tiny, tiny_model


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 384, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("base", "compute", "layer", "stored"),
    [
        ("nf4", "fp32", bitsandbytes.nn.Linear4bit, torch.uint8),
        ("nf4", "bf16", bitsandbytes.nn.Linear4bit, torch.uint8),
        ("auto", "fp32", bitsandbytes.nn.Linear4bit, torch.uint8),
        ("int8", "fp32", bitsandbytes.nn.Linear8bitLt, torch.int8),
        ("fp8", "fp32", Fp8Linear, torch.float8_e4m3fn),
        ("fp8", "bf16", Fp8Linear, torch.float8_e4m3fn),
        ("fp32", "fp32", torch.nn.Linear, torch.float32),
        ("bf16", "auto", torch.nn.Linear, torch.bfloat16),
    ],
)
def test_bases(base: str, compute: str, layer: type, stored: torch.dtype, llama_folder: Path) -> None:
    model, tokenizer = load(str(llama_folder), base=base, compute_dtype=compute)
    projection = model.model.layers[0].mlp.down_proj
    assert type(projection) is layer
    assert projection.weight.dtype == stored
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert len(tokenizer) == 384
    if layer is bitsandbytes.nn.Linear4bit:
        assert projection.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
        assert projection.weight.quant_type == "nf4" and projection.weight.quant_state.nested
        assert model.lm_head.weight.dtype == projection.compute_dtype  # the head is never quantised
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    with torch.no_grad():
        expected, got = plain(ids()).logits, model(ids()).logits.float()
    similarity = torch.nn.functional.cosine_similarity(expected.flatten(), got.flatten(), dim=0)
    assert similarity > (0.9999 if base in ("fp32", "bf16") else 0.97)
    assert torch.equal(expected, got) == (base == "fp32")


@pytest.mark.parametrize("base", ["nf4", "int8", "fp8", "bf16"])
def test_progress_is_told(base: str, llama_folder: Path) -> None:
    """And nobody's bars are changed afterwards."""
    told: list[tuple[int, int]] = []
    resolved = resolve(str(llama_folder))
    given: dict[str, Any] = {"base": base, "compute_dtype": "bf16", "attn_implementation": "auto"}
    load_resolved(resolved, None, **given, progress=lambda done, total: told.append((done, total)))
    (total,) = {total for _, total in told}
    assert [done for done, _ in told] == [*range(1, total + 1)]
    assert total == (14 if base == "fp8" else 21)  # linear layers; or all tensors
    load_resolved(resolved, None, **given)
    assert len(told) == total and set_tqdm_hook(None) is None
    with pytest.raises(RuntimeError), tensors_told(lambda done, total: None):
        raise RuntimeError
    assert set_tqdm_hook(None) is None


def test_what_is_unknown_is_refused(llama_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^model\.base: 'nf-4' is unknown\. Give one of auto, nf4, int8, fp8, bf16, fp16, fp32"
    ):
        load(str(llama_folder), base="nf-4")
    with pytest.raises(
        UserError, match=r"^model\.compute_dtype: 'nf4' is unknown\. Give one of auto, bf16, fp16, fp32"
    ):
        load(str(llama_folder), compute_dtype="nf4")


def test_4bit_layers_keep_their_layout(llama_folder: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode on some CPUs, and training breaks."""
    model, _ = load(str(llama_folder), base="nf4", compute_dtype="bf16")
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14
    codes = [layer.weight.detach().clone() for layer in layers]
    model = add_adapters(model, r=4, trained_dtype="bf16")

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        model(ids(), labels=ids()).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        evaluated = model(ids(), labels=ids()).loss
    after = gradients()
    assert len(before) == len(after) > 14
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(torch.equal(one, layer.weight) for one, layer in zip(codes, layers, strict=True))
    model.train()
    assert torch.equal(model(ids(), labels=ids()).loss, evaluated)


def test_a_quantised_checkpoint_loads_as_it_is(llama_folder: Path, tmp_path: Path) -> None:
    first, tokenizer = load(str(llama_folder), base="nf4", compute_dtype="fp32")
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    second, _ = load(str(tmp_path), compute_dtype="fp32")
    assert isinstance(second.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    with torch.no_grad():
        assert torch.equal(first(ids()).logits, second(ids()).logits)
    with pytest.raises(UserError, match="int8 was asked for but the checkpoint is stored as nf4"):
        load(str(tmp_path), base="int8")


def test_attention_can_be_chosen(llama_folder: Path) -> None:
    model, _ = load(str(llama_folder), base="fp32", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "flash_attention_2"), ("gemma2", "flash_attention_2"), ("gemma2", "sdpa")]
)
def test_an_attention_that_is_not_there_is_refused(family: str, attention: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    with pytest.raises(UserError, match=rf"^model\.attn_implementation: {attention} cannot be used"):
        load(str(tmp_path), base="fp32", attn_implementation=attention)


def test_soft_caps_are_never_left_out(tmp_path: Path) -> None:
    """transformers 5.17 would take sdpa, which knows none."""
    save_tiny("gemma2", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert attention("auto", config) == {"attn_implementation": "eager"}
    assert attention("flex_attention", config) == {"attn_implementation": "flex_attention"}
    config.attn_logit_softcapping = None
    assert (attention("auto", config), attention("sdpa", config)) == ({}, {"attn_implementation": "sdpa"})


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family: str, attention: str, tmp_path: Path) -> None:
    """Positions that start anew are all that separates documents: transformers makes the mask from them."""
    save_tiny(family, tmp_path)
    model, _ = load(str(tmp_path), base="fp32", attn_implementation=attention)
    model.train()
    lengths = (20, 9, 19)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    tokens = ids(sum(lengths))
    other = tokens.clone()
    other[0, 20:29] = (other[0, 20:29] + 7) % 381 + 3
    with torch.no_grad():
        one = model(tokens, position_ids=positions).logits
        two = model(other, position_ids=positions).logits
        alone = model(tokens[:, 29:]).logits
        together = model(tokens).logits
    assert torch.equal(one[:, :20], two[:, :20])
    assert torch.equal(one[:, 29:], two[:, 29:])
    assert not torch.equal(one[:, 20:29], two[:, 20:29])
    torch.testing.assert_close(one[:, 29:], alone, rtol=1e-4, atol=1e-4)
    assert (together[:, 29:] - alone).abs().max() > 1e-3  # without positions they would


def test_models_of_others_are_not_touched(llama_folder: Path) -> None:
    other = tiny_model("llama")
    load(str(llama_folder), base="nf4", compute_dtype="fp32")
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert bitsandbytes.nn.Linear4bit(64, 64).weight.requires_grad is False
    assert cache_folder().name


def test_4bit_rows_that_a_cpu_reads_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = str(save_tiny("llama", tmp_path, intermediate_size=160))
    with pytest.raises(UserError, match=r"model\.base: .*those of model\.layers\.0\.mlp\.down_proj have 160.*fp32"):
        load(folder, base="nf4", compute_dtype="fp32")
    load(folder, base="int8", compute_dtype="fp32")
