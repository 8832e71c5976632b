"""Matmuls with fused epilogues for Hopper GPUs, warp-specialised by hand in Gluon; `triton_linear` calls them.

One warp streams operands into shared memory with the bulk tensor copy engine (TMA); eight warps multiply with wgmma and
finish rows in registers. By hand because Triton's pipeliner leaves the tensor cores idle during an epilogue and cannot
keep a tile of x in shared memory from one output tile to the next.

Shapes: M rows, K inputs, F inner width of the gated MLP, D outputs.

Two kinds of barrier in shared memory pass buffers around: `full` (the copy has arrived) and `empty` (the readers are
done). A wait names the parity of the phase it waits for, so nobody may run a whole phase ahead of a waiter.
"""

from __future__ import annotations

import functools
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
# A row of an operand tile is 128 bytes, the widest that TMA swizzles against bank conflicts.
_ROWS, _COLUMNS = 128, 64
# x stays in shared memory whole: 8 slices of 16 KiB, beside 4 stages of weights and 2 tiles of output of 16 KiB each.
_MAX_SLICES = 8
_SWIGLU_STAGES = 4
# A normalised row passes through the registers as two halves, 256 columns in float32 and 256 in 16 bits.
_NORM_WIDTH = 512
# Stages of 16 KiB of x and 32 KiB of weights, beside 64 KiB for residual and output.
_NORM_STAGES = 3
# All registers of a multiprocessor over three groups of four warps. Of these 504, the two groups that multiply then
# take 240 each and the one that loads keeps 24, the least there is.
_START_REGISTERS = 168
_MULTIPLY_REGISTERS = gl.constexpr(240)
_LOAD_REGISTERS = gl.constexpr(24)


@gluon.jit
def _swiglu_load(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    NORM: gl.constexpr,
) -> None:
    x_desc, weight_desc = descs
    x_tile, weight_ring = buffers
    x_full, x_empty, weight_full, weight_empty, _ = barriers
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[1]
    step = 0
    x_phase = 0
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * (2 * BLOCK_N)
        new_rows = (tile == start) | (n == 0)
        if NORM:  # the norm wants all of a row before any of it is multiplied
            for k in range(SLICES):
                mbarrier.wait(x_empty.index(k), x_phase ^ 1, pred=new_rows)
                mbarrier.expect(x_full.index(k), x_desc.block_type.nbytes, pred=new_rows)
                tma.async_copy_global_to_shared(
                    x_desc, [m, k * BLOCK_K], x_full.index(k), x_tile.index(k), pred=new_rows
                )
        for half in gl.static_range(2):
            for k in range(SLICES):
                if not NORM and half == 0 and new_rows:
                    mbarrier.wait(x_empty.index(k), x_phase ^ 1)
                    mbarrier.expect(x_full.index(k), x_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(x_desc, [m, k * BLOCK_K], x_full.index(k), x_tile.index(k))
                stage = step % STAGES
                full = weight_full.index(stage)
                mbarrier.wait(weight_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full, weight_desc.block_type.nbytes)
                at = [0, n + half * BLOCK_N, k * BLOCK_K]
                tma.async_copy_global_to_shared(weight_desc, at, full, weight_ring.index(stage))
                step += 1
        x_phase ^= new_rows.to(gl.int32)


@gluon.jit
def _run_of(tiles: gl.tensor) -> Any:
    """First and end of the run of tiles that this program takes."""
    most = gl.cdiv(tiles, gl.num_programs(0))
    start = gl.program_id(0) * most
    return start, gl.minimum(start + most, tiles)


@gluon.jit
def _store_tile(
    desc: tma.tensor_descriptor,
    m: gl.tensor,
    n: gl.tensor,
    value: gl.tensor,
    staging: gl.shared_memory_descriptor,
    PENDING: gl.constexpr,
) -> None:
    """Write `value` to global memory through `staging`, once all but the last PENDING stores have left theirs."""
    tma.store_wait(PENDING)
    staging.store(value.to(staging.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [m, n], staging)


@gluon.jit
def _norm_factors(
    x_tile: gl.shared_memory_descriptor,
    x_full: gl.shared_memory_descriptor,
    phase: gl.tensor,
    eps: gl.tensor,
    layout: gl.constexpr,
    SLICES: gl.constexpr,
) -> Any:
    """1 / rms of the rows in `x_tile`, as soon as they are there."""
    BLOCK_M: gl.constexpr = x_tile.type.shape[1]
    BLOCK_K: gl.constexpr = x_tile.type.shape[2]
    of_slice: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    squares = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, of_slice))
    for k in range(SLICES):
        mbarrier.wait(x_full.index(k), phase)
        x = x_tile.index(k).load(of_slice).to(gl.float32)
        squares += gl.sum(x * x, 1)
    fence_async_shared()  # orders the reads before the copy engine's next writes
    factors = gl.rsqrt(squares / (SLICES * BLOCK_K) + eps)
    return gl.convert_layout(factors, gl.SliceLayout(1, layout))


