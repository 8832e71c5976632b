"""Attention to 65 to 128 tokens on Hopper GPUs, forward and backward, warp-specialised by hand in Gluon.

`hrm.kernels.ops.triton.attention` calls it where it pays. A program walks through a run of heads, and while groups of
four warps work on a head each, three forward and two backward, one warp copies the heads after them (TMA).

A group rotates its queries and keys in shared memory, where they came, and its results leave from the same place.
Queries are two tiles of ROWS; keys and values are one of ROWS and one of REST, 32 where that is enough. The backward
needs `qkv` alone and forms all probabilities again.

Shapes: B sequences, T tokens, N heads of size K, D = N K. Barriers in shared memory pass buffers around: `full` (a head
has arrived) and `empty` (its group is done with it). A wait names the parity of the phase it waits for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
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
    BUFFER_BYTES,
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    run_of,
)

# Whether they are faster than the kernels in Triton: not by themselves, and what training gains by less power is not
# settled (benchmarks/results/reports/2026-11-28-hrm-step.md).
FORWARD_PAYS = False
BACKWARD_PAYS = False

_DTYPES = (torch.bfloat16, torch.float16)
_LOG2_E = gl.constexpr(math.log2(math.e))
_HEAD_SIZE = 64
_GROUPS = gl.constexpr(3)
_ROWS = gl.constexpr(64)
_PIECE = gl.constexpr(32)  # rows that a group rotates at a time
# All registers of a multiprocessor over four groups of four warps: of these 512, three groups take 152 each.
_START_REGISTERS = 128
_ATTEND_REGISTERS = gl.constexpr(152)
_COPY_REGISTERS = gl.constexpr(56)
_BACKWARD_STAGES = 3


@gluon.jit
def _copy(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Heads as they are read; backward, with the gradients of their results."""
    tile_desc, rest_desc, grad_desc = descs
    q_tiles, d_tiles, k_tiles, k_rest, v_tiles, v_rest = buffers
    full, empty = barriers
    start, end = work
    ROWS: gl.constexpr = tile_desc.block_type.shape[1]
    K: gl.constexpr = tile_desc.block_type.shape[2]
    TILES: gl.constexpr = 4 if grad_desc is None else 6
    for head in range(start, end):
        i = head - start
        stage = i % STAGES
        batch = head // N
        q_at = head % N * K
        k_at = q_at + N * K
        v_at = k_at + N * K
        arrived = full.index(stage)
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(arrived, TILES * tile_desc.block_type.nbytes + 2 * rest_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(tile_desc, [batch, 0, k_at], arrived, k_tiles.index(stage))
        tma.async_copy_global_to_shared(rest_desc, [batch, ROWS, k_at], arrived, k_rest.index(stage))
        tma.async_copy_global_to_shared(tile_desc, [batch, 0, v_at], arrived, v_tiles.index(stage))
        tma.async_copy_global_to_shared(rest_desc, [batch, ROWS, v_at], arrived, v_rest.index(stage))
        for half in gl.static_range(2):
            at = [batch, half * ROWS, q_at]
            tma.async_copy_global_to_shared(tile_desc, at, arrived, q_tiles.index(2 * stage + half))
            if grad_desc is not None:
                tma.async_copy_global_to_shared(grad_desc, at, arrived, d_tiles.index(2 * stage + half))


@gluon.jit
def _angles(
    J: gl.constexpr, cos: gl.tensor, sin: gl.tensor, T: gl.constexpr, K: gl.constexpr, layout: gl.constexpr
) -> Any:
    """cos and sin of the J-th `_PIECE` rows, both [_PIECE, K/2]."""
    rows = J * _PIECE + gl.arange(0, _PIECE, gl.SliceLayout(1, layout))
    at = rows[:, None] * K + gl.arange(0, K // 2, gl.SliceLayout(0, layout))[None, :]
    inside = (rows < T)[:, None]
    return gl.load(cos + at, inside, 0.0), gl.load(sin + at, inside, 0.0)


@gluon.jit
def _rotate(tile: gl.shared_memory_descriptor, start: gl.constexpr, c: gl.tensor, s: gl.tensor) -> None:
    """Rotate `_PIECE` rows of `tile` [R, K] in place."""
    K: gl.constexpr = tile.shape[1]
    # A thread has both halves of a row, and eight threads on one another's rows read different banks.
    whole: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, K // 2]],
        [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]],
        [[8, 0], [16, 0]],
        [],
        [_PIECE, K],
    )
    part = tile.slice(start, _PIECE)
    first, second = part.load(whole).reshape([_PIECE, 2, K // 2]).permute([0, 2, 1]).split()
    a = gl.convert_layout(first, c.type.layout, assert_trivial=True).to(gl.float32)
    b = gl.convert_layout(second, c.type.layout, assert_trivial=True).to(gl.float32)
    both = gl.join((a * c - b * s).to(tile.dtype), (b * c + a * s).to(tile.dtype))
    part.store(both.permute([0, 2, 1]).reshape([_PIECE, K]))


@gluon.jit
def _await_and_rotate(
    q: gl.shared_memory_descriptor,
    q_last: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor,
    k_rest: gl.shared_memory_descriptor,
    arrived: gl.shared_memory_descriptor,
    phase: gl.tensor,
    cos: gl.tensor,
    sin: gl.tensor,
    T: gl.constexpr,
) -> None:
    """Wait for a head, and rotate its queries and keys in place, those of equal positions by the same angles."""
    REST: gl.constexpr = k_rest.shape[0]
    K: gl.constexpr = k_rest.shape[1]
    halves: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]],
        [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]],
        [[8, 0], [16, 0]],
        [],
        [_PIECE, K // 2],
    )
    c, s = _angles(0, cos, sin, T, K, halves)
    c_next, s_next = _angles(1, cos, sin, T, K, halves)
    c_rest, s_rest = _angles(2, cos, sin, T, K, halves)
    mbarrier.wait(arrived, phase)
    _rotate(q, 0, c, s)
    _rotate(k, 0, c, s)
    _rotate(q, _PIECE, c_next, s_next)
    _rotate(k, _PIECE, c_next, s_next)
    _rotate(q_last, 0, c_rest, s_rest)
    _rotate(k_rest, 0, c_rest, s_rest)
    if REST == 2 * _PIECE:
        c, s = _angles(3, cos, sin, T, K, halves)
        _rotate(q_last, _PIECE, c, s)
        _rotate(k_rest, _PIECE, c, s)


