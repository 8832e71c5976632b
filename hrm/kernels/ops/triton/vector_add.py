"""Kernel of `hrm.kernels.ops.vector_add`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.triton.elementwise import as_result, tiles


@triton.jit
def _add_tile(x: tl.tensor, y: tl.tensor, out: tl.tensor, at: tl.tensor, inside: tl.tensor | None) -> None:
    tl.store(out + at, tl.load(x + at, inside).to(tl.float32) + tl.load(y + at, inside).to(tl.float32), inside)


@triton.jit
def _add_kernel(x: tl.tensor, y: tl.tensor, out: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> None:
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = start + tl.arange(0, SIZE)
    if start + SIZE <= count:
        _add_tile(x, y, out, at, None)
    else:
        _add_tile(x, y, out, at, at < count)


def forward(x: Tensor, y: Tensor) -> Tensor:
    """x + y in the order in memory of `x`."""
    out = torch.empty_like(x)
    if out.numel():
        grid, tile = tiles(out)
        _add_kernel[grid](*as_result(out, x, y), out, out.numel(), **tile)
    return out
