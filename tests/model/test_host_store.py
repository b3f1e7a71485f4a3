"""What layers keep in host memory: the same bits as on the GPU, and no memory that is not theirs. On a CPU, by plain
copies; on a card marked `gpu`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from steep.errors import UserError
from steep.model import host_store
from steep.model.adapters import add_adapters
from steep.model.block import PLACES, block
from steep.model.host_store import HostPass, HostStore
from steep.model.install import fused_of, install, uninstall
from steep.model.mlp_half import MlpHalf
from steep.model.unwrap import unwrap
from tests.model.test_fused import adapted, loss_and_gradients, packed
from tests.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")


def same(ours: Any, expected: Any) -> bool:
    (loss, gradients), (expected_loss, expected_gradients) = ours, expected
    names = expected_gradients.keys()
    return (
        torch.equal(loss, expected_loss)
        and gradients.keys() == names
        and all(torch.equal(gradients[name], expected_gradients[name]) for name in names)
    )


def placed(model: Any, **how: Any) -> Any:
    uninstall(model)
    return install(model, **how)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Each fetch of a layer, with the tensors that it had on the host."""
    calls: list[tuple[int, int]] = []
    own = HostPass.fetch

    def noted(self: HostPass, index: int) -> list[torch.Tensor]:
        tensors = own(self, index)
        calls.append((index, len(tensors)))
        return tensors

    monkeypatch.setattr(HostPass, "fetch", noted)
    yield calls


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_the_bits_are_those_of_the_gpu(family: str, level: int, fetched: list[tuple[int, int]]) -> None:
    """Twice each: the second time buffers have been used. And garbage in them is no help."""
    model, tile = adapted(tiny_model(family)), 50 if (level + len(family)) % 2 else None
    expected = loss_and_gradients(placed(model, levels=level, tile=tile), packed())
    assert fetched == []
    counts: list[int] = []
    for place in PLACES[1:]:
        placed(model, levels=level, places=place, tile=tile)
        for _ in range(2):
            assert same(loss_and_gradients(model, packed()), expected), place
            for buffer in fused_of(model)._host._buffers.values():
                buffer.fill_(0x7F)
        assert [index for index, _ in fetched] == [1, 0, 1, 0]
        assert len({count for _, count in fetched}) == 1
        counts.append(fetched[0][1])
        fetched.clear()
        assert fused_of(model).said == set()
    x, attention, everything = counts
    norms = "gemma2" in family or "gemma3" in family
    assert x == 1
    assert attention == 1 + {0: 3, 1: 3, 2: 1, 3: 0}[level] + (norms and level == 0)
    assert everything == attention + (level == 0) + norms


@pytest.mark.parametrize("places", [["x", "gpu"], ["gpu", "all"], ["all", "x"], ["attention", "attention"]])
def test_layers_may_differ(places: Any) -> None:
    model = adapted(tiny_model("qwen3"))
    for levels in ([0, 3], [2, 1]):
        expected = loss_and_gradients(placed(model, levels=levels), packed())
        placed(model, levels=levels, places=places)
        assert all(same(loss_and_gradients(model, packed()), expected) for _ in range(2))


def test_more_layers_than_buffers_on_the_card() -> None:
    """Six layers, two slots: each is used three times."""
    model = adapted(tiny_model("llama", num_hidden_layers=6))
    for places in ("all", ["all"] * 5 + ["gpu"], ["gpu", "x", "gpu", "all", "attention", "gpu"]):
        for levels in (1, [3, 0, 2, 1, 0, 3]):
            expected = loss_and_gradients(placed(model, levels=levels), packed())
            assert same(loss_and_gradients(placed(model, levels=levels, places=places), packed()), expected)


