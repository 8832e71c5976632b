"""The half of a block that mixes tokens by a gated MLP over them, for Hopper GPUs, in Gluon.

`hrm.kernels.ops.triton.mixer` calls it where it runs. How warps work together: `hrm.kernels.ops.hopper.common`.

A tile is 64 features of a sequence with all its tokens. Its program keeps it on the chip from the state to the result:
groups of four warps take tiles in turns, and while one is busy with its gates, the others keep the tensor cores busy.
Both matmuls are transposed: features are the rows, so that a thread holds the tokens or hidden units that it sums over,
and what one matmul leaves in registers is the left operand of the next. One warp copies.

Weights come in chunks of hidden units. Where all of them fit into shared memory, they stay there; else all groups of a
program do their tiles at the same time and share the chunks that stream past.

Tiles are of powers of two, and so tokens come in two pieces, `first` and `rest`: 88 tokens are 64 and 32.
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

from hrm.kernels.ops.hopper.common import BUFFER_BYTES, LOAD_REGISTERS, descriptor, multiprocessor_count, tanh

_FEATURES = gl.constexpr(64)
_GROUPS = gl.constexpr(3)
_SLOTS = gl.constexpr(3)  # tiles of the state, or of the injection, that are copied ahead
_CHUNK = 32
# All registers of a multiprocessor over four groups of four warps. Of these 512, the three groups that mix then take
# 160 each, with which they do not spill, and the one that copies keeps the least there is.
_START_REGISTERS = 128
_MIX_REGISTERS = gl.constexpr(160)
_MIN_PIECE, _MAX_PIECE = 16, 64


@gluon.jit
def _load(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
) -> None:
    x_descs, injection_descs, gate_up_descs, down_descs = descs
    x_slots, weights = buffers
    x_full, x_empty, weights_full, weights_empty, _ = barriers
    start, end, per_sequence = work
    step = 0
    group = 0
    chunk = 0
    for tile in range(start, end, gl.num_programs(0)):
        sequence = tile // per_sequence
        feature = tile % per_sequence * _FEATURES
        load_tile(x_descs, sequence, feature, x_slots, x_full, x_empty, step, _SLOTS)
        step += 1
        if injection_descs[0] is not None:
            load_tile(injection_descs, sequence, feature, x_slots, x_full, x_empty, step, _SLOTS)
            step += 1
        group = (group + 1) % _GROUPS
        due = tile == start if STAGES == CHUNKS else group == 0
        if due:
            for c in range(CHUNKS):
                stage = chunk % STAGES
                mbarrier.wait(weights_empty.index(stage), (chunk // STAGES & 1) ^ 1)
                _load_chunk(gate_up_descs, down_descs, c, weights, weights_full.index(stage), stage)
                chunk += 1


@gluon.jit
def _load_chunk(
    gate_up_descs: gl.tuple,
    down_descs: gl.tuple,
    c: gl.tensor,
    weights: gl.tuple,
    full: gl.shared_memory_descriptor,
    stage: gl.tensor,
) -> None:
    gate_up_first, gate_up_rest, down_first, down_rest = weights
    hidden = c * gate_up_descs[0].block_type.shape[1]
    FIRST: gl.constexpr = gate_up_descs[0].block_type.shape[2]
    GATE_UP_BYTES: gl.constexpr = gate_up_descs[0].block_type.nbytes + gate_up_descs[1].block_type.nbytes
    mbarrier.expect(full, GATE_UP_BYTES + down_descs[0].block_type.nbytes + down_descs[1].block_type.nbytes)
    tma.async_copy_global_to_shared(gate_up_descs[0], [0, hidden, 0], full, gate_up_first.index(stage))
    tma.async_copy_global_to_shared(gate_up_descs[1], [0, hidden, FIRST], full, gate_up_rest.index(stage))
    tma.async_copy_global_to_shared(down_descs[0], [0, hidden], full, down_first.index(stage))
    tma.async_copy_global_to_shared(down_descs[1], [FIRST, hidden], full, down_rest.index(stage))


@gluon.jit
def load_tile(
    descs: gl.tuple,
    sequence: gl.tensor,
    feature: gl.tensor,
    slots: gl.tuple,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    step: gl.tensor,
    SLOTS: gl.constexpr,
) -> None:
    """Copy the tile of a sequence that begins at a feature to a slot, its tokens in two pieces [1, T, features]."""
    first_desc, rest_desc = descs
    FIRST: gl.constexpr = first_desc.block_type.shape[1]
    slot = step % SLOTS
    mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
    mbarrier.expect(full.index(slot), first_desc.block_type.nbytes + rest_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(first_desc, [sequence, 0, feature], full.index(slot), slots[0].index(slot))
    tma.async_copy_global_to_shared(rest_desc, [sequence, FIRST, feature], full.index(slot), slots[1].index(slot))


@gluon.jit
def _transposed(buffer: gl.shared_memory_descriptor) -> Any:
    """[1, tokens, features] as [features, tokens]."""
    return buffer.reshape([buffer.type.shape[1], buffer.type.shape[2]]).permute([1, 0])


@gluon.jit
def take(
    slots: gl.tuple,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    step: gl.tensor,
    first_layout: gl.constexpr,
    rest_layout: gl.constexpr,
    SLOTS: gl.constexpr,
    INPUTS: gl.constexpr,
) -> Any:
    """A tile that `load_tile` brought into registers, [features, T] in two pieces; of two inputs their sum."""
    for i in gl.static_range(INPUTS):
        mbarrier.wait(full.index((step + i) % SLOTS), (step + i) // SLOTS & 1)
    first = _read(slots[0], step, first_layout, SLOTS, INPUTS)
    rest = _read(slots[1], step, rest_layout, SLOTS, INPUTS)
    fence_async_shared()  # orders the reads before the copy engine's next writes
    for i in gl.static_range(INPUTS):
        mbarrier.arrive(empty.index((step + i) % SLOTS), count=1)
    return first, rest


@gluon.jit
def _read(
    slots: gl.shared_memory_descriptor,
    step: gl.tensor,
    layout: gl.constexpr,
    SLOTS: gl.constexpr,
    INPUTS: gl.constexpr,
) -> Any:
    x = _transposed(slots.index(step % SLOTS)).load(layout)
    if INPUTS == 2:
        injection = _transposed(slots.index((step + 1) % SLOTS)).load(layout)
        x = (x.to(gl.float32) + injection.to(gl.float32)).to(slots.dtype)
    return x


@gluon.jit
def _await_chunk(
    full: gl.shared_memory_descriptor,
    chunk: gl.tensor,
    first_tile: gl.tensor,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
) -> Any:
    """The stage that a chunk of weights is in, as soon as it is there."""
    stage = chunk % STAGES
    if STAGES == CHUNKS:
        mbarrier.wait(full.index(stage), 0, pred=first_tile)
    else:
        mbarrier.wait(full.index(stage), chunk // STAGES & 1)
    return stage


@gluon.jit
def _project(x: gl.tuple, first: gl.shared_memory_descriptor, rest: gl.shared_memory_descriptor) -> Any:
    """Gate and up of a chunk of hidden units, [features, 2 CHUNK], on their way."""
    CHUNK: gl.constexpr = first.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * CHUNK, 16])
    acc = gl.zeros([_FEATURES, 2 * CHUNK], gl.float32, layout)
    right = first.reshape([2 * CHUNK, first.type.shape[2]]).permute([1, 0])
    acc = warpgroup_mma(x[0], right, acc, use_acc=False, is_async=True)
    right = rest.reshape([2 * CHUNK, rest.type.shape[2]]).permute([1, 0])
    return warpgroup_mma(x[1], right, acc, is_async=True)


@gluon.jit
def _gate(acc: gl.tensor, squares: gl.tensor, dtype: gl.constexpr, NORMED: gl.constexpr) -> Any:
    """Hidden units of gate and up [features, 2 CHUNK], and `squares` [features, 8] with those of half their products.

    sigmoid(g) g u = h + h tanh(g / 2) with h = g u / 2. The error of `tanh` is small beside the rounding to 16 bit.
    """
    ROWS: gl.constexpr = acc.type.shape[0]
    CHUNK: gl.constexpr = acc.type.shape[1] // 2
    gate, up = acc.reshape([ROWS, 2, CHUNK]).permute([0, 2, 1]).split()
    half_gate = 0.5 * gate
    half = half_gate * up
    if NORMED:
        sums = gl.sum((half * half).reshape([ROWS, CHUNK // 8, 8]), 1)  # a thread has every eighth column
        squares += gl.convert_layout(sums, squares.type.layout, assert_trivial=True)
    return (half + half * tanh(half_gate)).to(dtype), squares


@gluon.jit
def _add(
    inner: gl.tensor,
    down_first: gl.shared_memory_descriptor,
    down_rest: gl.shared_memory_descriptor,
    first: gl.tensor,
    rest: gl.tensor,
    use_acc: gl.tensor,
) -> Any:
    """What a chunk of hidden units adds to the tokens, on its way."""
    left = gl.convert_layout(inner, gl.DotOperandLayout(0, first.type.layout, 2))
    first = warpgroup_mma(left, down_first.permute([1, 0]), first, use_acc=use_acc, is_async=True)
    left = gl.convert_layout(inner, gl.DotOperandLayout(0, rest.type.layout, 2))
    return first, warpgroup_mma(left, down_rest.permute([1, 0]), rest, use_acc=use_acc, is_async=True)


@gluon.jit
def _store_rounded(
    tile: gl.shared_memory_descriptor,
    rounded: gl.tensor,
    sequence: gl.tensor,
    first_token: gl.constexpr,
    feature: gl.tensor,
    shape: gl.tuple,
) -> None:
    """A piece of a tile of the result, [1, tokens, features], in another format."""
    B, T, D = shape
    TOKENS: gl.constexpr = tile.type.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tokens = first_token + gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
    features = feature + gl.arange(0, _FEATURES, gl.SliceLayout(0, layout))
    at = (sequence.to(gl.int64) * T + tokens[:, None]) * D + features[None, :]
    value = tile.reshape([TOKENS, _FEATURES]).load(layout).to(rounded.dtype.element_ty)
    inside = (tokens < T)[:, None] & (features < D)[None, :] & (sequence < B)
    gl.store(rounded + at, value, inside)


@gluon.jit
def put_tile(
    descs: gl.tuple, first: gl.tensor, rest: gl.tensor, staging: gl.tuple, sequence: gl.tensor, feature: gl.tensor
) -> None:
    """A tile from registers [features, tokens] to global memory, once the last one has left `staging`."""
    FIRST: gl.constexpr = descs[0].block_type.shape[1]
    tma.store_wait(0)
    gl.thread_barrier()
    _transposed(staging[0]).store(first)
    _transposed(staging[1]).store(rest)
    fence_async_shared()
    tma.async_copy_shared_to_global(descs[0], [sequence, 0, feature], staging[0])
    tma.async_copy_shared_to_global(descs[1], [sequence, FIRST, feature], staging[1])


@gluon.jit
def _mix(
    GROUP: gl.constexpr,
    out_descs: gl.tuple,
    rounded: gl.tensor,
    saved: gl.tuple,
    buffers: gl.tuple,
    staging: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    sizes: gl.tuple,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    INPUTS: gl.constexpr,
    NORMED: gl.constexpr,
) -> None:
    """One of the groups of four warps."""
    x_slots, weights = buffers
    gate_up_first, gate_up_rest, down_first, down_rest = weights
    first_staging, rest_staging = staging[0].index(GROUP), staging[1].index(GROUP)
    total_descs, kept_descs, rstd, gate_factors = saved
    x_full, x_empty, weights_full, weights_empty, turns = barriers
    start, end, per_sequence = work
    B, T, D, G, eps = sizes
    dtype: gl.constexpr = first_staging.dtype
    FIRST: gl.constexpr = first_staging.type.shape[1]
    REST: gl.constexpr = rest_staging.type.shape[1]
    first_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, first_layout, 2)
    rest_operand: gl.constexpr = gl.DotOperandLayout(0, rest_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, first_layout)
    rest_rows_layout: gl.constexpr = gl.SliceLayout(1, rest_layout)
    squares_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [_FEATURES, 8]
    )
    programs = gl.num_programs(0)
    step = GROUP * INPUTS
    chunk = 0
    turn_phase = 1 if GROUP == 0 else 0  # The first group finds its first turn given.
    for tile in range(start + GROUP * programs, end, _GROUPS * programs):
        # Without turns, a group could wait for a slot that is two copies behind, whose parity would be the same.
        mbarrier.wait(turns.index(GROUP), turn_phase)
        turn_phase ^= 1
        x = take(x_slots, x_full, x_empty, step, first_operand, rest_operand, _SLOTS, INPUTS)
        mbarrier.arrive(turns.index((GROUP + 1) % _GROUPS), count=1)
        step += _GROUPS * INPUTS
        sequence = tile // per_sequence
        feature = tile % per_sequence * _FEATURES
        rows = feature + gl.arange(0, _FEATURES, rows_layout)
        if total_descs[0] is not None:
            put_tile(total_descs, x[0], x[1], (first_staging, rest_staging), sequence, feature)

        first_tile = tile == start + GROUP * programs
        first = gl.zeros([_FEATURES, FIRST], gl.float32, first_layout)
        rest = gl.zeros([_FEATURES, REST], gl.float32, rest_layout)
        squares = gl.zeros([_FEATURES, 8], gl.float32, squares_layout)
        for c in range(CHUNKS):
            stage = _await_chunk(weights_full, chunk, first_tile, STAGES, CHUNKS)
            acc = _project(x, gate_up_first.index(stage), gate_up_rest.index(stage))
            acc = warpgroup_mma_wait(0, deps=(acc,))
            inner, squares = _gate(acc, squares, dtype, NORMED)
            first, rest = _add(inner, down_first.index(stage), down_rest.index(stage), first, rest, c > 0)
            first, rest = warpgroup_mma_wait(0, deps=(first, rest))
            if STAGES < CHUNKS:
                mbarrier.arrive(weights_empty.index(stage), count=1)
            chunk += 1

        if NORMED:
            factors = gl.rsqrt(gl.convert_layout(gl.sum(squares, 1), rows_layout) * (4 / G) + eps)
            first = first * gl.expand_dims(factors, 1)
            rest = rest * gl.expand_dims(gl.convert_layout(factors, rest_rows_layout), 1)
            if kept_descs[0] is not None:
                gl.store(gate_factors + (sequence * D + rows), factors, (rows < D) & (sequence < B))
                put_tile(kept_descs, first.to(dtype), rest.to(dtype), (first_staging, rest_staging), sequence, feature)
        first += gl.convert_layout(x[0], first_layout).to(gl.float32)
        rest += gl.convert_layout(x[1], rest_layout).to(gl.float32)  # tokens from T on are zeros
        total = gl.sum(first * first, 1) + gl.convert_layout(gl.sum(rest * rest, 1), rows_layout)
        factors = gl.rsqrt(total / T + eps)
        first = first * gl.expand_dims(factors, 1)
        rest = rest * gl.expand_dims(gl.convert_layout(factors, rest_rows_layout), 1)
        if rstd is not None:
            gl.store(rstd + (sequence * D + rows), factors, (rows < D) & (sequence < B))
        put_tile(out_descs, first.to(dtype), rest.to(dtype), (first_staging, rest_staging), sequence, feature)
        if rounded is not None:
            _store_rounded(first_staging, rounded, sequence, 0, feature, (B, T, D))
            _store_rounded(rest_staging, rounded, sequence, FIRST, feature, (B, T, D))
    tma.store_wait(0)


@gluon.jit
def _mix_tokens_kernel(
    x_first: tma.tensor_descriptor,
    x_rest: tma.tensor_descriptor,
    injection_first: tma.tensor_descriptor,
    injection_rest: tma.tensor_descriptor,
    gate_up_first: tma.tensor_descriptor,
    gate_up_rest: tma.tensor_descriptor,
    down_first: tma.tensor_descriptor,
    down_rest: tma.tensor_descriptor,
    out_first: tma.tensor_descriptor,
    out_rest: tma.tensor_descriptor,
    rounded: gl.tensor,
    total_first: tma.tensor_descriptor,
    total_rest: tma.tensor_descriptor,
    kept_first: tma.tensor_descriptor,
    kept_rest: tma.tensor_descriptor,
    rstd: gl.tensor,
    factors: gl.tensor,
    B: gl.tensor,
    D: gl.tensor,
    eps: gl.tensor,
    T: gl.constexpr,
    G: gl.constexpr,
    STAGES: gl.constexpr,
    NORMED: gl.constexpr,
) -> None:
    dtype: gl.constexpr = x_first.dtype
    FIRST: gl.constexpr = x_first.block_type.shape[1]
    REST: gl.constexpr = x_rest.block_type.shape[1]
    CHUNK: gl.constexpr = gate_up_first.block_type.shape[1]
    CHUNKS: gl.constexpr = (G + CHUNK - 1) // CHUNK
    INPUTS: gl.constexpr = 1 if injection_first is None else 2
    x_slots = (
        gl.allocate_shared_memory(dtype, [_SLOTS, 1, FIRST, _FEATURES], x_first.layout),
        gl.allocate_shared_memory(dtype, [_SLOTS, 1, REST, _FEATURES], x_rest.layout),
    )
    weights = (
        gl.allocate_shared_memory(dtype, [STAGES, 2, CHUNK, FIRST], gate_up_first.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 2, CHUNK, REST], gate_up_rest.layout),
        gl.allocate_shared_memory(dtype, [STAGES, FIRST, CHUNK], down_first.layout),
        gl.allocate_shared_memory(dtype, [STAGES, REST, CHUNK], down_rest.layout),
    )
    staging = (
        gl.allocate_shared_memory(dtype, [_GROUPS, 1, FIRST, _FEATURES], out_first.layout),
        gl.allocate_shared_memory(dtype, [_GROUPS, 1, REST, _FEATURES], out_rest.layout),
    )
    x_full = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weights_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [_GROUPS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(_SLOTS):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(x_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(weights_full.index(stage), count=1)
        mbarrier.init(weights_empty.index(stage), count=_GROUPS)
    for group in gl.static_range(_GROUPS):
        mbarrier.init(turns.index(group), count=1)

    start = gl.program_id(0)
    per_sequence = gl.cdiv(D, _FEATURES)
    tiles = B * per_sequence
    end = tiles
    if STAGES < CHUNKS:  # All groups take all weights: tiles past the last read zeros and write nothing.
        together = _GROUPS * gl.num_programs(0)
        end = start + gl.cdiv(tiles - start, together) * together
    work = (start, end, per_sequence)
    barriers = (x_full, x_empty, weights_full, weights_empty, turns)
    buffers = (x_slots, weights)
    sizes = (B, T, D, G, eps)
    outs = (out_first, out_rest)
    saved = ((total_first, total_rest), (kept_first, kept_rest), rstd, factors)
    descs = (
        (x_first, x_rest),
        (injection_first, injection_rest),
        (gate_up_first, gate_up_rest),
        (down_first, down_rest),
    )
    gl.warp_specialize(
        [
            (_mix, (0, outs, rounded, saved, buffers, staging, barriers, work, sizes, STAGES, CHUNKS, INPUTS, NORMED)),
            (_mix, (1, outs, rounded, saved, buffers, staging, barriers, work, sizes, STAGES, CHUNKS, INPUTS, NORMED)),
            (_mix, (2, outs, rounded, saved, buffers, staging, barriers, work, sizes, STAGES, CHUNKS, INPUTS, NORMED)),
            (_load, (descs, buffers, barriers, work, STAGES, CHUNKS)),
        ],
        [4, 4, 1],
        [_MIX_REGISTERS, _MIX_REGISTERS, LOAD_REGISTERS],
    )


def _pieces(tokens: int) -> tuple[int, int]:
    first = max(_MIN_PIECE, triton.next_power_of_2(tokens) // 2)
    return first, max(_MIN_PIECE, triton.next_power_of_2(max(tokens - first, 1)))


def _stages(tokens: int, inner: int) -> int:
    """Chunks of weights that fit into shared memory beside tiles of the state and of the result."""
    width = 2 * sum(_pieces(tokens))
    room: int = BUFFER_BYTES - width * _FEATURES.value * (_SLOTS.value + _GROUPS.value)
    return min(-(-inner // _CHUNK), room // (width * 3 * _CHUNK))


def fits(state: Tensor, injection: Tensor | None, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `mix_tokens` takes these operands: in 16 bit, with rows that begin at multiples of 16 bytes."""
    operands = (state, state if injection is None else injection, gate_up, down)
    aligned = not any(operand.data_ptr() % 16 for operand in operands)
    sizes = state.shape[1] <= 2 * _MAX_PIECE and state.shape[2] % 8 == 0 and down.shape[1] % 8 == 0
    return aligned and sizes and state.dtype in (torch.bfloat16, torch.float16)


