"""Products of lists of matrices for Hopper GPUs, warp-specialised by hand in Gluon.

As `hrm.kernels.ops.hopper.matmul`, with a table of addresses and sizes in global memory, which a kernel before writes:
the warp that loads makes tensor descriptors of each product it comes to. Results pass through shared memory, so that
rows are written in whole lines, and need no descriptor.

Shapes: M rows, K inputs, N outputs, each product of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
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
    multiprocessor_count,
    quarters,
    shared_layout,
    tile_position,
)

# Columns of a tile, and stages of 16 KiB of the left operand and 16 or 32 KiB of the right one.
_TILES = {256: 4, 128: 6}
_FIELDS = 9  # of a product in the table: three addresses, M, N, K, two strides, its first tile
_AT_ONCE = 8  # products that a program writes to the table


@triton.jit
def _write_field(
    table: tl.tensor,
    values: tl.tuple,
    FIELD: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    CODED: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    index = tl.arange(0, AT_ONCE)
    field = tl.zeros((AT_ONCE,), tl.int64)
    for i in tl.static_range(AT_ONCE):
        if FIRST + i < len(values):
            value = values[FIRST + i]
            field = tl.where(index == i, (value - 3) // 2 if CODED else value.to(tl.int64), field)
    tl.store(table + FIELD * SIZE + FIRST + index, field)


@triton.jit
def _table_kernel(
    table: tl.tensor,
    lefts: tl.tuple,
    rights: tl.tuple,
    outs: tl.tuple,
    heights: tl.tuple,
    widths: tl.tuple,
    depths: tl.tuple,
    left_strides: tl.tuple,
    right_strides: tl.tuple,
    starts: tl.tuple,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """The arguments, field by field, SIZE products each.

    Sizes come as 2 size + 3: odd and above 1, as Triton compiles anew for multiples of 16 and for 1.
    """
    for first in tl.static_range(0, len(lefts), AT_ONCE):
        if tl.program_id(0) == first // AT_ONCE:
            _write_field(table, lefts, 0, first, SIZE, False, AT_ONCE)
            _write_field(table, rights, 1, first, SIZE, False, AT_ONCE)
            _write_field(table, outs, 2, first, SIZE, False, AT_ONCE)
            _write_field(table, heights, 3, first, SIZE, True, AT_ONCE)
            _write_field(table, widths, 4, first, SIZE, True, AT_ONCE)
            _write_field(table, depths, 5, first, SIZE, True, AT_ONCE)
            _write_field(table, left_strides, 6, first, SIZE, True, AT_ONCE)
            _write_field(table, right_strides, 7, first, SIZE, True, AT_ONCE)
            _write_field(table, starts, 8, first, SIZE, True, AT_ONCE)


@gluon.jit
def _product_of(tile: gl.tensor, table: gl.tensor, products: gl.tensor, SIZE: gl.constexpr, dtype: gl.constexpr) -> Any:
    """The product that a tile belongs to: the last one that starts at or before it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    index = gl.arange(0, SIZE, layout)
    starts = gl.load(table + 8 * SIZE + index, index < products, other=0)
    at = table + gl.sum(((index < products) & (starts <= tile)).to(gl.int32), 0) - 1
    pointer: gl.constexpr = gl.pointer_type(dtype)
    left, right, out = (
        gl.load(at).to(pointer),
        gl.load(at + SIZE).to(pointer),
        gl.load(at + 2 * SIZE).to(pointer),
    )
    M, N, K = (
        gl.load(at + 3 * SIZE).to(gl.int32),
        gl.load(at + 4 * SIZE).to(gl.int32),
        gl.load(at + 5 * SIZE).to(gl.int32),
    )
    left_stride, right_stride = gl.load(at + 6 * SIZE), gl.load(at + 7 * SIZE)
    return left, right, out, M, N, K, left_stride, right_stride, gl.load(at + 8 * SIZE).to(gl.int32)