@gluon.jit
def _weights(
    q: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor, k_rest: gl.shared_memory_descriptor, T: gl.constexpr
) -> Any:
    """exp of the scores of `_ROWS` queries with both tiles of keys, and 1 / their sums; in base 2."""
    REST: gl.constexpr = k_rest.shape[0]
    K: gl.constexpr = k_rest.shape[1]
    SCALE: gl.constexpr = _LOG2_E * K**-0.5
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    scores = gl.zeros([_ROWS, _ROWS], gl.float32, layout)
    scores = warpgroup_mma(q, k.permute([1, 0]), scores, use_acc=False, is_async=True)
    others = gl.zeros([_ROWS, REST], gl.float32, rest_layout)
    others = warpgroup_mma(q, k_rest.permute([1, 0]), others, use_acc=False, is_async=True)
    scores, others = warpgroup_mma_wait(0, deps=(scores, others))
    keys = _ROWS + gl.arange(0, REST, gl.SliceLayout(0, rest_layout))
    others = gl.where((keys < T)[None, :], others, float("-inf"))
    peak = gl.maximum(gl.max(scores, 1), gl.convert_layout(gl.max(others, 1), rows_layout)) * SCALE
    p = gl.exp2(scores * SCALE - peak[:, None])
    p_rest = gl.exp2(others * SCALE - gl.convert_layout(peak, gl.SliceLayout(1, rest_layout))[:, None])
    factor = 1.0 / (gl.sum(p, 1) + gl.convert_layout(gl.sum(p_rest, 1), rows_layout))
    return p, p_rest, factor


