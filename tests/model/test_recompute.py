"""What layers are said to keep and to need, against what they do."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from steep.model import choices, decoder
from steep.model import fused as fused_module
from steep.model.adapters import add_adapters
from steep.model.block import Place
from steep.model.fused import Fused
from steep.model.install import fused_of, install
from steep.model.layer import Layer
from steep.model.mlp_half import MlpHalf
from steep.model.placement import moments
from steep.model.read_layer import Traits, read_layer
from steep.model.recompute import (
    LESS,
    Updates,
    bytes_beside_decoder,
    candidates,
    leaner_than,
    level_lists,
    levels_within,
    room_on_card,
)
from steep.model.step_bytes import loss_bytes, stored_bytes, training_bytes, work_bytes
from steep.model.tiling import tile_sizes
from steep.model.unwrap import unwrap
from steep.ops.backend import interpreted
from steep.ops.host_states import staging_bytes
from steep.ops.linear_cross_entropy import Way
from tests.allocations import allocations
from tests.model.test_fused import adapted, packed
from tests.tiny import FAMILIES, tiny_model


def kept_bytes(layer: Any, *how: Any) -> list[int]:
    """A token, by level, all on the GPU."""
    return [places[0].on_gpu for places in stored_bytes(layer, *how)]


def kept_by(node: Any) -> int:
    """Bytes that the backward pass of one layer holds."""
    tensors: list[Any] = [node.saved_tensors[0]]  # its input; after it come adapters, which are there anyway
    for value in vars(node.kept).values():
        tensors += [each for each in (value if isinstance(value, tuple) else [value]) if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_is_planned(
    stream: torch.dtype, family: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[Any] = []
    block = decoder.block

    def noted(*given: Any) -> Any:
        y = block(*given)
        nodes.append(y.grad_fn)
        return y

    monkeypatch.setattr(decoder, "block", noted)
    model = install(adapted(tiny_model(family)).to(stream), levels=level)
    batch = packed()
    loss = model(**batch, use_cache=False).loss  # holds the graph
    tokens, layer = batch["input_ids"].numel(), unwrap(model).model.layers[0]
    read = read_layer(layer, layer.traits)
    sums = 4 * read.attention.num_heads if level <= 2 else 0  # which not every backend keeps
    planned = kept_bytes(read, stream, stream)[level]
    assert len(nodes) == 2 and loss.requires_grad
    for node in nodes:
        assert planned - sums <= kept_by(node) / tokens <= planned
    assert planned - sums > 0.9 * planned


def test_more_is_needed_where_more_is_computed_again() -> None:
    model = install(adapted(tiny_model("llama")))
    layer = unwrap(model).model.layers[0]
    read = read_layer(layer, layer.traits)
    needed = [work_bytes(read, torch.bfloat16, torch.bfloat16, level, 1000) for level in range(4)]
    assert sorted(needed) == needed and needed[3] > needed[0]
    kept = kept_bytes(read, torch.bfloat16, torch.bfloat16)
    assert sorted(set(kept), reverse=True) == kept
    assert fused_of(model).levels is None  # chosen at the first call that trains


def test_lists_of_levels() -> None:
    assert list(level_lists(2)) == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    here: Any = ["gpu"] * 5
    assert moments([1, 1, 0, 0, 0], here) == [0, 1, 4]
    assert moments([2], here[:1]) == [0] and moments([3, 3], here[:2]) == [0, 1]
    assert moments([3] * 5, ["x", "x", "gpu", "gpu", "gpu"]) == [0, 1, 2, 4]


def test_levels_fill_a_room() -> None:
    model = install(adapted(tiny_model("llama")))
    layer, bf16 = unwrap(model).model.layers[0], torch.bfloat16
    read = read_layer(layer, layer.traits)
    kept = [1000 * each for each in kept_bytes(read, bf16, bf16)]
    work = [work_bytes(read, bf16, bf16, level, 1000) for level in range(4)]

    def within(room: float | None) -> list[int]:
        levels, places, tile = levels_within(room, 0, 3, read, bf16, bf16, 1000, 500)
        assert tile == 1000 and places == ["gpu"] * 3
        return levels

    assert within(None) == [0, 0, 0] and within(0) == [3, 3, 3]
    assert within(3 * kept[0] + work[0] + 500) == [0, 0, 0]
    assert within(3 * kept[0] + work[0] + 499) == [1, 0, 0]
    assert within(2 * kept[1] + kept[0] + work[0] + 500) == [1, 1, 0]  # the last layer's pass needs the most


def test_tiles_are_even_parts() -> None:
    assert tile_sizes(1000) == [1000] and tile_sizes(0) == [1] and tile_sizes(1500) == [1500, 768]
    assert tile_sizes(2048) == [2048, 1024] and tile_sizes(4096) == [4096, 2048, 1024]
    assert tile_sizes(10_000) == [10_000, 3392, 2048, 1024] and tile_sizes(16_384) == [16_384, 4096, 2048, 1024]
    assert tile_sizes(16_385) == [3328, 1856, 1024] and tile_sizes(131_072) == [4096, 2048, 1024]
    assert all(-(-tokens // 4096) == -(-tokens // tile_sizes(tokens)[-3]) for tokens in (9000, 20_001, 99_999))
    assert [tile for levels, tile in candidates(1, 10_000)] == [10_000, 3392] * 4 + [2048] * 4 + [1024] * 4
    assert list(candidates(1, 900)) == [([level], 900) for level in range(4)]


def layer_of_8b() -> Layer:
    """Of Llama-3-8B's shape, without data."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        base: Any = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        return read_layer(unwrap(add_adapters(base, r=256)).model.layers[0], Traits())


