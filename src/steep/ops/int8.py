"""A frozen weight in bitsandbytes' 8-bit storage (LLM.int8): a signed byte an element, an absmax a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steep.ops.backend import uses_kernels


@dataclass(frozen=True)
class Int8Weight:
    """W = codes · absmax / 127, in fp32: what bitsandbytes' `int8_vectorwise_dequant` gives, and what PEFT merges into.

    (The library's own forward rounds activations to 8 bit too, for its integer product; the weight is the same.)

    Attributes:
        codes: int8 [out_features, in_features], `CB` (the weight's own data); rows may be apart.
        absmax: fp32 [out_features], `SCB`.

    Raises:
        ValueError: the parts are not of such a storage.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2 or self.codes.stride(1) != 1:
            raise ValueError(
                f"8-bit storage: `codes` is {self.codes.dtype} {list(self.codes.shape)}, not a matrix of int8."
            )
        if self.absmax.dtype != torch.float32 or self.absmax.shape != self.codes.shape[:1]:
            raise ValueError(
                f"8-bit storage: `absmax` is {self.absmax.dtype} {list(self.absmax.shape)}; "
                f"{self.codes.shape[0]} of torch.float32 are expected."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out` [out_features, in_features] of bf16, fp16 or fp32, rounded once from fp32. Its
        rows may be apart."""
        assert tuple(out.shape) == self.shape and out.stride(1) == 1, (out.shape, out.stride(), self.shape)
        if not uses_kernels(out):
            out.copy_(int8_reference(self))
            return
        from steep.kernels import int8

        int8.write(self.codes, self.absmax.contiguous(), out)


def int8_reference(weight: Int8Weight) -> torch.Tensor:
    """The weight in fp32 [out_features, in_features]: bitsandbytes' dequantisation to the bit."""
    return weight.codes * weight.absmax[:, None] * (1.0 / 127.0)