@gluon.jit
def _mix(
    q: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor,
    k_rest: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor,
    v_rest: gl.shared_memory_descriptor,
    T: gl.constexpr,
) -> Any:
    """What `_ROWS` queries attend to, [_ROWS, K]."""
    K: gl.constexpr = k_rest.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    p, p_rest, factor = _weights(q, k, k_rest, T)
    weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, layout, 2))
    weights_rest = gl.convert_layout(p_rest.to(q.dtype), gl.DotOperandLayout(0, layout, 2))
    mixed = gl.zeros([_ROWS, K], gl.float32, layout)
    mixed = warpgroup_mma(weights, v, mixed, use_acc=False, is_async=True)
    mixed = warpgroup_mma(weights_rest, v_rest, mixed, is_async=True)
    mixed = warpgroup_mma_wait(0, deps=(mixed,))
    return mixed * factor[:, None]


@gluon.jit
def _store(desc: tma.tensor_descriptor, at: gl.tuple, mixed: gl.tensor, q_tile: gl.shared_memory_descriptor) -> None:
    """Write a tile of the result from where its queries were, of which it takes no more bytes."""
    tile = q_tile._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tile.reshape([_ROWS, mixed.type.shape[1]]).store(mixed.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [at[0], at[1], at[2]], tile)


@gluon.jit
def _attend(
    GROUP: gl.constexpr,
    out_desc: tma.tensor_descriptor,
    cos: gl.tensor,
    sin: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    T: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One of the groups: every third head."""
    q_tiles, _, k_tiles, k_rests, v_tiles, v_rests = buffers
    full, empty = barriers
    start, end = work
    REST: gl.constexpr = k_rests.shape[2]
    K: gl.constexpr = k_rests.shape[3]
    for head in range(start + GROUP, end, _GROUPS):
        i = head - start
        stage = i % STAGES
        q_tile = q_tiles.index(2 * stage)
        q_last_tile = q_tiles.index(2 * stage + 1)
        q = q_tile.reshape([_ROWS, K])
        q_last = q_last_tile.reshape([_ROWS, K])
        k = k_tiles.index(stage).reshape([_ROWS, K])
        k_rest = k_rests.index(stage).reshape([REST, K])
        v = v_tiles.index(stage).reshape([_ROWS, K])
        v_rest = v_rests.index(stage).reshape([REST, K])
        _await_and_rotate(q, q_last, k, k_rest, full.index(stage), i // STAGES & 1, cos, sin, T)
        # The result of the head before has left by now, and its buffers are free.
        tma.store_wait(0)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(empty.index((i + STAGES - _GROUPS) % STAGES), count=1, pred=i >= _GROUPS)
        at = (head // N, 0, head % N * K)
        _store(out_desc, at, _mix(q, k, k_rest, v, v_rest, T), q_tile)
        at = (head // N, _ROWS, head % N * K)
        _store(out_desc, at, _mix(q_last, k, k_rest, v, v_rest, T), q_last_tile)
    tma.store_wait(0)


@gluon.jit
def _forward_kernel(
    tile_desc: tma.tensor_descriptor,
    rest_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    cos: gl.tensor,
    sin: gl.tensor,
    heads: gl.tensor,
    T: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Descriptors of `qkv` with boxes of ROWS and of REST tokens of a head, and of the result with boxes of ROWS."""
    REST: gl.constexpr = rest_desc.block_type.shape[1]
    K: gl.constexpr = rest_desc.block_type.shape[2]
    dtype: gl.constexpr = tile_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, _ROWS, K], tile_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, K], tile_desc.layout)
    k_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, REST, K], rest_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, K], tile_desc.layout)
    v_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, REST, K], rest_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    start, end = run_of(heads)

    work = (start, end)
    buffers = (q_tiles, q_tiles, k_tiles, k_rest, v_tiles, v_rest)
    barriers = (full, empty)
    gl.warp_specialize(
        [
            (_attend, (0, out_desc, cos, sin, buffers, barriers, work, T, N, STAGES)),
            (_attend, (1, out_desc, cos, sin, buffers, barriers, work, T, N, STAGES)),
            (_attend, (2, out_desc, cos, sin, buffers, barriers, work, T, N, STAGES)),
            (_copy, ((tile_desc, rest_desc, None), buffers, barriers, work, N, STAGES)),
        ],
        [4, 4, 1],
        [_ATTEND_REGISTERS, _ATTEND_REGISTERS, _COPY_REGISTERS],
    )


