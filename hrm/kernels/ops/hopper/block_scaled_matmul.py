"""Product of e4m3 operands in blocks of 128 for Hopper GPUs, warp-specialised by hand in Gluon.

As `hrm.kernels.ops.hopper.matmul`, but every slice of 128 inputs is a sum of its own, which is scaled by its rows' and
columns' scales as it is added to the rest: by one group, while the other one multiplies. With wider tiles, which would
read less, both sums do not fit into the registers.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hrm.kernels.ops.hopper.common import (
    COLUMNS,
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    store_tile,
    tile_position,
)

TILE = 128
"""Rows and columns of a tile, and the inputs of a block: the 128 bytes over which the copy engine swizzles."""

# Of 16 KiB of each operand, beside two buffers of 8 KiB for the results of each group.
_STAGES = 6


@gluon.jit
def _load(descs: gl.tuple, rings: gl.tuple, barriers: gl.tuple, work: gl.tuple, STAGES: gl.constexpr) -> None:
    a_desc, b_desc = descs
    a_ring, b_ring = rings
    full, empty = barriers
    tiles_m, tiles_n, K = work
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = b_desc.block_type.shape[1]
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * (2 * BLOCK_M), tile_n * BLOCK_N
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            for half in gl.static_range(2):
                at = [m + half * BLOCK_M, k]
                tma.async_copy_global_to_shared(a_desc, at, full.index(stage), a_ring.index(2 * stage + half))
            tma.async_copy_global_to_shared(b_desc, [n, k], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def _multiply(
    HALF: gl.constexpr,
    out_desc: tma.tensor_descriptor,
    rings: gl.tuple,
    staging: gl.shared_memory_descriptor,
    barriers: gl.tuple,
    scales: gl.tuple,
    work: gl.tuple,
    STAGES: gl.constexpr,
) -> None:
    """One of the two groups of four warps."""
    a_ring, b_ring = rings
    full, empty = barriers
    a_scales, b_scales = scales
    tiles_m, tiles_n, K = work
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    BLOCK_N: gl.constexpr = b_ring.type.shape[1]
    BLOCK_K: gl.constexpr = b_ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    row_scales = a_scales + HALF * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column_scales = b_scales + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    step = 0
    tile_m, tile_n = tile_position(gl.program_id(0), tiles_m, tiles_n)
    m, n = tile_m * (2 * BLOCK_M), tile_n * BLOCK_N
    rows, columns = gl.load(row_scales + m), gl.load(column_scales + n)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        next_tile = gl.minimum(tile + gl.num_programs(0), tiles_m * tiles_n - 1)
        next_m, next_n = tile_position(next_tile, tiles_m, tiles_n)
        next_m, next_n = next_m * (2 * BLOCK_M), next_n * BLOCK_N
        row, column = m, n
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            part = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
            right = b_ring.index(stage).permute([1, 0])
            part = warpgroup_mma(a_ring.index(2 * stage + HALF), right, part, use_acc=False, is_async=True)
            # The next slice's scales have until its product is done to come.
            row += tiles_m * (2 * BLOCK_M)
            column += tiles_n * BLOCK_N
            if k + BLOCK_K >= K:
                row, column = next_m, next_n
            next_rows, next_columns = gl.load(row_scales + row), gl.load(column_scales + column)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(stage), count=1)
            acc = acc + part * gl.expand_dims(rows, 1) * gl.expand_dims(columns, 0)
            rows, columns = next_rows, next_columns
            step += 1
        m += HALF * BLOCK_M
        WIDTH: gl.constexpr = BLOCK_N // 2
        first, second = acc.reshape([BLOCK_M, 2, WIDTH]).permute([0, 2, 1]).split()
        store_tile(out_desc, m, n, first, staging.index(0), 1)
        store_tile(out_desc, m, n + WIDTH, second, staging.index(1), 1)
        m, n = next_m, next_n
    tma.store_wait(0)


@gluon.jit
def _block_scaled_kernel(
    a_desc: tma.tensor_descriptor,
    b_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    a_scales: gl.tensor,
    b_scales: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    K: gl.tensor,
    STAGES: gl.constexpr,
) -> None:
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = b_desc.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    first = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK_M, BLOCK_N // 2], out_desc.layout)
    second = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK_M, BLOCK_N // 2], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # Both groups read b.
    work = (gl.cdiv(M, 2 * BLOCK_M), gl.cdiv(N, BLOCK_N), K)
    rings = (a_ring, b_ring)
    barriers = (full, empty)
    scales = (a_scales, b_scales)
    gl.warp_specialize(
        [
            (_multiply, (0, out_desc, rings, first, barriers, scales, work, STAGES)),
            (_multiply, (1, out_desc, rings, second, barriers, scales, work, STAGES)),
            (_load, ((a_desc, b_desc), rings, barriers, work, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def multiply(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, out: Tensor) -> None:
    """Write to `out` [M, N], of 16 bit, the product of contiguous e4m3 a [M, K] and b [N, K].

    K is a multiple of 16, N of 8. The scales are float32, block by block, for whole tiles: [ceil(K / TILE), M'] and
    [ceil(K / TILE), N'] of M' and N' rounded up to multiples of TILE.
    """
    (M, K), N = a.shape, len(b)
    tiles = triton.cdiv(M, TILE) * triton.cdiv(N, TILE)
    _block_scaled_kernel[(min(tiles, multiprocessor_count(a.device)),)](
        descriptor(a, ROWS // 2, TILE),
        descriptor(b, TILE, TILE),
        descriptor(out, ROWS // 2, COLUMNS),
        a_scales,
        b_scales,
        M,
        N,
        K,
        STAGES=_STAGES,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