def test_a_smaller_tile_comes_before_more_is_computed_again() -> None:
    """And smaller ones after it. The smallest leaves what attention's backward takes, of some heads and all tokens."""
    read, bf16, tokens = layer_of_8b(), torch.bfloat16, 10_000
    kept = [tokens * each for each in kept_bytes(read, bf16, bf16)]
    whole, tiled, small, least = ([work_bytes(read, bf16, bf16, level, tokens, "none", tile) for level in range(4)]
                           for tile in tile_sizes(tokens))  # fmt: skip
    assert all(a > b > c >= d for a, b, c, d in list(zip(whole, tiled, small, least, strict=True))[1:])
    assert whole[0] < tiled[0]  # which has gate and up of all tokens in any case

    def within(room: float) -> tuple[list[int], int]:
        levels, _, tile = levels_within(room, 0, 3, read, bf16, bf16, tokens, 0)
        return levels, tile

    assert within(3 * kept[0] + whole[0]) == ([0, 0, 0], 10_000)
    levels, tile = within(3 * kept[2] + tiled[2])
    assert max(levels) <= 2 and tile == 3392
    assert within(3 * kept[3] + tiled[3]) == ([3, 3, 3], 3392)
    assert within(3 * kept[3] + tiled[3] - 1)[1] == 2048 and within(3 * kept[3] + small[3] - 1)[1] == 1024
    assert within(0) == ([3, 3, 3], 1024)


def test_a_long_batch_takes_what_attention_reads_and_no_more() -> None:
    """Bytes a token of Llama-3-8B's layer, from 65,536 tokens on."""
    read, bf16 = layer_of_8b(), torch.bfloat16
    short, long = (work_bytes(read, bf16, bf16, 3, tokens, "none", 4096) for tokens in (65_536, 131_072))
    assert 32_000 < (long - short) / 65_536 < 37 * 1024


def test_gate_and_up_are_gone_when_attention_is_differentiated() -> None:
    """Those of level 0, in tiles too: its work is less than at level 1, where they never were whole."""
    read, bf16, tokens = layer_of_8b(), torch.bfloat16, 32_768
    kept, computed_again = (work_bytes(read, bf16, bf16, level, tokens, "none", 4096) for level in (0, 1))
    assert kept < computed_again - 2**29


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_layer_writes_over_a_gradient_that_is_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And over no other: not where a layer is called by itself, or has a hook, as FSDP's."""
    calls: list[Any] = []
    block = decoder.block
    monkeypatch.setattr(decoder, "block", lambda *given: calls.append(given) or block(*given))
    one_layer: dict[str, Any] = {"layer_types": ["full_attention"]} if family == "gemma3" else {}
    model = install(adapted(tiny_model(family, num_hidden_layers=1, **one_layer)), levels=3, tile=16)
    model(**packed([[16] * 4]), use_cache=False)
    ((x, layer, batch, backend),) = calls
    assert batch.takes_dy and len(batch.tiles) == 4
    given = torch.randn_like(x)
    found = []
    for takes_dy in (False, True):
        leaf, dy = x.detach().requires_grad_(), given.clone()
        block(leaf, layer, replace(batch, takes_dy=takes_dy), backend).backward(dy)
        assert torch.equal(dy, given) != takes_dy
        found.append(leaf.grad)
    assert torch.equal(*found)
    hooked = unwrap(model).model.layers[0]

    def fsdps(*_: Any) -> None: ...

    fsdps.__module__ = "torch.distributed.fsdp"
    hooked.register_forward_pre_hook(fsdps)
    model(**packed([[16] * 4]), use_cache=False)
    assert len(calls) == 2 and not calls[1][2].takes_dy


