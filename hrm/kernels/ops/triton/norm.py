"""Kernels of `hrm.kernels.ops.layer_norm` and `rms_norm`, forward and backward.

Rows of at most `_WHOLE` columns are read once and lie in registers, several in a program where they are short; longer
ones pass in tiles. Gradients of weights come about in two stages: each of a fixed number of programs adds up those of
its rows, which a second kernel adds up in order. So they are the same in every run on a device. Where registers do not
hold a program's sums beside a row, sums are a kernel of their own or, on Hopper GPUs, rows lie in shared memory
(`hrm.kernels.ops.hopper.long_rows`).

Shapes: M rows, D columns; statistics of a row in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.common import multiprocessor_count

_WHOLE = 16384
_LONG = 4096  # columns of a tile of a longer row
_SUMS_APART = 8192  # columns; of longer rows registers do not hold the sums for weights and biases too
_SUM_ROWS, _SUM_COLUMNS = 16, 512  # of a tile, where these sums are a kernel of their own


class Tile(NamedTuple):
    """How a program takes rows."""

    rows: int  # at once
    warps: int  # that share them
    programs: int = 0  # on a multiprocessor, where it has a fixed number
    registers: int | None = None  # of a thread, so that these fit
    stages: int = 1  # tiles of which one is worked on and the others are on their way, in shared memory


def forward_tile(columns: int, itemsize: int = 2) -> Tile:
    """For rows of `columns`, a power of two: one warp up to 2,047 of them, two up to 4,095, and so on.

    Rows of 16 bit of more than 8,192 are taken in turns by a program for each multiprocessor.
    """
    if columns > 8192 and itemsize == 2:
        return Tile(1, 32, 1, stages=3)
    warps = min(16, max(1, columns // 1024))
    return Tile(max(1, 1024 // columns), warps, registers=64 if warps == 16 else None)  # two programs fit


def backward_tile(columns: int) -> Tile:
    if columns <= 2048:
        return Tile((2048 if columns > 64 else 1024) // columns, 4, 3, 168)
    return Tile(1, 8, 2, 128, stages=3) if columns <= 4096 else Tile(1, 16, 1, 128)


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    stride: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    y: tl.tensor,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # Short rows pass through the cache once and weights stay there, which is 3 % faster. With long ones it is slower.
    ONCE: tl.constexpr = "evict_first" if ROWS > 1 else ""
    KEPT: tl.constexpr = "evict_last" if ROWS > 1 else ""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    exists = columns < D
    inside = (rows < M)[:, None] & exists
    value = tl.load(x + rows[:, None] * stride + columns, inside, 0, eviction_policy=ONCE).to(tl.float32)
    if mean is not None:
        average = tl.sum(value, 1) / D
        tl.store(mean + rows, average, rows < M)
        value = tl.where(exists, value - average[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(rstd + rows, factor, rows < M)
    value *= factor[:, None]
    if weight is not None:
        value *= tl.load(weight + columns, exists, 0, eviction_policy=KEPT).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + columns, exists, 0, eviction_policy=KEPT).to(tl.float32)
    tl.store(y + rows[:, None] * D + columns, value, inside)


@triton.jit
def _persistent_forward_kernel(
    x: tl.tensor,
    stride: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    y: tl.tensor,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Rows in turns, the next ones on their way to shared memory; weights and biases stay in registers."""
    columns = tl.arange(0, COLUMNS)
    exists = columns < D
    if weight is not None:
        gain = tl.load(weight + columns, exists, 0)
    if bias is not None:
        shift = tl.load(bias + columns, exists, 0)
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        value = tl.load(x + tl.cast(row, tl.int64) * stride + columns, exists, 0).to(tl.float32)
        if mean is not None:
            average = tl.sum(value, 0) / D
            tl.store(mean + row, average)
            value = tl.where(exists, value - average, 0.0)
        factor = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        tl.store(rstd + row, factor)
        value *= factor
        if weight is not None:
            value *= gain.to(tl.float32)
        if bias is not None:
            value += shift.to(tl.float32)
        tl.store(y + tl.cast(row, tl.int64) * D + columns, value, exists)


@triton.jit
def _long_forward_kernel(
    x: tl.tensor,
    stride: tl.tensor,
    weight: tl.tensor | None,
    bias: tl.tensor | None,
    y: tl.tensor,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A row in tiles of COLUMNS, which the cache keeps from one pass over it to the next."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, COLUMNS)
    x += row * stride
    y += row * D
    average = 0.0
    if mean is not None:
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, D, COLUMNS):
            total += tl.load(x + start + within, start + within < D, 0).to(tl.float32)
        average = tl.sum(total, 0) / D
        tl.store(mean + row, average)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        value = tl.where(exists, tl.load(x + start + within, exists, 0).to(tl.float32) - average, 0.0)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    tl.store(rstd + row, factor)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        value = (tl.load(x + start + within, exists, 0).to(tl.float32) - average) * factor
        if weight is not None:
            value *= tl.load(weight + start + within, exists, 0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + start + within, exists, 0).to(tl.float32)
        tl.store(y + start + within, value, exists)