@gluon.jit
def _swiglu_multiply(
    HALF: gl.constexpr,
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    rstd: gl.tensor,
    M: gl.tensor,
    eps: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    SAVE: gl.constexpr,
    ACTIVATE: gl.constexpr,
    NORM: gl.constexpr,
) -> None:
    """One of the two groups of four warps, which take turns: one multiplies while the other one finishes its tile."""
    out_desc, gate_desc, up_desc = descs
    x_tile, weight_ring, staging = buffers
    x_full, x_empty, weight_full, weight_empty, turns = barriers
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = x_tile.type.shape[1]
    BLOCK_K: gl.constexpr = x_tile.type.shape[2]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    step = HALF * SLICES
    x_phase = 0
    turn_phase = 1 - HALF  # The first group finds its first turn given.
    factors = gl.full([BLOCK_M], 1.0, gl.float32, gl.SliceLayout(1, layout))
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * (2 * BLOCK_N) + HALF * BLOCK_N
        new_rows = (tile == start) | (tile % tiles_n == 0)
        last_of_rows = (tile + 1 == end) | ((tile + 1) % tiles_n == 0)
        if NORM and new_rows:
            factors = _norm_factors(x_tile, x_full, x_phase, eps, layout, SLICES)
            rows = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            gl.store(rstd + rows, factors, rows < M)  # both groups, and every program that has some of the rows
        acc = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, layout)
        # Besides ordering the two, a turn says that the other group has seen all stages before this tile's come full:
        # without it, the parity of `weight_full` would be ambiguous.
        mbarrier.wait(turns.index(HALF), turn_phase)
        turn_phase ^= 1
        for k in range(SLICES):
            stage = step % STAGES
            mbarrier.wait(x_full.index(k), x_phase, pred=new_rows)
            mbarrier.wait(weight_full.index(stage), step // STAGES & 1)
            weight = weight_ring.index(stage).reshape([2 * BLOCK_N, BLOCK_K]).permute([1, 0])
            acc = warpgroup_mma(x_tile.index(k), weight, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(weight_empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            mbarrier.arrive(x_empty.index(gl.maximum(k, 1) - 1), count=1, pred=last_of_rows & (k > 0))
            step += 1
        mbarrier.arrive(turns.index(1 - HALF), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(weight_empty.index((step + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(x_empty.index(SLICES - 1), count=1, pred=last_of_rows)
        step += SLICES
        x_phase ^= last_of_rows.to(gl.int32)

        if NORM:
            acc = acc * gl.expand_dims(factors, 1)
        gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
        if SAVE:
            _store_tile(gate_desc, m, n, gate, staging, 0)
            _store_tile(up_desc, m, n, up, staging, 0)
        if ACTIVATE:
            _store_tile(out_desc, m, n, gate * up / (1.0 + gl.exp(-gate)), staging, 0)
    tma.store_wait(0)


@gluon.jit
def _swiglu_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    gate_desc: tma.tensor_descriptor,
    up_desc: tma.tensor_descriptor,
    rstd: gl.tensor,
    M: gl.tensor,
    F: gl.tensor,
    eps: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    SAVE: gl.constexpr,
    ACTIVATE: gl.constexpr,
    NORM: gl.constexpr,
) -> None:
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[1]
    dtype: gl.constexpr = x_desc.dtype
    x_tile = gl.allocate_shared_memory(dtype, [SLICES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(dtype, [STAGES, 2, BLOCK_N, BLOCK_K], weight_desc.layout)
    staging = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N], out_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [SLICES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [SLICES, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(SLICES):
        mbarrier.init(x_full.index(k), count=1)
        mbarrier.init(x_empty.index(k), count=2)  # Both groups read x.
    for stage in gl.static_range(STAGES):
        mbarrier.init(weight_full.index(stage), count=1)
        mbarrier.init(weight_empty.index(stage), count=1)
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    # Neighbouring tiles share their rows of x. A tile is 2 BLOCK_N outputs wide.
    tiles_n = gl.cdiv(F, 2 * BLOCK_N)
    start, end = _run_of(gl.cdiv(M, BLOCK_M) * tiles_n)

    work = (start, end, tiles_n)
    barriers = (x_full, x_empty, weight_full, weight_empty, turns)
    outputs = (out_desc, gate_desc, up_desc)
    first = (x_tile, weight_ring, staging.index(0))
    second = (x_tile, weight_ring, staging.index(1))
    gl.warp_specialize(
        [
            (_swiglu_multiply, (0, outputs, first, barriers, work, rstd, M, eps, SLICES, STAGES, SAVE, ACTIVATE, NORM)),
            (
                _swiglu_multiply,
                (1, outputs, second, barriers, work, rstd, M, eps, SLICES, STAGES, SAVE, ACTIVATE, NORM),
            ),
            (_swiglu_load, ((x_desc, weight_desc), (x_tile, weight_ring), barriers, work, SLICES, STAGES, NORM)),
        ],
        [4, 1],
        [_MULTIPLY_REGISTERS, _LOAD_REGISTERS],
    )


@gluon.jit
def _norm_load(
    descs: gl.tuple, buffers: gl.tuple, barriers: gl.tuple, M: gl.tensor, K: gl.tensor, STAGES: gl.constexpr
) -> None:
    x_desc, weight_desc = descs
    x_ring, weight_ring = buffers
    full, empty = barriers
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    HALF: gl.constexpr = weight_desc.block_type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.num_programs(0)):
        for half in range(2):
            for k in range(0, K, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(x_desc, [tile * BLOCK_M, k], full.index(stage), x_ring.index(stage))
                at = [half * HALF, k]
                tma.async_copy_global_to_shared(weight_desc, at, full.index(stage), weight_ring.index(stage))
                step += 1


@gluon.jit
def _quarters(x: gl.tensor) -> Any:
    """The columns of x [M, N] in four parts [M, N / 4]; nothing moves between threads."""
    M: gl.constexpr = x.type.shape[0]
    N: gl.constexpr = x.type.shape[1]
    left, right = x.reshape([M, 2, N // 2]).permute([0, 2, 1]).split()
    a, b = left.reshape([M, 2, N // 4]).permute([0, 2, 1]).split()
    c, d = right.reshape([M, 2, N // 4]).permute([0, 2, 1]).split()
    return a, b, c, d


@gluon.jit
def _pack(x: gl.tensor, dtype: gl.constexpr) -> Any:
    """Neighbouring columns of x [M, N], rounded to 16 bits, in one word: [M, N / 2] of int32.

    In assembly, because the compiler would keep what it rounds as float32 through the next matmul, and spill.
    """
    low, high = x.reshape([x.type.shape[0], x.type.shape[1] // 2, 2]).split()
    pair: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise("cvt.rn." + pair + ".f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, False, 1)


@gluon.jit
def _unpack(words: gl.tensor, dtype: gl.constexpr, layout: gl.constexpr) -> Any:
    """The numbers in `words` [M, N / 2] as float32 [M, N] in `layout`, the one they were packed from."""
    widen_bf16: gl.constexpr = (
        "{ .reg .b32 l, h; shl.b32 l, $2, 16; and.b32 h, $2, 0xffff0000; mov.b32 $0, l; mov.b32 $1, h; }"
    )
    widen_fp16: gl.constexpr = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    code: gl.constexpr = widen_bf16 if dtype == gl.bfloat16 else widen_fp16
    low, high = gl.inline_asm_elementwise(code, "=f,=f,r", [words], (gl.float32, gl.float32), False, 1)
    pairs = gl.join(low, high).reshape([words.type.shape[0], 2 * words.type.shape[1]])
    return gl.convert_layout(pairs, layout, assert_trivial=True)


@gluon.jit
def _add_residual(
    x: gl.tensor,
    residual: gl.shared_memory_descriptor,
    factors: gl.tensor,
    rows: gl.tensor,
    M: gl.tensor,
    SCALE: gl.constexpr,
    PACK: gl.constexpr,
) -> Any:
    """SCALE x + residual, its rows times `factors` if there are any, and the sum of its squares in each row."""
    before = residual.load(x.type.layout).to(gl.float32)
    if factors is not None:
        rows = gl.convert_layout(rows, gl.SliceLayout(1, x.type.layout), assert_trivial=True)
        before = before * gl.expand_dims(gl.load(factors + rows, rows < M, other=0.0), 1)
    x = SCALE * x + before
    squares = gl.sum(x * x, 1)
    if PACK:
        x = _pack(x, residual.dtype)
    # Orders the read before the copy engine's next write; and the compiler, short of registers, cannot load ahead.
    fence_async_shared()
    return x, squares


@gluon.jit
def _half_row(
    step: gl.tensor,
    m: gl.tensor,
    HALF: gl.constexpr,
    residual_desc: tma.tensor_descriptor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    factors: gl.tensor,
    M: gl.tensor,
    K: gl.tensor,
    SCALE: gl.constexpr,
    STAGES: gl.constexpr,
) -> Any:
    """Columns of SCALE x @ weight.T + residual in quarters (the first half packed), and the sums of their squares."""
    x_ring, weight_ring, staging = buffers
    full, empty, residual_full = barriers
    BLOCK_M: gl.constexpr = x_ring.type.shape[1]
    BLOCK_K: gl.constexpr = x_ring.type.shape[2]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[1]
    # A matrix instruction takes 32 bytes of each row.
    inputs: gl.constexpr = 256 // x_ring.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_M // 16, 1], [16, BLOCK_N, inputs])
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    # The first slice is being multiplied while `staging` passes from the last store to this half's residual.
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    weight = weight_ring.index(stage).permute([1, 0])
    acc = warpgroup_mma(x_ring.index(stage), weight, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    step += 1
    tma.store_wait(0)
    gl.thread_barrier()
    mbarrier.expect(residual_full, 4 * residual_desc.block_type.nbytes)
    for j in gl.static_range(4):
        at = [m, HALF * BLOCK_N + j * (BLOCK_N // 4)]
        tma.async_copy_global_to_shared(residual_desc, at, residual_full, staging.index(j))
    for _ in range(BLOCK_K, K, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        acc = warpgroup_mma(x_ring.index(stage), weight_ring.index(stage).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    mbarrier.wait(residual_full, HALF)
    a, b, c, d = _quarters(acc)
    rows = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, a.type.layout))
    a, squares_a = _add_residual(a, staging.index(0), factors, rows, M, SCALE, HALF == 0)
    b, squares_b = _add_residual(b, staging.index(1), factors, rows, M, SCALE, HALF == 0)
    c, squares_c = _add_residual(c, staging.index(2), factors, rows, M, SCALE, HALF == 0)
    d, squares_d = _add_residual(d, staging.index(3), factors, rows, M, SCALE, HALF == 0)
    return step, a, b, c, d, squares_a + squares_b + squares_c + squares_d


@gluon.jit
def _store_quarter(
    J: gl.constexpr,
    x: gl.tensor,
    scale: gl.tensor,
    descs: gl.tuple,
    m: gl.tensor,
    HALF: gl.constexpr,
    buffers: gl.tuple,
    ROUND: gl.constexpr,
) -> None:
    """Write a quarter of half a row to y and, with ROUND, also in e4m3."""
    y_desc, y8_desc = descs
    staging, staging8 = buffers
    quarter: gl.constexpr = 4 * HALF + J
    n: gl.constexpr = quarter * x.type.shape[1]
    # A buffer is free when what left from it last has been read: the store four quarters back; in e4m3, which leaves as
    # a store of its own, two quarters back. Before the first half, `_half_row` waited for all of the tile before.
    if ROUND:
        tma.store_wait(2)
    elif HALF == 1:
        tma.store_wait(3)
    y = x * scale
    staging.index(J).store(y.to(staging.dtype))
    if ROUND:
        staging8.index(J % 2).store(y.to(staging8.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [m, n], staging.index(J))
    if ROUND:
        tma.async_copy_shared_to_global(y8_desc, [m, n], staging8.index(J % 2))


@gluon.jit
def _norm_multiply(
    descs: gl.tuple,
    factors: gl.tensor,
    rstd: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    M: gl.tensor,
    K: gl.tensor,
    eps: gl.tensor,
    SCALE: gl.constexpr,
    STAGES: gl.constexpr,
    SAVE: gl.constexpr,
    ROUND: gl.constexpr,
) -> None:
    residual_desc, y_desc, y8_desc = descs
    x_ring, weight_ring, staging, staging8 = buffers
    BLOCK_M: gl.constexpr = x_ring.type.shape[1]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[1]
    dtype: gl.constexpr = staging.dtype
    operands = (x_ring, weight_ring, staging)
    results = (y_desc, y8_desc)
    stagings = (staging, staging8)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.num_programs(0)):
        m = tile * BLOCK_M
        step, a, b, c, d, squares_left = _half_row(
            step, m, 0, residual_desc, operands, barriers, factors, M, K, SCALE, STAGES
        )
        step, e, f, g, h, squares_right = _half_row(
            step, m, 1, residual_desc, operands, barriers, factors, M, K, SCALE, STAGES
        )
        layout: gl.constexpr = e.type.layout
        row_scale = gl.rsqrt((squares_left + squares_right) / (2 * BLOCK_N) + eps)
        if SAVE:
            rows = m + gl.arange(0, BLOCK_M, row_scale.type.layout)
            gl.store(rstd + rows, row_scale, rows < M)
        scale = gl.expand_dims(row_scale, 1)
        _store_quarter(0, _unpack(a, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(1, _unpack(b, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(2, _unpack(c, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(3, _unpack(d, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(0, e, scale, results, m, 1, stagings, ROUND)
        _store_quarter(1, f, scale, results, m, 1, stagings, ROUND)
        _store_quarter(2, g, scale, results, m, 1, stagings, ROUND)
        _store_quarter(3, h, scale, results, m, 1, stagings, ROUND)
    tma.store_wait(0)


@gluon.jit
def _norm_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    residual_desc: tma.tensor_descriptor,
    y_desc: tma.tensor_descriptor,
    y8_desc: tma.tensor_descriptor,
    factors: gl.tensor,
    rstd: gl.tensor,
    M: gl.tensor,
    K: gl.tensor,
    eps: gl.tensor,
    SCALE: gl.constexpr,
    STAGES: gl.constexpr,
    SAVE: gl.constexpr,
    ROUND: gl.constexpr,
) -> None:
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    staging = gl.allocate_shared_memory(y_desc.dtype, [4, BLOCK_M, BLOCK_N // 4], y_desc.layout)
    staging8 = staging
    if ROUND:
        staging8 = gl.allocate_shared_memory(y8_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], y8_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    residual_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(residual_full, count=1)
    descs = (residual_desc, y_desc, y8_desc)
    buffers = (x_ring, weight_ring, staging, staging8)
    barriers = (full, empty, residual_full)
    gl.warp_specialize(
        [
            (_norm_multiply, (descs, factors, rstd, buffers, barriers, M, K, eps, SCALE, STAGES, SAVE, ROUND)),
            (_norm_load, ((x_desc, weight_desc), (x_ring, weight_ring), (full, empty), M, K, STAGES)),
        ],
        [1],
        [_LOAD_REGISTERS],
    )


def fits_swiglu(K: int) -> bool:
    """Whether `linear_swiglu` takes rows of `K` inputs."""
    return K % _COLUMNS == 0 and K <= _MAX_SLICES * _COLUMNS


def pays_for_residual_rms(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_residual_rms` takes these operands, and faster than the library followed by a norm."""
    # A multiprocessor works on whole rows, so the time is that of full waves of 128 rows each. For every 128 rows it
    # also reads all weights: with many inputs that is more than the L2 cache delivers in the time.
    multiprocessors = _multiprocessors(x.device)
    tiles = triton.cdiv(x.shape[0], _ROWS)
    full_enough = tiles >= 0.7 * multiprocessors * triton.cdiv(tiles, multiprocessors)
    few_inputs = x.shape[1] <= 512 and x.shape[1] % 8 == 0
    return x.dtype in _DTYPES and weight.shape[0] == _NORM_WIDTH and few_inputs and full_enough


def linear_swiglu(x: Tensor, gate_up: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """silu(x @ gate.T) * (x @ up.T) of contiguous x [M, K] and gate_up [2 F, K]; with `save` also x @ gate_up.T."""
    out = x.new_empty(x.shape[0], gate_up.shape[0] // 2)
    projected = x.new_empty(x.shape[0], gate_up.shape[0]) if save else None
    _launch_swiglu(x, gate_up, out, projected)
    return out, projected


def pays_for_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these operands, and is faster than the library."""
    M, K = x.shape
    half, odd = divmod(weight.shape[0], 2)
    tiles = triton.cdiv(M, _ROWS) * triton.cdiv(half, 2 * _COLUMNS)
    fits = fits_swiglu(K) and x.dtype in _DTYPES and not odd and half % 8 == 0
    return fits and tiles >= _multiprocessors(x.device)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of contiguous x [M, K] and weight [N, K]: the matmul of `linear_swiglu` without its activation."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _launch_swiglu(x, weight, None, out)
    return out


def norm_linear(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x) @ weight.T, and 1 / rms of the rows of x [M], float32: a row's norm commutes with the matmul."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    _launch_swiglu(x, weight, None, out, rstd, eps)
    return out, rstd


def _launch_swiglu(
    x: Tensor,
    gate_up: Tensor,
    out: Tensor | None,
    projected: Tensor | None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write to `out` [M, F] what gate and up make of each other, to `projected` [M, 2 F] what they are.

    With `rstd` [M], of the rows of x after their norm, whose factors are left there.
    """
    M, K = x.shape
    F = gate_up.shape[0] // 2
    out_desc = gate_desc = up_desc = None
    if out is not None:
        out_desc = gate_desc = up_desc = _descriptor(out, _ROWS, _COLUMNS)
    if projected is not None:
        gate_desc = _descriptor(projected[:, :F], _ROWS, _COLUMNS)
        up_desc = _descriptor(projected[:, F:], _ROWS, _COLUMNS)
    tiles = triton.cdiv(M, _ROWS) * triton.cdiv(F, 2 * _COLUMNS)
    _swiglu_kernel[(min(tiles, _multiprocessors(x.device)),)](
        _descriptor(x, _ROWS, _COLUMNS),
        _descriptor(gate_up.view(2, F, K), 2, _COLUMNS, _COLUMNS),
        out_desc or gate_desc,
        gate_desc,
        up_desc,
        rstd,
        M,
        F,
        eps,
        SLICES=K // _COLUMNS,
        STAGES=_SWIGLU_STAGES,
        SAVE=projected is not None,
        ACTIVATE=out is not None,
        NORM=rstd is not None,
        num_warps=4,
        maxnreg=_START_REGISTERS,
    )


def linear_residual_rms(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float, save: bool, factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """rms_norm(residual + x @ weight.T) of contiguous operands; with `save` also 1 / rms of the rows [M], float32.

    With `factors` [M], float32, the residual's rows count so many times.
    """
    M, K = x.shape
    y = torch.empty_like(residual)
    y_desc = _descriptor(y, _ROWS, _NORM_WIDTH // 8)
    rstd = x.new_empty(M, dtype=torch.float32) if save else None
    _norm_kernel[(min(triton.cdiv(M, _ROWS), _multiprocessors(x.device)),)](
        _descriptor(x, _ROWS, _COLUMNS),
        _descriptor(weight, _NORM_WIDTH // 2, _COLUMNS),
        _descriptor(residual, _ROWS, _NORM_WIDTH // 8),
        y_desc,
        y_desc,
        factors,
        rstd,
        M,
        K,
        eps,
        SCALE=1.0,
        STAGES=_NORM_STAGES,
        SAVE=save,
        ROUND=False,
        num_warps=8,
        maxnreg=_START_REGISTERS,
    )
    return y, rstd


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block), _layout(tensor.dtype, block))


@functools.cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
