"""Attention over packed documents: the semantics are transformers', and a document knows nothing of its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from steep.ops import attention_backends, attention_flex
from steep.ops.attention import (
    BACKENDS,
    attention,
    attention_backward,
    attention_backward_in_place,
    attention_forward,
    attention_reference,
    heads_at_once,
)
from steep.ops.attention_backends import (
    fastest_backend,
    measured_backends,
    refusals,
    table_backend,
    usable_backends,
)
from steep.ops.packing import Packing
from tests.ops.closeness import assert_as_good, error, slack_of

# Inductor gives it for whatever it compiles on a card that has TF32.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")

HEADS = [(8, 2), (9, 3), (16, 16)]
NAMES = ("out", "dq", "dk", "dv")
SOFTCAP = 0.7  # of scores around 1: it bites


# --- what is compared -----------------------------------------------------------------------------------------


def draw(
    tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as columns of one buffer, and dout."""
    num_heads, num_kv_heads = heads
    buffer = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    q, k, v = split(buffer, heads, head_dim)
    return q, k, v, torch.randn(tokens, num_heads, head_dim, device=device).to(dtype)


def split(
    buffer: torch.Tensor, heads: tuple[int, int], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_heads, num_kv_heads = heads
    q, k, v = buffer.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], 1)
    return q, k, v


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """transformers' own eager attention under its own packed mask, in the dtype of q."""
    from transformers import Gemma2Config, LlamaConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.llama.modeling_llama import eager_attention_forward as llama

    shape: dict[str, Any] = {
        "hidden_size": q.shape[1] * q.shape[2],
        "num_attention_heads": q.shape[1],
        "num_key_value_heads": k.shape[1],
        "head_dim": q.shape[2],
    }
    config = LlamaConfig(**shape) if window is None else Gemma2Config(**shape, sliding_window=window)
    config._attn_implementation = "eager"
    positions = torch.cat([torch.arange(length, device=q.device) for length in packing.lengths])[None]
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    hidden = torch.empty(1, packing.num_tokens, 1, dtype=q.dtype, device=q.device)
    mask = make(config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions)
    module: Any = torch.nn.Module().eval()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    module.head_dim = q.shape[2]
    forward: Any = llama if softcap is None else gemma2
    more = {} if softcap is None else {"softcap": softcap}
    out, _ = forward(module, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scaling=scale, **more)
    return out[0]


def with_gradients(
    function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, *rest: Any, **options: Any
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *rest, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, packing: Packing, **options: Any
) -> list[torch.Tensor]:
    """By forward and backward without a graph, the gradients into columns of one buffer that starts as NaN."""
    out, saved = attention_forward(q, k, v, packing, **options)
    assert out.is_contiguous() and not out.requires_grad
    heads, head_dim = (q.shape[1], k.shape[1]), q.shape[2]
    buffer = torch.full((len(q), (heads[0] + 2 * heads[1]) * head_dim), torch.nan, dtype=q.dtype, device=q.device)
    attention_backward(dout, q, k, v, out, saved, packing, **options, into=buffer)
    assert buffer.isfinite().all()
    return [out, *split(buffer, heads, head_dim)]


def in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    packing: Packing,
    *,
    group_bytes: int,
    **options: Any,
) -> list[torch.Tensor]:
    """The gradients written over q, k and v, some heads at a time."""
    q, k, v = split(torch.cat([x.flatten(1) for x in (q, k, v)], 1), (q.shape[1], k.shape[1]), q.shape[2])
    out, saved = attention_forward(q, k, v, packing, **options)
    attention_backward_in_place(dout, q, k, v, out, saved, packing, **options, group_bytes=group_bytes)
    return [out, q, k, v]