@gluon.jit
def _load(
    rings: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    SIZE: gl.constexpr,
    LEFT_TRANSPOSED: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    a_ring, b_ring = rings
    full, empty = barriers
    table, products, tiles, run = work
    BLOCK_M: gl.constexpr = a_ring.type.shape[2 if LEFT_TRANSPOSED else 1]
    BLOCK_K: gl.constexpr = a_ring.type.shape[1 if LEFT_TRANSPOSED else 2]
    BLOCK_N: gl.constexpr = b_ring.type.shape[1 if RIGHT_TRANSPOSED else 2]
    step = 0
    for first in range(gl.program_id(0) * run, tiles, gl.num_programs(0) * run):
        tile = first
        end = gl.minimum(first + run, tiles)
        while tile < end:
            left, right, _, M, N, K, left_stride, right_stride, start = _product_of(
                tile, table, products, SIZE, a_ring.dtype
            )
            tiles_m, tiles_n = gl.cdiv(M, 2 * BLOCK_M), gl.cdiv(N, BLOCK_N)
            last = gl.minimum(end, start + tiles_m * tiles_n)
            if step > 0:  # what was loaded last has arrived: the copy engine needs those descriptors no more
                mbarrier.wait(full.index((step - 1) % STAGES), (step - 1) // STAGES & 1)
            if LEFT_TRANSPOSED:
                a = tma.make_tensor_descriptor(left, [K, M], [left_stride, 1], [BLOCK_K, BLOCK_M], a_ring.layout)
            else:
                a = tma.make_tensor_descriptor(left, [M, K], [left_stride, 1], [BLOCK_M, BLOCK_K], a_ring.layout)
            if RIGHT_TRANSPOSED:
                b = tma.make_tensor_descriptor(right, [N, K], [right_stride, 1], [BLOCK_N, BLOCK_K], b_ring.layout)
            else:
                b = tma.make_tensor_descriptor(right, [K, N], [right_stride, 1], [BLOCK_K, BLOCK_N], b_ring.layout)
            for t in range(tile, last):
                tile_m, tile_n = tile_position(t - start, tiles_m, tiles_n)
                m, n = tile_m * (2 * BLOCK_M), tile_n * BLOCK_N
                for k in range(0, K, BLOCK_K):
                    stage = step % STAGES
                    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                    mbarrier.expect(full.index(stage), 2 * a.block_type.nbytes + b.block_type.nbytes)
                    for half in gl.static_range(2):
                        row = m + half * BLOCK_M
                        target = a_ring.index(2 * stage + half)
                        if LEFT_TRANSPOSED:
                            tma.async_copy_global_to_shared(a, [k, row], full.index(stage), target)
                        else:
                            tma.async_copy_global_to_shared(a, [row, k], full.index(stage), target)
                    if RIGHT_TRANSPOSED:
                        tma.async_copy_global_to_shared(b, [n, k], full.index(stage), b_ring.index(stage))
                    else:
                        tma.async_copy_global_to_shared(b, [k, n], full.index(stage), b_ring.index(stage))
                    step += 1
            tile = last


@gluon.jit
def _store(
    out: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    m: gl.tensor,
    n: gl.tensor,
    value: gl.tensor,
    staging: gl.shared_memory_descriptor,
) -> None:
    """Part of a tile to out [M, N], whose rows begin at multiples of 16 bytes."""
    HEIGHT: gl.constexpr = value.type.shape[0]
    WIDTH: gl.constexpr = value.type.shape[1]
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    staging.store(value.to(staging.dtype))
    rows = m + gl.arange(0, HEIGHT, gl.SliceLayout(1, lines))
    columns = n + gl.arange(0, WIDTH, gl.SliceLayout(0, lines))
    at = out + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
    at = gl.max_contiguous(gl.multiple_of(at, [1, 16]), [1, 8])
    inside = gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < N, 0)
    gl.store(at, staging.load(lines), gl.max_constancy(inside, [1, 8]))


@gluon.jit
def _multiply(
    HALF: gl.constexpr,
    rings: gl.tuple,
    staging: gl.shared_memory_descriptor,
    barriers: gl.tuple,
    work: gl.tuple,
    SIZE: gl.constexpr,
    LEFT_TRANSPOSED: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One of the two groups of four warps."""
    a_ring, b_ring = rings
    full, empty = barriers
    table, products, tiles, run = work
    BLOCK_M: gl.constexpr = a_ring.type.shape[2 if LEFT_TRANSPOSED else 1]
    BLOCK_K: gl.constexpr = a_ring.type.shape[1 if LEFT_TRANSPOSED else 2]
    BLOCK_N: gl.constexpr = b_ring.type.shape[1 if RIGHT_TRANSPOSED else 2]
    WIDTH: gl.constexpr = BLOCK_N // 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    for first in range(gl.program_id(0) * run, tiles, gl.num_programs(0) * run):
        tile = first
        end = gl.minimum(first + run, tiles)
        while tile < end:
            _, _, out, M, N, K, _, _, start = _product_of(tile, table, products, SIZE, a_ring.dtype)
            tiles_m, tiles_n = gl.cdiv(M, 2 * BLOCK_M), gl.cdiv(N, BLOCK_N)
            last = gl.minimum(end, start + tiles_m * tiles_n)
            for t in range(tile, last):
                tile_m, tile_n = tile_position(t - start, tiles_m, tiles_n)
                m, n = tile_m * (2 * BLOCK_M) + HALF * BLOCK_M, tile_n * BLOCK_N
                acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
                for k in range(0, K, BLOCK_K):
                    stage = step % STAGES
                    mbarrier.wait(full.index(stage), step // STAGES & 1)
                    left, right = a_ring.index(2 * stage + HALF), b_ring.index(stage)
                    if LEFT_TRANSPOSED:
                        left = left.permute([1, 0])
                    if RIGHT_TRANSPOSED:
                        right = right.permute([1, 0])
                    acc = warpgroup_mma(left, right, acc, use_acc=k > 0, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
                    step += 1
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                first_part, second_part, third_part, fourth_part = quarters(acc)
                _store(out, M, N, m, n, first_part, staging.index(0))
                _store(out, M, N, m, n + WIDTH, second_part, staging.index(1))
                _store(out, M, N, m, n + 2 * WIDTH, third_part, staging.index(0))
                _store(out, M, N, m, n + 3 * WIDTH, fourth_part, staging.index(1))
            tile = last


@gluon.jit
def _grouped_kernel(
    table: gl.tensor,
    products: gl.tensor,
    tiles: gl.tensor,
    run: gl.tensor,
    dtype: gl.constexpr,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LEFT_TRANSPOSED: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Programs take runs of `run` tiles, 2 BLOCK_M rows high, in turn. TRANSPOSED: [K, M], or [N, K], in memory."""
    if LEFT_TRANSPOSED:
        a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_M], A_LAYOUT)
    else:
        a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M, BLOCK_K], A_LAYOUT)
    if RIGHT_TRANSPOSED:
        b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], B_LAYOUT)
    else:
        b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], B_LAYOUT)
    first = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N // 4], OUT_LAYOUT)
    second = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N // 4], OUT_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # Both groups read b.
    rings = (a_ring, b_ring)
    barriers = (full, empty)
    work = (table, products, tiles, run)
    gl.warp_specialize(
        [
            (_multiply, (0, rings, first, barriers, work, SIZE, LEFT_TRANSPOSED, RIGHT_TRANSPOSED, STAGES)),
            (_multiply, (1, rings, second, barriers, work, SIZE, LEFT_TRANSPOSED, RIGHT_TRANSPOSED, STAGES)),
            (_load, (rings, barriers, work, SIZE, LEFT_TRANSPOSED, RIGHT_TRANSPOSED, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def choose_width(sizes: Sequence[tuple[int, int]], processors: int) -> int | None:
    """Columns of a tile for products of `sizes` (M, N), or None where there are fewer tiles than multiprocessors.

    Wide tiles read less, unless too many multiprocessors stand idle in the last round of them.
    """

    def busy(width: int) -> float:
        tiles = tile_count(sizes, width)
        return float(tiles / (triton.cdiv(tiles, processors) * processors))

    if tile_count(sizes, 128) < processors:
        return None
    return 256 if busy(256) > 0.85 * busy(128) else 128


def tile_count(sizes: Sequence[tuple[int, int]], width: int) -> int:
    """Of products of `sizes` (M, N), with so many columns in a tile."""
    return sum(triton.cdiv(M, ROWS) * triton.cdiv(N, width) for M, N in sizes)


def multiply(
    products: Sequence[tuple[Tensor, Tensor, Tensor]],
    sizes: Sequence[tuple[int, int]],
    depths: Sequence[int],
    width: int,
    in_runs: bool,
    left_transposed: bool,
    right_transposed: bool,
) -> None:
    """Write products (left, right, out) of 16 bit, whose rows begin at multiples of 16 bytes.

    Args:
        sizes: M and N of each.
        depths: K of each.
        width: of tiles, by `choose_width`.
        in_runs: whether a program takes neighbouring tiles, or tiles in turn.
        left_transposed, right_transposed: those operands are [K, M], or [N, K], in memory.
    """
    lefts, rights, outs = zip(*products, strict=True)
    heights, widths = zip(*sizes, strict=True)
    *starts, tiles = itertools.accumulate((tile_count([size], width) for size in sizes), initial=0)
    dtype, device = lefts[0].dtype, lefts[0].device
    programs = min(tiles, multiprocessor_count(device))
    size = max(32, triton.next_power_of_2(len(products)))
    table = torch.empty(_FIELDS * size, dtype=torch.int64, device=device)

    def coded(numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(2 * number + 3 for number in numbers)

    _table_kernel[(triton.cdiv(len(products), _AT_ONCE),)](
        table,
        lefts,
        rights,
        outs,
        coded(heights),
        coded(widths),
        coded(depths),
        coded([x.stride(0) for x in lefts]),
        coded([x.stride(0) for x in rights]),
        coded(starts),
        size,
        _AT_ONCE,
        num_warps=1,
    )
    rows = ROWS // 2
    _grouped_kernel[(programs,)](
        table,
        len(products),
        tiles,
        triton.cdiv(tiles, programs) if in_runs else 1,
        DTYPES[dtype],
        shared_layout(dtype, (COLUMNS, rows) if left_transposed else (rows, COLUMNS)),
        shared_layout(dtype, (width, COLUMNS) if right_transposed else (COLUMNS, width)),
        shared_layout(dtype, (rows, width // 4)),
        size,
        rows,
        width,
        COLUMNS,
        left_transposed,
        right_transposed,
        _TILES[width],
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
