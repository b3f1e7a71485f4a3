"""A linear layer in e4m3 by itself, under PEFT, and as an `nn.Module`."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from steep.errors import UserError
from steep.model import fp8_linear
from steep.model.adapters import add_adapters
from steep.model.fp8_linear import Fp8Linear, stack_groups
from steep.model.install import install
from steep.model.load import load
from steep.model.projections import base_weight, compute_dtype, projection
from steep.ops.fp8 import BLOCK, E4M3, LARGEST, Fp8Weight, fp8_reference, quantise_weight
from steep.ops.fp8_linear import as_one
from steep.training.proof import frozen_checksums
from tests.ops.closeness import error

Model = Any


def layer(
    outputs: int = 40, inputs: int = 72, *, blocks: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Fp8Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    b = torch.randn(outputs, generator=generator) if bias else None
    if not blocks:
        return Fp8Linear(quantise_weight(weight), b, dtype)
    scale = 0.01 + 0.01 * torch.rand(-(-outputs // BLOCK), -(-inputs // BLOCK), generator=generator)
    return Fp8Linear(Fp8Weight((100 * weight).clamp(-LARGEST, LARGEST).to(E4M3), scale), b, dtype)


def rows(inputs: int = 72, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


# ---- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("blocks", "shape"), [(False, (40, 72)), (True, (40, 72)), (True, (257, 130)), (False, (1, 3))]
)
def test_it_is_the_product_with_what_is_stored(blocks: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = layer(*shape, blocks=blocks, dtype=dtype)
    x = rows(shape[1], dtype)
    y = linear(x)
    weight = fp8_reference(linear.stored).to(dtype)
    assert linear.bias is not None and y.dtype == dtype
    assert torch.equal(y, nn.functional.linear(x, weight, linear.bias))
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.double() @ fp8_reference(linear.stored).double()
    assert x.grad is not None
    limit = 3 * torch.finfo(dtype).eps
    assert error(x.grad, exact) < limit
    assert error(x.grad / 2, exact) > 0.4  # the bound bites


def test_the_dtype_of_products_is_the_layers_or_autocasts() -> None:
    linear, x = layer(dtype=torch.bfloat16), rows()
    y = linear(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x.bfloat16()).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(dtype=torch.float32)(x), linear(x.bfloat16()))
        assert compute_dtype(layer(), x) == torch.bfloat16
    assert compute_dtype(layer(), x) == torch.float32
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_no_dequantised_weight_waits_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    real = fp8_linear._dequantised

    def dequantised(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
        out = real(weight, dtype)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(fp8_linear, "_dequantised", dequantised)
    x = rows()
    y = layer()(x)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    y.sum().backward()
    assert len(made) == 2
    with torch.no_grad():
        layer()(x)
    assert len(made) == 3


def test_it_launches_on_the_card_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by itself, in no decoder that sees to it: a later launch goes to the current card's stream."""
    guarded: list[torch.Size] = []
    own = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: guarded.append(tensor.shape) or own(tensor))
    linear = layer()
    linear(rows()).sum().backward()
    linear.dequantize()
    assert guarded == [(40, 72)] * 3


def test_a_trained_bias_has_its_gradient() -> None:
    linear = layer()
    assert linear.bias is not None
    linear.bias.requires_grad_()
    linear(rows()).sum().backward()
    assert linear.bias.grad is not None and torch.equal(linear.bias.grad, torch.full((40,), 15.0))


def test_codes_that_are_to_be_trained_are_refused() -> None:
    """They would stay as they are, and nothing would say so."""
    whole = LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(nn.Sequential(layer(72, 72), layer()), whole)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"40 x 72 is to be trained in e4m3.* leave it out of modules_to_save"):
        model(rows())
    model.requires_grad_(False)
    model(rows())


