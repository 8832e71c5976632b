"""Matmul with an epilogue for Hopper GPUs, warp-specialised by hand in Gluon.

One warp streams slices of both operands. Two groups of four warps multiply them, 64 rows of a tile each, and finish
their rows while the other one still multiplies: a group may be as many slices ahead as there are stages. How warps work
together is said in `hrm.kernels.ops.hopper.common`.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hrm.kernels.ops.hopper.common import (
    COLUMNS,
    DTYPES,
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    quarters,
    store_tile,
    tile_position,
)

if TYPE_CHECKING:
    from hrm.kernels.ops.triton.matmul import Epilogue

_OUTPUTS = 256
# Of 16 KiB of a and 32 KiB of b, beside two buffers of 8 KiB for the results of each group.
_STAGES = 4


@gluon.jit
def _load(
    descs: gl.tuple,
    rings: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    a_desc, b_desc = descs
    a_ring, b_ring = rings
    full, empty = barriers
    tiles_m, tiles_n, K = work
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0 if TRANSPOSED else 1]
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
            if TRANSPOSED:
                tma.async_copy_global_to_shared(b_desc, [n, k], full.index(stage), b_ring.index(stage))
            else:
                tma.async_copy_global_to_shared(b_desc, [k, n], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def _reciprocal(x: gl.tensor) -> Any:
    root = gl.rsqrt(x)
    return root * root


@gluon.jit
def _activate(x: gl.tensor, ACTIVATION: gl.constexpr) -> Any:
    """To what 16 bits show, as `hrm.kernels.ops.triton.matmul` does."""
    if ACTIVATION == "relu":
        x = gl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * _reciprocal(1.0 + gl.exp(-x))
    elif ACTIVATION == "gelu":
        t = _reciprocal(1.0 + 0.38 * gl.abs(x))
        p = -0.08992946147918701 * t + 0.18887804448604584
        p = p * t + 0.09197960048913956
        p = p * t + 0.15782897174358368
        p = p * t + 0.151225283741951
        tail = p * t * gl.exp2(x * (x * -0.7213475204444817))
        x = x * gl.where(x > 0, 1.0 - tail, tail)
    return x


@gluon.jit
def _bias_of(J: gl.constexpr, x: gl.tensor, n: gl.tensor, bias: gl.tensor, N: gl.tensor) -> Any:
    """The biases of a quarter of a tile's columns, if there are any."""
    columns = n + J * x.type.shape[1] + gl.arange(0, x.type.shape[1], gl.SliceLayout(0, x.type.layout))
    if bias is not None:
        return gl.load(bias + columns, columns < N, other=0.0)
    else:
        return columns


@gluon.jit
def _finish(
    J: gl.constexpr,
    x: gl.tensor,
    biases: gl.tensor,
    m: gl.tensor,
    n: gl.tensor,
    descs: gl.tuple,
    staging: gl.shared_memory_descriptor,
    vectors: gl.tuple,
    sizes: gl.tuple,
    ACTIVATION: gl.constexpr,
) -> None:
    """A quarter of a tile's columns, through the epilogue and into global memory."""
    out_desc, before_desc = descs
    factors, shifts, sums, bias = vectors
    M, N = sizes
    n += J * x.type.shape[1]
    rows = m + gl.arange(0, x.type.shape[0], gl.SliceLayout(1, x.type.layout))
    columns = n + gl.arange(0, x.type.shape[1], gl.SliceLayout(0, x.type.layout))
    if factors is not None:
        x = x * gl.expand_dims(gl.load(factors + rows, rows < M, other=0.0), 1)
    if shifts is not None:
        shift = gl.expand_dims(gl.load(shifts + rows, rows < M, other=0.0), 1)
        x = x - shift * gl.expand_dims(gl.load(sums + columns, columns < N, other=0.0), 0)
    if bias is not None:
        x = x + gl.expand_dims(biases.to(gl.float32), 0)
    if before_desc is not None:
        store_tile(before_desc, m, n, x, staging.index(0), 1)
        store_tile(out_desc, m, n, _activate(x, ACTIVATION), staging.index(1), 1)
    else:
        store_tile(out_desc, m, n, _activate(x, ACTIVATION), staging.index(J % 2), 1)


