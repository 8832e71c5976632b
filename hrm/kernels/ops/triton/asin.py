"""Kernels of `hrm.kernels.ops.asin`, which call libdevice. Triton's interpreter has no libdevice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hrm.kernels.ops.triton.elementwise import as_result, tiles


@triton.jit
def _asin_tile(x: tl.tensor, out: tl.tensor, at: tl.tensor, inside: tl.tensor | None) -> None:
    tl.store(out + at, libdevice.asin(tl.load(x + at, inside).to(tl.float32)), inside)


@triton.jit
def _asin_kernel(x: tl.tensor, out: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> None:
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = start + tl.arange(0, SIZE)
    if start + SIZE <= count:
        _asin_tile(x, out, at, None)
    else:
        _asin_tile(x, out, at, at < count)


@triton.jit
def _gradient_tile(grad: tl.tensor, x: tl.tensor, dx: tl.tensor, at: tl.tensor, inside: tl.tensor | None) -> None:
    value = tl.load(x + at, inside).to(tl.float32)
    # (1 - x)(1 + x) keeps its digits where x is nearly 1, as 1 - x x does not.
    slope = tl.rsqrt((1 - value) * (1 + value))
    tl.store(dx + at, tl.load(grad + at, inside).to(tl.float32) * slope, inside)


@triton.jit
def _asin_backward_kernel(grad: tl.tensor, x: tl.tensor, dx: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> None:
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = start + tl.arange(0, SIZE)
    if start + SIZE <= count:
        _gradient_tile(grad, x, dx, at, None)
    else:
        _gradient_tile(grad, x, dx, at, at < count)


def forward(x: Tensor) -> Tensor:
    """asin of each element, in the order in memory of `x`."""
    out = torch.empty_like(x)
    if out.numel():
        grid, tile = tiles(out)
        _asin_kernel[grid](*as_result(out, x), out, out.numel(), **tile)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad / sqrt(1 - x²), in the order in memory of `x`."""
    dx = torch.empty_like(x)
    if dx.numel():
        grid, tile = tiles(dx)
        _asin_backward_kernel[grid](*as_result(dx, grad, x), dx, dx.numel(), **tile)
    return dx