# ---- as a module


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda module: module.to(torch.bfloat16), torch.bfloat16),
        (lambda module: module.half(), torch.float16),
        (lambda module: module.bfloat16(), torch.bfloat16),
        (lambda module: module.double(), torch.float64),
        (lambda module: module.type(torch.bfloat16), torch.bfloat16),
        (lambda module: module.to("cpu"), torch.float32),
        (lambda module: nn.Sequential(module).to(torch.float16)[0], torch.float16),
    ],
)
@pytest.mark.parametrize("blocks", [False, True])
def test_a_cast_reaches_neither_codes_nor_scales(cast: Any, dtype: torch.dtype, blocks: bool) -> None:
    linear = layer(blocks=blocks)
    before = copy.deepcopy(linear.stored)
    moved = cast(linear)
    assert moved is linear and torch.equal(linear.weight.view(torch.uint8), before.codes.view(torch.uint8))
    assert torch.equal(linear.scale, before.scale) and linear.scale.dtype == torch.float32
    assert linear.bias is not None and (linear.bias.dtype, linear.compute_dtype) == (dtype, dtype)
    assert not linear.weight.requires_grad


def test_it_moves_with_its_model() -> None:
    linear = layer().to("meta")
    assert (linear.weight.device.type, linear.weight.dtype) == ("meta", E4M3)
    assert (linear.scale.device.type, linear.scale.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copy_is_the_same(way: str) -> None:
    linear, x = layer(), rows()
    if way == "deepcopy":
        other = copy.deepcopy(linear)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(linear))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = Fp8Linear(Fp8Weight(torch.zeros(40, 72).to(E4M3), torch.zeros(40)), torch.zeros(40), torch.float32)
        other.load_state_dict(linear.state_dict())
    assert other.weight.data_ptr() != linear.weight.data_ptr() and isinstance(other.weight, nn.Parameter)
    assert torch.equal(other(x), linear(x)) and not other.weight.requires_grad
    assert set(linear.state_dict()) == {"weight", "scale", "bias"}


# ---- groups that lie one behind the other


@pytest.fixture
def model(llama_folder: Path) -> Model:
    return load(str(llama_folder), base="fp8", compute_dtype="fp32")[0]