@gluon.jit
def _multiply(
    HALF: gl.constexpr,
    descs: gl.tuple,
    rings: gl.tuple,
    staging: gl.shared_memory_descriptor,
    barriers: gl.tuple,
    vectors: gl.tuple,
    sizes: gl.tuple,
    work: gl.tuple,
    ACTIVATION: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One of the two groups of four warps."""
    a_ring, b_ring = rings
    full, empty = barriers
    tiles_m, tiles_n, K = work
    BLOCK_M: gl.constexpr = a_ring.type.shape[1]
    BLOCK_K: gl.constexpr = a_ring.type.shape[2]
    BLOCK_N: gl.constexpr = b_ring.type.shape[1 if TRANSPOSED else 2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * (2 * BLOCK_M) + HALF * BLOCK_M, tile_n * BLOCK_N
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            right = b_ring.index(stage)
            if TRANSPOSED:
                right = right.permute([1, 0])
            acc = warpgroup_mma(a_ring.index(2 * stage + HALF), right, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        first, second, third, fourth = quarters(acc)
        # All are on their way at once.
        bias, N = vectors[3], sizes[1]
        first_bias, second_bias = _bias_of(0, first, n, bias, N), _bias_of(1, second, n, bias, N)
        third_bias, fourth_bias = _bias_of(2, third, n, bias, N), _bias_of(3, fourth, n, bias, N)
        _finish(0, first, first_bias, m, n, descs, staging, vectors, sizes, ACTIVATION)
        _finish(1, second, second_bias, m, n, descs, staging, vectors, sizes, ACTIVATION)
        _finish(2, third, third_bias, m, n, descs, staging, vectors, sizes, ACTIVATION)
        _finish(3, fourth, fourth_bias, m, n, descs, staging, vectors, sizes, ACTIVATION)
    tma.store_wait(0)


@gluon.jit
def _matmul_kernel(
    a_desc: tma.tensor_descriptor,
    b_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    before_desc: tma.tensor_descriptor,
    factors: gl.tensor,
    shifts: gl.tensor,
    sums: gl.tensor,
    bias: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    K: gl.tensor,
    ACTIVATION: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """TRANSPOSED: b is [N, K] in memory."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    b_shape: gl.constexpr = b_desc.block_type.shape
    BLOCK_N: gl.constexpr = b_shape[0 if TRANSPOSED else 1]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, b_shape[0], b_shape[1]], b_desc.layout)
    first = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], out_desc.layout)
    second = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK_M, BLOCK_N // 4], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # Both groups read b.
    work = (gl.cdiv(M, 2 * BLOCK_M), gl.cdiv(N, BLOCK_N), K)
    results = (out_desc, before_desc)
    rings = (a_ring, b_ring)
    barriers = (full, empty)
    vectors = (factors, shifts, sums, bias)
    sizes = (M, N)
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, results, rings, first, barriers, vectors, sizes, work, ACTIVATION, TRANSPOSED, STAGES),
            ),
            (
                _multiply,
                (1, results, rings, second, barriers, vectors, sizes, work, ACTIVATION, TRANSPOSED, STAGES),
            ),
            (_load, ((a_desc, b_desc), rings, barriers, work, TRANSPOSED, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def pays(a: Tensor, b: Tensor) -> bool:
    """Whether `multiply` takes these operands of 16 bit, and is not for want of tiles slower than smaller ones."""
    tiles = triton.cdiv(a.shape[0], ROWS) * triton.cdiv(b.shape[1], _OUTPUTS)
    return a.dtype in DTYPES and a.itemsize == 2 and tiles >= multiprocessor_count(a.device)


def multiply(
    a: Tensor, b: Tensor, epilogue: Epilogue, save: bool, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """As `hrm.kernels.ops.triton.matmul.multiply`, of operands whose rows begin at multiples of 16 bytes."""
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N, dtype=out_dtype)
    before = torch.empty_like(out) if save else None
    transposed = b.stride(1) != 1
    part = (ROWS // 2, _OUTPUTS // 4)
    _matmul_kernel[(min(triton.cdiv(M, ROWS) * triton.cdiv(N, _OUTPUTS), multiprocessor_count(a.device)),)](
        descriptor(a, ROWS // 2, COLUMNS),
        descriptor(b.T, _OUTPUTS, COLUMNS) if transposed else descriptor(b, COLUMNS, _OUTPUTS),
        descriptor(out, *part),
        None if before is None else descriptor(before, *part),
        epilogue.factors,
        epilogue.shifts,
        epilogue.sums,
        epilogue.bias,
        M,
        N,
        K,
        ACTIVATION=epilogue.activation,
        TRANSPOSED=transposed,
        STAGES=_STAGES,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
    return out, before
