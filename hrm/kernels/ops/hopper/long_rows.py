"""Gradients of rows that registers do not hold, of softmax and layer norm, for Hopper GPUs in Gluon.

A program takes a whole multiprocessor. Its shared memory is a ring of tiles, each of which is read twice and then makes
room for one of the rows to come: those are on their way from memory while a row is worked on, and nothing is read from
there twice. A thread reads what it copied itself.

Shapes: M rows of D columns in 16 bits; rows begin at multiples of 16 bytes, and strides are counted in 8 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from hrm.kernels.ops.hopper.common import multiprocessor_count

_WARPS = 16
# Of softmax: tiles of 8 KiB, each of the gradients and of the results, in 14 places; those of the first 4 tiles of a
# row wait in registers for the row's sum.
_COLUMNS, _SLOTS, _KEPT = 4096, 14, 4
_NORM_COLUMNS, _NORM_SLOTS = 16384, 2  # two rows of 64 KiB, beside weights of up to 64 KiB
_NORM_REGISTERS = 128  # of which the sums for weights and biases are 64


@gluon.jit
def _fetch(
    source: gl.tensor,
    stride: gl.tensor,
    target: gl.shared_memory_descriptor,
    row: gl.tensor,
    tile: gl.constexpr,
    M: gl.tensor,
    D: gl.constexpr,
    layout: gl.constexpr,
) -> None:
    """Begin to copy a tile of a row, if there is such a row."""
    COLUMNS: gl.constexpr = target.type.shape[0]
    columns = tile * COLUMNS + gl.arange(0, COLUMNS, layout)
    at = source + row.to(gl.int64) * (stride * 8) + columns
    async_copy.async_copy_global_to_shared(target, at, mask=(columns < D) & (row < M))


@gluon.jit
def _softmax_kernel(
    dy: gl.tensor,
    stride: gl.tensor,
    y: gl.tensor,
    dx: gl.tensor,
    M: gl.tensor,
    D: gl.constexpr,
    COLUMNS: gl.constexpr,
    SLOTS: gl.constexpr,
    KEPT: gl.constexpr,
) -> None:
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TILES: gl.constexpr = (D + COLUMNS - 1) // COLUMNS
    grads = gl.allocate_shared_memory(dy.dtype.element_ty, [SLOTS, COLUMNS], shared)
    shares = gl.allocate_shared_memory(y.dtype.element_ty, [SLOTS, COLUMNS], shared)
    first_row, programs = gl.program_id(0), gl.num_programs(0)
    for n in gl.static_range(SLOTS):
        row = first_row + n // TILES * programs
        _fetch(dy, stride, grads.index(n), row, n % TILES, M, D, layout)
        _fetch(y, D // 8, shares.index(n), row, n % TILES, M, D, layout)
        async_copy.commit_group()
    begin = 0  # the slot of the row's first tile
    for row in range(first_row, M, programs):
        products = gl.zeros([COLUMNS], gl.float32, layout)
        kept = ()
        for t in gl.static_range(TILES):
            slot = (begin + t) % SLOTS
            async_copy.wait_group(SLOTS - 1 - t + min(t, KEPT))
            grad, share = grads.index(slot).load(layout), shares.index(slot).load(layout)
            if t < KEPT:
                kept = kept + (grad, share)  # type: ignore[assignment]  # noqa: RUF005  Triton takes no star here
                later = row + (SLOTS + t) // TILES * programs
                _fetch(dy, stride, grads.index(slot), later, (SLOTS + t) % TILES, M, D, layout)
                _fetch(y, D // 8, shares.index(slot), later, (SLOTS + t) % TILES, M, D, layout)
                async_copy.commit_group()
            product = grad.to(gl.float32) * share.to(gl.float32)
            if D % COLUMNS != 0 and t == TILES - 1:
                product = gl.where(t * COLUMNS + gl.arange(0, COLUMNS, layout) < D, product, 0.0)
            products += product
        along = gl.sum(products, 0)
        for t in gl.static_range(TILES):
            if t < KEPT:
                grad, share = kept[2 * t], kept[2 * t + 1]
            else:
                slot = (begin + t) % SLOTS
                later = row + (SLOTS + t) // TILES * programs
                grad, share = grads.index(slot).load(layout), shares.index(slot).load(layout)
                _fetch(dy, stride, grads.index(slot), later, (SLOTS + t) % TILES, M, D, layout)
                _fetch(y, D // 8, shares.index(slot), later, (SLOTS + t) % TILES, M, D, layout)
                async_copy.commit_group()
            columns = t * COLUMNS + gl.arange(0, COLUMNS, layout)
            result = share.to(gl.float32) * (grad.to(gl.float32) - along)
            gl.store(dx + gl.cast(row, gl.int64) * D + columns, result.to(dx.dtype.element_ty), columns < D)
        begin = (begin + TILES) % SLOTS


@gluon.jit
def _add_pairs(a: gl.tensor, b: gl.tensor, c: gl.tensor, d: gl.tensor) -> Any:
    return a + c, b + d


@gluon.jit
def _norm_kernel(
    dy: gl.tensor,
    dy_stride: gl.tensor,
    x: gl.tensor,
    stride: gl.tensor,
    weight: gl.tensor,
    mean: gl.tensor,
    rstd: gl.tensor,
    dx: gl.tensor,
    d_weight: gl.tensor,
    d_bias: gl.tensor,
    M: gl.tensor,
    D: gl.constexpr,
    COLUMNS: gl.constexpr,
    SLOTS: gl.constexpr,
) -> None:
    """d_weight and d_bias [programs, D] get the sums over a program's rows."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    values = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, COLUMNS], shared)
    grads = gl.allocate_shared_memory(dy.dtype.element_ty, [SLOTS, COLUMNS], shared)
    program, programs = gl.program_id(0), gl.num_programs(0)
    for n in gl.static_range(SLOTS):
        _fetch(x, stride, values.index(n), program + n * programs, 0, M, D, layout)
        _fetch(dy, dy_stride, grads.index(n), program + n * programs, 0, M, D, layout)
        async_copy.commit_group()
    columns = gl.arange(0, COLUMNS, layout)
    exists = columns < D
    gains = gl.allocate_shared_memory(
        weight.dtype.element_ty, [COLUMNS], shared, gl.load(weight + columns, exists, other=0.0)
    )
    weight_sum = gl.zeros([COLUMNS], gl.float32, layout)
    bias_sum = gl.zeros([COLUMNS], gl.float32, layout)
    slot = 0
    next_average = gl.load(mean + program, program < M, other=0.0)
    next_factor = gl.load(rstd + program, program < M, other=0.0)
    for row in range(program, M, programs):
        average, factor = next_average, next_factor
        after = row + programs
        next_average = gl.load(mean + after, after < M, other=0.0)
        next_factor = gl.load(rstd + after, after < M, other=0.0)
        async_copy.wait_group(SLOTS - 1)
        value = values.index(slot).load(layout).to(gl.float32)
        grad = grads.index(slot).load(layout).to(gl.float32)
        if D != COLUMNS:  # what was not copied may be anything
            value, grad = gl.where(exists, value, 0.0), gl.where(exists, grad, 0.0)
        value = (value - average) * factor
        weight_sum += grad * value
        bias_sum += grad
        grad *= gains.load(layout).to(gl.float32)
        along, total = gl.reduce((grad * value, grad), 0, _add_pairs)
        # Registers hold no row beside the sums: it is read and worked out again.
        gl.thread_barrier()
        value = values.index(slot).load(layout).to(gl.float32)
        grad = grads.index(slot).load(layout).to(gl.float32)
        _fetch(x, stride, values.index(slot), row + SLOTS * programs, 0, M, D, layout)
        _fetch(dy, dy_stride, grads.index(slot), row + SLOTS * programs, 0, M, D, layout)
        async_copy.commit_group()
        value = (value - average) * factor
        grad *= gains.load(layout).to(gl.float32)
        result = (grad - value * (along / D) - total / D) * factor
        gl.store(dx + gl.cast(row, gl.int64) * D + columns, result.to(dx.dtype.element_ty), exists)
        slot = (slot + 1) % SLOTS
    gl.store(d_weight + program * D + columns, weight_sum, exists)
    gl.store(d_bias + program * D + columns, bias_sum, exists)


