"""The head and its loss as one: mean cross-entropy of x Wᵀ, with exact gradients, and no logits of the whole batch.

`steep.ops.cross_entropy` has the maths up to g, the gradient by the products z = x Wᵀ; then dx = g W and dW = gᵀ x. No
element of g is left out, and products accumulate in fp32. Both gradients are made in the forward, where the logits
are, and multiplied by that of the loss in the backward: on the device, and without a pass over them where it is 1.

Three ways:
- "tokens": a tile of tokens has its logits whole. They become their gradient in place, and three products are all there
  is. Over the tiles dW needs an fp32 sum of the weight's size.
- "vocabulary": a chunk of the vocabulary has its logits for all tokens. A first pass over the chunks finds lse, a
  second makes the logits again (but for the last chunk, which is still there) and the gradients: a chunk of dW is one
  product straight into its place, and the sum over chunks, dx, is small. Up to four products, and little memory.
- "narrow": the same in chunks of an eighth. Beside both gradients there is next to nothing, and nearly all logits are
  made twice.

z and g are in the dtype of x. In fp16 g is lifted by LIFT and free of the normaliser, and products stay in fp32 until
the backward multiplies by the normaliser, so that nothing underflows.

Shapes: T tokens, H hidden, V vocabulary. The rows of x may be apart (columns of a wider buffer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import not_compiled
from steep.ops.cross_entropy import CrossEntropy, nothing_yet, product_buffer, scaled
from steep.ops.products import product, sums_in_fp32

Way = Literal["tokens", "vocabulary", "narrow"]

LIFT = 4096.0  # fp16: 1 / 128,256 is below its smallest normal number; 4096 · (p - 1) is far from its largest
TILE_BYTES = 2**30  # logits of a tile of tokens, where every tile costs a pass over an fp32 sum of the weight's size
LEAN_TILE_BYTES = 2**28  # and where it does not, since the weight is frozen
CHUNK_BYTES = 2**29  # logits of a chunk of the vocabulary: the larger, the less is made twice
NARROW_CHUNK_BYTES = 2**26
LEAN_CHUNK_BYTES = 2**28  # and where there are no gradients, so that nothing is
MIN_CHUNK = 1024

_Made = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass
class HeadGradients:
    """Gradients of a loss, but for a factor.

    Attributes:
        x: [T, H], or None.
        weight: [V, H], or None.
        factor: one fp32 that both are still to be multiplied by; None: they are the gradients.
        x_dtype, weight_dtype: what they become.
    """

    x: torch.Tensor | None
    weight: torch.Tensor | None
    factor: torch.Tensor | None
    x_dtype: torch.dtype
    weight_dtype: torch.dtype


def linear_cross_entropy_reference(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The loss, with whole logits, by plain torch and its autograd. A label outside of the vocabulary is an error."""
    logits = (x_TH @ weight_VH.to(x_TH.dtype).t()).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels_T, ignore_index=ignore_index, reduction="sum")
    return losses / _number(labels_T, num_items, ignore_index)


def _number(labels: torch.Tensor, num_items: torch.Tensor | int | None, ignore_index: int) -> torch.Tensor:
    """What the sum of the losses is divided by, one fp32 on the device; 1 in place of 0: no item, no loss."""
    if num_items is None:
        number = (labels != ignore_index).sum()
    elif isinstance(num_items, torch.Tensor):
        number = num_items.detach().to(labels.device).reshape(())
    else:
        number = torch.full((), num_items, device=labels.device)
    number = number.float()
    return number.masked_fill(number == 0, 1)


