"""The weight buffer of a group is filled by one launch as by plain torch, to the bit, in every layout."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from steep.kernels import lora_fill as kernels
from steep.kernels import nf4 as nf4_kernels
from steep.ops.backend import interpreted
from steep.ops.lora import LoraGroup
from steep.ops.lora_fill import _launches, lora_fill_reference
from tests.ops.lora_cases import make_projection, stored_as
from tests.ops.routes import along, cases, columns

# In features, and out features and ranks of each projection.
SHAPES = {
    "one": (64, [(96, (8,))]),
    "qkv": (72, [(48, (16,)), (24, (8,)), (24, (8,))]),
    "odd": (50, [(31, (3,)), (21, (5, 1)), (9, (2,))]),
    "stacked": (40, [(32, (8, 8)), (32, (16, 8)), (32, (8, 8))]),
    "partial": (56, [(33, ()), (16, (8,)), (16, ())]),
    "none": (50, [(31, ())]),
    "bare": (64, [(96, ())]),
    "many": (24, [(16, (8, 8, 3)), (8, (8, 8)), (8, (8, 8)), (8, (1,)), (8, ())]),
    "wide": (296, [(144, (264,)), (24, (8,))]),
}
REAL = {
    "llama qkv": (4096, [(4096, (256,)), (1024, (256,)), (1024, (256,))]),
    "llama gate and up": (4096, [(14336, (256,)), (14336, (256,))]),
    "llama down": (14336, [(4096, (256,))]),
    "rank 10": (896, [(896, (10,)), (128, (10,)), (128, (10,))]),
}


def _group(shape: str, biases: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> LoraGroup:
    in_features, members = (SHAPES | REAL)[shape]
    how: dict[str, Any] = {"dtype": dtype, "adapter_dtype": adapter_dtype, "device": device}
    with_bias = {"no biases": (), "biases": range(9), "one bias": (1,)}[biases]
    return LoraGroup(
        [
            make_projection(in_features, size, ranks, bias=index in with_bias, **how)
            for index, (size, ranks) in enumerate(members)
        ],
        dtype,
    )


def _by_reference(group: LoraGroup, device: str) -> torch.Tensor:
    buffer = torch.full(group.buffer_shape, torch.nan, dtype=group.dtype, device=device)
    adapters = [adapter for projection in group.projections for adapter in projection.adapters]
    for projection, rows in zip(group.projections, group._layout.rows, strict=True):
        projection.weight.write(buffer[rows, group.x_columns])
    matrices = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]
    scales = [scale for adapter in adapters for scale in (1.0, adapter.scale)]
    biases = [None if projection.bias is None else projection.bias[:, None] for projection in group.projections]
    lora_fill_reference(buffer, group._layout.matrices, matrices, scales)
    lora_fill_reference(buffer, group._layout.biases, biases, [1.0] * len(biases))
    return buffer


def _check(route: str, group: LoraGroup, before: int = 16) -> None:
    with along(route, kernels, fill=1) as device:
        empty = torch.full(group.buffer_shape, torch.nan, dtype=group.dtype, device=device)
        buffer = columns(empty, before)
        group.fill(buffer)
    bits = torch.int32 if group.dtype == torch.float32 else torch.int16
    assert torch.equal(buffer.contiguous().view(bits), _by_reference(group, device).view(bits))
    whole = buffer._base
    assert whole is not None and int((~whole.isnan()).sum()) == int((~buffer.isnan()).sum())


def _device(route: str) -> str:
    return "cuda" if route == "gpu" else "cpu"


def _with_biases(layouts: list[tuple]) -> list[tuple]:
    """With biases of each kind in turn, aligned and not: every two of all parameters meet."""
    return [
        (*layout, biases, (16, 3)[(number + kind) % 2])  # columns before: aligned, and not
        for kind, biases in enumerate(["no biases", "biases", "one bias"])
        for number, layout in enumerate(layouts)
    ]


@pytest.mark.parametrize(
    ("route", "shape", "dtype", "adapter_dtype", "biases", "before"),
    cases(
        small=_with_biases(
            [(shape, torch.bfloat16, torch.bfloat16) for shape in SHAPES]
            + [("odd", torch.bfloat16, torch.float32), ("qkv", torch.float16, torch.float32)]
            + [("qkv", torch.float32, torch.float32), ("stacked", torch.float32, torch.bfloat16)]
        ),
        real=_with_biases(
            [(shape, torch.bfloat16, dtype) for shape in REAL for dtype in (torch.bfloat16, torch.float32)]
        ),
    ),
)
def test_every_layout(
    route: str, shape: str, dtype: torch.dtype, adapter_dtype: torch.dtype, biases: str, before: int
) -> None:
    _check(route, _group(shape, biases, dtype, adapter_dtype, _device(route)), before)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["qkv", "odd", "many"])
@pytest.mark.parametrize(("route",), cases(small=[()]))
def test_filled_again_with_other_values_elsewhere(route: str, shape: str, adapter_dtype: torch.dtype) -> None:
    """Adapters change in their memory, and get other memory."""
    group = _group(shape, "biases", torch.bfloat16, adapter_dtype, _device(route))
    for before, moves in ((16, False), (3, False), (16, True), (3, True), (16, False)):
        _check(route, group, before)
        for projection in group.projections:
            for tensor in projection.tensors():
                tensor.data = tensor.data.neg() if moves else tensor.data.neg_()


def test_what_was_compiled_for_other_memory_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is kept for addresses, whose alignment it was compiled for."""
    compiled: list[list[int]] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def run(*arguments: Any, **options: Any) -> Any:
                tensors = [each for given in arguments if isinstance(given, tuple) for each in given]
                compiled.append([each.data_ptr() % 16 for each in tensors if isinstance(each, torch.Tensor)])
                return {grid: lambda *kept: None}

            return run

    monkeypatch.setattr(kernels, "lora_fill_kernel", Kernel())
    group = _group("one", "no biases", torch.bfloat16, torch.bfloat16, "cpu")
    a = group.projections[0].adapters[0].a
    buffer = torch.empty(group.buffer_shape, dtype=group.dtype)
    with interpreted():
        group.fill(buffer)
        group.fill(buffer)
        a.data = torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape).copy_(a.data)
        group.fill(buffer)
    assert len(compiled) == 2 and any(compiled[1]) and not any(compiled[0])


