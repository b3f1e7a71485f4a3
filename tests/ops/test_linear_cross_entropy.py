"""Loss, both gradients and the tokens' losses against fp32 truth: both ways, in torch, interpreted and compiled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steep.ops import linear_cross_entropy as op
from steep.ops.backend import interpreted
from steep.ops.cross_entropy import scaled
from steep.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.closeness import assert_as_good

IGNORE = -100
WAYS: list[dict[str, Any]] = [
    {"way": "tokens"},
    {"way": "tokens", "tile": 24},
    {"way": "vocabulary"},
    {"way": "vocabulary", "chunk": 320},
]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@dataclass
class Place:
    """Where a test runs: in plain torch, or in the kernels, interpreted or compiled."""

    name: str
    device: torch.device


@contextlib.contextmanager
def counting(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Counts the kernels' launches: where they run, nothing passes without them; elsewhere none is launched."""
    calls = 0
    if name != "torch":
        from steep.kernels import cross_entropy as kernels

        def counted(launch: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                nonlocal calls
                calls += 1
                launch(*arguments)

            return call

        for launcher in ("loss_and_gradient", "statistics", "gradient", "scaled"):
            monkeypatch.setattr(kernels, launcher, counted(getattr(kernels, launcher)))
    with interpreted() if name == "interpreted" else contextlib.nullcontext():
        yield Place(name, torch.device("cuda" if name == "cuda" else "cpu"))
    assert (calls > 0) == (name != "torch")


@pytest.fixture(params=["torch", "interpreted", CUDA])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with counting(request.param, monkeypatch) as found:
        yield found


@pytest.fixture(params=["torch", CUDA])
def fast_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with counting(request.param, monkeypatch) as found:
        yield found


@dataclass
class Case:
    x: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor


def case_of(place: Place, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, ignored: float = 0.3) -> Case:
    """Columns of a wider buffer, logits of a few units, and a share of labels ignored, the first token's not."""
    x = torch.randn(tokens, hidden + 16, device=place.device).to(dtype)[:, 8:-8]
    weight = (torch.randn(vocabulary, hidden, device=place.device) * 3 / hidden**0.5).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), device=place.device)
    labels[1:][torch.rand(tokens - 1, device=place.device) < ignored] = IGNORE
    return Case(x, weight, labels)


