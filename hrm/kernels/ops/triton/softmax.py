"""Kernels of `hrm.kernels.ops.softmax`, forward and backward.

Along the last dimension, rows that fit lie in registers as a whole, several in a program where they are short; longer
ones pass in tiles twice, first for their peak and sum, which are kept for each lane of a tile and joined at the end.
On Hopper GPUs gradients of longer ones are read once (`hrm.kernels.ops.hopper.long_rows`). Along another dimension,
programs take neighbouring columns of it, and tiles of them pass in the same way.

Shapes: M rows of D columns; or outer x D x inner, softmax along D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.norm import Tile, as_rows

_WHOLE_FORWARD, _WHOLE_BACKWARD = 32768, 16384
_LONG, _LONG_WARPS = 16384, 32  # columns of a tile of a longer row, and the warps that share them
_LANE = 8  # neighbouring columns, which a thread reads at once, and whose peak and sum it keeps


def forward_tile(columns: int) -> Tile:
    """For rows of `columns`, a power of two."""
    if columns <= 64:  # read an element at a time where their length is no power of two, which wants many threads
        return Tile(512 // columns, 4)
    return Tile(max(1, 1024 // columns), min(32, max(1, columns // 1024)))


def backward_tile(columns: int) -> Tile:
    if columns <= 64:
        return Tile(512 // columns, 4)
    return Tile(max(1, 512 // columns), min(16, max(1, columns // 512)))


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    stride: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    value = tl.load(x + rows[:, None] * stride + columns, inside, float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 1)[:, None])
    value *= (1.0 / tl.sum(value, 1))[:, None]
    tl.store(y + rows[:, None] * D + columns, value, inside)


@triton.jit
def _joined(peak: tl.tensor, total: tl.tensor, value: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Peak and sum of exponentials of each lane, with one more value; a lane that has seen only -inf stays at 0."""
    higher = tl.maximum(peak, value)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(peak - base) + tl.exp(value - base)