def test_a_wrong_layer_on_the_host_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison bites: one value of what was copied, changed."""
    model = adapted(tiny_model("llama"))
    expected = loss_and_gradients(placed(model, levels=1), packed())
    own = host_store._copy

    def spoilt(sources: Any, places: Any) -> None:
        own(sources, places)
        places[-1].view(-1)[7] += 1

    monkeypatch.setattr(host_store, "_copy", spoilt)
    assert not same(loss_and_gradients(placed(model, levels=1, places="all"), packed()), expected)


def test_gradients_of_several_forwards_add_up() -> None:
    """Also where batches differ in length: the longest so far has the buffers made anew."""
    model, batches = adapted(tiny_model("llama")), [packed([[9, 20]]), packed([[40, 2], [30, 12]]), packed([[11]])]

    def accumulated(**how: Any) -> dict[str, torch.Tensor]:
        placed(model, levels=1, **how).zero_grad(set_to_none=True)
        for batch in (*batches, batches[0]):
            model(**batch, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, ours = accumulated(), accumulated(places="all")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    sizes = [each.numel() for each in fused_of(model)._host._buffers.values()]
    layer = [each for each in sizes if each == sizes[0]]
    assert len(layer) == 2 and fused_of(model)._host.nbytes == sum(sizes)


def test_the_memory_is_what_is_kept_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    own = host_store.pinned_zeros
    monkeypatch.setattr(host_store, "pinned_zeros", lambda shape, *rest: asked.append(shape[0]) or own(shape, *rest))
    model = placed(adapted(tiny_model("llama")), levels=3, places=["x", "gpu"])
    for _ in range(3):
        loss_and_gradients(model, packed())
    hidden = model.config.hidden_size
    assert asked == [128 * hidden * 4]


def test_evaluation_takes_none() -> None:
    model = placed(adapted(tiny_model("llama")), levels=1, places="all")
    with torch.no_grad():
        model(**packed(), use_cache=False)
    assert fused_of(model)._host.nbytes == 0


def test_a_forward_without_a_backward_gives_its_memory_back() -> None:
    model = adapted(tiny_model("llama"))
    expected = loss_and_gradients(placed(model, levels=1), packed())
    placed(model, levels=1, places="all")
    model(**packed(seed=3), use_cache=False)
    assert same(loss_and_gradients(model, packed()), expected)
    assert fused_of(model).said == set()


def test_a_loss_that_is_kept_after_its_backward_holds_nothing() -> None:
    model = placed(adapted(tiny_model("llama")), levels=1, places="all")
    losses = []
    for _ in range(2):
        losses.append(model(**packed(), use_cache=False).loss)
        losses[-1].backward()
    assert fused_of(model).said == set()


def test_a_second_forward_before_the_first_backward_stays_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """As where two answers are compared (DPO)."""
    model, batches = adapted(tiny_model("llama")), (packed(), packed(seed=1))

    def compared(**how: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        placed(model, levels=1, **how).zero_grad(set_to_none=True)
        first, second = (model(**batch, use_cache=False).loss for batch in batches)
        (first - 2 * second).backward()
        return first.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = compared()
    assert same(compared(places="all"), expected)
    assert [line for line in caplog.messages if "host memory" in line] == [
        "a forward before the backward of another keeps all on the GPU: host memory is for one. A step that an "
        "error ended is one too, as long as somebody has its loss"
    ]
    assert same(compared(places="all"), expected)


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_step_that_failed_does_not_disturb_the_next(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its loss, or its error, that somebody still has."""
    model = adapted(tiny_model("llama", num_hidden_layers=4))
    expected = loss_and_gradients(placed(model, levels=1), packed())
    placed(model, levels=1, places="all")
    own, calls = getattr(MlpHalf, moment), []

    def fails(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("planted")
        return own(*given)

    loss = None
    with monkeypatch.context() as planted, pytest.raises(torch.OutOfMemoryError, match="planted") as held:
        planted.setattr(MlpHalf, moment, fails)
        loss = model(**packed(seed=5), use_cache=False).loss
        loss.backward()
    assert len(calls) == 3
    for _ in range(2):
        assert same(loss_and_gradients(model, packed()), expected)
    assert fused_of(model).said == set() and held.value.__traceback__ is not None  # which has the frames
    if moment == "backward":
        with pytest.raises(RuntimeError):
            assert loss is not None
            loss.backward()  # which is over
    assert same(loss_and_gradients(model, packed()), expected)


def test_an_adapter_changed_before_the_backward_pass_is_an_error() -> None:
    model = placed(adapted(tiny_model("llama")), levels=3, places="x")
    loss = model(**packed(), use_cache=False).loss
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_x_is_held_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer whose input is on the host; where it is on the GPU its node has it. While later layers compute, too:
    the first layer's was held by who called it, 8 KB a token of an 8B at the peak of a forward pass."""
    for places, alive in (("gpu", 2), (["x", "gpu"], 1), ("x", 0)):
        model = placed(adapted(tiny_model("llama")), levels=3, places=places)
        inputs: list[StorageWeakRef] = []

        def noted(x: torch.Tensor, *rest: Any, inputs: Any = inputs, places: Any = places) -> torch.Tensor:
            inputs.append(StorageWeakRef(x.untyped_storage()))
            y = block(x, *rest)
            if len(inputs) > 1:  # what was copied last is held meanwhile
                assert inputs[0].expired() == (places != "gpu"), places
            return y

        monkeypatch.setattr("steep.model.decoder.block", noted)
        loss = model(**packed(), use_cache=False).loss
        assert sum(not each.expired() for each in inputs) == alive, places
        loss.backward()


def test_what_is_modified_while_it_is_copied_is_an_error() -> None:
    store = HostStore()
    begun = store.begin(CPU)
    assert begun is not None
    x = torch.ones(3)
    begun.keep(0, [x])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        begun.keep(1, [])
    begun.keep(1, [x])
    begun.let_go()
    x.add_(1)  # it is copied
    assert torch.equal(begun.fetch(1)[0], torch.full((3,), 2.0)) and torch.equal(begun.fetch(0)[0], torch.ones(3))


def test_a_layer_may_write_over_what_it_gets_and_layers_may_be_left_out() -> None:
    """A backward pass through some layers alone; the buffers are two, of the largest that any layer has."""
    store = HostStore()
    begun = store.begin(CPU)
    assert begun is not None and store.begin(CPU) is None
    given = [
        [torch.full((number + 1, 70), float(number)), torch.arange(number, dtype=torch.int64)] for number in range(6)
    ]
    for number, tensors in enumerate(given):
        begun.keep(number, tensors)
    begun.let_go()
    for number in (5, 4, 2, 0):
        found = begun.fetch(number)
        assert all(torch.equal(one, other) for one, other in zip(found, given[number], strict=True))
        for tensor in found:
            tensor.fill_(-1)
    assert [len(slot) for slot in begun._slots] == [len(store._buffers[5])] * 2
    store.take_back()  # as where a step is given up while its graph is alive
    with pytest.raises(RuntimeError, match="ended this pass before"):
        begun.fetch(1)
    assert store.begin(CPU) is not None


def test_large_inputs_have_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer fetches its own when it begins, and nothing is fetched before."""
    monkeypatch.setattr(host_store, "_LARGE", 70 * 4)
    for inputs, buffers in ([[0, 1, 2]], 1), ([[0, 1, 2], [1]], 2):
        begun = HostStore().begin(CPU, little=buffers == 1)
        assert begun is not None
        for number in range(3):
            begun.keep(number, [torch.full((70,), float(number)) for numbers in inputs if number in numbers])
        begun.keep(3, [])
        begun.let_go()
        assert begun.fetch(3) == [] and list(begun._fetched) == ([] if buffers == 1 else [2])
        for number in (2, 1, 0):
            assert all(torch.equal(each, torch.full((70,), float(number))) for each in begun.fetch(number))
            assert [each in begun._fetched for each in (number, number - 1)] == [True, buffers == 2 and number > 0]
        assert len(begun._slots) == buffers
    model = adapted(tiny_model("llama", num_hidden_layers=4))
    monkeypatch.setattr(host_store, "_LARGE", 1)
    for level in (1, 3):
        expected = loss_and_gradients(placed(model, levels=level), packed())
        for places in ("x", ["x"] * 3 + ["gpu"], ["gpu", "x", "gpu", "x"]):
            assert same(loss_and_gradients(placed(model, levels=level, places=places), packed()), expected)


def test_a_shorter_batch_has_no_more_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a batch that is only just not long need more memory than the one of the long batch before it."""
    monkeypatch.setattr(host_store, "_LARGE", 70 * 4)
    store = HostStore()
    for length in (70, 60):
        begun = store.begin(CPU, little=True)
        assert begun is not None
        for number in range(2):
            begun.keep(number, [torch.zeros(length)])
        begun.let_go()
        begun.fetch(1)
        assert list(begun._fetched) == [1]
        begun.leave()


def test_rows_that_are_apart_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = HostStore().begin(CPU)
    assert begun is not None
    wide = torch.randn(5, 9)
    begun.keep(0, [wide[:, 2:6], wide[:0]])
    begun.let_go()
    part, empty = begun.fetch(0)
    assert torch.equal(part, wide[:, 2:6]) and empty.shape == (0, 9)


def test_a_copy_of_a_model_has_memory_of_its_own() -> None:
    model = placed(adapted(tiny_model("llama")), levels=1, places="all")
    expected = loss_and_gradients(model, packed())
    copied = copy.deepcopy(model)
    assert fused_of(copied).places == ["all"] * 2 and fused_of(copied)._host.nbytes == 0
    assert same(loss_and_gradients(copied, packed()), expected)
    assert pickle.loads(pickle.dumps(fused_of(model))).places == ["all"] * 2


@pytest.mark.parametrize("places", ["cpu", 1, ["x"], ["x", "gpu", "x"], ["x", None], ["x", 0]])
def test_places_that_are_none(places: Any) -> None:
    with pytest.raises(UserError, match="are no places of 2 layers") as caught:
        install(adapted(tiny_model("llama")), levels=1, places=places)
    assert "gpu, x, attention, all" in str(caught.value)
    assert not hasattr(unwrap(adapted(tiny_model("llama"))), "fused")


# ---- on a card


def on_card(layers: int = 4, hidden: int = 512) -> Any:
    with torch.device("cuda"):
        config = LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=2,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
        return add_adapters(model, r=64, trained_dtype="bf16").train()


def of_card(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 512, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1)
    return {"input_ids": tokens.cuda(), "position_ids": positions.cuda(), "labels": tokens.cuda()}


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, 1000])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_the_bits_are_those_of_the_card(level: int, tile: int | None) -> None:
    """With kernels that give the same bits each time; step after step without a wait, and after one that failed."""
    model = on_card(6)
    torch.use_deterministic_algorithms(True)
    try:
        batches = [of_card(2, 1024, seed) for seed in range(3)]
        placed(model, levels=level, tile=tile)
        expected = [loss_and_gradients(model, batch) for batch in batches]
        for places in ("x", "attention", "all", ["all", "x", "gpu", "attention", "all", "gpu"]):
            placed(model, levels=level, places=places, tile=tile)
            found = [loss_and_gradients(model, batch) for batch in batches * 2]
            with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
                calls: list[int] = []

                def fails(*given: Any, own: Any = MlpHalf.backward, calls: Any = calls) -> Any:
                    calls.append(1)
                    if len(calls) > 2:
                        raise RuntimeError("planted")
                    return own(*given)

                patch.setattr(MlpHalf, "backward", fails)
                loss_and_gradients(model, batches[2])
            found += [loss_and_gradients(model, batch) for batch in batches]
            assert all(same(one, other) for one, other in zip(found, expected * 3, strict=True)), places
            assert all(buffer.is_pinned() for buffer in fused_of(model)._host._buffers.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_copies_are_hidden_behind_the_step() -> None:
    """Of the time in which something is copied, kernels run in most: the last layer's are on the GPU."""
    model = placed(on_card(8, 4096), levels=1, places=["attention"] * 7 + ["gpu"])
    batch = of_card(2, 2048)
    for _ in range(2):
        loss_and_gradients(model, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as prof:
        model(**batch, use_cache=False).loss.backward()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in prof.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = event.time_range.start, event.time_range.end
            spans["Memcpy DtoH" in event.name or "Memcpy HtoD" in event.name].append(span)
    large = [span for span in spans[True] if span[1] - span[0] > 20]  # microseconds
    assert len(large) >= 2 * 7
    hidden = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in large
        for other_start, other_end in spans[False]
    )
    assert hidden > 0.8 * sum(end - start for start, end in large)


@pytest.mark.gpu
def test_nothing_is_held_back_on_the_card() -> None:
    """Reserved memory grows no further after the first steps, and what is allocated is what it was."""
    model, batch = placed(on_card(8, 2048), levels=1, places="all"), of_card(2, 2048)
    for _ in range(3):
        loss_and_gradients(model, batch)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for seed in range(5):
        loss_and_gradients(model, of_card(2, 2048, seed))
    model.zero_grad(set_to_none=True)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