def gradients(
    function: Callable[..., torch.Tensor], case: Case, times: float = 1.0, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dx, dW) for times · loss."""
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss = function(x, weight, case.labels, **options)
    (loss * times).backward()
    assert x.grad is not None and weight.grad is not None
    return loss.detach(), x.grad, weight.grad


def assert_gradients(case: Case, way: dict[str, Any], times: float = 1.0, **options: Any) -> None:
    truth = gradients(
        linear_cross_entropy_reference, Case(case.x.float(), case.weight.float(), case.labels), times, **options
    )
    reference = gradients(linear_cross_entropy_reference, case, times, **options)
    ours = gradients(linear_cross_entropy, case, times, **options, **way)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    assert (ours[1].dtype, ours[2].dtype) == (case.x.dtype, case.weight.dtype)
    slack = 1e-5 if case.x.dtype == case.weight.dtype == torch.float32 and not case.x.is_cuda else 2e-3
    for name, *values in zip(("loss", "dx", "dW"), ours, reference, truth, strict=True):
        assert_as_good(*values, slack=slack, name=name)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 384), (27, 1007)])
def test_it_is_exact(place: Place, tokens: int, vocabulary: int, dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert_gradients(case_of(place, tokens, vocabulary, 64, dtype), way)


@pytest.mark.parametrize("way", [{"way": "tokens", "tile": 1}, {"way": "vocabulary", "chunk": 6144}], ids=str)
def test_rows_of_several_passes(place: Place, way: dict[str, Any]) -> None:
    assert_gradients(case_of(place, 3, 9001, 64, torch.bfloat16), way, softcap=5.0)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(63, 384), (1000, 1007), (63, 50264)])
def test_it_is_exact_at_larger_sizes(
    fast_place: Place, tokens: int, vocabulary: int, dtype: torch.dtype, way: dict[str, Any]
) -> None:
    assert_gradients(case_of(fast_place, tokens, vocabulary, 64, dtype), way)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_scale_and_softcap(
    place: Place, scale: float, softcap: float | None, dtype: torch.dtype, way: dict[str, Any]
) -> None:
    assert_gradients(case_of(place, 27, 1007, 64, dtype), way, scale=scale, softcap=softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [{"way": "tokens"}, {"way": "tokens", "tile": 1024}, {"way": "vocabulary"}], ids=str)
@pytest.mark.parametrize(("vocabulary", "hidden", "softcap"), [(128263, 2048, None), (262144, 1152, 30.0)])
def test_real_sizes(vocabulary: int, hidden: int, softcap: float | None, way: dict[str, Any]) -> None:
    place = Place("cuda", torch.device("cuda"))
    assert_gradients(case_of(place, 2500, vocabulary, hidden, torch.bfloat16, 0.1), way, softcap=softcap)


@pytest.mark.parametrize("place", [CUDA], indirect=True)
def test_rows_beyond_two_to_the_31st_element(place: Place) -> None:
    """One tile, and one chunk, of more than 2^31 logits."""
    case = case_of(place, 17000, 128256, 64, torch.bfloat16, 0.0)
    tiles = gradients(linear_cross_entropy, case, times=2.0, tile=1000)
    for way in ({"way": "tokens", "tile": 17000}, {"way": "vocabulary", "chunk": 128256}):
        whole = gradients(linear_cross_entropy, case, times=2.0, **way)
        for name, ours, other in zip(("loss", "dx", "dW"), whole, tiles, strict=True):
            assert_as_good(ours, other, other.float(), name=name)


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_number_of_items_and_gradient_of_the_loss(place: Place, dtype: torch.dtype, way: dict[str, Any]) -> None:
    """The mean is over another number than this batch's targets, and the loss is scaled as for fp16: 2^10."""
    case = case_of(place, 27, 640, 64, dtype)
    for number in (1000, torch.tensor(1000, device=place.device), torch.tensor(1000.0, device=place.device)):
        assert_gradients(case, way, times=1024.0, num_items=number)


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
def test_two_micro_batches_are_one_batch(place: Place, way: dict[str, Any]) -> None:
    case = case_of(place, 40, 640, 64, torch.float32)
    number = int((case.labels != IGNORE).sum())
    whole = gradients(linear_cross_entropy, case, **way)
    halves = [
        gradients(linear_cross_entropy, Case(case.x[part], case.weight, case.labels[part]), num_items=number, **way)
        for part in (slice(0, 13), slice(13, 40))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
    torch.testing.assert_close(torch.cat([halves[0][1], halves[1][1]]), whole[1])
    torch.testing.assert_close(halves[0][2] + halves[1][2], whole[2])


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
def test_gradients_in_fp32_of_a_weight_in_bf16(place: Place, way: dict[str, Any]) -> None:
    """With `grad_dtype` two micro-batches are added in fp32; dW is then as exact as its logits are."""
    case = case_of(place, 40, 640, 64, torch.bfloat16)
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    weight.grad_dtype = torch.float32
    for part in (slice(0, 13), slice(13, 40)):
        linear_cross_entropy(x[part], weight, case.labels[part], num_items=30, **way).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert (weight.grad != weight.grad.bfloat16()).any()
    wide = Case(case.x.float(), case.weight.float(), case.labels)
    truth = gradients(linear_cross_entropy_reference, wide, num_items=30)[2]
    reference = gradients(linear_cross_entropy_reference, case, num_items=30)[2]
    assert_as_good(weight.grad, reference, truth, slack=0, name="dW")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_masters_in_fp32_are_read_in_the_dtype_of_x(place: Place, way: dict[str, Any]) -> None:
    case = case_of(place, 40, 640, 64, torch.float32)
    mixed = Case(case.x.bfloat16(), case.weight, case.labels)
    assert_gradients(mixed, way)
    assert_gradients(Case(case.x, case.weight.bfloat16(), case.labels), way)


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
def test_no_targets_no_loss(place: Place, way: dict[str, Any]) -> None:
    for tokens in (30, 0):
        case = case_of(place, max(tokens, 1), 640, 64, torch.bfloat16)
        case = Case(case.x[:tokens], case.weight, torch.full_like(case.labels, IGNORE)[:tokens])
        for number in (None, 7, 0, torch.tensor(0, device=place.device)):
            loss, dx, dw = gradients(linear_cross_entropy, case, num_items=number, **way)
            assert loss == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(place: Place, value: float, softcap: float | None, way: dict[str, Any]) -> None:
    case = case_of(place, 30, 640, 64, torch.bfloat16, 0.0)
    case.x = case.x.clone()
    case.x[17] = 0
    case.x[17, 5] = value
    case.weight[:, 5] = case.weight[:, 5].abs()  # all logits infinite, of one sign
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter
        loss, dx, _ = gradients(linear_cross_entropy, case, softcap=softcap, **way)
    assert loss.isnan()
    assert dx.isnan().any(1).nonzero().flatten().tolist() == [17]


def test_a_cap_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="softcap is 0"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(64, 8), torch.tensor([1, 2, 3]), softcap=0.0)