def _even(total: int, largest: int, multiple: int) -> int:
    """The size of equal parts of `total`, as few as can be, of about `largest` at most."""
    parts = -(-total // largest)
    return -(-total // (max(parts, 1) * multiple)) * multiple


def faster_way(num_tokens: int, hidden: int, itemsize: int, sums: bool) -> Way:
    """The way that is taken by default: by tokens, unless the batch is so short that the fp32 sum of dW would be larger
    than all its logits.

    Args:
        itemsize: bytes of a logit.
        sums: several tiles of tokens need an fp32 sum of the weight's size that is not the gradient itself.
    """
    return "vocabulary" if sums and num_tokens * itemsize <= 4 * hidden else "tokens"


def tile_size(num_tokens: int, num_columns: int, itemsize: int, frozen: bool) -> int:
    """Tokens of a tile, by default.

    Args:
        itemsize: bytes of a logit.
        frozen: there is no gradient by the weight.
    """
    most = (LEAN_TILE_BYTES if frozen else TILE_BYTES) // (num_columns * itemsize)
    return max(_even(num_tokens, max(min(most, -(-num_tokens // 2)), 128), 128), 1)


def chunk_size(num_tokens: int, num_columns: int, itemsize: int, gradients: bool, way: Way = "vocabulary") -> int:
    """Columns of a chunk of the vocabulary, by default.

    Args:
        itemsize: bytes of a logit.
        gradients: they are made too, in a second pass over the chunks.
        way: "narrow" has smaller ones.
    """
    with_gradients = NARROW_CHUNK_BYTES if way == "narrow" else CHUNK_BYTES
    most = (with_gradients if gradients else LEAN_CHUNK_BYTES) // (max(num_tokens, 1) * itemsize)
    return _even(num_columns, max(most, MIN_CHUNK), 64)


def _by_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    entropy: CrossEntropy,
    factor: torch.Tensor,
    tile: int,
    x_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> _Made:
    """Losses, dx and dW, these in the dtypes that are asked for or not at all."""
    num_tokens = len(x)
    weight = weight.to(x.dtype)
    losses = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    dx = None if x_dtype is None else torch.empty(x.shape, dtype=x_dtype, device=x.device)
    dw = None
    if weight_dtype is not None:
        one = num_tokens <= tile
        dw = torch.empty(weight.shape, dtype=weight_dtype if one else torch.float32, device=x.device)
    g = buffer = product_buffer(min(tile, num_tokens), len(weight), x)
    for start in range(0, num_tokens, tile):
        part = slice(start, start + tile)
        g = product(x[part], weight.t(), out=buffer[: len(x[part]), : len(weight)])
        losses[part] = entropy.losses_and_turn(g, labels[part], factor)
        if dx is not None:
            product(g, weight, out=dx[part])
        if dw is not None and start == 0:
            product(g.t(), x[part], out=dw)
        elif dw is not None:
            product(g.t(), x[part], add=dw, out=dw)
    del buffer, g  # before dW may be there twice
    if dw is not None:
        dw = dw.to(weight_dtype) if num_tokens else dw.zero_()
    return losses, dx, dw


def _by_vocabulary(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    entropy: CrossEntropy,
    factor: torch.Tensor,
    chunk: int,
    x_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> _Made:
    """As `_by_tokens`; without gradients the second pass is left out."""
    num_columns = len(weight)
    starts = range(0, num_columns, chunk)
    buffer = product_buffer(len(x), min(chunk, num_columns), x)
    running = nothing_yet(labels)
    for first in reversed(starts):  # backwards: the chunk that is left in the buffer is then a full one
        part = weight[first : first + chunk].to(x.dtype)
        entropy.take_in(product(x, part.t(), out=buffer[:, : len(part)]), labels, running, first)
    losses, lse = entropy.losses(running, labels, num_columns)
    if x_dtype is None and weight_dtype is None:
        return losses, None, None
    dx = None if x_dtype is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dw = None if weight_dtype is None else torch.empty(weight.shape, dtype=weight_dtype, device=x.device)
    for first in starts:
        part = weight[first : first + chunk].to(x.dtype)
        g = buffer[:, : len(part)]
        if first:
            product(x, part.t(), out=g)
        entropy.turn(g, labels, lse, factor, first)
        if dx is not None:
            product(g, part, add=dx if first else None, out=dx)
        if dw is not None:
            product(g.t(), x, out=dw[first : first + chunk])
    del buffer, g  # before dX is there twice
    return losses, None if dx is None else dx.to(x_dtype), dw


def _check(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    assert x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.stride(1) == 1 and weight.stride(1) == 1, (x.stride(), weight.stride())
    assert labels.shape == x.shape[:1] and labels.dtype == torch.int64, (labels.shape, labels.dtype)
    assert labels.device == x.device == weight.device, (labels.device, x.device, weight.device)


@sums_in_fp32()
def linear_cross_entropy_forward(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    way: Way | None = None,
    tile: int | None = None,
    chunk: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[torch.Tensor, HeadGradients]:
    """The loss, fp32, and its gradients as far as they are needed, for `linear_cross_entropy_backward`.

    Arguments are those of `linear_cross_entropy`.
    """
    _check(x_TH, weight_VH, labels_T)
    labels = labels_T.contiguous()
    weight_grad_dtype = weight_grad_dtype or weight_VH.dtype
    entropy = CrossEntropy(ignore_index, scale, softcap)
    number = _number(labels, num_items, ignore_index)
    late = x_TH.dtype == torch.float16
    factor = torch.full_like(number, LIFT) if late else scale / number
    x_dtype = (torch.float32 if late else x_TH.dtype) if needs_x else None
    weight_dtype = (torch.float32 if late else weight_grad_dtype) if needs_weight else None
    (num_tokens, hidden), num_columns, itemsize = x_TH.shape, len(weight_VH), x_TH.dtype.itemsize
    sums = weight_dtype not in (None, torch.float32)
    way = way or faster_way(num_tokens, hidden, itemsize, sums)
    if (way == "tokens" and (needs_x or needs_weight)) or num_tokens == 0:
        tile = tile or tile_size(num_tokens, num_columns, itemsize, not needs_weight)
        made = _by_tokens(x_TH, weight_VH, labels, entropy, factor, tile, x_dtype, weight_dtype)
    else:
        chunk = chunk or chunk_size(num_tokens, num_columns, itemsize, gradients=needs_x or needs_weight, way=way)
        made = _by_vocabulary(x_TH, weight_VH, labels, entropy, factor, chunk, x_dtype, weight_dtype)
    losses, dx, dw = made
    left = scale / (LIFT * number) if late else None
    return losses.sum() / number, HeadGradients(dx, dw, left, x_TH.dtype, weight_grad_dtype)


def linear_cross_entropy_backward(
    gradients: HeadGradients, grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dW) for `grad_output`, one fp32 on the device. `gradients` are used up: they are multiplied in place."""
    factor = grad_output if gradients.factor is None else grad_output * gradients.factor
    dx = None if gradients.x is None else scaled(gradients.x, factor, gradients.x_dtype)
    dw = None if gradients.weight is None else scaled(gradients.weight, factor, gradients.weight_dtype)
    return dx, dw


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the gradients themselves: not as saved tensors, since autograd must own them alone to keep them as `.grad`
    without a copy."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        loss, ctx.gradients = linear_cross_entropy_forward(x, weight, labels, **options)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy holds its gradients once: backward went through it a second time")
        return *linear_cross_entropy_backward(gradients, grad_output), None, None


@not_compiled
def linear_cross_entropy(
    x_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    way: Way | None = None,
    tile: int | None = None,
    chunk: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum of the tokens' losses over `num_items`, one fp32; differentiable by x and by the weight, once.

    Where neither needs a gradient it is the first pass of "vocabulary" alone.

    Args:
        x_TH: hidden states, bf16, fp16 or fp32: the dtype of the products.
        weight_VH: the head; another dtype is converted (by "vocabulary": a chunk at a time). It may be the
            embedding too.
        labels_T: int64, already shifted: labels[t] is the target of x[t]. One outside of the vocabulary that is not
            `ignore_index` makes the loss NaN.
        num_items: targets of the whole accumulated batch, on any device (on x's nobody waits for it); None: labels
            that are not ignored; 0 counts as 1.
        scale: factor of the logits (Cohere, Granite).
        softcap: softcap · tanh(logits / softcap), after the scale (Gemma 2).
        way: "tokens", "vocabulary" or "narrow", see the module; None: `faster_way`.
        tile: tokens of a tile (way "tokens"); default by the shapes, `tile_size`.
        chunk: columns of a chunk, a multiple of 64 at best (the other ways); default by the shapes, `chunk_size`.
        weight_grad_dtype: default: what autograd keeps of it (`weight.grad_dtype`, where that is set), else the
            weight's own. An fp32 gradient of a bf16 leaf needs `weight.grad_dtype = torch.float32`: autograd rounds it
            otherwise.

    Raises:
        ValueError: `softcap` is not above 0.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it has to be above 0, or None")
    if weight_grad_dtype is None and weight_VH.is_leaf:
        weight_grad_dtype = weight_VH.grad_dtype
    recording = torch.is_grad_enabled()
    options = {
        "num_items": num_items,
        "ignore_index": ignore_index,
        "scale": scale,
        "softcap": softcap,
        "way": way,
        "tile": tile,
        "chunk": chunk,
        "weight_grad_dtype": weight_grad_dtype,
        "needs_x": recording and x_TH.requires_grad,
        "needs_weight": recording and weight_VH.requires_grad,
    }
    with torch.cuda.device_of(x_TH), torch.autocast(x_TH.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x_TH, weight_VH, labels_T, options)  # pyright: ignore[reportReturnType]
