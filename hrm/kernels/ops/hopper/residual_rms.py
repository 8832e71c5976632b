"""Matmul, residual and norm in one kernel for Hopper GPUs, warp-specialised by hand in Gluon.

A program works on whole rows of 512 outputs, as the norm asks. How warps work together is said in
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
    COLUMNS,
    DTYPES,
    LOAD_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    quarters,
)

# A normalised row passes through the registers as two halves, 256 columns in float32 and 256 in 16 bits.
NORM_WIDTH = 512
# Stages of 16 KiB of x and 32 KiB of weights, beside 64 KiB for residual and output.
NORM_STAGES = 3


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
def pack(x: gl.tensor, dtype: gl.constexpr) -> Any:
    """Neighbouring columns of x [M, N], rounded to 16 bits, in one word: [M, N / 2] of int32.

    In assembly, because the compiler would keep what it rounds as float32 through the next matmul, and spill.
    """
    low, high = x.reshape([x.type.shape[0], x.type.shape[1] // 2, 2]).split()
    pair: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise("cvt.rn." + pair + ".f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, False, 1)


@gluon.jit
def unpack(words: gl.tensor, dtype: gl.constexpr, layout: gl.constexpr) -> Any:
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
        x = pack(x, residual.dtype)
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
    a, b, c, d = quarters(acc)
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
        _store_quarter(0, unpack(a, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(1, unpack(b, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(2, unpack(c, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(3, unpack(d, dtype, layout), scale, results, m, 0, stagings, ROUND)
        _store_quarter(0, e, scale, results, m, 1, stagings, ROUND)
        _store_quarter(1, f, scale, results, m, 1, stagings, ROUND)
        _store_quarter(2, g, scale, results, m, 1, stagings, ROUND)
        _store_quarter(3, h, scale, results, m, 1, stagings, ROUND)
    tma.store_wait(0)


@gluon.jit
def norm_kernel(
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
        [LOAD_REGISTERS],
    )


def pays_for_residual_rms(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_residual_rms` takes these operands, and faster than the library followed by a norm."""
    # A multiprocessor works on whole rows, so the time is that of full waves of 128 rows each. For every 128 rows it
    # also reads all weights: with many inputs that is more than the L2 cache delivers in the time.
    multiprocessors = multiprocessor_count(x.device)
    tiles = triton.cdiv(x.shape[0], ROWS)
    full_enough = tiles >= 0.7 * multiprocessors * triton.cdiv(tiles, multiprocessors)
    few_inputs = x.shape[1] <= 512 and x.shape[1] % 8 == 0
    return x.dtype in DTYPES and weight.shape[0] == NORM_WIDTH and few_inputs and full_enough


def linear_residual_rms(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float, save: bool, factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """rms_norm(residual + x @ weight.T) of contiguous operands; with `save` also 1 / rms of the rows [M], float32.

    With `factors` [M], float32, the residual's rows count so many times.
    """
    M, K = x.shape
    y = torch.empty_like(residual)
    y_desc = descriptor(y, ROWS, NORM_WIDTH // 8)
    rstd = x.new_empty(M, dtype=torch.float32) if save else None
    norm_kernel[(min(triton.cdiv(M, ROWS), multiprocessor_count(x.device)),)](
        descriptor(x, ROWS, COLUMNS),
        descriptor(weight, NORM_WIDTH // 2, COLUMNS),
        descriptor(residual, ROWS, NORM_WIDTH // 8),
        y_desc,
        y_desc,
        factors,
        rstd,
        M,
        K,
        eps,
        SCALE=1.0,
        STAGES=NORM_STAGES,
        SAVE=save,
        ROUND=False,
        num_warps=8,
        maxnreg=START_REGISTERS,
    )
    return y, rstd