def test_a_first_pass_of_impossible_tokens(place: Place) -> None:
    """Logits of -inf are probabilities of 0, the first 4,096 of a row too."""
    case = case_of(place, 3, 4500, 64, torch.float32, 0.0)
    case.x, case.labels = case.x.clone(), case.labels % 404 + 4096
    case.x[:, 5] = 1.0
    case.weight[:4096, 5] = -torch.inf
    expected = gradients(linear_cross_entropy_reference, case)
    found = gradients(linear_cross_entropy, case, way="tokens")
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2][4096:], expected[2][4096:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
@pytest.mark.parametrize("label", [640, 641, 10**12, -1, -101])
def test_a_label_outside_of_the_vocabulary_is_nan(place: Place, label: int, way: dict[str, Any]) -> None:
    case = case_of(place, 30, 640, 64, torch.bfloat16)
    case.labels[17] = label
    loss, dx, dw = gradients(linear_cross_entropy, case, **way)
    assert loss.isnan() and dw.isnan().all()
    assert dx.isnan().any(1).nonzero().flatten().tolist() == [17]


def test_another_index_is_ignored(place: Place) -> None:
    """Also one that the vocabulary has, as a padding token's."""
    case = case_of(place, 30, 640, 64, torch.float32)
    case.labels[case.labels == IGNORE] = 3
    for way in WAYS[1::2]:
        assert_gradients(case, way, ignore_index=3)


def test_only_what_is_needed_is_made(place: Place) -> None:
    case = case_of(place, 27, 640, 64, torch.bfloat16)
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss, dx, dw = gradients(linear_cross_entropy, case)
    for way in WAYS[1::2]:
        linear_cross_entropy(x.detach(), weight, case.labels, **way).backward()
        assert weight.grad is not None
        assert_as_good(weight.grad, dw, dw.float())
        linear_cross_entropy(x, weight.detach(), case.labels, **way).backward()
        assert x.grad is not None
        assert_as_good(x.grad, dx, dx.float())
        x.grad = weight.grad = None
        with torch.no_grad():
            torch.testing.assert_close(linear_cross_entropy(x, weight, case.labels, **way), loss)
        assert x.grad is None and weight.grad is None


def test_a_head_that_is_the_embedding_too(place: Place) -> None:
    tokens, labels = torch.randint(640, (2, 40), device=place.device)
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.manual_seed(0)
        weight = torch.randn(640, 64, device=place.device).requires_grad_()
        function(torch.nn.functional.embedding(tokens, weight).tanh(), weight, labels).backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_it_is_the_same_to_the_bit_each_time(place: Place) -> None:
    case = case_of(place, 27, 1007, 64, torch.bfloat16)
    for way in WAYS[1::2]:
        first, second = (gradients(linear_cross_entropy, case, **way) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_autocast_changes_nothing(place: Place) -> None:
    case = case_of(place, 40, 640, 64, torch.float32)
    expected = gradients(linear_cross_entropy, case)
    with torch.autocast(place.device.type, torch.bfloat16):
        found = gradients(linear_cross_entropy, case)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_autograd_owns_the_gradient_alone(place: Place) -> None:
    """What the forward made becomes `.grad` without a copy, and is not left for a second backward."""
    case = case_of(place, 40, 640, 64, torch.float32)
    weight = case.weight.detach().requires_grad_()
    loss = linear_cross_entropy(case.x, weight, case.labels)
    made = loss.grad_fn.gradients.weight.data_ptr()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    loss.backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.data_ptr() == made
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_in_fp16_nothing_underflows(place: Place) -> None:
    """The gradients of 10^6 items are far below fp16's smallest number until the loss is scaled."""
    case = case_of(place, 27, 1007, 64, torch.float16)
    case.weight *= 0.05  # near uniform
    for way in WAYS[1::2]:
        assert_gradients(case, way, times=2.0**16, num_items=2_000_000)


def test_scaling_passes_over_everything(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than programs, and a last one that is not full; in place, and into another dtype."""
    monkeypatch.setattr("steep.kernels.cross_entropy.SCALED_PROGRAMS", 2)
    source = torch.randn(9001, device=place.device)
    for factor, dtype in ((3.0, torch.float32), (1.0, torch.float32), (3.0, torch.float16), (1.0, torch.float16)):
        found = scaled(source.clone(), torch.tensor(factor, device=place.device), dtype)
        assert torch.equal(found, (source * factor).to(dtype))


@pytest.mark.parametrize("place", [CUDA], indirect=True)
def test_scaling_beyond_two_to_the_31_elements(place: Place) -> None:
    source = torch.ones(2**31 + 4099, dtype=torch.bfloat16, device=place.device)
    assert (scaled(source, torch.tensor(3.0, device=place.device), torch.bfloat16) == 3).all()


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("way", WAYS[1::2], ids=str)
def test_logits_of_the_whole_batch_never_exist(way: dict[str, Any]) -> None:
    """T · V is the largest of all sizes here: nothing made comes near it, and the reference is seen to make it."""
    tokens, vocabulary, hidden = 600, 4000, 16
    case = case_of(Place("torch", torch.device("cpu")), tokens, vocabulary, hidden, torch.bfloat16)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
        with Largest() as seen:
            function(x, weight, case.labels, **(way if function is linear_cross_entropy else {})).backward()
        if function is linear_cross_entropy_reference:
            assert seen.elements == tokens * vocabulary
        else:
            assert 0 < seen.elements <= max(tokens * 320, 24 * 4032, vocabulary * hidden)


def test_nor_do_they_in_evaluation() -> None:
    case = case_of(Place("torch", torch.device("cpu")), 600, 4000, 16, torch.bfloat16)
    with Largest() as seen, torch.no_grad():
        linear_cross_entropy(case.x, case.weight, case.labels, chunk=320)
    assert 0 < seen.elements <= 600 * 320


def test_default_sizes() -> None:
    """8B's head: chunks of half the vocabulary as long as all logits need less than the fp32 sum, then equal tiles of
    about 1 GiB, or of 256 MiB over a frozen head; never the whole of a batch."""
    assert op.faster_way(4096, 4096, 2, sums=True) == "vocabulary"
    assert op.faster_way(16384, 4096, 2, sums=True) == "tokens"
    assert op.faster_way(4096, 4096, 2, sums=False) == "tokens"
    assert op.tile_size(16384, 128256, 2, frozen=False) == 4096
    assert op.tile_size(4096, 128256, 2, frozen=False) == 2048
    assert op.tile_size(4096, 128256, 2, frozen=True) == 1024
    assert op.tile_size(0, 128256, 2, frozen=False) == 1
    assert op.chunk_size(4096, 128256, 2, gradients=True) == 64128
    assert op.chunk_size(4096, 128263, 2, gradients=True) == 64192
    assert op.chunk_size(4096, 128256, 2, gradients=False) == 32064
    assert op.chunk_size(4096, 128256, 2, gradients=True, way="narrow") == 8064
    assert op.chunk_size(10**5, 128256, 2, gradients=True, way="narrow") <= 1088
    assert op.chunk_size(10**6, 128256, 2, gradients=True) <= 1088
    assert op.chunk_size(1, 384, 2, gradients=True) == 384


def test_narrow_chunks_are_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit those of the same size by the vocabulary, and smaller than that way has them."""
    monkeypatch.setattr(op, "NARROW_CHUNK_BYTES", 1)
    made, products = [], []
    own = op.product
    monkeypatch.setattr(op, "product", lambda a, b, **how: products.append(b.shape) or own(a, b, **how))
    ways: list[dict[str, Any]] = [{"way": "narrow"}, {"way": "vocabulary", "chunk": 1024}, {"way": "vocabulary"}]
    for way in ways:
        torch.manual_seed(0)
        x, weight = torch.randn(70, 64).requires_grad_(), torch.randn(2900, 64).requires_grad_()
        products.clear()
        loss = linear_cross_entropy(x, weight, torch.randint(2900, (70,)), **way)
        loss.backward()
        made.append((loss.detach(), x.grad, weight.grad, list(products)))
    narrow, chunks, whole = made
    assert all(torch.equal(one, other) for one, other in zip(narrow[:3], chunks[:3], strict=True))
    assert narrow[3] == chunks[3] and len(narrow[3]) > len(whole[3])


def most_memory(way: dict[str, Any], num_tokens: int, num_columns: int, hidden: int) -> int:
    """Bytes at the peak of a forward and a backward in bf16, both gradients among them, as the module says."""
    x, weight = num_tokens * hidden * 2, num_columns * hidden * 2
    if way["way"] != "tokens":
        chunk = way.get("chunk") or op.chunk_size(num_tokens, num_columns, 2, gradients=True, way=way["way"])
        return num_tokens * chunk * 2 + weight + 3 * x  # dx is summed in fp32, then rounded
    tile = way.get("tile") or op.tile_size(num_tokens, num_columns, 2, frozen=False)
    logits = tile * num_columns * 2
    # dW is summed in fp32; its own dtype comes when the logits have gone
    return x + (logits + weight if tile >= num_tokens else 2 * weight + max(logits, weight))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "way",
    [
        {"way": "tokens"},
        {"way": "tokens", "tile": 1024},
        {"way": "tokens", "tile": 4096},
        {"way": "vocabulary"},
        {"way": "vocabulary", "chunk": 8064},
        {"way": "narrow"},
    ],
    ids=str,
)
def test_peak_memory_on_a_card(way: dict[str, Any]) -> None:
    """What the module says, and 64 MiB for cuBLAS and vectors."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    labels = torch.randint(128256, (4096,), device="cuda")
    linear_cross_entropy(x[:64], weight.detach(), labels[:64]).backward()  # cuBLAS takes its workspace
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels, **way).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= most_memory(way, 4096, 128256, 4096) + 2**26

    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        linear_cross_entropy(x, weight, labels)
    logits = 4096 * op.chunk_size(4096, 128256, 2, gradients=False) * 2
    assert torch.cuda.max_memory_allocated() - before <= logits + 2**26


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_card() -> None:
    case = case_of(Place("cuda", torch.device("cuda")), 256, 1007, 64, torch.bfloat16)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    number = torch.tensor(200, device="cuda")
    for mode in ("default", "error"):  # compiled at first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for way in WAYS:
                linear_cross_entropy(x, weight, case.labels, num_items=number, **way).backward()
                linear_cross_entropy(x, weight, case.labels, **way).backward()
            with torch.no_grad():
                linear_cross_entropy(x, weight, case.labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