@pytest.mark.parametrize("biases", ["no biases", "biases", "one bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_that_is_read_is_written_and_w_is_not(shape: str, biases: str) -> None:
    """By the pieces, each element once; no piece touches W."""
    layout = _group(shape, biases, torch.float32, torch.float32, "cpu")._layout
    written = torch.zeros(layout.gradient_width, layout.input_width, dtype=torch.int32)
    for rows in layout.rows:
        written[rows, layout.x_columns] += 1
    for piece in (*layout.matrices, *layout.biases):
        written[piece.rows, piece.columns] += 1
    read = torch.zeros_like(written)
    for part in layout.parts:
        read[part.outputs, part.inputs] = 1
    read[:, layout.x_columns] = 1
    assert torch.equal(written, read)


def test_layouts_of_one_shape_are_one() -> None:
    groups = [_group("qkv", biases, torch.float32, torch.float32, "cpu") for biases in ("biases", "biases", "one bias")]
    assert groups[0]._layout is groups[1]._layout is not groups[2]._layout


@pytest.mark.parametrize(("route",), cases(small=[()]))
def test_tensors_of_several_dtypes_and_strides(route: str) -> None:
    """Adapters of one group, and its biases, may differ in dtype; a matrix may be the transpose of a stored one."""
    device = _device(route)
    first, second = _group("stacked", "biases", torch.bfloat16, torch.float32, device).projections[:2]
    half = replace(second.adapters[0], a=second.adapters[0].a.detach().bfloat16())
    turned = replace(second.adapters[1], b=second.adapters[1].b.detach().t().contiguous().t())
    assert first.bias is not None
    first = replace(first, bias=first.bias.float() + 1e-4)
    group = LoraGroup([first, replace(second, adapters=(half, turned))], torch.bfloat16)
    for _ in range(2):
        _check(route, group)
        for projection in group.projections:
            for tensor in projection.tensors():
                tensor.data.neg_()  # what was made for the launch is not what the next one reads


@pytest.mark.parametrize(("route",), cases(small=[()]))
def test_no_buffer_stays_alive(route: str) -> None:
    """With what is kept for the next launch: not even where there is nothing to write but zeros."""
    for group in (
        _group("odd", "no biases", torch.bfloat16, torch.bfloat16, _device(route)),
        _group("none", "no biases", torch.bfloat16, torch.bfloat16, _device(route)),
    ):
        buffer = torch.empty(group.buffer_shape, dtype=group.dtype, device=_device(route))
        with along(route, kernels, fill=1):
            group.fill(buffer)
        gone = weakref.ref(buffer)
        del buffer
        gc.collect()  # spies remember what they were given
        assert gone() is None


@pytest.mark.parametrize(("shape", "number"), [("bare", 0), ("one", 1), ("qkv", 1), ("stacked", 2), ("many", 3)])
def test_number_of_launches(shape: str, number: int) -> None:
    """One for three projections with an adapter each, and their biases."""
    layout = _group(shape, "biases" if number else "no biases", torch.float32, torch.float32, "cpu")._layout
    assert len(_launches(layout, torch.device("cpu"))) == number


@pytest.mark.parametrize(
    ("storages", "number"),
    [
        (("nf4", "nf4", "nf4"), 1),
        (("nf4",), 1),
        (("nf4", None, "nf4"), 2),
        ((None, "int8"), 0),
        (("int8", "nf4", "nf4"), 1),
    ],
)
def test_neighbours_in_nf4_are_written_by_one_launch(storages: tuple[str | None, ...], number: int) -> None:
    projections = [make_projection(128, size, (8,), dtype=torch.bfloat16) for size in (48, 24, 24)]
    projections = [
        projection if storage is None else stored_as(storage, projection)
        for storage, projection in zip(storages, projections, strict=False)
    ]
    group = LoraGroup(projections, torch.bfloat16)
    buffer = torch.full(group.buffer_shape, torch.nan, dtype=torch.bfloat16)
    with along("interpreter", nf4_kernels, write=number):
        group.fill(buffer)
    assert torch.equal(buffer.view(torch.int16), _by_reference(group, "cpu").view(torch.int16))


@pytest.mark.gpu
def test_beyond_int32() -> None:
    """Rows so far apart that those of A begin past 2^31 elements."""
    group = LoraGroup([make_projection(64, 8, (8,), dtype=torch.bfloat16, device="cuda")], torch.bfloat16)
    rows, width = group.buffer_shape
    stride = 2**28 + 16
    buffer = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16, device="cuda")
    buffer = buffer.as_strided((rows, width), (stride, 1)).fill_(torch.nan)
    group.fill(buffer)
    read = ~buffer.isnan()
    assert torch.equal(buffer[read], _by_reference(group, "cuda")[read])
    assert bool(read[8:, 8:].all())


@pytest.mark.gpu
def test_a_fill_waits_for_nothing() -> None:
    """Nor is anything copied to the device, once a layout is known there."""
    group = _group("llama qkv", "biases", torch.bfloat16, torch.bfloat16, "cuda")
    buffer = torch.full(group.buffer_shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    group.fill(buffer)
    truth = buffer.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait, or a copy from memory that is not pinned, is an error while one records
        group.fill(buffer)
    buffer.fill_(torch.nan)
    graph.replay()
    assert torch.equal(buffer.view(torch.int16), truth.view(torch.int16))
    assert not torch.equal((buffer / 2).view(torch.int16), truth.view(torch.int16))