def bytes_of_a_kv_head(q: torch.Tensor, k: torch.Tensor) -> int:
    """Of its gradients and those of its query heads."""
    return q.element_size() * len(q) * q.shape[2] * (q.shape[1] // k.shape[1] + 2)


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, packing: Packing, backend: str, **more: Any
) -> None:
    """The explicit forms and the differentiable one, every output and gradient, against fp32 truth."""
    options = {"scale": q.shape[-1] ** -0.5, **more}
    truth = with_gradients(attention_reference, *(x.float() for x in (q, k, v, dout)), packing, **options)
    reference = with_gradients(eager, q, k, v, dout, packing, **options)
    for ours in (
        explicit(q, k, v, dout, packing, **options, backend=backend),
        in_place(q, k, v, dout, packing, **options, backend=backend, group_bytes=1),
        in_place(q, k, v, dout, packing, **options, backend=backend, group_bytes=bytes_of_a_kv_head(q, k)),
        with_gradients(attention, q, k, v, dout, packing, **options, backend=backend),
    ):
        for name, mine, theirs, true in zip(NAMES, ours, reference, truth, strict=True):
            assert mine.dtype == q.dtype
            if true.abs().max() < 1e-6:  # a document of one token has no gradient of q and k
                assert mine.abs().max() < 1e-2, name
            else:
                assert_as_good(mine, theirs, true, slack_of(mine), name)