@gluon.jit
def _differentiate_rows(
    q: gl.shared_memory_descriptor,
    d: gl.shared_memory_descriptor,
    keys: gl.tuple,
    weights: gl.tuple,
    sums: gl.tuple,
    T: gl.constexpr,
) -> Any:
    """dq of `_ROWS` queries, not yet rotated back, and `sums` with what they add to dv and dk."""
    k, k_rest, v, v_rest = keys
    w, w_rest = weights
    dv, dv_rest, dk, dk_rest = sums
    REST: gl.constexpr = k_rest.shape[0]
    K: gl.constexpr = k_rest.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    rest_rows_layout: gl.constexpr = gl.SliceLayout(1, rest_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    p, p_rest, factor = _weights(q, k, k_rest, T)
    p = p * factor[:, None]
    p_rest = p_rest * gl.convert_layout(factor, rest_rows_layout)[:, None]

    w.store(p.to(q.dtype))
    w_rest.store(p_rest.to(q.dtype))
    fence_async_shared()
    gl.thread_barrier()
    dv = warpgroup_mma(w.permute([1, 0]), d, dv, is_async=True)
    dv_rest = warpgroup_mma(d.permute([1, 0]), w_rest, dv_rest, is_async=True)
    dp = gl.zeros([_ROWS, _ROWS], gl.float32, layout)
    dp = warpgroup_mma(d, v.permute([1, 0]), dp, use_acc=False, is_async=True)
    dp_rest = gl.zeros([_ROWS, REST], gl.float32, rest_layout)
    dp_rest = warpgroup_mma(d, v_rest.permute([1, 0]), dp_rest, use_acc=False, is_async=True)
    dv, dv_rest, dp, dp_rest = warpgroup_mma_wait(0, deps=(dv, dv_rest, dp, dp_rest))

    delta = gl.sum(p * dp, 1) + gl.convert_layout(gl.sum(p_rest * dp_rest, 1), rows_layout)
    ds = (p * (dp - delta[:, None]) * K**-0.5).to(q.dtype)
    ds_rest = p_rest * (dp_rest - gl.convert_layout(delta, rest_rows_layout)[:, None]) * K**-0.5
    ds_rest = ds_rest.to(q.dtype)
    gl.thread_barrier()
    w.store(ds)
    w_rest.store(ds_rest)
    fence_async_shared()
    gl.thread_barrier()
    dq = gl.zeros([_ROWS, K], gl.float32, layout)
    dq = warpgroup_mma(gl.convert_layout(ds, operand), k, dq, use_acc=False, is_async=True)
    dq = warpgroup_mma(gl.convert_layout(ds_rest, operand), k_rest, dq, is_async=True)
    dk = warpgroup_mma(w.permute([1, 0]), q, dk, is_async=True)
    dk_rest = warpgroup_mma(q.permute([1, 0]), w_rest, dk_rest, is_async=True)
    dq, dk, dk_rest = warpgroup_mma_wait(0, deps=(dq, dk, dk_rest))
    gl.thread_barrier()
    return dq, (dv, dv_rest, dk, dk_rest)


@gluon.jit
def _rotate_back(
    tile: gl.shared_memory_descriptor, FIRST: gl.constexpr, cos: gl.tensor, sin: gl.tensor, T: gl.constexpr
) -> None:
    """Rotate rows of a gradient in `tile` [R, K] back in place; the first is of the FIRST-th `_PIECE`."""
    R: gl.constexpr = tile.shape[0]
    K: gl.constexpr = tile.shape[1]
    halves: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]],
        [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]],
        [[8, 0], [16, 0]],
        [],
        [_PIECE, K // 2],
    )
    for j in gl.static_range(R // _PIECE):
        c, s = _angles(FIRST + j, cos, sin, T, K, halves)
        _rotate(tile, j * _PIECE, c, -s)


@gluon.jit
def _differentiate(
    GROUP: gl.constexpr,
    descs: gl.tuple,
    cos: gl.tensor,
    sin: gl.tensor,
    buffers: gl.tuple,
    weights: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    T: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
) -> None:
    """One of the groups: every GROUPS-th head. Gradients leave from where q, k and v came."""
    tile_desc, rest_desc = descs
    q_tiles, d_tiles, k_tiles, k_rests, v_tiles, v_rests = buffers
    full, empty = barriers
    start, end = work
    REST: gl.constexpr = k_rests.shape[2]
    K: gl.constexpr = k_rests.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    for head in range(start + GROUP, end, GROUPS):
        i = head - start
        stage = i % STAGES
        q = q_tiles.index(2 * stage).reshape([_ROWS, K])
        q_last = q_tiles.index(2 * stage + 1).reshape([_ROWS, K])
        d = d_tiles.index(2 * stage).reshape([_ROWS, K])
        d_last = d_tiles.index(2 * stage + 1).reshape([_ROWS, K])
        k = k_tiles.index(stage).reshape([_ROWS, K])
        k_rest = k_rests.index(stage).reshape([REST, K])
        v = v_tiles.index(stage).reshape([_ROWS, K])
        v_rest = v_rests.index(stage).reshape([REST, K])
        _await_and_rotate(q, q_last, k, k_rest, full.index(stage), i // STAGES & 1, cos, sin, T)
        # The gradients of the head before have left by now, and its buffers are free.
        tma.store_wait(0)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(empty.index((i + STAGES - GROUPS) % STAGES), count=1, pred=i >= GROUPS)
        # Those of the rest of the keys are kept transposed: 32 rows are too few for the matrix unit.
        sums = (
            gl.zeros([_ROWS, K], gl.float32, layout),
            gl.zeros([K, REST], gl.float32, rest_layout),
            gl.zeros([_ROWS, K], gl.float32, layout),
            gl.zeros([K, REST], gl.float32, rest_layout),
        )
        batch = head // N
        at = head % N * K
        keys = (k, k_rest, v, v_rest)
        dq, sums = _differentiate_rows(q, d, keys, weights, sums, T)
        q.store(dq.to(q.dtype))
        gl.thread_barrier()
        _rotate_back(q, 0, cos, sin, T)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(tile_desc, [batch, 0, at], q_tiles.index(2 * stage))
        dq, sums = _differentiate_rows(q_last, d_last, keys, weights, sums, T)
        dv, dv_rest, dk, dk_rest = sums
        q_last.store(dq.to(q.dtype))
        v.store(dv.to(q.dtype))
        v_rest.permute([1, 0]).store(dv_rest.to(q.dtype))
        k.store(dk.to(q.dtype))
        k_rest.permute([1, 0]).store(dk_rest.to(q.dtype))
        gl.thread_barrier()
        _rotate_back(q_last.slice(0, REST), 2, cos, sin, T)
        _rotate_back(k, 0, cos, sin, T)
        _rotate_back(k_rest, 2, cos, sin, T)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(tile_desc, [batch, _ROWS, at], q_tiles.index(2 * stage + 1))
        tma.async_copy_shared_to_global(tile_desc, [batch, 0, N * K + at], k_tiles.index(stage))
        tma.async_copy_shared_to_global(rest_desc, [batch, _ROWS, N * K + at], k_rests.index(stage))
        tma.async_copy_shared_to_global(tile_desc, [batch, 0, 2 * N * K + at], v_tiles.index(stage))
        tma.async_copy_shared_to_global(rest_desc, [batch, _ROWS, 2 * N * K + at], v_rests.index(stage))
    tma.store_wait(0)


@gluon.jit
def _backward_kernel(
    tile_desc: tma.tensor_descriptor,
    rest_desc: tma.tensor_descriptor,
    grad_desc: tma.tensor_descriptor,
    d_tile_desc: tma.tensor_descriptor,
    d_rest_desc: tma.tensor_descriptor,
    cos: gl.tensor,
    sin: gl.tensor,
    heads: gl.tensor,
    T: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Descriptors of `qkv`, of the result's gradient, and of that of `qkv`."""
    GROUPS: gl.constexpr = 2
    REST: gl.constexpr = rest_desc.block_type.shape[1]
    K: gl.constexpr = rest_desc.block_type.shape[2]
    dtype: gl.constexpr = tile_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, _ROWS, K], tile_desc.layout)
    d_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, _ROWS, K], tile_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, K], tile_desc.layout)
    k_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, REST, K], rest_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, _ROWS, K], tile_desc.layout)
    v_rest = gl.allocate_shared_memory(dtype, [STAGES, 1, REST, K], rest_desc.layout)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _ROWS], dtype)
    rest_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, REST], dtype)
    weights = gl.allocate_shared_memory(dtype, [GROUPS, _ROWS, _ROWS], tile_layout)
    weights_rest = gl.allocate_shared_memory(dtype, [GROUPS, _ROWS, REST], rest_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    work = run_of(heads)

    buffers = (q_tiles, d_tiles, k_tiles, k_rest, v_tiles, v_rest)
    barriers = (full, empty)
    descs = (d_tile_desc, d_rest_desc)
    first = (weights.index(0), weights_rest.index(0))
    second = (weights.index(1), weights_rest.index(1))
    gl.warp_specialize(
        [
            (_differentiate, (0, descs, cos, sin, buffers, first, barriers, work, T, N, STAGES, GROUPS)),
            (_differentiate, (1, descs, cos, sin, buffers, second, barriers, work, T, N, STAGES, GROUPS)),
            (_copy, ((tile_desc, rest_desc, grad_desc), buffers, barriers, work, N, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def _rest(tokens: int) -> int:
    """Rows of the second tile of keys."""
    return 32 if tokens <= 96 else 64


def _stages(tokens: int) -> int:
    """Heads that fit into shared memory: more than there are groups."""
    rows = 4 * _ROWS.value + 2 * _rest(tokens)
    return int(BUFFER_BYTES // (rows * _HEAD_SIZE * 2))


def pays_forward(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention_forward` takes these operands and is, as far as measured, the faster way."""
    return FORWARD_PAYS and _fits(qkv, num_heads)


def pays_backward(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention_backward` takes these operands and is, as far as measured, the faster way."""
    return BACKWARD_PAYS and _fits(qkv, num_heads)


def _fits(qkv: Tensor, num_heads: int) -> bool:
    """Whether the kernels take these operands, and heads are enough to fill the GPU."""
    batch, tokens, width = qkv.shape
    fits = 64 < tokens <= 128 and width == 3 * num_heads * _HEAD_SIZE and qkv.dtype in _DTYPES
    return fits and batch * num_heads >= 8 * multiprocessor_count(qkv.device)


def attention_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The result [B, T, D] of contiguous `qkv` [B, T, 3 D], in its dtype or in `dtype`: torch.float8_e4m3fn."""
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3, dtype=dtype)
    _forward_kernel[(min(batch * num_heads, multiprocessor_count(qkv.device)),)](
        descriptor(qkv, 1, _ROWS.value, _HEAD_SIZE),
        descriptor(qkv, 1, _rest(tokens), _HEAD_SIZE),
        descriptor(out, 1, _ROWS.value, _HEAD_SIZE),
        cos,
        sin,
        batch * num_heads,
        T=tokens,
        N=num_heads,
        STAGES=_stages(tokens),
        num_warps=4,
        maxnreg=_START_REGISTERS,
    )
    return out


def attention_backward(grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """The gradient of `qkv` [B, T, 3 D] from that of the result [B, T, D], both contiguous."""
    batch, tokens, _ = qkv.shape
    d_qkv = torch.empty_like(qkv)
    tile, rest = (1, _ROWS.value, _HEAD_SIZE), (1, _rest(tokens), _HEAD_SIZE)
    _backward_kernel[(min(batch * num_heads, multiprocessor_count(qkv.device)),)](
        descriptor(qkv, *tile),
        descriptor(qkv, *rest),
        descriptor(grad, *tile),
        descriptor(d_qkv, *tile),
        descriptor(d_qkv, *rest),
        cos,
        sin,
        batch * num_heads,
        T=tokens,
        N=num_heads,
        STAGES=_BACKWARD_STAGES,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
    return d_qkv
