"""The fused forward on a GPU, its kernels compiled: every family over NF4, bf16 and fp8 against fp32 truth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from steep.model.fp8_linear import Fp8Linear
from steep.model.install import fused_of, install, uninstall
from steep.model.load import load
from steep.model.unwrap import unwrap
from steep.ops.fp8_groups import Fp8Products
from tests.fp8_checkpoints import FINE_GRAINED, publish
from tests.model.test_fused import adapted, loss_and_gradients
from tests.ops.closeness import error
from tests.tiny import FAMILIES, VOCAB_SIZE, save_tiny

# Inductor gives the warning for whatever it compiles (Gemma 2's attention) on a card that has TF32.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")]

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
UNIFORM = [[1024], [1024]]
PACKED = [[300, 1, 723], [1000, 24]]


def batch(lengths: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tokens = torch.randint(3, VOCAB_SIZE, positions.shape, generator=generator)
    labels = tokens.masked_fill(positions == 0, -100)
    return {
        name: tensor.cuda() for name, tensor in (("input_ids", tokens), ("position_ids", positions), ("labels", labels))
    }


def truth_of(model: Any) -> Any:
    """A plain model in fp32 with the same weights."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Linear4bit | Fp8Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="cuda")
            weight: Any = module.weight
            linear.weight.data = (
                module.dequantize()
                if isinstance(module, Fp8Linear)
                else dequantize_4bit(weight.data, weight.quant_state).float()
            )
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            plain.set_submodule(name, linear.requires_grad_(False))
    return plain.float()


def assert_as_exact(
    fused: dict[str, torch.Tensor], library: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], where: str
) -> None:
    """Every gradient is as near to the truth as the library's, and a halved one is not."""
    for name, gradient in truth.items():
        bound = 1.1 * error(library[name], gradient) + 2e-3
        assert bound < 0.25, name
        assert error(fused[name], gradient) <= bound, f"{name} {where}"
        assert error(fused[name] / 2, gradient) > bound, name


@pytest.mark.parametrize("lengths", [UNIFORM, PACKED], ids=["uniform", "packed"])
@pytest.mark.parametrize("base", ["nf4", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_exact_as_the_librarys(
    family: str, base: str, lengths: list[list[int]], tmp_path: Path
) -> None:
    model, _ = load(str(save_tiny(family, tmp_path, **SHAPE)), base=base, compute_dtype="bf16")
    model = adapted(model, r=64, trained_dtype="bf16")
    truth_loss, truth = loss_and_gradients(truth_of(model), batch(lengths))
    _, library = loss_and_gradients(model, batch(lengths))
    for level, tile in ((0, None), (1, None), (2, None), (3, None), (0, 100), (1, 100), (2, 100), (3, 100)):
        install(model, levels=level, tile=tile)
        loss, fused = loss_and_gradients(model, batch(lengths))
        assert abs(loss - truth_loss) < 1e-3 * truth_loss
        assert_as_exact(fused, library, truth, f"at level {level}, tile {tile}")
        uninstall(model)


@pytest.mark.parametrize("lengths", [UNIFORM, PACKED], ids=["uniform", "packed"])
@pytest.mark.parametrize("products", ["none", "backward", "both"])
@pytest.mark.parametrize("scales", ["rows", "blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_over_fp8_are_as_exact_as_in_plain_torch(
    family: str, scales: str, products: Fp8Products, lengths: list[list[int]], tmp_path: Path
) -> None:
    """On the CPU the same layers quantise and multiply in plain torch. Halved gradients are further from the truth than
    any bound."""
    folder = save_tiny(family, tmp_path / "plain", **SHAPE)
    if scales == "blocks":
        folder = publish(folder, tmp_path / "published", FINE_GRAINED)
    model, _ = load(str(folder), base="fp8", compute_dtype="bf16")
    model = adapted(model, r=64, trained_dtype="bf16")
    on_cpu = install(copy.deepcopy(model).cpu(), levels=1, fp8_products=products)
    of_cpu = {name: tensor.cpu() for name, tensor in batch(lengths).items()}
    _, in_plain_torch = loss_and_gradients(on_cpu, of_cpu)
    truth_loss, truth = loss_and_gradients(truth_of(model), batch(lengths))
    for level, tile in ((0, None), (1, None), (2, None), (3, None), (1, 100), (3, 100)):
        install(model, levels=level, fp8_products=products, tile=tile)
        loss, fused = loss_and_gradients(model, batch(lengths))
        assert abs(loss - truth_loss) < (1e-2 if products == "both" else 1e-3) * truth_loss
        said = [line for line in fused_of(model).said if "fp8" in line]
        assert len(said) == (scales == "blocks" and products != "none"), said  # of the layer that is stored in 16 bits
        for name, gradient in truth.items():
            bound = 1.15 * error(in_plain_torch[name].cuda(), gradient) + 2e-3
            assert bound < 0.4, name
            assert error(fused[name], gradient) <= bound, f"{name} at level {level}, tile {tile}"
            assert error(fused[name] / 2, gradient) > bound, name
        uninstall(model)


def test_the_same_twice_with_deterministic_kernels(tmp_path: Path) -> None:
    model, _ = load(str(save_tiny("llama", tmp_path, **SHAPE)), base="nf4", compute_dtype="bf16")
    model = install(adapted(model, r=64, trained_dtype="bf16"))
    torch.use_deterministic_algorithms(True)
    try:
        results = [loss_and_gradients(model, batch(PACKED)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_evaluation_and_generation_on_the_card(tmp_path: Path) -> None:
    model, _ = load(str(save_tiny("qwen3", tmp_path, **SHAPE)), base="nf4", compute_dtype="bf16")
    model = adapted(model, r=64, trained_dtype="bf16").eval()
    with torch.no_grad():
        expected = model(**batch(PACKED), use_cache=False).loss
        install(model)
        assert abs(model(**batch(PACKED), use_cache=False).loss - expected) < 1e-2 * expected
        tokens = batch(UNIFORM)["input_ids"][:, :16]
        assert model.generate(input_ids=tokens, min_new_tokens=8, max_new_tokens=8, pad_token_id=0).shape == (2, 24)
    assert unwrap(model).fused.calls == 1  # pyright: ignore[reportAttributeAccessIssue]