def test_a_second_derivative_is_an_error() -> None:
    """The backward pass is explicit: what would be differentiated again is not what was computed."""
    q, k, v = (torch.randn(7, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    out = attention(q, k, v, Packing.from_lengths([4, 3], "cpu"), scale=0.3, backend="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# The aten operations that a backend has to call: a test of one backend cannot pass through another.
OPERATIONS = {
    "cudnn": ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    "flash": ("_flash_attention_forward", "_flash_attention_backward"),
}


class Calls(TorchDispatchMode):
    """Counts the aten operations that run, and keeps the options of the last call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.options: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        self.options[name] = kwargs or {}
        return func(*args, **self.options[name])


# --- the semantics, on a CPU ----------------------------------------------------------------------------------

PACKINGS = {
    "uneven": [5, 1, 17, 1, 40],
    "uniform": [32, 32],
    "single tokens": [1, 1, 1],
    "one token": [1],
    "one document": [63],
}


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_the_reference_is_transformers_attention(
    lengths: Sequence[int], window: int | None, softcap: float | None
) -> None:
    packing = Packing.from_lengths(lengths, "cpu")
    q, k, v, dout = draw(packing.num_tokens, (4, 2), 16, torch.float64)
    options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap}
    ours = with_gradients(attention_reference, q, k, v, dout, packing, **options)
    # transformers takes the softmax in fp32, whatever the dtype
    theirs = with_gradients(eager, *(x.float() for x in (q, k, v, dout)), packing, **options)
    for name, mine, other in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(other.double(), mine, atol=2e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_as_good_as_eager(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    packing = Packing.from_lengths([30, 1, 32], "cpu")
    check(*draw(63, heads, head_dim, dtype), packing, "reference")


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_form(backend: str, lengths: Sequence[int], window: int | None, softcap: float | None) -> None:
    packing = Packing.from_lengths(lengths, "cpu")
    q, k, v, dout = draw(packing.num_tokens, (8, 2), 64, torch.float32)
    if backend == "sdpa" and softcap is not None:
        with pytest.raises(ValueError, match="'sdpa' cannot do a soft cap"):
            attention_forward(q, k, v, packing, scale=1.0, window=window, softcap=softcap, backend=backend)
    else:
        check(q, k, v, dout, packing, backend, window=window, softcap=softcap)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_window_one_short_of_a_document_is_one(backend: str) -> None:
    packing, options = Packing.from_lengths([4, 2], "cpu"), {"scale": 0.3, "backend": backend}
    q, k, v, _ = draw(6, (4, 2), 16, torch.float32)
    whole, same, short = (attention_forward(q, k, v, packing, window=w, **options)[0] for w in (None, 4, 3))
    assert torch.equal(whole, same)
    assert [token for token in range(6) if not torch.equal(whole[token], short[token])] == [3]


@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_token_counts(tokens: int) -> None:
    lengths = [tokens] if tokens < 100 else [tokens - 301, 300, 1]
    check(*draw(tokens, (4, 2), 64, torch.bfloat16), Packing.from_lengths(lengths, "cpu"), "reference")


def test_gradients_may_be_written_over_the_inputs() -> None:
    packing, options = Packing.from_lengths([9, 4], "cpu"), {"scale": 0.2, "backend": "reference"}
    q, k, v, dout = draw(13, (4, 2), 16, torch.float32)
    wanted = explicit(q, k, v, dout, packing, **options)
    out, saved = attention_forward(q, k, v, packing, **options)
    assert q._base is not None
    attention_backward(dout, q, k, v, out, saved, packing, **options, into=q._base)
    for written, right in zip((q, k, v), wanted[1:], strict=True):
        assert torch.equal(written, right)


OF_A_HEAD = 13 * 16 * 4  # bytes of a gradient


@pytest.mark.parametrize(
    ("num_kv_heads", "group_bytes", "calls"),
    [
        (4, 1, 4), (4, 2 * 3 * OF_A_HEAD, 2), (4, 10**9, 1),
        (2, 1, 4), (2, 4 * OF_A_HEAD - 1, 4), (2, 4 * OF_A_HEAD, 2), (2, 8 * OF_A_HEAD, 1), (1, 6 * OF_A_HEAD - 1, 4),
    ],
)  # fmt: skip
def test_as_many_heads_at_once_as_there_is_room_for(
    num_kv_heads: int, group_bytes: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing, options = Packing.from_lengths([9, 4], "cpu"), {"scale": 0.2, "backend": "reference"}
    q, k, v, dout = draw(13, (4, num_kv_heads), 16, torch.float32)
    wanted = explicit(q, k, v, dout, packing, **options)
    heads: list[int] = []
    own = BACKENDS["reference"].backward
    monkeypatch.setattr(
        BACKENDS["reference"], "backward", lambda dout, *given: heads.append(dout.shape[1]) or own(dout, *given)
    )
    out, saved = attention_forward(q, k, v, packing, **options)
    attention_backward_in_place(dout, q, k, v, out, saved, packing, **options, group_bytes=group_bytes)
    assert heads == [4 // calls] * calls
    assert heads_at_once(13, 4, num_kv_heads, 16, 4, group_bytes)[0] == heads[0]
    for written, right in zip((q, k, v), wanted[1:], strict=True):
        torch.testing.assert_close(written, right, rtol=1e-6, atol=1e-6)  # products may sum in another order


# --- a document knows nothing of its neighbours -----------------------------------------------------------------


def swapped_neighbours(
    lengths: Sequence[int], dtype: torch.dtype, device: str, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients at the middle document, before and after all others' tokens are replaced."""
    packing = Packing.from_lengths(lengths, device)
    at = packing.slices[len(lengths) // 2]
    before = draw(packing.num_tokens, (8, 2), 64, dtype, device)
    after = draw(packing.num_tokens, (8, 2), 64, dtype, device)
    for new, old in zip(after, before, strict=True):
        new[at] = old[at]
    first, second = (explicit(*tensors, packing, scale=0.125, **options) for tensors in (before, after))
    assert not torch.equal(first[0], second[0])
    return [x[at] for x in first], [x[at] for x in second]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [[20, 33, 10], [21, 21, 21]])
def test_a_neighbours_tokens_change_no_bit(lengths: Sequence[int], window: int | None, backend: str) -> None:
    before, after = swapped_neighbours(lengths, torch.float32, "cpu", window=window, backend=backend)
    for name, old, new in zip(NAMES, before, after, strict=True):
        assert torch.equal(old, new), name


# --- FlexAttention's mask, without a GPU ------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 64, 128, 200, 1000])
@pytest.mark.parametrize(
    "lengths", [[1], [128], [500], [256, 256], [100, 1, 1, 300, 7], [128, 128, 1, 300, 255], [63, 65, 700]]
)
def test_the_block_mask_is_that_of_torch(lengths: Sequence[int], window: int | None) -> None:
    packing = Packing.from_lengths(lengths, "cpu")
    ours: Any = attention_flex.block_mask(packing, window)
    tokens = packing.num_tokens
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def plain(batch, head, query, key):
        seen = (document[query] == document[key]) & (key <= query)
        return seen if window is None else seen & (query - key < window)

    theirs: Any = create_block_mask(plain, None, None, tokens, tokens, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    rows = torch.arange(tokens)
    seen = ours.mask_mod(0, 0, rows[:, None], rows[None])
    assert torch.equal(seen, plain(0, 0, rows[:, None], rows[None]))
    full = to_dense(ours.full_kv_num_blocks, ours.full_kv_indices)
    assert torch.equal(full, to_dense(theirs.full_kv_num_blocks, theirs.full_kv_indices))


def to_dense(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """bool [blocks of queries, blocks of keys]."""
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, which) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
        dense[row, which[:count].long()] = True
    return dense


def flex_without_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: str) -> Any:
    """Let it be traced and run by torch's plain form; the counter of what is compiled."""
    torch._dynamo.reset()  # it remembers which lengths vary, and compiles less
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(attention_flex, "_compiled", cache(attention_flex._compiled.__wrapped__))
    # torch has no kernel of the backward for a CPU, and refuses before it would take its plain form
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    return counter


@pytest.mark.parametrize("of", ["heads", "soft caps"])
def test_flex_attention_serves_many_models_in_one_process(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than eight compilations, at which torch stops."""
    counter = flex_without_a_gpu(monkeypatch, "eager")
    heads = [((4, 2), 16), ((8, 4), 32), ((9, 3), 16), ((4, 4), 16)] if of == "heads" else [((4, 2), 16)] * 4
    caps = [None] * 4 if of == "heads" else [None, 0.5, 0.7, 0.9]
    for (shape, head_dim), softcap in zip(heads, caps, strict=True):
        options: dict[str, Any] = {"scale": head_dim**-0.5, "softcap": softcap}
        for tokens in (130, 200, 127):  # torch compiles for each
            packing = Packing.from_lengths([tokens - 50, 50], "cpu")
            q, k, v, _ = draw(tokens, shape, head_dim, torch.float32)
            out, _ = attention_forward(q, k, v, packing, **options, backend="flex")
            assert error(out, attention_reference(q, k, v, packing, **options)) < 1e-5
    assert counter.frame_count == 12


def test_lengths_alone_may_be_compiled_more_often_than_torch_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = flex_without_a_gpu(monkeypatch, "eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for tokens in (130, 200, 127):
            q, k, v, _ = draw(tokens, (4, 2), 16, torch.float32)
            attention_forward(q, k, v, Packing.from_lengths([tokens], "cpu"), scale=1.0, backend="flex")
    assert counter.frame_count == 3


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_flex_attention_without_a_gpu(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, windows, soft cap, the backward too; one graph for them all."""
    counter = flex_without_a_gpu(monkeypatch, "aot_eager")
    for lengths in ([100, 1, 60, 39], [50, 150]):
        packing = Packing.from_lengths(lengths, "cpu")
        tensors = draw(200, (4, 2), 16, torch.float32)
        for window in (None, 1, 7, 120):
            options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap}
            ours = explicit(*tensors, packing, **options, backend="flex")
            for name, mine, true in zip(
                NAMES, ours, with_gradients(attention_reference, *tensors, packing, **options), strict=True
            ):
                assert error(mine, true) < 1e-5 if window != 1 or name in ("out", "dv") else mine.abs().max() < 1e-5, (
                    name
                )
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("backend", "lengths", "window"),
    [("cudnn", [256, 256], None), ("cudnn", [256], None), ("flash", [256, 256], 50), ("flash", [5, 1, 90], None)],
)
def test_what_is_handed_to_torch_fits_its_operations(backend: str, lengths: Sequence[int], window: int | None) -> None:
    """Shapes and layouts without data: what cannot run here is at least called rightly."""
    packing = Packing(torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta"), tuple(lengths))
    tensors = draw(packing.num_tokens, (8, 2), 64, torch.bfloat16, "meta")
    options: dict[str, Any] = {"scale": 0.1, "window": window, "backend": backend}
    with Calls() as calls:
        out, saved = attention_forward(*tensors[:3], packing, **options)
        gradients = attention_backward(tensors[3], *tensors[:3], out, saved, packing, **options)
    for operation in OPERATIONS[backend]:
        assert calls.counts[operation] == 1
        sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        assert calls.options[operation] == {"scale": 0.1, **sides}
    assert [x.shape for x in (out, *gradients)] == [tensors[3].shape, *(x.shape for x in tensors[:3])]
    assert all(x.is_contiguous() for x in gradients)
    assert sum(x.numel() for x in saved) == packing.num_tokens * 8
    for heads, kv_heads in ((slice(0, 4), slice(0, 1)), (slice(4, 8), slice(1, 2))):  # what each half would have saved
        k, v = (x[:, kv_heads] for x in tensors[1:3])
        _, own = attention_forward(tensors[0][:, heads], k, v, packing, **options)
        parts = [BACKENDS[backend].of_heads(each, heads, packing) for each in saved]
        assert [x.shape for x in parts] == [x.shape for x in own]
        assert all(x.is_contiguous() for x in (*parts, *own))
    with Calls() as calls:
        group_bytes = bytes_of_a_kv_head(*tensors[:2])
        attention_backward_in_place(tensors[3], *tensors[:3], out, saved, packing, **options, group_bytes=group_bytes)
    assert calls.counts[OPERATIONS[backend][1]] == 2


# --- which backend ----------------------------------------------------------------------------------------------


FORMS = [(None, None), (100, None), (5000, None), (None, SOFTCAP), (100, SOFTCAP)]  # (window, softcap)
FORM_PACKINGS = {
    "uneven": [700, 1, 128, 1000, 219],
    "uniform": [1024, 1024],
    "odd uniform": [1000, 1000],
    "single tokens": [1, 1, 1],
    "63 tokens": [63],
}


def lacks(backend: str, lengths: Sequence[int], window: int | None, softcap: float | None) -> list[str]:
    """What a backend has to refuse a form for; empty: it has to run."""
    found = []
    if backend in ("cudnn", "flash", "sdpa") and softcap is not None:
        found.append("a soft cap")
    if backend == "cudnn":
        if window is not None and window < max(lengths):
            found.append("a sliding window")
        if len(set(lengths)) > 1:
            found.append("documents of uneven lengths")
        elif lengths[0] == 1:
            found.append("documents of one token")
        elif lengths[0] % 128 and (torch.backends.cudnn.version() or 0) < 91501:
            found.append("lengths that 128 does not divide, in this version of cuDNN")
    return found


@pytest.mark.parametrize(("window", "softcap"), FORMS)
@pytest.mark.parametrize("lengths", FORM_PACKINGS.values(), ids=FORM_PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_refuses_what_it_cannot_do(
    backend: str, lengths: Sequence[int], window: int | None, softcap: float | None
) -> None:
    """Never computed without: a window or a soft cap left out would show nowhere but in the loss."""
    packing = Packing.from_lengths(lengths, "cpu")
    refusal = refusals("cpu", torch.bfloat16, 128, packing.uniform, window, softcap)[backend]
    wanted = lacks(backend, lengths, window, softcap)
    if not wanted:
        assert refusal is None or "it cannot do" not in refusal
        return
    assert refusal in [f"it cannot do {lack}" for lack in wanted]
    q, k, v, dout = draw(packing.num_tokens, (2, 1), 8, torch.float32)
    options: dict[str, Any] = {"scale": 1.0, "window": window, "softcap": softcap, "backend": backend}
    with pytest.raises(ValueError, match=f"attention backend '{backend}' cannot do ({'|'.join(wanted)})"):
        attention_forward(q, k, v, packing, **options)
    with pytest.raises(ValueError, match=f"attention backend '{backend}' cannot do ({'|'.join(wanted)})"):
        attention_backward(dout, q, k, v, dout, (), packing, **options)


def test_a_backend_that_there_is_not_is_an_error() -> None:
    q, k, v, _ = draw(9, (4, 2), 16, torch.float32)
    with pytest.raises(ValueError, match="no attention backend 'xformers'"):
        attention_forward(q, k, v, Packing.from_lengths([4, 5], "cpu"), scale=1.0, backend="xformers")


def test_tokens_outside_of_the_documents_are_an_error() -> None:
    q, k, v, _ = draw(10, (4, 2), 16, torch.float32)
    with pytest.raises(AssertionError):
        attention_forward(q, k, v, Packing.from_lengths([4, 5], "cpu"), scale=1.0, backend="reference")


def test_a_cap_of_zero_is_an_error() -> None:
    q, k, v, _ = draw(9, (4, 2), 16, torch.float32)
    with pytest.raises(ValueError, match="softcap is 0"):
        attention_forward(q, k, v, Packing.from_lengths([9], "cpu"), scale=1.0, softcap=0.0, backend="reference")


def test_a_cpu_has_the_reference() -> None:
    found = refusals("cpu", torch.float32, 64, None)
    assert list(found) == list(BACKENDS)
    assert [name for name, refusal in found.items() if refusal is None] == ["reference"]
    assert usable_backends("cpu", torch.float32, 64, 128, window=64, softcap=30.0) == ["reference"]
    assert table_backend("cpu", torch.float32, 64, 128, deterministic=True) == "reference"
    packing = Packing.from_lengths([4, 5], "cpu")
    assert fastest_backend(packing, 4, 2, 64, torch.float32) == "reference"


def test_only_fused_backends_are_timed_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def milliseconds(*arguments: Any) -> float:
        timed.append(arguments[-1])
        return {"cudnn": 2.0, "flash": 1.0}[arguments[-1]]

    monkeypatch.setattr(attention_backends, "_measured", {})
    monkeypatch.setattr(attention_backends, "_milliseconds", milliseconds)
    monkeypatch.setattr(attention_backends, "usable_backends", lambda *_: list(BACKENDS))
    arguments = (Packing.from_lengths([8, 8], "cpu"), 4, 2, 64, torch.float32)
    for _ in range(2):
        assert fastest_backend(*arguments) == "flash"
        assert measured_backends(*arguments) == {"cudnn": 2.0, "flash": 1.0}
    assert timed == ["cudnn", "flash"]


def test_a_long_batch_is_timed_by_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it would take more memory than the step."""
    timed: list[tuple[int, Packing]] = []
    monkeypatch.setattr(attention_backends, "_measured", {})
    monkeypatch.setattr(
        attention_backends, "_milliseconds", lambda q, k, v, dout, packing, *_: timed.append((len(q), packing)) or 1.0
    )
    monkeypatch.setattr(attention_backends, "usable_backends", lambda *_: ["cudnn", "flash"])
    whole = attention_backends.TIMED
    cases: list[tuple[list[int], tuple[int, ...]]] = [
        ([2048] * 8, (2048,) * 8),  # of as many tokens as are timed
        ([2048] * 64, (2048,) * 8),
        ([131_072], (whole,)),
        ([131_072 + 77], (whole - 128 + 77,)),
        ([8000, 8000, 9000], (8000, 8000, 256 + 9000 % 128)),  # of several lengths, as the batch is
        ([20_000, 300], (whole - 128 + 20_000 % 128, 1)),
        ([10, 130_000], (10, whole - 128 + 130_000 % 128)),  # a tail, then what takes the time
        ([1] * 40_000 + [3], (1,) * whole + (2,)),
    ]
    for lengths, expected in cases:
        timed.clear()
        attention_backends._measured.clear()
        packing = Packing.from_lengths(lengths, "cpu")
        measured_backends(packing, 1, 1, 8, torch.bfloat16)
        assert [(tokens, part.lengths) for tokens, part in timed] == [(sum(expected), expected)] * 2
        assert (timed[0][1].uniform is None) == (packing.uniform is None)


def test_a_deterministic_table_has_no_backend_that_adds_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "usable_backends", lambda *_: list(BACKENDS))
    assert table_backend("cuda", torch.bfloat16, 128, 2048, deterministic=False) == "cudnn"
    assert table_backend("cuda", torch.bfloat16, 128, 2048, deterministic=True) == "flash"


# --- on a GPU ---------------------------------------------------------------------------------------------------


def is_refused_by_the_card(backend: str, dtype: torch.dtype, head_dim: int, uniform: int | None) -> bool:
    """Whether it is one that another card than a Hopper one may not have: then it is not offered either."""
    refusal = refusals("cuda", dtype, head_dim, uniform)[backend]
    if refusal is None:
        return False
    assert "this card" in refusal and torch.cuda.get_device_capability() != (9, 0), refusal
    assert backend not in usable_backends("cuda", dtype, head_dim, uniform)
    return True


@contextmanager
def calls_of(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails unless what runs inside calls the backend's own operations."""
    if backend in OPERATIONS:
        with Calls() as calls:
            yield
        for operation in OPERATIONS[backend]:
            assert calls.counts.get(operation, 0) > 0, calls.counts
    elif backend == "flex":  # compiled, so that no mode sees it; the compiled function is counted
        count, compiled = [], attention_flex._compiled
        monkeypatch.setattr(attention_flex, "_compiled", lambda *form: count.append(1) or compiled(*form))
        yield
        assert count
    else:
        yield


def gpu_forms() -> list[Any]:
    """(backend, lengths, window, softcap, dtype) of what each can do. FlexAttention compiles for each, so it has
    fewer."""
    forms = [
        (backend, name, *form, torch.bfloat16)
        for backend in BACKENDS
        for name in FORM_PACKINGS
        for form in FORMS
        if backend != "flex" or name in ("uneven", "uniform") or form == (100, SOFTCAP)
    ]
    forms += [(backend, name, None, None, torch.float16) for backend in BACKENDS for name in ("uneven", "uniform")]
    return [
        pytest.param(
            backend, FORM_PACKINGS[name], window, softcap, dtype, id=f"{backend}-{name}-{window}-{softcap}-{dtype}"
        )
        for backend, name, window, softcap, dtype in forms
        if not lacks(backend, FORM_PACKINGS[name], window, softcap)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "lengths", "window", "softcap", "dtype"), gpu_forms())
def test_every_form_on_a_gpu(
    backend: str,
    lengths: Sequence[int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packing = Packing.from_lengths(lengths, "cuda")
    if is_refused_by_the_card(backend, dtype, 128, packing.uniform):
        return
    tensors = draw(packing.num_tokens, (8, 2), 128, dtype, "cuda")
    with calls_of(backend, monkeypatch):
        explicit(*tensors, packing, scale=0.1, window=window, softcap=softcap, backend=backend)
    check(*tensors, packing, backend, window=window, softcap=softcap)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "lengths"),
    [
        (name, lengths)
        for name in BACKENDS
        for lengths in ([700, 1, 300], [512, 512])
        if not lacks(name, lengths, None, None)
    ],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_every_head_on_a_gpu(backend: str, heads: tuple[int, int], head_dim: int, lengths: Sequence[int]) -> None:
    packing = Packing.from_lengths(lengths, "cuda")
    if is_refused_by_the_card(backend, torch.bfloat16, head_dim, packing.uniform):
        return
    check(*draw(packing.num_tokens, heads, head_dim, torch.bfloat16, "cuda"), packing, backend)


@pytest.mark.gpu
def test_flex_attention_serves_many_models_in_one_process_on_a_gpu() -> None:
    """The tests above share a process with it too: none starts torch's compiler anew."""
    for heads, head_dim in (((8, 2), 64), ((9, 3), 96), ((16, 16), 128), ((4, 2), 256)):
        if is_refused_by_the_card("flex", torch.bfloat16, head_dim, None):
            return
        for tokens in (130, 300, 127):
            packing = Packing.from_lengths([tokens - 50, 50], "cuda")
            tensors = draw(tokens, heads, head_dim, torch.bfloat16, "cuda")
            check(*tensors, packing, "flex")


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """The flash backward then adds dq in order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[300, 433, 291], [256, 256, 256]])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cudnn"])
def test_a_neighbours_tokens_change_no_bit_on_a_gpu(backend: str, lengths: Sequence[int], window: int | None) -> None:
    with deterministic_algorithms():
        before, after = swapped_neighbours(lengths, torch.bfloat16, "cuda", window=window, backend=backend)
    for name, old, new in zip(NAMES, before, after, strict=True):
        assert torch.equal(old, new), f"{name}: {error(new, old):.2e}"


@pytest.mark.gpu
def test_a_neighbours_tokens_change_nothing_in_cudnn() -> None:
    """Documents are rows of its batch. Its backward adds in any order, so dq may differ by that, and by no more."""
    if is_refused_by_the_card("cudnn", torch.bfloat16, 64, 256):
        return
    before, after = swapped_neighbours([256, 256, 256], torch.bfloat16, "cuda", backend="cudnn")
    assert torch.equal(before[0], after[0])
    for name, old, new in zip(NAMES[1:], before[1:], after[1:], strict=True):
        assert error(new, old) < 1e-3, name


@pytest.mark.gpu
def test_the_fastest_of_a_gpu_is_measured() -> None:
    packing = Packing.from_lengths([1024, 1024], "cuda")
    timings = measured_backends(packing, 32, 8, 128, torch.bfloat16)
    assert set(timings) <= set(usable_backends("cuda", torch.bfloat16, 128, 1024))
    assert len(timings) == 1 or all(0 < timing < 100 for timing in timings.values())
    assert fastest_backend(packing, 32, 8, 128, torch.bfloat16) in timings


@pytest.mark.gpu
def test_a_deterministic_run_is_given_no_cudnn() -> None:
    with deterministic_algorithms():
        assert "cudnn" not in usable_backends("cuda", torch.bfloat16, 128, 2048)
