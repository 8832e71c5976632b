"""Gradients of blocks that mix tokens by a gated MLP over them, for Hopper GPUs, in Gluon.

`hrm.kernels.ops.triton.mixer_backward` calls them where they fit, and says what they compute. How warps work together:
`hrm.kernels.ops.hopper.common`.

Over tokens, for the gradient of the state, a tile is 64 features of a sequence with all its tokens, and features are
the rows: what one matmul leaves in registers is the left operand of the next. Two groups of four warps take tiles in
turns; all weights stay in shared memory. Tiles are of powers of two, and so tokens come in two parts: 88 tokens are 64
and 32.

Over features, the product with the second matrix is finished by the gate's gradient. It is bound by memory: gate and up
are copied to shared memory beside the operands, and their gradients take their place there on the way out.

Shapes: B sequences, T tokens, D features, M = B T rows, G and F inner widths of the MLPs over tokens and features.
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
    BUFFER_BYTES,
    COLUMNS,
    DTYPES,
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    run_of,
)
from hrm.kernels.ops.hopper.linear import fits_swiglu
from hrm.kernels.ops.hopper.mixer import load_tile, put_tile, take

_FEATURES = gl.constexpr(64)
_CHUNK = 32  # hidden units at a time


@gluon.jit
def _load_chunk(descs: gl.tuple, c: gl.tensor, full: gl.shared_memory_descriptor, weights: gl.tuple) -> None:
    gate_up_left, gate_up_right, down_left, down_right = descs
    CHUNK: gl.constexpr = down_left.block_type.shape[1]
    LEFT: gl.constexpr = down_left.block_type.shape[2]
    GATE_UP_BYTES: gl.constexpr = gate_up_left.block_type.nbytes + gate_up_right.block_type.nbytes
    mbarrier.expect(full, GATE_UP_BYTES + down_left.block_type.nbytes + down_right.block_type.nbytes)
    tma.async_copy_global_to_shared(gate_up_left, [0, c * CHUNK, 0], full, weights[0].index(c))
    tma.async_copy_global_to_shared(gate_up_right, [0, c * CHUNK, LEFT], full, weights[1].index(c))
    tma.async_copy_global_to_shared(down_left, [2, c * CHUNK, 0], full, weights[2].index(c))
    tma.async_copy_global_to_shared(down_right, [2, c * CHUNK, LEFT], full, weights[3].index(c))


@gluon.jit
def _flat(buffer: gl.shared_memory_descriptor) -> Any:
    """[N, rows, columns] as [N rows, columns]."""
    shape: gl.constexpr = buffer.type.shape
    return buffer.reshape([shape[0] * shape[1], shape[2]])


@gluon.jit
def _chunk(weights: gl.tuple, c: gl.tensor) -> Any:
    """A chunk of hidden units: gate, then up [2 CHUNK, tokens], and down transposed [CHUNK, tokens], in two parts."""
    return (
        _flat(weights[0].index(c)),
        _flat(weights[1].index(c)),
        _flat(weights[2].index(c)),
        _flat(weights[3].index(c)),
    )


@gluon.jit
def _state_load(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
) -> None:
    x_descs, kept_descs, dy_descs, weight_descs = descs
    slots, weights = buffers
    full, empty, weights_full, _ = barriers
    tiles, per_sequence, _ = work
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sequence = tile // per_sequence
        feature = tile % per_sequence * _FEATURES
        load_tile(x_descs, sequence, feature, slots, full, empty, step, SLOTS)
        load_tile(kept_descs, sequence, feature, slots, full, empty, step + 1, SLOTS)
        load_tile(dy_descs, sequence, feature, slots, full, empty, step + 2, SLOTS)
        if step == 0:
            for c in range(CHUNKS):
                _load_chunk(weight_descs, c, weights_full.index(c), weights)
        step += 3


@gluon.jit
def _sigmoid(x: gl.tensor) -> Any:
    beyond = 1.0 + gl.exp2(x * -1.4426950408889634)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [beyond], gl.float32, True, 1)


@gluon.jit
def _project(x: gl.tuple, d_mixed: gl.tuple, chunk: gl.tuple) -> Any:
    """Gate and up of a chunk of hidden units [features, 2 CHUNK] and the gradient of what they make of each other
    [features, CHUNK], on their way."""
    gate_up_left, gate_up_right, down_left, down_right = chunk
    CHUNK: gl.constexpr = down_left.type.shape[0]
    both_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * CHUNK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    both = gl.zeros([_FEATURES, 2 * CHUNK], gl.float32, both_layout)
    both = warpgroup_mma(x[0], gate_up_left.permute([1, 0]), both, use_acc=False, is_async=True)
    both = warpgroup_mma(x[1], gate_up_right.permute([1, 0]), both, is_async=True)
    d_inner = gl.zeros([_FEATURES, CHUNK], gl.float32, layout)
    d_inner = warpgroup_mma(d_mixed[0], down_left.permute([1, 0]), d_inner, use_acc=False, is_async=True)
    return both, warpgroup_mma(d_mixed[1], down_right.permute([1, 0]), d_inner, is_async=True)


@gluon.jit
def _gate_gradients(
    gate: gl.tensor, up: gl.tensor, d_inner: gl.tensor, share: gl.tensor, dtype: gl.constexpr, NORMED: gl.constexpr
) -> Any:
    """Gradients of gate and up."""
    sigmoid = _sigmoid(gate)
    product = gate * up
    outer = sigmoid * d_inner
    d_product = outer
    if NORMED:
        d_product = outer - share * product
    d_gate = up * d_product + (product - product * sigmoid) * outer
    return d_gate.to(dtype), (gate * d_product).to(dtype)


@gluon.jit
def _add(
    both: gl.tensor,
    d_inner: gl.tensor,
    share: gl.tensor,
    chunk: gl.tuple,
    left: gl.tensor,
    right: gl.tensor,
    NORMED: gl.constexpr,
) -> Any:
    """What a chunk of hidden units adds to the gradient of the state, on its way."""
    ROWS: gl.constexpr = both.type.shape[0]
    CHUNK: gl.constexpr = d_inner.type.shape[1]
    gate, up = both.reshape([ROWS, 2, CHUNK]).permute([0, 2, 1]).split()
    gate = gl.convert_layout(gate, d_inner.type.layout, assert_trivial=True)
    up = gl.convert_layout(up, d_inner.type.layout, assert_trivial=True)
    d_gate, d_up = _gate_gradients(gate, up, d_inner, share, chunk[0].dtype, NORMED)
    gradients = gl.join(d_gate, d_up).permute([0, 2, 1]).reshape([ROWS, 2 * CHUNK])
    operand = gl.convert_layout(gradients, gl.DotOperandLayout(0, left.type.layout, 2), assert_trivial=True)
    left = warpgroup_mma(operand, chunk[0], left, is_async=True)
    operand = gl.convert_layout(gradients, gl.DotOperandLayout(0, right.type.layout, 2), assert_trivial=True)
    return left, warpgroup_mma(operand, chunk[1], right, is_async=True)


@gluon.jit
def _state_multiply(
    GROUP: gl.constexpr,
    out_descs: gl.tuple,
    buffers: gl.tuple,
    staging: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    vectors: gl.tuple,
    sizes: gl.tuple,
    SLOTS: gl.constexpr,
    CHUNKS: gl.constexpr,
    NORMED: gl.constexpr,
) -> None:
    """One of the two groups of four warps."""
    dx_descs, d_mixed_descs = out_descs
    slots, weights = buffers
    full, empty, weights_full, turns = barriers
    tiles, per_sequence, programs = work
    rstd, factors, shares = vectors
    T, D, G = sizes
    dtype: gl.constexpr = weights[0].dtype
    CHUNK: gl.constexpr = weights[0].type.shape[2]
    LEFT: gl.constexpr = weights[0].type.shape[3]
    RIGHT: gl.constexpr = weights[1].type.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LEFT, 16])
    right_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RIGHT, 16])
    hidden_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(0, right_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    right_rows_layout: gl.constexpr = gl.SliceLayout(1, right_layout)
    step = GROUP * 3
    turn_phase = 1 if GROUP == 0 else 0  # The first group finds its first turn given.
    for tile in range(gl.program_id(0) + GROUP * programs, tiles, 2 * programs):
        first_tile = tile == gl.program_id(0) + GROUP * programs
        sequence = tile // per_sequence
        feature = tile % per_sequence * _FEATURES
        rows = feature + gl.arange(0, _FEATURES, rows_layout)
        at = sequence * D + rows
        scale = gl.load(rstd + at, rows < D, other=0.0)
        factor = scale
        if NORMED:
            factor = gl.load(factors + at, rows < D, other=0.0)
        # Without turns, a group could wait for a slot that is two copies behind, whose parity would be the same.
        mbarrier.wait(turns.index(GROUP), turn_phase)
        turn_phase ^= 1
        x = take(slots, full, empty, step, operand, right_operand, SLOTS, 1)
        kept = take(slots, full, empty, step + 1, operand, right_operand, SLOTS, 1)
        dy = take(slots, full, empty, step + 2, operand, right_operand, SLOTS, 1)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        step += 6

        kept_left = gl.convert_layout(kept[0], layout).to(gl.float32)
        kept_right = gl.convert_layout(kept[1], right_layout).to(gl.float32)
        left = gl.convert_layout(dy[0], layout).to(gl.float32)
        right = gl.convert_layout(dy[1], right_layout).to(gl.float32)
        scales = gl.expand_dims(scale, 1)
        scales_right = gl.expand_dims(gl.convert_layout(scale, right_rows_layout), 1)
        y_left = kept_left
        y_right = kept_right
        if NORMED:
            y_left = (gl.convert_layout(x[0], layout).to(gl.float32) + kept_left) * scales
            y_right = (gl.convert_layout(x[1], right_layout).to(gl.float32) + kept_right) * scales_right
        along = (gl.sum(left * y_left, 1) + gl.convert_layout(gl.sum(right * y_right, 1), rows_layout)) / T
        along_right = gl.expand_dims(gl.convert_layout(along, right_rows_layout), 1)
        # Gradients of the sum before the norm, and then of x.
        left = scales * (left - y_left * gl.expand_dims(along, 1))
        right = scales_right * (right - y_right * along_right)
        d_mixed_left = left
        d_mixed_right = right
        share = gl.expand_dims(gl.zeros([_FEATURES], gl.float32, gl.SliceLayout(1, hidden_layout)), 1)
        if NORMED:
            total = gl.sum(left * kept_left, 1) + gl.convert_layout(gl.sum(right * kept_right, 1), rows_layout)
            total = total * factor * factor / G
            gl.store(shares + at, total, rows < D)
            share = gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, hidden_layout)), 1)
            d_mixed_left = left * gl.expand_dims(factor, 1)
            d_mixed_right = right * gl.expand_dims(gl.convert_layout(factor, right_rows_layout), 1)
        d_mixed_left = d_mixed_left.to(dtype)
        d_mixed_right = d_mixed_right.to(dtype)
        put_tile(d_mixed_descs, d_mixed_left, d_mixed_right, staging, sequence, feature)
        d_mixed = gl.convert_layout(d_mixed_left, operand), gl.convert_layout(d_mixed_right, right_operand)

        mbarrier.wait(weights_full.index(0), 0, pred=first_tile)
        both, d_inner = _project(x, d_mixed, _chunk(weights, 0))
        both, d_inner = warpgroup_mma_wait(0, deps=(both, d_inner))
        for c in range(CHUNKS - 1):
            mbarrier.wait(weights_full.index(c + 1), 0, pred=first_tile)
            left, right = _add(both, d_inner, share, _chunk(weights, c), left, right, NORMED)
            both, d_inner = _project(x, d_mixed, _chunk(weights, c + 1))
            both, d_inner, left, right = warpgroup_mma_wait(0, deps=(both, d_inner, left, right))
        left, right = _add(both, d_inner, share, _chunk(weights, CHUNKS - 1), left, right, NORMED)
        left, right = warpgroup_mma_wait(0, deps=(left, right))
        put_tile(dx_descs, left.to(dtype), right.to(dtype), staging, sequence, feature)
    tma.store_wait(0)


@gluon.jit
def _state_kernel(
    x_left: tma.tensor_descriptor,
    x_right: tma.tensor_descriptor,
    kept_left: tma.tensor_descriptor,
    kept_right: tma.tensor_descriptor,
    dy_left: tma.tensor_descriptor,
    dy_right: tma.tensor_descriptor,
    gate_up_left: tma.tensor_descriptor,
    gate_up_right: tma.tensor_descriptor,
    down_left: tma.tensor_descriptor,
    down_right: tma.tensor_descriptor,
    dx_left: tma.tensor_descriptor,
    dx_right: tma.tensor_descriptor,
    d_mixed_left: tma.tensor_descriptor,
    d_mixed_right: tma.tensor_descriptor,
    rstd: gl.tensor,
    factors: gl.tensor,
    shares: gl.tensor,
    tiles: gl.tensor,
    per_sequence: gl.tensor,
    T: gl.constexpr,
    D: gl.constexpr,
    G: gl.constexpr,
    CHUNKS: gl.constexpr,
    SLOTS: gl.constexpr,
    NORMED: gl.constexpr,
) -> None:
    dtype: gl.constexpr = x_left.dtype
    LEFT: gl.constexpr = x_left.block_type.shape[1]
    RIGHT: gl.constexpr = x_right.block_type.shape[1]
    CHUNK: gl.constexpr = down_left.block_type.shape[1]
    slots = (
        gl.allocate_shared_memory(dtype, [SLOTS, 1, LEFT, _FEATURES], x_left.layout),
        gl.allocate_shared_memory(dtype, [SLOTS, 1, RIGHT, _FEATURES], x_right.layout),
    )
    weights = (
        gl.allocate_shared_memory(dtype, [CHUNKS, 2, CHUNK, LEFT], gate_up_left.layout),
        gl.allocate_shared_memory(dtype, [CHUNKS, 2, CHUNK, RIGHT], gate_up_right.layout),
        gl.allocate_shared_memory(dtype, [CHUNKS, 1, CHUNK, LEFT], down_left.layout),
        gl.allocate_shared_memory(dtype, [CHUNKS, 1, CHUNK, RIGHT], down_right.layout),
    )
    staging_left = gl.allocate_shared_memory(dtype, [2, 1, LEFT, _FEATURES], x_left.layout)
    staging_right = gl.allocate_shared_memory(dtype, [2, 1, RIGHT, _FEATURES], x_right.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for c in gl.static_range(CHUNKS):
        mbarrier.init(weights_full.index(c), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    work = (tiles, per_sequence, gl.num_programs(0))
    barriers = (full, empty, weights_full, turns)
    buffers = (slots, weights)
    outs = ((dx_left, dx_right), (d_mixed_left, d_mixed_right))
    vectors = (rstd, factors, shares)
    sizes = (T, D, G)
    first = (staging_left.index(0), staging_right.index(0))
    second = (staging_left.index(1), staging_right.index(1))
    descs_of_weights = (gate_up_left, gate_up_right, down_left, down_right)
    descs = ((x_left, x_right), (kept_left, kept_right), (dy_left, dy_right), descs_of_weights)
    gl.warp_specialize(
        [
            (_state_multiply, (0, outs, buffers, first, barriers, work, vectors, sizes, SLOTS, CHUNKS, NORMED)),
            (_state_multiply, (1, outs, buffers, second, barriers, work, vectors, sizes, SLOTS, CHUNKS, NORMED)),
            (_state_load, (descs, buffers, barriers, work, SLOTS, CHUNKS)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


@gluon.jit
def _gate_load(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    d_mixed_desc, down_desc, gate_desc, up_desc = descs
    rows_tile, ring, gates, ups = buffers
    rows_full, rows_empty, down_full, down_empty, gate_full, gate_empty, _ = barriers
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = d_mixed_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = d_mixed_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = down_desc.block_type.shape[1]
    step = 0
    rows_phase = 0
    phase = 1
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        new_rows = (tile == start) | (tile % tiles_n == 0)
        for half in gl.static_range(2):
            n = tile % tiles_n * (2 * BLOCK_N) + half * BLOCK_N
            for k in range(SLICES):
                if half == 0 and new_rows:
                    mbarrier.wait(rows_empty.index(k), rows_phase ^ 1)
                    mbarrier.expect(rows_full.index(k), d_mixed_desc.block_type.nbytes)
                    at = [m, k * BLOCK_K]
                    tma.async_copy_global_to_shared(d_mixed_desc, at, rows_full.index(k), rows_tile.index(k))
                stage = step % STAGES
                mbarrier.wait(down_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(down_full.index(stage), down_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(down_desc, [k * BLOCK_K, n], down_full.index(stage), ring.index(stage))
                step += 1
            # After the operands: the last tile may still be on its way out of this room.
            full = gate_full.index(half)
            mbarrier.wait(gate_empty.index(half), phase)
            mbarrier.expect(full, gate_desc.block_type.nbytes + up_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(gate_desc, [m, n], full, gates.index(half))
            tma.async_copy_global_to_shared(up_desc, [m, n], full, ups.index(half))
        phase ^= 1
        rows_phase ^= new_rows.to(gl.int32)


@gluon.jit
def _gate_multiply(
    HALF: gl.constexpr,
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    shares: gl.tensor,
    M: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One of the two groups of four warps, which take turns: one multiplies while the other one finishes its tile."""
    d_gate_desc, d_up_desc = descs
    rows_tile, ring, gates, ups = buffers
    rows_full, rows_empty, down_full, down_empty, gate_full, gate_empty, turns = barriers
    start, end, tiles_n = work
    dtype: gl.constexpr = gates.dtype
    BLOCK_M: gl.constexpr = rows_tile.type.shape[1]
    BLOCK_N: gl.constexpr = ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    gate_tile, up_tile = gates.index(HALF), ups.index(HALF)
    step = HALF * SLICES
    rows_phase = 0
    phase = 0
    turn_phase = 1 - HALF  # The first group finds its first turn given.
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * (2 * BLOCK_N) + HALF * BLOCK_N
        new_rows = (tile == start) | (tile % tiles_n == 0)
        last_of_rows = (tile + 1 == end) | ((tile + 1) % tiles_n == 0)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        # Besides ordering the two, a turn says that the other group has seen all stages before this tile's come full:
        # without it, the parity of `down_full` would be ambiguous.
        mbarrier.wait(turns.index(HALF), turn_phase)
        turn_phase ^= 1
        for k in range(SLICES):
            stage = step % STAGES
            mbarrier.wait(rows_full.index(k), rows_phase, pred=new_rows)
            mbarrier.wait(down_full.index(stage), step // STAGES & 1)
            acc = warpgroup_mma(rows_tile.index(k), ring.index(stage), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(down_empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            mbarrier.arrive(rows_empty.index(gl.maximum(k, 1) - 1), count=1, pred=last_of_rows & (k > 0))
            step += 1
        mbarrier.arrive(turns.index(1 - HALF), count=1)
        share = gl.expand_dims(gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, layout)), 1)
        if shares is not None:
            rows = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            share = gl.expand_dims(gl.load(shares + rows, rows < M, other=0.0), 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(down_empty.index((step + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(rows_empty.index(SLICES - 1), count=1, pred=last_of_rows)
        step += SLICES
        rows_phase ^= last_of_rows.to(gl.int32)

        mbarrier.wait(gate_full.index(HALF), phase)
        phase ^= 1
        gate = gate_tile.load(layout).to(gl.float32)
        up = up_tile.load(layout).to(gl.float32)
        d_gate, d_up = _gate_gradients(gate, up, acc, share, dtype, shares is not None)
        gate_tile.store(d_gate)
        up_tile.store(d_up)
        fence_async_shared()
        tma.async_copy_shared_to_global(d_gate_desc, [m, n], gate_tile)
        tma.async_copy_shared_to_global(d_up_desc, [m, n], up_tile)
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(gate_empty.index(HALF), count=1)


@gluon.jit
def _gate_kernel(
    d_mixed_desc: tma.tensor_descriptor,
    down_desc: tma.tensor_descriptor,
    gate_desc: tma.tensor_descriptor,
    up_desc: tma.tensor_descriptor,
    d_gate_desc: tma.tensor_descriptor,
    d_up_desc: tma.tensor_descriptor,
    shares: gl.tensor,
    M: gl.tensor,
    F: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Neighbouring tiles share their rows, which stay in shared memory; gradients of a tile take the place of what
    they are of."""
    dtype: gl.constexpr = d_mixed_desc.dtype
    BLOCK_M: gl.constexpr = d_mixed_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = d_mixed_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = down_desc.block_type.shape[1]
    rows_tile = gl.allocate_shared_memory(dtype, [SLICES, BLOCK_M, BLOCK_K], d_mixed_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], down_desc.layout)
    gates = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N], gate_desc.layout)
    ups = gl.allocate_shared_memory(dtype, [2, BLOCK_M, BLOCK_N], up_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [SLICES, 1], mbarrier.MBarrierLayout())
    rows_empty = gl.allocate_shared_memory(gl.int64, [SLICES, 1], mbarrier.MBarrierLayout())
    down_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    down_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    gate_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    gate_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(SLICES):
        mbarrier.init(rows_full.index(k), count=1)
        mbarrier.init(rows_empty.index(k), count=2)  # Both groups read the rows.
    for stage in gl.static_range(STAGES):
        mbarrier.init(down_full.index(stage), count=1)
        mbarrier.init(down_empty.index(stage), count=1)
    for half in gl.static_range(2):
        mbarrier.init(gate_full.index(half), count=1)
        mbarrier.init(gate_empty.index(half), count=1)
        mbarrier.init(turns.index(half), count=1)
    tiles_n = gl.cdiv(F, 2 * BLOCK_N)
    start, end = run_of(gl.cdiv(M, BLOCK_M) * tiles_n)
    work = (start, end, tiles_n)
    barriers = (rows_full, rows_empty, down_full, down_empty, gate_full, gate_empty, turns)
    buffers = (rows_tile, ring, gates, ups)
    outs = (d_gate_desc, d_up_desc)
    descs = (d_mixed_desc, down_desc, gate_desc, up_desc)
    gl.warp_specialize(
        [
            (_gate_multiply, (0, outs, buffers, barriers, work, shares, M, SLICES, STAGES)),
            (_gate_multiply, (1, outs, buffers, barriers, work, shares, M, SLICES, STAGES)),
            (_gate_load, (descs, buffers, barriers, work, SLICES, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


def _slots(tokens: int, hidden: int) -> int:
    """Tiles that fit into shared memory beside all weights and the tiles of two results."""
    room = BUFFER_BYTES - 2 * tokens * (3 * hidden + 2 * _FEATURES.value)
    fitting: int = room // (2 * tokens * _FEATURES.value)
    return min(8, fitting)


def fits(x: Tensor, matrices: Tensor) -> bool:
    """Whether the kernels take a state [B, T, D] and packed weights: in 16 bit, rows at multiples of 16 bytes."""
    hidden, tokens = matrices.shape[0] // 3, matrices.shape[1]
    return x.dtype in DTYPES and x.shape[2] % 8 == 0 and _slots(tokens, hidden) >= 3


def state_backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    rstd: Tensor,
    factors: Tensor | None,
    matrices: Tensor,
    parts: tuple[int, int],
    G: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `hrm.kernels.ops.triton.mixer_backward.tokens_backward`."""
    B, T, D = x.shape
    hidden, tokens = matrices.shape[0] // 3, matrices.shape[1]
    dx, d_mixed = torch.empty_like(x), torch.empty_like(x)
    shares = None if factors is None else torch.empty_like(factors)
    width = _FEATURES.value
    per_sequence = triton.cdiv(D, width)
    tiles = B * per_sequence
    weights = matrices.view(3, hidden, tokens)
    _state_kernel[(min(tiles, multiprocessor_count(x.device)),)](
        *(descriptor(tensor, 1, part, width) for tensor in (x, kept, dy) for part in parts),
        *(descriptor(weights, count, _CHUNK, part) for count in (2, 1) for part in parts),
        *(descriptor(tensor, 1, part, width) for tensor in (dx, d_mixed) for part in parts),
        rstd,
        factors,
        shares,
        tiles,
        per_sequence,
        T=T,
        D=D,
        G=G,
        CHUNKS=hidden // _CHUNK,
        SLOTS=_slots(tokens, hidden),
        NORMED=factors is not None,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
    return dx, d_mixed, shares


def fits_gate(d_mixed: Tensor, down: Tensor) -> bool:
    """Whether `gate_backward` takes rows [M, D] and a matrix [D, F]."""
    D, F = down.shape
    return d_mixed.dtype in DTYPES and fits_swiglu(D) and F % 8 == 0 and down.data_ptr() % 16 == 0


def gate_backward(d_mixed: Tensor, down: Tensor, projected: Tensor, shares: Tensor | None) -> Tensor:
    """As `hrm.kernels.ops.triton.mixer_backward.gate_backward`."""
    M, D = d_mixed.shape
    F = down.shape[1]
    d_projected = torch.empty_like(projected)
    tiles = triton.cdiv(M, ROWS) * triton.cdiv(F, 2 * COLUMNS)
    _gate_kernel[(min(tiles, multiprocessor_count(d_mixed.device)),)](
        descriptor(d_mixed, ROWS, COLUMNS),
        descriptor(down, COLUMNS, COLUMNS),
        *(descriptor(half, ROWS, COLUMNS) for of in (projected, d_projected) for half in (of[:, :F], of[:, F:])),
        shares,
        M,
        F,
        SLICES=D // COLUMNS,
        STAGES=4,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )
    return d_projected