@triton.jit
def _backward_kernel(
    dy: tl.tensor,
    dy_stride: tl.tensor,
    x: tl.tensor,
    stride: tl.tensor,
    weight: tl.tensor | None,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    dx: tl.tensor,
    d_weight: tl.tensor | None,
    d_bias: tl.tensor | None,
    M: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HELD: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Tiles of rows in turns; d_weight and d_bias [programs, D] get the sums over a program's.

    HELD: weights stay in registers, for which long rows leave none. With AHEAD, the next rows are on their way to
    registers while some are worked on; with STAGES of more than 1, to shared memory.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, COLUMNS)[None, :]
    exists = columns < D
    if HELD and weight is not None:
        gain = tl.load(weight + columns, exists, 0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    if AHEAD:
        rows = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < M)[:, None] & exists
        next_value = tl.load(x + rows[:, None] * stride + columns, inside, 0)
        next_grad = tl.load(dy + rows[:, None] * dy_stride + columns, inside, 0)
    for first in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < M)[:, None] & exists
        if AHEAD:
            value, grad = next_value.to(tl.float32), next_grad.to(tl.float32)
            later = rows + programs * ROWS
            is_there = (later < M)[:, None] & exists
            next_value = tl.load(x + later[:, None] * stride + columns, is_there, 0)
            next_grad = tl.load(dy + later[:, None] * dy_stride + columns, is_there, 0)
        else:
            value = tl.load(x + rows[:, None] * stride + columns, inside, 0).to(tl.float32)
            grad = tl.load(dy + rows[:, None] * dy_stride + columns, inside, 0).to(tl.float32)
        factor = tl.load(rstd + rows, rows < M, 0)[:, None]
        if mean is not None:
            value -= tl.load(mean + rows, rows < M, 0)[:, None]
        value *= factor
        if d_weight is not None:
            weight_sum += grad * value
        if d_bias is not None:
            bias_sum += grad
        if weight is not None:
            if not HELD:
                gain = tl.load(weight + columns, exists, 0).to(tl.float32)
            grad *= gain
        result = grad - value * (tl.sum(grad * value, 1) / D)[:, None]
        if mean is not None:
            result -= (tl.sum(grad, 1) / D)[:, None]
        tl.store(dx + rows[:, None] * D + columns, result * factor, inside)
    if d_weight is not None:
        tl.store(d_weight + program * D + columns, tl.sum(weight_sum, 0)[None, :], exists)
    if d_bias is not None:
        tl.store(d_bias + program * D + columns, tl.sum(bias_sum, 0)[None, :], exists)


@triton.jit
def _long_backward_kernel(
    dy: tl.tensor,
    dy_stride: tl.tensor,
    x: tl.tensor,
    stride: tl.tensor,
    weight: tl.tensor | None,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    dx: tl.tensor,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, COLUMNS)
    dy += row * dy_stride
    x += row * stride
    dx += row * D
    factor = tl.load(rstd + row)
    average = 0.0
    if mean is not None:
        average = tl.load(mean + row)
    along = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        grad = tl.load(dy + start + within, exists, 0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + start + within, exists, 0).to(tl.float32)
        along += grad * ((tl.load(x + start + within, exists, 0).to(tl.float32) - average) * factor)
        total += grad
    mean_along = tl.sum(along, 0) / D
    mean_grad = 0.0
    if mean is not None:
        mean_grad = tl.sum(total, 0) / D
    for start in range(0, D, COLUMNS):
        exists = start + within < D
        grad = tl.load(dy + start + within, exists, 0).to(tl.float32)
        if weight is not None:
            grad *= tl.load(weight + start + within, exists, 0).to(tl.float32)
        value = (tl.load(x + start + within, exists, 0).to(tl.float32) - average) * factor
        tl.store(dx + start + within, (grad - value * mean_along - mean_grad) * factor, exists)