def _fits(*matrices: Tensor) -> bool:
    """Whether rows of matrices [M, D] can be copied 16 bytes at a time."""
    return all(
        x.itemsize == 2 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in matrices
    )


def fits_softmax(dy: Tensor, y: Tensor) -> bool:
    """Whether `softmax_backward` takes these rows [M, D]."""
    return dy.shape[1] <= (_SLOTS + _KEPT) * _COLUMNS and _fits(dy, y)


def softmax_backward(dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """Write y (dy - sum(y dy)) to contiguous `dx`, of contiguous y [M, D] and rows of dy."""
    M, D = y.shape
    _softmax_kernel[(min(M, multiprocessor_count(y.device)),)](
        dy, dy.stride(0) // 8, y, dx, M, D, _COLUMNS, _SLOTS, _KEPT, num_warps=_WARPS
    )


def fits_layer_norm(dy: Tensor, x: Tensor) -> bool:
    """Whether `layer_norm_backward` takes these rows [M, D]."""
    return x.shape[1] <= _NORM_COLUMNS and _fits(dy, x)


def layer_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient in x to contiguous `dx`; returns parts of those in weight and bias, [2, parts, D] float32."""
    M, D = x.shape
    programs = min(M, multiprocessor_count(x.device))
    parts = x.new_empty(2, programs, D, dtype=torch.float32)
    _norm_kernel[(programs,)](
        dy,
        dy.stride(0) // 8,
        x,
        x.stride(0) // 8,
        weight,
        mean,
        rstd,
        dx,
        *parts,
        M,
        D,
        triton.next_power_of_2(D),
        _NORM_SLOTS,
        num_warps=_WARPS,
        maxnreg=_NORM_REGISTERS,
    )
    return parts
