"""Matmuls for Hopper GPUs, warp-specialised by hand in Gluon, with SwiGLU or a norm before them fused in.

Two groups of four warps multiply and finish their tiles in turns. `hrm.kernels.ops.triton` calls what is here where it
pays; how warps work together is said in `hrm.kernels.ops.hopper.common`.

Shapes: M rows, K inputs, F inner width of the gated MLP.
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
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    run_of,
    sigmoid,
    store_squares,
    store_tile,
)

# x stays in shared memory whole: 8 slices of 16 KiB, beside 4 stages of weights and 2 tiles of output of 16 KiB each.
_MAX_SLICES = 8
_SWIGLU_STAGES = 4


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
        last_of_rows = (tile + 1 == end) | ((tile + 1) % tiles_n == 0)
        beside_weights = new_rows
        if NORM:
            # Rows of one tile alone come as a whole: the first group finds their norm before it takes any weights.
            first = new_rows & last_of_rows
            beside_weights = new_rows & (not last_of_rows)
            for k in range(SLICES):
                mbarrier.wait(x_empty.index(k), x_phase ^ 1, pred=first)
                mbarrier.expect(x_full.index(k), x_desc.block_type.nbytes, pred=first)
                tma.async_copy_global_to_shared(x_desc, [m, k * BLOCK_K], x_full.index(k), x_tile.index(k), pred=first)
        for half in gl.static_range(2):
            for k in range(SLICES):
                if half == 0 and beside_weights:
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
def _norm_factors(
    x_tile: gl.shared_memory_descriptor,
    x_full: gl.shared_memory_descriptor,
    phase: gl.tensor,
    eps: gl.tensor,
    layout: gl.constexpr,
    SLICES: gl.constexpr,
    LAYER: gl.constexpr,
) -> Any:
    """Of the rows in `x_tile`, as soon as they are there: 1 / rms and 0; LAYER: 1 / standard deviation, and mean."""
    BLOCK_M: gl.constexpr = x_tile.type.shape[1]
    BLOCK_K: gl.constexpr = x_tile.type.shape[2]
    of_slice: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    # Squares are taken around the mean of the first slice: near to that of all, or the rest is spread as far.
    around = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, of_slice))
    sums = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, of_slice))
    squares = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, of_slice))
    for k in range(SLICES):
        mbarrier.wait(x_full.index(k), phase)
        x = x_tile.index(k).load(of_slice).to(gl.float32)
        if LAYER:
            if k == 0:
                around = gl.sum(x, 1) / BLOCK_K
            x = x - gl.expand_dims(around, 1)
            sums += gl.sum(x, 1)
        squares += gl.sum(x * x, 1)
    fence_async_shared()  # orders the reads before the copy engine's next writes
    off = sums / (SLICES * BLOCK_K)
    factors = gl.rsqrt(squares / (SLICES * BLOCK_K) - off * off + eps)
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    return gl.convert_layout(factors, of_rows), gl.convert_layout(around + off, of_rows)


@gluon.jit
def _norm_rows(
    x_tile: gl.shared_memory_descriptor,
    x_full: gl.shared_memory_descriptor,
    phase: gl.tensor,
    vectors: gl.tuple,
    sizes: gl.tuple,
    m: gl.tensor,
    eps: gl.tensor,
    layout: gl.constexpr,
    SLICES: gl.constexpr,
) -> Any:
    """`_norm_factors`, kept in global memory: by both groups, and by every program that has some of the rows."""
    rstd, shifts, _, _ = vectors
    factors, means = _norm_factors(x_tile, x_full, phase, eps, layout, SLICES, shifts is not None)
    rows = m + gl.arange(0, x_tile.type.shape[1], gl.SliceLayout(1, layout))
    gl.store(rstd + rows, factors, rows < sizes[0])
    if shifts is not None:
        gl.store(shifts + rows, means * factors, rows < sizes[0])
    return factors, means


@gluon.jit
def _swiglu_multiply(
    HALF: gl.constexpr,
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    vectors: gl.tuple,
    sizes: gl.tuple,
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
    _, shifts, sums, squares = vectors
    M, F = sizes
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = x_tile.type.shape[1]
    BLOCK_K: gl.constexpr = x_tile.type.shape[2]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    step = HALF * SLICES
    x_phase = 0
    turn_phase = 1 - HALF  # The first group finds its first turn given.
    factors = gl.full([BLOCK_M], 1.0, gl.float32, gl.SliceLayout(1, layout))
    means = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, layout))
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * (2 * BLOCK_N) + HALF * BLOCK_N
        new_rows = (tile == start) | (tile % tiles_n == 0)
        last_of_rows = (tile + 1 == end) | ((tile + 1) % tiles_n == 0)
        # Factors are wanted only at the end. The first group, whose turn it is, multiplies before it finds them; the
        # second one has to wait for its turn anyway. Where these rows are given back at once, they come first.
        first = new_rows & last_of_rows if HALF == 0 else new_rows
        if NORM and first:
            factors, means = _norm_rows(x_tile, x_full, x_phase, vectors, sizes, m, eps, layout, SLICES)
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
        if NORM and HALF == 0 and new_rows & (not last_of_rows):
            factors, means = _norm_rows(x_tile, x_full, x_phase, vectors, sizes, m, eps, layout, SLICES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(weight_empty.index((step + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(x_empty.index(SLICES - 1), count=1, pred=last_of_rows)
        step += SLICES
        x_phase ^= last_of_rows.to(gl.int32)

        if shifts is not None:
            columns = gl.arange(0, 2 * BLOCK_N, gl.SliceLayout(0, layout))
            at = n + columns % BLOCK_N
            sum_of = gl.load(sums + columns // BLOCK_N * F + at, at < F, other=0.0)
            acc = acc - gl.expand_dims(means, 1) * gl.expand_dims(sum_of, 0)
        if NORM:
            acc = acc * gl.expand_dims(factors, 1)
        gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
        product = gate * up
        if squares is not None:
            store_squares(squares, product, m, n, M, F, 1.0)
        if SAVE:
            store_tile(gate_desc, m, n, gate, staging, 0)
            store_tile(up_desc, m, n, up, staging, 0)
        if ACTIVATE:
            store_tile(out_desc, m, n, product * sigmoid(gate), staging, 0)
    tma.store_wait(0)


@gluon.jit
def _swiglu_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    gate_desc: tma.tensor_descriptor,
    up_desc: tma.tensor_descriptor,
    rstd: gl.tensor,
    shifts: gl.tensor,
    sums: gl.tensor,
    squares: gl.tensor,
    M: gl.tensor,
    F: gl.tensor,
    eps: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    SAVE: gl.constexpr,
    ACTIVATE: gl.constexpr,
    NORM: gl.constexpr,
) -> None:
    """NORM: of rows that are divided by their root mean square or, with `shifts`, laid around 0 and divided by that.

    shifts: gets mean / standard deviation of each row; `sums` are those of the rows of both weights.
    squares: gets, of each row, the sums of squares of gate * up, as `store_squares` says.
    """
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
    start, end = run_of(gl.cdiv(M, BLOCK_M) * tiles_n)

    work = (start, end, tiles_n)
    barriers = (x_full, x_empty, weight_full, weight_empty, turns)
    outputs = (out_desc, gate_desc, up_desc)
    first = (x_tile, weight_ring, staging.index(0))
    second = (x_tile, weight_ring, staging.index(1))
    vectors = (rstd, shifts, sums, squares)
    sizes = (M, F)
    gl.warp_specialize(
        [
            (
                _swiglu_multiply,
                (0, outputs, first, barriers, work, vectors, sizes, eps, SLICES, STAGES, SAVE, ACTIVATE, NORM),
            ),
            (
                _swiglu_multiply,
                (1, outputs, second, barriers, work, vectors, sizes, eps, SLICES, STAGES, SAVE, ACTIVATE, NORM),
            ),
            (_swiglu_load, ((x_desc, weight_desc), (x_tile, weight_ring), barriers, work, SLICES, STAGES, NORM)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def fits_swiglu(K: int) -> bool:
    """Whether `linear_swiglu` takes rows of `K` inputs."""
    return K % COLUMNS == 0 and K <= _MAX_SLICES * COLUMNS


def linear_swiglu(x: Tensor, gate_up: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """silu(x @ gate.T) * (x @ up.T) of contiguous x [M, K] and gate_up [2 F, K]; with `save` also x @ gate_up.T."""
    out = x.new_empty(x.shape[0], gate_up.shape[0] // 2)
    projected = x.new_empty(x.shape[0], gate_up.shape[0]) if save else None
    _launch_swiglu(x, gate_up, out, projected)
    return out, projected


def linear_swiglu_and_squares(x: Tensor, gate_up: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`linear_swiglu` and, second, the squares of gate * up, sums of COLUMNS hidden units [F / COLUMNS, M], float32."""
    M, F = x.shape[0], gate_up.shape[0] // 2
    out = x.new_empty(M, F)
    projected = x.new_empty(M, 2 * F) if save else None
    squares = x.new_empty(triton.cdiv(F, COLUMNS), M, dtype=torch.float32)
    _launch_swiglu(x, gate_up, out, projected, squares=squares)
    return out, squares, projected


