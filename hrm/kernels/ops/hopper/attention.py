"""Attention forward for long sequences on Hopper GPUs, warp-specialised by hand in Gluon.

`hrm.kernels.ops.triton.attention` calls it where it pays. It is for RoPE by positions 0, 1, 2, ... alone: it reads the
tables at the first rows of a tile and carries the angles on from there.

A program walks through a run of query tiles, one head after another. The keys of a head stay in shared memory from its
first tile of queries to its last, so they are read and rotated once; its values stream past once a tile.

Five groups of warps work at the same time: one warp copies (TMA), two rotate what it copied in shared memory, and
three times four attend, each with 64 queries of its own: while one of them is busy with its softmax, the other two keep
the tensor cores busy (as FlashAttention-3 does, Shah et al. 2024).

Shapes: B sequences, T tokens, N heads of size K, D = N K. The keys and values of a head come as FULL tiles of KEYS and
one of REST, which is attended to first, so that the loop needs no mask.

Barriers in shared memory pass buffers around: `raw` (copied), `ready` (rotated too) and `empty` (the readers are done).
A wait names the parity of the phase it waits for, so nobody may run a whole phase ahead of a waiter.
"""

from __future__ import annotations

import math

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

from hrm.kernels.ops.hopper.common import BUFFER_BYTES, descriptor, multiprocessor_count, run_of

_DTYPES = (torch.bfloat16, torch.float16)
_LOG2_E = gl.constexpr(math.log2(math.e))
_HEAD_SIZE = 64
# 64 queries are the least that wgmma takes, and three groups of them waste 6 % of 901 tokens, where two waste 14 %.
_GROUPS = gl.constexpr(3)
_ROWS = gl.constexpr(64)
_KEYS = 128
_PIECE = gl.constexpr(16)  # rows that two warps rotate at a time
# All registers of a multiprocessor over four groups of four warps. Of these 512, the three groups that attend then take
# 136 each, with which they do not spill, and leave 104 to those that rotate and copy.
_START_REGISTERS = 128
_ATTEND_REGISTERS = gl.constexpr(136)
_FEED_REGISTERS = gl.constexpr(104)
_MOST_STAGES = 4


@gluon.jit
def _head(tile: gl.tensor, TILES: gl.constexpr, N: gl.constexpr) -> gl.tuple:
    """Sequence and head of a tile of queries, and the first of its rows."""
    head = tile // TILES
    return head // N, head % N, tile % TILES * (_GROUPS * _ROWS)


