"""Weights in e4m3 as the tests of fp8 ops need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from steep.ops.base_weight import DenseWeight
from steep.ops.fp8 import BLOCK, E4M3, LARGEST, Fp8Weight, quantise_weight
from steep.ops.lora import Projection
from tests.ops.lora_cases import make_projection


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """torch compares no e4m3 on a GPU."""
    return codes.view(torch.uint8)


def random_codes(rows: int, columns: int, device: str) -> torch.Tensor:
    """Every defined code, alike often."""
    codes = torch.randint(0, 254, (rows, columns), dtype=torch.uint8)
    return (codes + (codes >= 127).to(torch.uint8)).to(device).view(E4M3)


def with_blocks(weight: torch.Tensor) -> Fp8Weight:
    """`weight` with a scale of each block of 128 x 128."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows of blocks, 128, blocks, 128]
    scale = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return Fp8Weight(codes.to(E4M3).contiguous(), scale)


def stored_in_fp8(projection: Projection, blocks: bool) -> Projection:
    """The same over its weight in e4m3."""
    assert isinstance(projection.weight, DenseWeight)
    weight = projection.weight.weight
    return replace(projection, weight=with_blocks(weight) if blocks else quantise_weight(weight))


def stacked_in_one(projections: Sequence[Projection]) -> list[Projection]:
    """The same with codes that are rows of one tensor."""
    weights = [projection.weight for projection in projections]
    codes = torch.cat([as_bytes(weight.codes) for weight in weights if isinstance(weight, Fp8Weight)]).view(E4M3)
    parts = codes.split([weight.shape[0] for weight in weights])
    return [
        replace(projection, weight=replace(projection.weight, codes=part))  # pyright: ignore[reportArgumentType]
        for projection, part in zip(projections, parts, strict=True)
    ]


def make_fp8_projection(
    in_features: int, out_features: int, ranks: Sequence[int] = (8,), *, blocks: bool = False, **options: object
) -> Projection:
    """As `make_projection`, over a weight in e4m3."""
    return stored_in_fp8(make_projection(in_features, out_features, ranks, **options), blocks)  # pyright: ignore[reportArgumentType]