def pays_for_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these operands, and is faster than the library."""
    M, K = x.shape
    half, odd = divmod(weight.shape[0], 2)
    tiles = triton.cdiv(M, ROWS) * triton.cdiv(half, 2 * COLUMNS)
    fits = fits_swiglu(K) and x.dtype in DTYPES and not odd and half % 8 == 0
    return fits and tiles >= multiprocessor_count(x.device)


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


def layer_norm_linear(x: Tensor, weight: Tensor, sums: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(x) @ weight.T, and of the rows of x 1 / standard deviation and mean times that.

    `sums` are those of the rows of `weight` [N, K], float32: norm(x) weight.T = (x weight.T - mean sums) / deviation.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    rstd, shifts = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    _launch_swiglu(x, weight, None, out, rstd, eps, shifts, sums)
    return out, rstd, shifts


def _launch_swiglu(
    x: Tensor,
    gate_up: Tensor,
    out: Tensor | None,
    projected: Tensor | None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
    shifts: Tensor | None = None,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """Write to `out` [M, F] what gate and up make of each other, to `projected` [M, 2 F] what they are.

    With `rstd` [M], of the rows of x after their norm, whose factors are left there; with `shifts` and `sums` too, that
    is a layer norm, as `layer_norm_linear` says. `squares`: see `linear_swiglu_and_squares`.
    """
    M, K = x.shape
    F = gate_up.shape[0] // 2
    out_desc = gate_desc = up_desc = None
    if out is not None:
        out_desc = gate_desc = up_desc = descriptor(out, ROWS, COLUMNS)
    if projected is not None:
        gate_desc = descriptor(projected[:, :F], ROWS, COLUMNS)
        up_desc = descriptor(projected[:, F:], ROWS, COLUMNS)
    tiles = triton.cdiv(M, ROWS) * triton.cdiv(F, 2 * COLUMNS)
    _swiglu_kernel[(min(tiles, multiprocessor_count(x.device)),)](
        descriptor(x, ROWS, COLUMNS),
        descriptor(gate_up.view(2, F, K), 2, COLUMNS, COLUMNS),
        out_desc or gate_desc,
        gate_desc,
        up_desc,
        rstd,
        shifts,
        sums,
        squares,
        M,
        F,
        eps,
        SLICES=K // COLUMNS,
        STAGES=_SWIGLU_STAGES,
        SAVE=projected is not None,
        ACTIVATE=out is not None,
        NORM=rstd is not None,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