def mix_tokens(
    state: Tensor,
    injection: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    normed: bool,
    eps: float,
    rounded: Tensor | None,
    total: Tensor | None = None,
    kept: Tensor | None = None,
    rstd: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """As `hrm.kernels.ops.triton.mixer.mix_tokens_and_save`."""
    B, T, D = state.shape
    G = down.shape[1]
    if T % 8:  # its rows have to begin at multiples of 16 bytes
        gate_up = torch.nn.functional.pad(gate_up, (0, 8 - T % 8))
    both = gate_up.view(2, G, gate_up.shape[1])
    out = torch.empty_like(state)
    pieces = _pieces(T)
    width = _FEATURES.value
    tiles = B * triton.cdiv(D, width)
    _mix_tokens_kernel[(min(tiles, multiprocessor_count(state.device)),)](
        *(descriptor(state, 1, piece, width) for piece in pieces),
        *(None if injection is None else descriptor(injection, 1, piece, width) for piece in pieces),
        *(descriptor(both, 2, _CHUNK, piece) for piece in pieces),
        *(descriptor(down, piece, _CHUNK) for piece in pieces),
        *(descriptor(out, 1, piece, width) for piece in pieces),
        rounded,
        *(
            None if tensor is None else descriptor(tensor, 1, piece, width)
            for tensor in (total, kept)
            for piece in pieces
        ),
        rstd,
        factors,
        B,
        D,
        eps,
        T=T,
        G=G,
        STAGES=_stages(T, G),
        NORMED=normed,
        num_warps=4,
        maxnreg=_START_REGISTERS,
    )
    return out