@triton.jit
def _exp(x: tl.tensor) -> tl.tensor:
    """By the chip's power of 2 alone: `tl.exp` sees to subnormal results besides."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _long_forward_kernel(
    x: tl.tensor, stride: tl.tensor, y: tl.tensor, D: tl.constexpr, COLUMNS: tl.constexpr, LANE: tl.constexpr
) -> None:
    """Rows wait in the cache from one pass over them to the next, and results do not take their place there."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, COLUMNS)
    x += row * stride
    y += row * D
    peak = tl.full((COLUMNS // LANE,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS // LANE,), tl.float32)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        value = tl.load(x + start + within, exists, float("-inf"), eviction_policy="evict_last").to(tl.float32)
        value = value.reshape(COLUMNS // LANE, LANE)
        higher = tl.maximum(peak, tl.max(value, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # lanes that have seen only -inf stay at 0
        total = total * _exp(peak - base) + tl.sum(_exp(value - base[:, None]), 1)
        peak = higher
    highest = tl.max(peak, 0)
    share = 1.0 / tl.sum(total * _exp(peak - highest), 0)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        value = tl.load(x + start + within, exists, float("-inf"), eviction_policy="evict_first").to(tl.float32)
        tl.store(y + start + within, _exp(value - highest) * share, exists, eviction_policy="evict_first")


@triton.jit
def _across_forward_kernel(
    x: tl.tensor, y: tl.tensor, D: tl.tensor, inner: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    pieces = tl.cdiv(inner, COLUMNS)
    outer, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    begin = outer.to(tl.int64) * D * inner
    peak = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows.to(tl.int64) * inner + columns
        value = tl.load(x + at, (rows < D) & (columns < inner), float("-inf")).to(tl.float32)
        peak, total = _joined(peak, total, value)
    highest = tl.max(peak, 0)[None, :]
    share = 1.0 / tl.sum(total * tl.exp(peak - highest), 0)[None, :]
    for start in range(0, D, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows.to(tl.int64) * inner + columns
        inside = (rows < D) & (columns < inner)
        value = tl.load(x + at, inside, float("-inf")).to(tl.float32)
        tl.store(y + at, tl.exp(value - highest) * share, inside)


@triton.jit
def _backward_kernel(
    dy: tl.tensor,
    stride: tl.tensor,
    y: tl.tensor,
    dx: tl.tensor,
    M: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows[:, None] * D + columns
    share = tl.load(y + at, inside, 0).to(tl.float32)
    grad = tl.load(dy + rows[:, None] * stride + columns, inside, 0).to(tl.float32)
    tl.store(dx + at, share * (grad - tl.sum(share * grad, 1)[:, None]), inside)


@triton.jit
def _long_backward_kernel(
    dy: tl.tensor, stride: tl.tensor, y: tl.tensor, dx: tl.tensor, D: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, COLUMNS)
    dy += row * stride
    y += row * D
    dx += row * D
    products = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        share = tl.load(y + start + within, exists, 0).to(tl.float32)
        products += share * tl.load(dy + start + within, exists, 0).to(tl.float32)
    along = tl.sum(products, 0)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        share = tl.load(y + start + within, exists, 0).to(tl.float32)
        grad = tl.load(dy + start + within, exists, 0).to(tl.float32)
        tl.store(dx + start + within, share * (grad - along), exists)


@triton.jit
def _across_backward_kernel(
    dy: tl.tensor,
    y: tl.tensor,
    dx: tl.tensor,
    D: tl.tensor,
    inner: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    pieces = tl.cdiv(inner, COLUMNS)
    outer, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    columns = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    begin = outer.to(tl.int64) * D * inner
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows.to(tl.int64) * inner + columns
        inside = (rows < D) & (columns < inner)
        share = tl.load(y + at, inside, 0).to(tl.float32)
        products += share * tl.load(dy + at, inside, 0).to(tl.float32)
    along = tl.sum(products, 0)[None, :]
    for start in range(0, D, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows.to(tl.int64) * inner + columns
        inside = (rows < D) & (columns < inner)
        share = tl.load(y + at, inside, 0).to(tl.float32)
        grad = tl.load(dy + at, inside, 0).to(tl.float32)
        tl.store(dx + at, share * (grad - along), inside)


def forward(x: Tensor, dim: int) -> Tensor:
    """softmax(x) along `dim`, contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    if dim != x.ndim - 1:
        grid, sizes = _across(x, dim)
        _across_forward_kernel[grid](x.contiguous(), y, **sizes)
        return y
    rows = as_rows(x)
    M, D = rows.shape
    columns = triton.next_power_of_2(D)
    if columns > _WHOLE_FORWARD:
        _long_forward_kernel[(M,)](rows, rows.stride(0), y, D, COLUMNS=_LONG, LANE=_LANE, num_warps=_LONG_WARPS)
        return y
    tile = forward_tile(columns)
    grid = (triton.cdiv(M, tile.rows),)
    _forward_kernel[grid](rows, rows.stride(0), y, M, D, ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps)
    return y


def backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """y (dy - sum(y dy)) along `dim`, contiguous; y is what `forward` made."""
    dx = torch.empty_like(y)
    if y.numel() == 0:
        return dx
    if dim != y.ndim - 1:
        grid, sizes = _across(y, dim)
        _across_backward_kernel[grid](dy.contiguous(), y, dx, **sizes)
        return dx
    rows = as_rows(dy)
    M, D = rows.shape
    columns = triton.next_power_of_2(D)
    if columns > _WHOLE_BACKWARD:
        if hopper.why_not(y.device) is None:
            from hrm.kernels.ops.hopper import long_rows

            if long_rows.fits_softmax(rows, y.view(M, D)):
                long_rows.softmax_backward(rows, y.view(M, D), dx)
                return dx
        _long_backward_kernel[(M,)](rows, rows.stride(0), y, dx, D, COLUMNS=_LONG, num_warps=_LONG_WARPS)
        return dx
    tile = backward_tile(columns)
    grid = (triton.cdiv(M, tile.rows),)
    _backward_kernel[grid](rows, rows.stride(0), y, dx, M, D, ROWS=tile.rows, COLUMNS=columns, num_warps=tile.warps)
    return dx


def _across(x: Tensor, dim: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes of a kernel along a dimension that is not the last."""
    depth, inner = x.shape[dim], x.shape[dim + 1 :].numel()
    columns = min(64, triton.next_power_of_2(inner))
    rows = min(2048 // columns, triton.next_power_of_2(depth))
    grid = (x.shape[:dim].numel() * triton.cdiv(inner, columns),)
    return grid, {"D": depth, "inner": inner, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
