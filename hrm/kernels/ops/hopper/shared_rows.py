"""Matmul, residual and norm for Hopper GPUs, where programs share rows that are wider than one of them can hold.

A program has 128 rows of 256 outputs. It leaves the sums of their squares in global memory and goes on to its next
rows. While the tensor cores are at those, it finds there the sums of the programs that have the other columns, and
finishes its own, which waited in 16 bit. `hrm.kernels.ops.hopper.residual_rms`, whose programs make one half of a row
after the other, reads x twice, and its tensor cores are idle meanwhile.

Programs that share rows have consecutive numbers, and there are no more programs than multiprocessors, each of which
holds one: so they run at the same time, beside other kernels too. How warps work together:
`hrm.kernels.ops.hopper.common`.

Shapes: M rows, K inputs, D outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hrm.kernels.ops.hopper.common import (
    DTYPES,
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    quarters,
    store_tile,
)
from hrm.kernels.ops.hopper.residual_rms import pack, unpack

SHARE = 256  # columns of a program
# Of 16 KiB of x and 32 KiB of weights, beside 32 KiB for output; or 16 more for the output in e4m3.
_STAGES, _STAGES_ROUNDING = 4, 3
_LINE = 128  # bytes of a row of an operand's tile
_LEAST_SLICES = 5  # of a tile, there are more: so long it takes to finish the tile before


@gluon.jit
def _load(
    descs: gl.tuple, rings: gl.tuple, barriers: gl.tuple, work: gl.tuple, SHARES: gl.constexpr, STAGES: gl.constexpr
) -> None:
    x_desc, weight_desc = descs
    x_ring, weight_ring = rings
    full, empty = barriers
    tiles, K = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    step = 0
    for tile in range(gl.program_id(0) // SHARES, tiles, gl.num_programs(0) // SHARES):
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
            for group in gl.static_range(2):
                at = [(2 * tile + group) * BLOCK_M, k]
                tma.async_copy_global_to_shared(x_desc, at, full.index(stage), x_ring.index(2 * stage + group))
            at = [gl.program_id(0) % SHARES * BLOCK_N, k]
            tma.async_copy_global_to_shared(weight_desc, at, full.index(stage), weight_ring.index(stage))
            step += 1


@gluon.jit
def _wait_for(at: gl.tensor) -> Any:
    """The numbers there, once none is less than 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; AGAIN: ld.relaxed.gpu.global.f32 $0, [$1]; setp.lt.f32 p, $0, 0f00000000; @p bra AGAIN; }",
        "=f,l",
        [at.to(gl.int64)],
        gl.float32,
        False,
        1,
    )


@gluon.jit
def _factors(
    squares: gl.tensor,
    m: gl.tensor,
    M: gl.tensor,
    eps: gl.tensor,
    layout: gl.constexpr,
    HEIGHT: gl.constexpr,
    PARTS: gl.constexpr,
    UNITS: gl.constexpr,
) -> Any:
    """1 / rms of HEIGHT rows of UNITS numbers whose squares are summed in PARTS, for accumulators of that layout."""
    WIDTH: gl.constexpr = max(8, triton.next_power_of_2(PARTS))
    # As the accumulator's rows, so that the four threads of a row have a quarter of its sums each.
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    rows = gl.expand_dims(m + gl.arange(0, HEIGHT, gl.SliceLayout(1, of_sums)), 1)
    parts = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, of_sums)), 0)
    found = gl.load(squares + parts * M + rows, (rows < M) & (parts < PARTS), other=0.0)
    factors = gl.rsqrt(gl.sum(found, 1) / UNITS + eps)
    return gl.convert_layout(factors, gl.SliceLayout(1, layout), assert_trivial=True)