@triton.jit
def _sums_kernel(
    dy: tl.tensor,
    dy_stride: tl.tensor,
    x: tl.tensor,
    stride: tl.tensor,
    mean: tl.tensor | None,
    rstd: tl.tensor,
    d_weight: tl.tensor | None,
    d_bias: tl.tensor | None,
    M: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of tiles of rows in turns: a program for each row of d_weight and d_bias."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = columns < D
    weight_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for _ in range(program * ROWS, M, programs * ROWS):
        inside = (rows < M)[:, None] & exists
        grad = tl.load(dy + rows[:, None] * dy_stride + columns, inside, 0).to(tl.float32)
        if d_weight is not None:
            value = tl.load(x + rows[:, None] * stride + columns, inside, 0).to(tl.float32)
            if mean is not None:
                value -= tl.load(mean + rows, rows < M, 0)[:, None]
            weight_sum += grad * (value * tl.load(rstd + rows, rows < M, 0)[:, None])
        if d_bias is not None:
            bias_sum += grad
        rows += programs.to(tl.int64) * ROWS
    if d_weight is not None:
        tl.store(d_weight + program * D + columns, tl.sum(weight_sum, 0)[None, :], exists)
    if d_bias is not None:
        tl.store(d_bias + program * D + columns, tl.sum(bias_sum, 0)[None, :], exists)


@triton.jit
def _add_up_kernel(
    parts: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """parts [sums, count, D] added up over `count`, in order, into out [sums, D]."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    parts += tl.program_id(1).to(tl.int64) * count * D
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + rows * D + columns, (rows < count) & (columns < D), 0)
    tl.store(out + tl.program_id(1) * D + columns, tl.sum(total, 0)[None, :], columns < D)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normalised rows of x [..., D], contiguous; the means, if they are taken off, and 1 / deviation [M]."""
    rows = as_rows(x)
    M, D = rows.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(M, dtype=torch.float32) if centred else None
    rstd = x.new_empty(M, dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, rstd
    weight, bias = _contiguous(weight), _contiguous(bias)
    columns = triton.next_power_of_2(D)
    if columns > _WHOLE:
        _long_forward_kernel[(M,)](
            rows, rows.stride(0), weight, bias, y, mean, rstd, eps, D, COLUMNS=_LONG, num_warps=8
        )
        return y, mean, rstd
    tile = forward_tile(columns, x.itemsize)
    if tile.programs:
        _persistent_forward_kernel[(min(M, tile.programs * multiprocessor_count(x.device)),)](
            rows,
            rows.stride(0),
            weight,
            bias,
            y,
            mean,
            rstd,
            M,
            eps,
            D,
            COLUMNS=columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
        return y, mean, rstd
    _forward_kernel[(triton.cdiv(M, tile.rows),)](
        rows,
        rows.stride(0),
        weight,
        bias,
        y,
        mean,
        rstd,
        M,
        eps,
        D,
        ROWS=tile.rows,
        COLUMNS=columns,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    d_weight: bool,
    d_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient in x, contiguous, and those in weight and bias that are asked for: [0, 1 or 2, D]."""
    grads, rows = as_rows(dy), as_rows(x)
    M, D = rows.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    asked = d_weight + d_bias
    sums = x.new_empty(asked, D, dtype=None if weight is None else weight.dtype)
    if x.numel() == 0:
        return dx, sums.zero_()
    weight = _contiguous(weight)
    columns = triton.next_power_of_2(D)
    if columns > _SUMS_APART and asked == 2 and hopper.why_not(x.device) is None:
        from hrm.kernels.ops.hopper import long_rows

        if weight is not None and mean is not None and long_rows.fits_layer_norm(grads, rows):
            return dx, _add_up(long_rows.layer_norm_backward(grads, rows, weight, mean, rstd, dx), sums)
    sums_apart = columns > (_SUMS_APART if asked == 2 else _WHOLE) and asked > 0
    tile, processors = backward_tile(columns), multiprocessor_count(x.device)
    programs = min(tile.programs * processors, triton.cdiv(M, tile.rows))
    summing = programs
    if sums_apart:
        summing = min(triton.cdiv(8 * processors, triton.cdiv(D, _SUM_COLUMNS)), triton.cdiv(M, _SUM_ROWS))
    parts = x.new_empty(asked, summing, D, dtype=torch.float32)
    weight_parts, bias_parts = parts[0] if d_weight else None, parts[-1] if d_bias else None
    if columns > _WHOLE:
        _long_backward_kernel[(M,)](
            grads,
            grads.stride(0),
            rows,
            rows.stride(0),
            weight,
            mean,
            rstd,
            dx,
            D,
            COLUMNS=_LONG,
            num_warps=8,
        )
    else:
        # Triton copies to shared memory what it knows to begin at multiples of 16 bytes.
        stages = tile.stages if grads.stride(0) % 16 == rows.stride(0) % 16 == 0 else 1
        _backward_kernel[(programs,)](
            grads,
            grads.stride(0),
            rows,
            rows.stride(0),
            weight,
            mean,
            rstd,
            dx,
            None if sums_apart else weight_parts,
            None if sums_apart else bias_parts,
            M,
            D,
            ROWS=tile.rows,
            COLUMNS=columns,
            HELD=columns <= 4096,
            AHEAD=columns <= 4096 and stages == 1,
            STAGES=stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    if sums_apart:
        _sums_kernel[(triton.cdiv(D, _SUM_COLUMNS), summing)](
            grads,
            grads.stride(0),
            rows,
            rows.stride(0),
            mean,
            rstd,
            weight_parts,
            bias_parts,
            M,
            D,
            ROWS=_SUM_ROWS,
            COLUMNS=_SUM_COLUMNS,
            num_warps=8,
        )
    return dx, _add_up(parts, sums)


def _add_up(parts: Tensor, sums: Tensor) -> Tensor:
    """Write the sums of parts [sums, count, D] to `sums` [sums, D]."""
    asked, count, D = parts.shape
    if asked:
        width = 32 if D <= 1024 else 128
        _add_up_kernel[(triton.cdiv(D, width), asked)](
            parts, sums, count, D, ROWS=2048 // width, COLUMNS=width, num_warps=4
        )
    return sums


def as_rows(x: Tensor) -> Tensor:
    """[M, D] of x [..., D], whose columns lie side by side; copied only where they do not, or rows at no one stride."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