def together(layers: list[Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return as_one([each.weight.data for each in layers]), as_one([each.scale for each in layers])


def test_groups_lie_one_behind_the_other(model: Model) -> None:
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for group in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            codes, scale = together(group)
            assert codes is not None and codes.data_ptr() == group[0].weight.data_ptr()
            assert scale is not None and scale.data_ptr() == group[0].scale.data_ptr()
            expected = torch.cat([fp8_reference(each.stored) for each in group])
            assert torch.equal(fp8_reference(Fp8Weight(codes, scale)), expected)
        assert together([mlp.up_proj, mlp.gate_proj]) == (None, None)
        assert together([attention.o_proj, mlp.gate_proj]) == (None, None)


def test_stacking_changes_no_value_and_no_name(model: Model) -> None:
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, Fp8Linear):
            module.weight.data = module.weight.data.view(torch.uint8).clone().view(E4M3)
            module.scale = module.scale.clone()
    first = apart.model.layers[0].self_attn
    assert together([first.q_proj, first.k_proj]) == (None, None)
    before = {name: tensor.clone() for name, tensor in apart.state_dict().items()}
    assert stack_groups(apart) == 4
    assert all(each is not None for each in together([first.q_proj, first.k_proj]))
    after = apart.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


def test_blocks_are_stacked_where_they_end_with_their_layer() -> None:
    def group(outputs: int) -> nn.Module:
        module = nn.Module()
        for name in ("gate_proj", "up_proj"):
            module.add_module(name, layer(outputs, 130, blocks=True, bias=False))
        return module

    for outputs, fits in ((256, True), (250, False)):
        module: Any = group(outputs)
        assert stack_groups(module) == 1
        codes, scale = together([module.gate_proj, module.up_proj])
        assert codes is not None and (scale is not None) is fits
        if scale is not None:
            assert scale.shape == (4, 2)


# ---- under PEFT


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_pefts_lora_goes_over_it(compute: str, llama_folder: Path) -> None:
    model, _ = load(str(llama_folder), base="fp8", compute_dtype=compute)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    peft_model: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    wrapped = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert wrapped.lora_A["default"].weight.dtype == wrapped.lora_B["default"].weight.dtype == dtype
    read = projection(wrapped, "q_proj")
    assert isinstance(read.weight, Fp8Weight) and len(read.adapters) == 1
    assert read.weight.codes.data_ptr() == wrapped.base_layer.weight.data_ptr()
    assert isinstance(base_weight(wrapped.base_layer, "q_proj"), Fp8Weight)
    assert compute_dtype(wrapped, torch.zeros(1)) == dtype


@pytest.mark.parametrize("safely", [False, True])
def test_pefts_own_merge_is_refused(model: Model, safely: bool) -> None:
    """It would add a difference to codes."""
    peft_model: Any = add_adapters(model, r=4)
    codes = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.dtype == E4M3}
    with pytest.raises((RuntimeError, NotImplementedError), match="Float8"):
        peft_model.merge_and_unload(safe_merge=safely)
    now = dict(peft_model.named_parameters())
    assert len(codes) == 14
    assert all(torch.equal(now[name].view(torch.uint8), each.view(torch.uint8)) for name, each in codes.items())


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_an_installed_model_is_not_merged_in_part(way: str, llama_folder: Path) -> None:
    """Its first layers are in 16 bits, as a published checkpoint may have them: PEFT would change these."""
    model, _ = load(str(llama_folder), base="fp8", compute_dtype="fp32")
    for name, module in list(model.model.layers[0].named_modules()):
        if isinstance(module, Fp8Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            model.model.layers[0].set_submodule(name, plain)
    peft_model: Any = install(add_adapters(model, r=4))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    before = {name: tensor.detach().clone() for name, tensor in peft_model.state_dict().items()}
    with pytest.raises(UserError, match=r"^model: adapters are on 7 layers in e4m3.* 16-bit original: steep export"):
        getattr(peft_model, way)()
    now = peft_model.state_dict()
    assert all(torch.equal(now[name].float(), tensor.float()) for name, tensor in before.items())


def test_an_installed_model_without_e4m3_is_merged(llama_folder: Path) -> None:
    model, _ = load(str(llama_folder), base="fp32")
    peft_model: Any = install(add_adapters(model, r=4))
    peft_model.merge_adapter()
    assert all(layer.mlp.up_proj.merged for layer in peft_model.get_base_model().model.layers)
    peft_model.unmerge_adapter()
    assert type(peft_model.merge_and_unload().model.layers[0].mlp.up_proj) is nn.Linear


def test_the_base_by_itself_is_not_saved(model: Model, tmp_path: Path) -> None:
    """Others would read the codes as weights."""
    with pytest.raises(ValueError, match=r"e4m3 .*save the adapter alone, or .* the 16-bit original: steep export RUN"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    peft_model: Any = add_adapters(model, r=4)
    peft_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_dora_takes_its_lengths_from_the_weights(model: Model) -> None:
    peft_model: Any = add_adapters(model, r=4, use_dora=True)
    for block in peft_model.base_model.model.model.layers:
        wrapped = block.mlp.up_proj
        lengths = wrapped.lora_magnitude_vector["default"].weight
        assert torch.allclose(lengths, fp8_reference(wrapped.base_layer.stored).norm(dim=1), rtol=1e-5)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        here = peft_model(ids).logits
        with peft_model.disable_adapter():
            assert torch.allclose(peft_model(ids).logits, here, atol=1e-4)  # it begins at no effect


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_other_starts(start: str, llama_folder: Path) -> None:
    model, _ = load(str(llama_folder), base="fp8", compute_dtype="fp32")
    ids = torch.arange(3, 40)[None]
    original, _ = load(str(llama_folder), base="fp32")
    with torch.no_grad():
        base, truth = model(ids).logits, original(ids).logits
        peft_model: Any = add_adapters(model, r=16, init_lora_weights=start)
        begun = peft_model(ids).logits
    if start == "pissa":
        assert error(begun, base) < 1e-4
        assert error(begun / 2, base) > 0.4
    else:
        assert error(begun, truth) < 0.8 * error(base, truth)


def test_the_proof_sees_codes_and_scales(model: Model) -> None:
    before = frozen_checksums(model)
    layer = model.model.layers[1].mlp.down_proj
    name = "model.layers.1.mlp.down_proj"
    assert {f"{name}.weight", f"{name}.scale"} <= set(before)
    layer.weight.data.view(torch.uint8)[3, 5] ^= 1
    layer.scale[7] *= 1.0001
    now = frozen_checksums(model)
    assert {each for each in before if before[each] != now[each]} == {f"{name}.weight", f"{name}.scale"}