@gluon.jit
def _copy_queries(
    tile: gl.tensor,
    start: gl.tensor,
    q_desc: tma.tensor_descriptor,
    q_tiles: gl.shared_memory_descriptor,
    q_raw: gl.shared_memory_descriptor,
    q_empty: gl.shared_memory_descriptor,
    TILES: gl.constexpr,
    N: gl.constexpr,
) -> None:
    K: gl.constexpr = q_desc.block_type.shape[2]
    batch, head, row = _head(tile, TILES, N)
    slot = (tile - start) % 2
    mbarrier.wait(q_empty.index(slot), ((tile - start) // 2 & 1) ^ 1)
    mbarrier.expect(q_raw.index(slot), _GROUPS * q_desc.block_type.nbytes)
    for group in gl.static_range(_GROUPS):
        at = [batch, row + group * _ROWS, head * K]
        tma.async_copy_global_to_shared(q_desc, at, q_raw.index(slot), q_tiles.index(slot * _GROUPS + group))


@gluon.jit
def _copy_tile(
    desc: tma.tensor_descriptor,
    at: gl.tuple,
    buffer: gl.shared_memory_descriptor,
    raw: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    phase: gl.tensor,
) -> None:
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(raw, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [at[0], at[1], at[2]], raw, buffer)


@gluon.jit
def _copy(
    descs: gl.tuple,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    TILES: gl.constexpr,
    N: gl.constexpr,
    FULL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    q_desc, kv_desc, rest_desc = descs
    q_tiles, k_tiles, k_rest, v_tiles, v_rest = buffers
    q_raw, q_empty, k_raw, k_empty, v_raw, v_empty = barriers
    start, end = work
    K: gl.constexpr = q_desc.block_type.shape[2]
    KEYS: gl.constexpr = kv_desc.block_type.shape[1]
    REST_AT: gl.constexpr = FULL * KEYS
    batch, head, row = _head(start, TILES, N)
    at = (batch, REST_AT, (N + head) * K)
    _copy_queries(start, start, q_desc, q_tiles, q_raw, q_empty, TILES, N)
    _copy_tile(rest_desc, at, k_rest, k_raw.index(FULL), k_empty.index(FULL), 0)
    phase = 0
    step = 0
    for tile in range(start, end):
        batch, head, row = _head(tile, TILES, N)
        next_batch, next_head, next_row = _head(tile + 1, TILES, N)
        new_head = (row == 0) & (tile > start)
        new_next = (next_row == 0) & (tile + 1 < end)
        k_at = (N + head) * K
        next_k_at = (N + next_head) * K
        v_at = (2 * N + head) * K
        at = (batch, REST_AT, v_at)
        _copy_tile(rest_desc, at, v_rest, v_raw.index(STAGES), v_empty.index(STAGES), tile - start & 1)
        for j in range(FULL):
            if tile == start:
                at = (batch, j * KEYS, k_at)
                _copy_tile(kv_desc, at, k_tiles.index(j), k_raw.index(j), k_empty.index(j), 0)
            stage = step % STAGES
            at = (batch, j * KEYS, v_at)
            v_phase = step // STAGES & 1
            _copy_tile(kv_desc, at, v_tiles.index(stage), v_raw.index(stage), v_empty.index(stage), v_phase)
            step += 1
            # These values found room, so the keys STAGES steps back have been read. If that was for the last time, the
            # next head's take their place: most during this head's last tile, the last STAGES during the first after.
            if (j >= STAGES) & new_next:
                i = j - STAGES
                at = (next_batch, i * KEYS, next_k_at)
                _copy_tile(kv_desc, at, k_tiles.index(i), k_raw.index(i), k_empty.index(i), phase ^ 1)
            if (j < STAGES) & new_head:
                i = j + FULL - STAGES
                at = (batch, i * KEYS, k_at)
                _copy_tile(kv_desc, at, k_tiles.index(i), k_raw.index(i), k_empty.index(i), phase)
            if (j == STAGES - 1) & (tile + 1 < end):
                _copy_queries(tile + 1, start, q_desc, q_tiles, q_raw, q_empty, TILES, N)
                if new_next:
                    at = (next_batch, REST_AT, next_k_at)
                    _copy_tile(rest_desc, at, k_rest, k_raw.index(FULL), k_empty.index(FULL), phase ^ 1)
        phase ^= new_next.to(gl.int32)


@gluon.jit
def _load_angles(cos: gl.tensor, sin: gl.tensor, rows: gl.tensor, T: gl.constexpr, layout: gl.constexpr) -> gl.tuple:
    """cos and sin of `rows` [R], both [R, K/2]."""
    HALF: gl.constexpr = layout.shape[1]
    at = rows[:, None] * (2 * HALF) + gl.arange(0, HALF, gl.SliceLayout(0, layout))[None, :]
    inside = (rows < T)[:, None]
    return gl.load(cos + at, inside, 0.0), gl.load(sin + at, inside, 0.0)


@gluon.jit
def _rotate_rows(
    tile: gl.shared_memory_descriptor,
    start: gl.tensor,
    c_step: gl.tensor,
    s_step: gl.tensor,
    cos: gl.tensor,
    sin: gl.tensor,
    T: gl.constexpr,
) -> None:
    """Rotate `tile` [R, K] in place; `start` is the position of its first row."""
    R: gl.constexpr = tile.shape[0]
    K: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = c_step.type.layout
    # A thread has both halves of a row, and eight threads on one another's rows read different banks.
    whole: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, K // 2]], [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]], [[8, 0]], [], [_PIECE, K]
    )
    c, s = _load_angles(cos, sin, start + gl.arange(0, _PIECE, gl.SliceLayout(1, layout)), T, layout)
    for i in gl.static_range(R // _PIECE):
        part = tile.slice(i * _PIECE, _PIECE)
        first, second = part.load(whole).reshape([_PIECE, 2, K // 2]).permute([0, 2, 1]).split()
        a = gl.convert_layout(first, layout, assert_trivial=True).to(gl.float32)
        b = gl.convert_layout(second, layout, assert_trivial=True).to(gl.float32)
        both = gl.join((a * c - b * s).to(tile.dtype), (b * c + a * s).to(tile.dtype))
        part.store(both.permute([0, 2, 1]).reshape([_PIECE, K]))
        c, s = c * c_step - s * s_step, s * c_step + c * s_step
    fence_async_shared()


@gluon.jit
def _rotate(
    cos: gl.tensor,
    sin: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    T: gl.constexpr,
    TILES: gl.constexpr,
    FULL: gl.constexpr,
) -> None:
    q_tiles, k_tiles, k_rest = buffers
    q_raw, q_ready, k_raw, k_ready = barriers
    start, end = work
    KEYS: gl.constexpr = k_tiles.shape[2]
    REST: gl.constexpr = k_rest.shape[1]
    K: gl.constexpr = k_rest.shape[2]
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]], [[8, 0]], [], [_PIECE, K // 2]
    )
    # Waiting for rows of the tables at every piece would take longer than all the rest. Only those of a tile's first
    # piece are read, and carried on by what angles grow by over a piece: the angle of position `_PIECE`.
    ahead = gl.full([_PIECE], _PIECE, gl.int32, gl.SliceLayout(1, layout))
    c_step, s_step = _load_angles(cos, sin, ahead, T, layout)
    k_phase = 0
    for tile in range(start, end):
        row = tile % TILES * (_GROUPS * _ROWS)
        slot = (tile - start) % 2
        new_head = (tile == start) | (row == 0)
        mbarrier.wait(q_raw.index(slot), (tile - start) // 2 & 1)
        for group in range(_GROUPS):
            q = q_tiles.index(slot * _GROUPS + group).reshape([_ROWS, K])
            _rotate_rows(q, row + group * _ROWS, c_step, s_step, cos, sin, T)
        mbarrier.arrive(q_ready.index(slot), count=1)
        if new_head:
            mbarrier.wait(k_raw.index(FULL), k_phase)
            _rotate_rows(k_rest.reshape([REST, K]), FULL * KEYS, c_step, s_step, cos, sin, T)
            mbarrier.arrive(k_ready.index(FULL), count=1)
            for j in range(FULL):
                mbarrier.wait(k_raw.index(j), k_phase)
                _rotate_rows(k_tiles.index(j).reshape([KEYS, K]), j * KEYS, c_step, s_step, cos, sin, T)
                mbarrier.arrive(k_ready.index(j), count=1)
        k_phase ^= new_head.to(gl.int32)


@gluon.jit
def _attend_to_rest(
    q: gl.shared_memory_descriptor,
    k_rest: gl.shared_memory_descriptor,
    v_rest: gl.shared_memory_descriptor,
    first_key: gl.constexpr,
    T: gl.constexpr,
    out_layout: gl.constexpr,
) -> gl.tuple:
    """Peaks, totals and weighted values of the keys in the last tile, in part past the end."""
    REST: gl.constexpr = k_rest.shape[1]
    K: gl.constexpr = k_rest.shape[2]
    SCALE: gl.constexpr = _LOG2_E * K**-0.5
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    scores = gl.zeros([_ROWS, REST], gl.float32, layout)
    scores = warpgroup_mma(q, k_rest.reshape([REST, K]).permute([1, 0]), scores, use_acc=False)
    keys = first_key + gl.arange(0, REST, gl.SliceLayout(0, layout))
    scores = gl.where((keys < T)[None, :], scores, float("-inf"))
    peak = gl.max(scores, 1)
    p = gl.exp2(scores * SCALE - (peak * SCALE)[:, None])
    total = gl.convert_layout(gl.sum(p, 1), rows_layout)
    weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, out_layout, 2))
    mixed = gl.zeros([_ROWS, K], gl.float32, out_layout)
    mixed = warpgroup_mma(weights, v_rest.reshape([REST, K]), mixed, use_acc=False)
    return gl.convert_layout(peak, rows_layout), total, mixed


@gluon.jit
def _attend(
    GROUP: gl.constexpr,
    out_desc: tma.tensor_descriptor,
    lse: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    T: gl.constexpr,
    TILES: gl.constexpr,
    N: gl.constexpr,
    FULL: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The online softmax of `_ROWS` queries a tile, in base 2."""
    q_tiles, k_tiles, k_rest, v_tiles, v_rest = buffers
    q_ready, q_empty, k_ready, k_empty, v_raw, v_empty = barriers
    start, end = work
    dtype: gl.constexpr = k_rest.dtype
    KEYS: gl.constexpr = k_tiles.shape[2]
    K: gl.constexpr = k_rest.shape[2]
    SCALE: gl.constexpr = _LOG2_E * K**-0.5
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    k_phase = 0
    step = 0
    for tile in range(start, end):
        batch, head, row = _head(tile, TILES, N)
        row += GROUP * _ROWS
        slot = (tile - start) % 2
        last_of_head = (tile + 1 == end) | ((tile + 1) % TILES == 0)
        q_tile = q_tiles.index(slot * _GROUPS + GROUP)
        q = q_tile.reshape([_ROWS, K])
        mbarrier.wait(q_ready.index(slot), (tile - start) // 2 & 1)

        mbarrier.wait(k_ready.index(FULL), k_phase)
        mbarrier.wait(v_raw.index(STAGES), tile - start & 1)
        peak, total, mixed = _attend_to_rest(q, k_rest, v_rest, FULL * KEYS, T, out_layout)
        mbarrier.arrive(k_empty.index(FULL), count=1, pred=last_of_head)
        mbarrier.arrive(v_empty.index(STAGES), count=1)
        # Frees the buffer of the tile before this one, from which its result has been copied meanwhile.
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(q_empty.index(1 - slot), count=1, pred=tile > start)
        for j in range(FULL):
            mbarrier.wait(k_ready.index(j), k_phase)
            scores = gl.zeros([_ROWS, KEYS], gl.float32, scores_layout)
            k = k_tiles.index(j).reshape([KEYS, K]).permute([1, 0])
            scores = warpgroup_mma(q, k, scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(j), count=1, pred=last_of_head)
            peak, total, shrink, p = _weights(scores, peak, total, SCALE, rows_layout, p_layout, dtype)
            stage = step % STAGES
            mbarrier.wait(v_raw.index(stage), step // STAGES & 1)
            v = v_tiles.index(stage).reshape([KEYS, K])
            mixed = warpgroup_mma(p, v, mixed * shrink[:, None], is_async=True)
            mixed = warpgroup_mma_wait(0, deps=(mixed,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            step += 1

        # The result leaves from where its queries were, of which it takes no more bytes.
        result = q_tile._reinterpret(out_desc.dtype, out_desc.block_type.shape, out_desc.layout)
        result.reshape([_ROWS, K]).store((mixed * (1.0 / total)[:, None]).to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, row, head * K], result)
        if lse is not None:
            rows = row + gl.arange(0, _ROWS, rows_layout)
            gl.store(lse + (tile // TILES).to(gl.int64) * T + rows, peak * SCALE + gl.log2(total), rows < T)
        k_phase ^= last_of_head.to(gl.int32)
    tma.store_wait(0)


@gluon.jit
def _weights(
    scores: gl.tensor,
    peak: gl.tensor,
    total: gl.tensor,
    SCALE: gl.constexpr,
    rows_layout: gl.constexpr,
    p_layout: gl.constexpr,
    dtype: gl.constexpr,
) -> gl.tuple:
    """A step of online softmax: the rows' peak and total, what earlier sums shrink by, and weights as an operand."""
    new_peak = gl.maximum(peak, gl.convert_layout(gl.max(scores, 1), rows_layout))
    shrink = gl.exp2((peak - new_peak) * SCALE)
    shift = gl.convert_layout(new_peak * SCALE, gl.SliceLayout(1, scores.type.layout))
    p = gl.exp2(scores * SCALE - shift[:, None])
    total = total * shrink + gl.convert_layout(gl.sum(p, 1), rows_layout)
    return new_peak, total, shrink, gl.convert_layout(p.to(dtype), p_layout)


@gluon.jit
def _forward_kernel(
    q_desc: tma.tensor_descriptor,
    kv_desc: tma.tensor_descriptor,
    rest_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    cos: gl.tensor,
    sin: gl.tensor,
    lse: gl.tensor,
    heads: gl.tensor,
    T: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    KEYS: gl.constexpr = kv_desc.block_type.shape[1]
    REST: gl.constexpr = rest_desc.block_type.shape[1]
    K: gl.constexpr = q_desc.block_type.shape[2]
    FULL: gl.constexpr = (T - 1) // KEYS
    TILES: gl.constexpr = (T + _GROUPS * _ROWS - 1) // (_GROUPS * _ROWS)
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2 * _GROUPS, 1, _ROWS, K], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [FULL, 1, KEYS, K], kv_desc.layout)
    k_rest = gl.allocate_shared_memory(dtype, [1, REST, K], rest_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, K], kv_desc.layout)
    v_rest = gl.allocate_shared_memory(dtype, [1, REST, K], rest_desc.layout)
    q_raw = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    # The last of each is for the tile of REST.
    k_raw = gl.allocate_shared_memory(gl.int64, [FULL + 1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [FULL + 1, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [FULL + 1, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_raw.index(slot), count=1)
        mbarrier.init(q_ready.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=_GROUPS)
    for j in gl.static_range(FULL + 1):
        mbarrier.init(k_raw.index(j), count=1)
        mbarrier.init(k_ready.index(j), count=1)
        mbarrier.init(k_empty.index(j), count=_GROUPS)
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(v_raw.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=_GROUPS)
    start, end = run_of(heads * TILES)

    work = (start, end)
    descs = (q_desc, kv_desc, rest_desc)
    buffers = (q_tiles, k_tiles, k_rest, v_tiles, v_rest)
    attending = (q_ready, q_empty, k_ready, k_empty, v_raw, v_empty)
    rotating = (q_raw, q_ready, k_raw, k_ready)
    copying = (q_raw, q_empty, k_raw, k_empty, v_raw, v_empty)
    gl.warp_specialize(
        [
            (_attend, (0, out_desc, lse, buffers, attending, work, T, TILES, N, FULL, STAGES)),
            (_attend, (1, out_desc, lse, buffers, attending, work, T, TILES, N, FULL, STAGES)),
            (_attend, (2, out_desc, lse, buffers, attending, work, T, TILES, N, FULL, STAGES)),
            (_rotate, (cos, sin, (q_tiles, k_tiles, k_rest), rotating, work, T, TILES, FULL)),
            (_copy, (descs, buffers, copying, work, TILES, N, FULL, STAGES)),
        ],
        [4, 4, 2, 1],
        [_ATTEND_REGISTERS, _ATTEND_REGISTERS, _FEED_REGISTERS, _FEED_REGISTERS],
    )


def _rest(tokens: int) -> int:
    """Rows of the last tile of keys: a power of two, and 16 at least, as wgmma asks."""
    return int(max(16, triton.next_power_of_2((tokens - 1) % _KEYS + 1)))


def _stages(tokens: int) -> int:
    """Tiles of values that fit into shared memory beside all keys of a head and two tiles of queries."""
    row = 2 * _HEAD_SIZE
    taken = (tokens - 1) // _KEYS * _KEYS + 2 * _rest(tokens) + 2 * _GROUPS.value * _ROWS.value
    return int(min(_MOST_STAGES, (BUFFER_BYTES - taken * row) // (_KEYS * row)))


def _programs(batch: int, tokens: int, num_heads: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs share the tiles of queries, each at least one, and how many tiles are the most of a program."""
    tiles = batch * num_heads * triton.cdiv(tokens, _GROUPS.value * _ROWS.value)
    most = triton.cdiv(tiles, multiprocessors)
    return triton.cdiv(tiles, most), most


def pays(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention_forward` takes these operands and is, as far as measured, the faster way."""
    batch, tokens, width = qkv.shape
    # STAGES full tiles of keys at least, which `_copy` counts on, and all of them in shared memory.
    long_enough = (tokens - 1) // _KEYS >= _MOST_STAGES and _stages(tokens) >= 2
    if not long_enough or width != 3 * num_heads * _HEAD_SIZE or qkv.dtype not in _DTYPES:
        return False
    # With fewer tiles to a program, most of its time would go into copying and rotating keys.
    return _programs(batch, tokens, num_heads, multiprocessor_count(qkv.device))[1] >= 4


def attention_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *, save_lse: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The result [B, T, D] of contiguous `qkv` [B, T, 3 D] and, if it is to be saved, `lse` [B, N, T] in base 2.

    The result is in the dtype of `qkv`, or in `dtype`: torch.float8_e4m3fn.
    """
    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, width // 3, dtype=dtype)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32) if save_lse else None
    programs, _ = _programs(batch, tokens, num_heads, multiprocessor_count(qkv.device))
    _forward_kernel[(programs,)](
        descriptor(qkv, 1, _ROWS.value, _HEAD_SIZE),
        descriptor(qkv, 1, _KEYS, _HEAD_SIZE),
        descriptor(qkv, 1, _rest(tokens), _HEAD_SIZE),
        descriptor(out, 1, _ROWS.value, _HEAD_SIZE),
        cos,
        sin,
        lse,
        batch * num_heads,
        T=tokens,
        N=num_heads,
        STAGES=_stages(tokens),
        num_warps=4,
        maxnreg=_START_REGISTERS,
    )
    return out, lse