@pytest.mark.parametrize(
    ("family", "level", "tile"),
    [("llama", 0, 64), ("llama", 1, 64), ("gemma3", 2, 64), ("gemma3", 3, 64), ("llama", 3, 16), ("gemma3", 0, 16)],
)
def test_the_work_of_a_layer_is_what_is_planned(
    family: str, level: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a backward pass up to the end of its MLP half, which needs the most but at level 0: with the kernels, since
    plain torch takes more. Attention has others on a GPU."""
    calls: list[Any] = []
    passed: list[Any] = []
    block, mlp_backward = decoder.block, MlpHalf.backward
    monkeypatch.setattr(decoder, "block", lambda *given: calls.append(given) or block(*given))

    def up_to_here(half: Any, *given: Any) -> Any:
        made = mlp_backward(half, *given)
        passed.append(half)
        if len(passed) == len(half.batch.tiles):
            spans.pop().__exit__(None, None, None)
        return made

    monkeypatch.setattr(MlpHalf, "backward", up_to_here)
    with interpreted():
        one_layer: dict[str, Any] = {"layer_types": ["full_attention"]} if family == "gemma3" else {}
        model = install(adapted(tiny_model(family, num_hidden_layers=1, **one_layer)), levels=level, tile=tile)
        model(**packed([[16] * 4]), use_cache=False)
        ((x, layer, batch, backend),) = calls
        x = x.detach().requires_grad_()
        dy = torch.randn_like(x)
        gc.collect()  # nothing of before is given back meanwhile
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
            y = block(x, layer, batch, backend)
            spans = [torch.profiler.record_function("work")]
            spans[0].__enter__()
            y.backward(dy)
    peak = max(accumulate(allocations(prof, "work")))
    planned = work_bytes(layer, torch.float32, torch.float32, level, len(x), "none", tile) - dy.nbytes
    gradients = sum(adapter.nbytes for adapter in layer.trained())  # of which some are not there yet
    in_tiles = tile < len(x)  # of so few tokens: attention then needs the most
    assert (0.7 if level == 0 or in_tiles else 0.85) * planned < peak <= planned + gradients


@pytest.mark.parametrize("tied", [False, True])
def test_a_script_leaves_room_for_the_head(tied: bool) -> None:
    model = install(adapted(tiny_model("llama", tied=tied)))
    batch = packed()
    model(**batch, use_cache=False)
    tokens, (vocabulary, hidden) = batch["input_ids"].numel(), model.get_input_embeddings().weight.shape
    own = 0 if tied else vocabulary * hidden * (4 + 8)  # gradient, moments
    logits = loss_bytes(tokens, vocabulary, hidden, 2, 4, 4, None, converts=True)
    assert fused_of(model).beside == own + logits
    assert logits > tokens * vocabulary * 2 / 2  # two tiles
    with_sum = loss_bytes(10**5, 128_256, 4096, 2, 2, 2, "tokens", converts=False)
    assert with_sum > 4 * 128_256 * 4096 + 2**29
    assert loss_bytes(10**5, 128_256, 4096, 2, 2, 2, "vocabulary", converts=False) < with_sum
    fp16 = {way: [loss_bytes(10**4, 128_256, 4096, 2, 4, 4, way, converts=True, lifted=each) for each in (False, True)]
            for way in get_args(Way)}  # fmt: skip
    assert fp16["tokens"][1] - fp16["tokens"][0] == 10**4 * 4096 * 2  # the gradient stays in fp32
    assert fp16["vocabulary"][1] == fp16["vocabulary"][0]
    base = unwrap(model).model
    assert all(p.dtype == torch.float32 for p in base.parameters() if p.requires_grad)
    counted = training_bytes([*base.parameters(), *base.parameters()])
    assert counted == sum(p.numel() * 12 for p in base.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["no labels", "another loss", "logits too", "the decoder alone", "evaluated before"])
def test_a_script_leaves_room_for_the_head_whoever_makes_the_loss(way: str, tied: bool) -> None:
    """A trainer that wants logits gives no labels (label smoothing, `compute_loss_func`), or calls the decoder and no
    more (TRL's)."""
    model, batch = install(adapted(tiny_model("llama", tied=tied)), logits=way == "logits too"), packed()
    tokens, (vocabulary, hidden) = batch["input_ids"].numel(), model.get_input_embeddings().weight.shape
    own = 0 if tied else vocabulary * hidden * (4 + 8)  # gradient, moments
    if way == "another loss":
        unwrap(model).loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    if way == "no labels":
        del batch["labels"]
    if way == "evaluated before":
        with torch.no_grad():
            model(**packed([[64]] * 4), use_cache=False)
    if way == "the decoder alone":
        del batch["labels"]
        unwrap(model).model(**batch)
        of_loss = 0
    else:
        model(**batch, use_cache=False)
        of_loss = loss_bytes(tokens, vocabulary, hidden, 2, 4, 4, None, converts=True)
        if way == "logits too":
            of_loss += tokens * vocabulary * 4
        elif way != "evaluated before":
            of_loss = tokens * vocabulary * 12
    assert fused_of(model).levels == [0, 0] and fused_of(model).beside == own + of_loss


def test_a_script_leaves_room_for_an_adapter_of_the_head() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model("llama", tied=False), config).train()
    batch = packed()
    install(model)(**batch, use_cache=False).loss.backward()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    own = 4 * (vocabulary + hidden) * (4 + 8)
    assert fused_of(model).beside == own + batch["input_ids"].numel() * vocabulary * 12


def test_levels_are_chosen_within_what_the_head_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on a card that holds level 0 but for a head."""
    found: dict[str, Any] = {}
    for labels in ("labels", "none"):
        model, batch = install(adapted(tiny_model("llama", tied=False))), packed()
        fused, layer = fused_of(model), unwrap(model).model.layers[0]
        read, fp32 = read_layer(layer, layer.traits), torch.float32
        room = work_bytes(read, fp32, fp32, 0, 128) + 2 * 128 * kept_bytes(read, fp32, fp32)[0]
        monkeypatch.setattr(fused_module, "room_on_card", lambda *_, room=room: room)
        monkeypatch.setattr(fused_module, "room_on_host", lambda: 0)
        if labels == "none":
            del batch["labels"]
        model(**batch, use_cache=False)
        found[labels] = fused.levels
    assert found["labels"] != [0, 0] and found["none"] != [0, 0]


def test_the_room_on_a_card_is_what_is_free_less_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    card, asked = torch.device("cuda", 1), []
    for name, answer in (("mem_get_info", (1000, 8000)), ("memory_reserved", 700), ("memory_allocated", 500)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: asked.append(device) or answer)
    parameters = [torch.nn.Parameter(torch.zeros(n), requires_grad=n == 10) for n in (10, 50)]
    on_card: Any = SimpleNamespace(
        norm=SimpleNamespace(weight=SimpleNamespace(device=card)), parameters=lambda: iter(parameters)
    )
    assert room_on_card(on_card, Updates()) == pytest.approx(0.92 * (1000 + 200) - 10 * (4 + 8))
    assert asked == [card] * 3
    assert room_on_card(unwrap(adapted(tiny_model("llama"))).model, Updates()) is None


def test_what_is_on_the_card_is_counted() -> None:
    """Of a decoder with its table, and of a head beside it."""
    model = unwrap(adapted(tiny_model("llama", tied=False, num_hidden_layers=8)))
    decoder = model.model
    table, layer = decoder.get_input_embeddings(), decoder.layers[0]
    of_table = sum(p.numel() for p in table.parameters() if p.requires_grad)
    of_layer = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    slots = staging_bytes()
    for updates, counted in (
        (Updates(), 12 * (of_table + 8 * of_layer)),
        (Updates(True), 8 * (of_table + 8 * of_layer) + 5 * 4 * of_layer),
        (Updates(False, "embeddings"), 4 * of_table + 12 * 8 * of_layer + slots),
        (Updates(True, "embeddings"), 8 * 8 * of_layer + slots + 5 * 4 * of_layer),
        (Updates(False, "all"), 4 * (of_table + 8 * of_layer) + slots),
        (Updates(True, "all"), 5 * 4 * of_layer + slots),
        (Updates(True, "all", tied=True), 4 * of_table + 5 * 4 * of_layer + slots),
    ):
        assert updates.bytes_of(decoder) == counted, updates
        assert bytes_beside_decoder(model, updates) == of_table * (12 if updates.on_host == "none" else 4)


def test_moments_are_counted_in_the_dtype_of_their_parameters() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    assert training_bytes([parameter]) == 10 * (2 + 4)
    parameter.grad_dtype = torch.float32
    assert training_bytes([parameter]) == 10 * (4 + 4)


def test_a_longer_batch_chooses_levels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on a card whose room holds the first batch, at level 0, and no more."""
    model = install(adapted(tiny_model("llama")))
    fused, layer = fused_of(model), unwrap(model).model.layers[0]
    read, fp32 = read_layer(layer, layer.traits), torch.float32
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    rooms: list[float] = []

    def head(tokens: int) -> int:
        return vocabulary * hidden * 12 + loss_bytes(tokens, vocabulary, hidden, 2, 4, 4, None, converts=True)

    def room_on_card(*_: Any) -> float:
        work = work_bytes(read, fp32, fp32, 0, 128)
        rooms.append(work + head(128) + 2 * 128 * kept_bytes(read, fp32, fp32)[0])
        return rooms[-1]

    monkeypatch.setattr(fused_module, "room_on_card", room_on_card)
    monkeypatch.setattr(fused_module, "room_on_host", lambda: 0)
    short, first, long = ([[n, 64 - n]] * rows for n, rows in ((20, 1), (5, 2), (40, 3)))
    chosen: list[tuple[int, Any, int]] = []
    for lengths in (first, short, long, first):
        model(**packed(lengths), use_cache=False).loss.backward()
        chosen.append((fused.chosen_for, fused.levels, fused.beside))
    expected, _, _ = levels_within(rooms[0], 0, 2, read, fp32, fp32, 192, head(192))
    assert chosen == [(128, [0, 0], head(128))] * 2 + [(192, expected, head(192))] * 2
    assert max(expected) > 0
    assert len(rooms) == 1  # measured before there are gradients and states

    given = install(adapted(tiny_model("llama")), levels=1)
    for lengths in (first, long):
        given(**packed(lengths), use_cache=False).loss.backward()
        assert fused_of(given).levels == [1, 1] and fused_of(given).chosen_for == 0
    assert len(rooms) == 1


@pytest.mark.parametrize("chosen_for", [64, 0])
def test_levels_of_a_checkpoint_are_chosen_again_for_a_longer_batch(
    chosen_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if on a card with no room; but not those that were given (0)."""
    monkeypatch.setattr(fused_module, "room_on_card", lambda *_: 0.0)
    monkeypatch.setattr(fused_module, "room_on_host", lambda: 0)
    begun, model = (install(adapted(tiny_model("llama"))) for _ in range(2))
    fused_of(begun).levels, fused_of(begun).chosen_for = [0, 1], chosen_for
    choices.take_over(model, choices.choices_of(begun))
    found: list[Any] = []
    for lengths in ([[64]], [[64]] * 2):
        model(**packed(lengths), use_cache=False).loss.backward()
        found.append(fused_of(model).levels)
    assert found == ([[0, 1], [3, 3]] if chosen_for else [[0, 1], [0, 1]])
    assert choices.choices_of(model).chosen_for == (128 if chosen_for else 0)


def test_what_is_leaner_needs_less() -> None:
    """Each by a share, the last one whatever it spares; then nothing is left. Layers of an 8B's proportions."""

    def needed(levels: Any, tile: int) -> int:
        kept, work = (94, 37, 25, 8), {4096: 60, 2048: 55, 1024: 52}  # MiB or so, of 4,096 tokens
        return sum(kept[level] for level in levels) + work[tile]

    now, found = ([0] * 4, 4096), []
    while (next_one := leaner_than(*now, 4096, needed)) is not None:
        assert needed(*next_one) < needed(*now)
        found.append(needed(*next_one) <= (1 - LESS) * needed(*now))
        now = next_one
    assert now == ([3] * 4, 1024) and all(found[:-1]) and len(found) > 4
    assert leaner_than([0, 3, 0, 3], 4096, 4096, needed) is not None  # which is no candidate


def test_other_updates_choose_anew() -> None:
    """A second trainer over the same model; what was given stays."""
    for chosen_for, stays in ((128, False), (0, True)):
        fused = Fused(levels=[0, 1], places=["gpu", "x"], tile=64, chosen_for=chosen_for, beside_for=chosen_for)
        fused.expect(Updates())
        assert (fused.levels, fused.chosen_for) == ([0, 1], chosen_for)
        lean = Updates(in_backward=True)
        fused.expect(lean)
        assert fused.updates == lean
        found = fused.levels, fused.places, fused.tile, fused.chosen_for, fused.beside_for
        assert found == (([0, 1], ["gpu", "x"], 64, 0, 0) if stays else (None, None, None, 0, 0))


def test_evaluation_chooses_no_levels() -> None:
    model = install(adapted(tiny_model("llama")))
    with torch.no_grad():
        model(**packed(), use_cache=False)
    assert (fused_of(model).levels, fused_of(model).beside_for) == (None, 0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_evaluation_keeps_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so needs no more than the leanest step, whatever the levels are."""
    model, seen = install(adapted(tiny_model(family)), levels=0, tile=5), list[tuple[int, bool]]()
    own = MlpHalf.forward

    def noted(half: Any, x2: torch.Tensor, up: Any, down: Any, gate_up: Any, mlp_out: Any, y: torch.Tensor) -> None:
        seen.append((len(x2), gate_up is None and mlp_out is None))
        own(half, x2, up, down, gate_up, mlp_out, y)

    monkeypatch.setattr(MlpHalf, "forward", noted)
    with torch.no_grad():
        model(**packed(), use_cache=False)
    assert seen and max(rows for rows, _ in seen) == 5 and all(nothing for _, nothing in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("level", "place"), [(0, "gpu"), (1, "gpu"), (2, "gpu"), (3, "gpu"), (0, "attention"),
                                              (1, "attention"), (2, "x"), (3, "x")])  # fmt: skip
def test_a_step_takes_what_was_planned(level: int, place: Place, accumulation: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from steep.model.adapters import add_adapters
    from steep.planning.fusing import decide, fused_step
    from steep.planning.memory import shape_of
    from steep.training.adamw8bit import AdamW8bit
    from tests.test_fused_run import config_of

    small = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(small)
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    config = config_of(adapter={"r": 64}, training=training)
    shape, (layer, _) = shape_of(empty, config.adapter), decide(config, empty, None, None)
    assert layer is not None
    step = fused_step(config, [layer], shape, base="bf16", compute="bf16", trained="bf16", on_card=True)
    before = torch.cuda.memory_allocated()
    places: list[Place] = [place if number < 7 else "gpu" for number in range(8)]
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16).requires_grad_(False)
    model = install(add_adapters(model, r=64, trained_dtype="bf16").train(), levels=level, places=places)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad_dtype = torch.float32 if accumulation > 1 else torch.bfloat16
    optimizer = AdamW8bit(trained, lr=1e-4)
    positions = torch.arange(2048, device="cuda").expand(2, -1)
    for number in range(3):
        if number == 1:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(accumulation):
            tokens = torch.randint(0, 32_000, (2, 2048), device="cuda")
            model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    # In a run the originals of trained embeddings are not in memory.
    originals = sum(p.nbytes for name, p in model.named_parameters() if "original_module" in name)
    assert originals == 2 * 32_000 * 2048 * 2
    planned = sum(step.by_item([level] * 8, step.faster_way, step.tokens, places).values()) + originals
    assert planned == pytest.approx(peak, rel=0.1), f"{peak / 2**30:.2f} GiB, planned {planned / 2**30:.2f}"