@gluon.jit
def _slice(
    acc: gl.tensor,
    step: gl.tensor,
    GROUP: gl.constexpr,
    rings: gl.tuple,
    barriers: gl.tuple,
    FIRST: gl.constexpr,
    STAGES: gl.constexpr,
) -> Any:
    """`acc` and the product of the next slices of x and weights, which may still be under way."""
    x_ring, weight_ring = rings
    full, empty = barriers
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    weight = weight_ring.index(stage).permute([1, 0])
    acc = warpgroup_mma(x_ring.index(2 * stage + GROUP), weight, acc, use_acc=not FIRST, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    if not FIRST:
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _residual(at: gl.tensor, J: gl.constexpr, width: gl.tensor, rows_left: gl.tensor, words: gl.tensor) -> Any:
    """A quarter of the residual's columns, packed as `words` are, from the first word of the rows on."""
    rows = gl.arange(0, words.type.shape[0], gl.SliceLayout(1, words.type.layout))
    columns = J * words.type.shape[1] + gl.arange(0, words.type.shape[1], gl.SliceLayout(0, words.type.layout))
    inside = gl.expand_dims(rows < rows_left, 1)
    return gl.load(at + gl.expand_dims(rows, 1) * width + gl.expand_dims(columns, 0), inside, other=0)


@gluon.jit
def _add_residual(x: gl.tensor, residual: gl.tensor, factors: gl.tensor, dtype: gl.constexpr) -> Any:
    """x, its rows times `factors`, + residual, packed, and the sums of its squares in each row."""
    of_rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    factors = gl.convert_layout(factors, of_rows, assert_trivial=True)
    layout: gl.constexpr = x.type.layout
    x = x * gl.expand_dims(factors, 1) + unpack(residual, dtype, layout)
    return pack(x, dtype), gl.sum(x * x, 1)


@gluon.jit
def _keep_quarter(
    J: gl.constexpr,
    x: gl.tensor,
    product_desc: tma.tensor_descriptor,
    at: gl.tuple,
    staging: gl.shared_memory_descriptor,
    SCALE: gl.constexpr,
) -> None:
    """Write a quarter of the columns of the product, before it is divided."""
    m, n = at
    store_tile(product_desc, m, n + J * x.type.shape[1], SCALE * x, staging.index(J % 2), 1)


@gluon.jit
def _row_scale(
    total: gl.tensor,
    m: gl.tensor,
    share: gl.tensor,
    vectors: gl.tuple,
    sizes: gl.tuple,
    eps: gl.tensor,
    SHARES: gl.constexpr,
    BLOCK_N: gl.constexpr,
) -> Any:
    """1 / rms of rows of which `total` are the sums of squares of this program's share, as soon as all are there."""
    _, sums, rstd, _ = vectors
    M, height = sizes
    rows = m + gl.arange(0, total.type.shape[0], total.type.layout)
    if SHARES > 1:
        total = _wait_for(sums + rows)
        for other in gl.static_range(1, SHARES):
            total += _wait_for(sums + other * height + rows)
    scale = gl.rsqrt(total / (SHARES * BLOCK_N) + eps)
    if rstd is not None:
        gl.store(rstd + rows, scale, (rows < M) & (share == 0))
    return scale


@gluon.jit
def _store_quarter(
    J: gl.constexpr,
    words: gl.tensor,
    scale: gl.tensor,
    layout: gl.constexpr,
    descs: gl.tuple,
    at: gl.tuple,
    stagings: gl.tuple,
    ROUND: gl.constexpr,
) -> None:
    """Write a quarter of the columns, packed in `words`, to y and, with ROUND, also in e4m3."""
    y_desc, y8_desc, _ = descs
    staging, staging8 = stagings
    m, n = at
    y = unpack(words, staging.dtype, layout) * gl.expand_dims(scale, 1)
    n += J * y.type.shape[1]
    tma.store_wait(2 if ROUND else 1)  # What left from this buffer, two quarters ago, has been read.
    staging.index(J % 2).store(y.to(staging.dtype))
    if ROUND:
        staging8.index(J % 2).store(y.to(staging8.dtype))
    fence_async_shared()
    if ROUND:
        tma.async_copy_shared_to_global(y8_desc, [m, n], staging8.index(J % 2))
    tma.async_copy_shared_to_global(y_desc, [m, n], staging.index(J % 2))


@gluon.jit
def _multiply(
    GROUP: gl.constexpr,
    descs: gl.tuple,
    rings: gl.tuple,
    residual: gl.tensor,
    stagings: gl.tuple,
    barriers: gl.tuple,
    vectors: gl.tuple,
    work: gl.tuple,
    M: gl.tensor,
    eps: gl.tensor,
    SCALE: gl.constexpr,
    PARTS: gl.constexpr,
    UNITS: gl.constexpr,
    SHARES: gl.constexpr,
    STAGES: gl.constexpr,
    ROUND: gl.constexpr,
) -> None:
    """One of the two groups of four warps, each with half of the rows.

    What a tile becomes waits in 16 bit for its norm, and is finished while the first slices of the next are multiplied.
    """
    x_ring, weight_ring = rings
    product_desc = descs[2]
    staging = stagings[0]
    empty = barriers[1]
    squares, sums, _, factors_out = vectors
    tiles, K = work
    BLOCK_M: gl.constexpr = x_ring.type.shape[1]
    BLOCK_K: gl.constexpr = x_ring.type.shape[2]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[1]
    # A matrix instruction takes 32 bytes of each row.
    inputs: gl.constexpr = 256 // x_ring.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, inputs])
    dtype: gl.constexpr = staging.dtype
    width = SHARES * (BLOCK_N // 2)  # of a row in words
    height = 2 * tiles * BLOCK_M
    sizes = (M, height)
    share = gl.program_id(0) % SHARES
    first = gl.program_id(0) // SHARES
    n = share * BLOCK_N
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    a, b, c, d = quarters(acc)
    of_quarter: gl.constexpr = a.type.layout
    total = gl.sum(a, 1)
    a = pack(a, dtype)
    b = pack(b, dtype)
    c = pack(c, dtype)
    d = pack(d, dtype)
    scale = total
    step = 0
    before = 0  # the first row of the tile that is to be finished
    for tile in range(first, tiles, gl.num_programs(0) // SHARES):
        m = (2 * tile + GROUP) * BLOCK_M
        acc = _slice(acc, step, GROUP, rings, barriers, True, STAGES)
        factors = gl.full([BLOCK_M], SCALE, gl.float32, gl.SliceLayout(1, layout))
        if squares is not None:
            found = _factors(squares, m, M, eps, layout, BLOCK_M, PARTS, UNITS)
            factors = factors * found
            if factors_out is not None:
                rows = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
                gl.store(factors_out + rows, found, (rows < M) & (share == 0))
        acc = _slice(acc, step + 1, GROUP, rings, barriers, False, STAGES)
        acc = _slice(acc, step + 2, GROUP, rings, barriers, False, STAGES)
        if tile != first:
            scale = _row_scale(total, before, share, vectors, sizes, eps, SHARES, BLOCK_N)
            _store_quarter(0, a, scale, of_quarter, descs, (before, n), stagings, ROUND)
        acc = _slice(acc, step + 3, GROUP, rings, barriers, False, STAGES)
        if tile != first:
            _store_quarter(1, b, scale, of_quarter, descs, (before, n), stagings, ROUND)
        acc = _slice(acc, step + 4, GROUP, rings, barriers, False, STAGES)
        if tile != first:
            _store_quarter(2, c, scale, of_quarter, descs, (before, n), stagings, ROUND)
        acc = _slice(acc, step + 5, GROUP, rings, barriers, False, STAGES)
        if tile != first:
            _store_quarter(3, d, scale, of_quarter, descs, (before, n), stagings, ROUND)
        step += 6
        words = residual + m.to(gl.int64) * width + n // 2
        a = _residual(words, 0, width, M - m, a)
        b = _residual(words, 1, width, M - m, b)
        c = _residual(words, 2, width, M - m, c)
        d = _residual(words, 3, width, M - m, d)
        for _k in range(6 * BLOCK_K, K, BLOCK_K):
            acc = _slice(acc, step, GROUP, rings, barriers, False, STAGES)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        w, x, y, z = quarters(acc)
        if product_desc is not None:
            _keep_quarter(0, w, product_desc, (m, n), staging, SCALE)
            _keep_quarter(1, x, product_desc, (m, n), staging, SCALE)
            _keep_quarter(2, y, product_desc, (m, n), staging, SCALE)
            _keep_quarter(3, z, product_desc, (m, n), staging, SCALE)
        a, squares_a = _add_residual(w, a, factors, dtype)
        b, squares_b = _add_residual(x, b, factors, dtype)
        c, squares_c = _add_residual(y, c, factors, dtype)
        d, squares_d = _add_residual(z, d, factors, dtype)
        total = squares_a + squares_b + squares_c + squares_d
        before = m
        if SHARES > 1:
            rows = m + gl.arange(0, BLOCK_M, total.type.layout)
            gl.store(sums + share * height + rows, total)
    scale = _row_scale(total, before, share, vectors, sizes, eps, SHARES, BLOCK_N)
    _store_quarter(0, a, scale, of_quarter, descs, (before, n), stagings, ROUND)
    _store_quarter(1, b, scale, of_quarter, descs, (before, n), stagings, ROUND)
    _store_quarter(2, c, scale, of_quarter, descs, (before, n), stagings, ROUND)
    _store_quarter(3, d, scale, of_quarter, descs, (before, n), stagings, ROUND)
    tma.store_wait(0)


@gluon.jit
def _shared_rows_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    residual: gl.tensor,
    y_desc: tma.tensor_descriptor,
    y8_desc: tma.tensor_descriptor,
    product_desc: tma.tensor_descriptor,
    squares: gl.tensor,
    sums: gl.tensor,
    rstd: gl.tensor,
    factors: gl.tensor,
    M: gl.tensor,
    K: gl.tensor,
    eps: gl.tensor,
    SCALE: gl.constexpr,
    PARTS: gl.constexpr,
    UNITS: gl.constexpr,
    SHARES: gl.constexpr,
    STAGES: gl.constexpr,
    ROUND: gl.constexpr,
) -> None:
    """residual: two neighbouring columns in a word.

    sums: [SHARES, M], M filled up to whole tiles, of -1: gets those of the squares of each share of the rows.
    """
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    first = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y_desc.layout)
    second = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y_desc.layout)
    first8 = first
    second8 = second
    if ROUND:
        first8 = gl.allocate_shared_memory(y8_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y8_desc.layout)
        second8 = gl.allocate_shared_memory(y8_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y8_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # Both groups read the weights.
    work = (gl.cdiv(M, 2 * BLOCK_M), K)
    results = (y_desc, y8_desc, product_desc)
    barriers = (full, empty)
    rings = (x_ring, weight_ring)
    vectors = (squares, sums, rstd, factors)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    results,
                    rings,
                    residual,
                    (first, first8),
                    barriers,
                    vectors,
                    work,
                    M,
                    eps,
                    SCALE,
                    PARTS,
                    UNITS,
                    SHARES,
                    STAGES,
                    ROUND,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    results,
                    rings,
                    residual,
                    (second, second8),
                    barriers,
                    vectors,
                    work,
                    M,
                    eps,
                    SCALE,
                    PARTS,
                    UNITS,
                    SHARES,
                    STAGES,
                    ROUND,
                ),
            ),
            (_load, ((x_desc, weight_desc), rings, barriers, work, SHARES, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_residual_rms` takes these operands."""
    shares, odd = divmod(weight.shape[0], SHARE)
    inputs = x.shape[1] * x.itemsize
    return x.dtype in DTYPES and not odd and shares in (1, 2, 4) and inputs > _LEAST_SLICES * _LINE and inputs % 16 == 0


def linear_residual_rms(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    eps: float,
    *,
    squares: Tensor | None = None,
    scale: float = 1.0,
    rstd: Tensor | None = None,
    factors: Tensor | None = None,
    product: Tensor | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """rms_norm(residual + scale x @ weight.T / rms(u)) of contiguous x [M, K] and weight [D, K], 16 bit or e4m3.

    Args:
        squares: of the squares of K numbers u for each row, sums of some at a time, [parts, M] float32. By default,
            nothing is divided.
        rstd: gets 1 / rms of what is normalised, [M] float32.
        factors: gets 1 / rms(u), [M] float32.
        product: gets scale x @ weight.T, [M, D]; not together with `rounded`.
        rounded: gets the result in e4m3, [M, D].
    """
    M, K = x.shape
    shares = weight.shape[0] // SHARE
    tiles = triton.cdiv(M, ROWS)
    inputs = _LINE // x.itemsize
    y = torch.empty_like(residual)
    sums = torch.full((shares, ROWS * tiles), -1.0, device=x.device) if shares > 1 else None
    block = (ROWS // 2, SHARE // 4)
    y_desc = descriptor(y, *block)
    _shared_rows_kernel[(shares * min(tiles, multiprocessor_count(x.device) // shares),)](
        descriptor(x, ROWS // 2, inputs),
        descriptor(weight, SHARE, inputs),
        residual.view(torch.int32),
        y_desc,
        y_desc if rounded is None else descriptor(rounded, *block),
        None if product is None else descriptor(product, *block),
        squares,
        sums,
        rstd,
        factors,
        M,
        K,
        eps,
        SCALE=scale,
        PARTS=0 if squares is None else len(squares),
        UNITS=1 if squares is None else K,
        SHARES=shares,
        STAGES=_STAGES if rounded is None else _STAGES_ROUNDING,
        ROUND=rounded is not None,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
    return y
