"""Self-attention with rotary embedding in Triton, forward and backward, straight on the fused projection.

`attention` is `hrm.kernels.naive.attention` without its two projections: the same roundings, but no copy, transpose or
rotated tensor passes through memory besides the result (long sequences also write their rotated keys once).

Shapes: B sequences, T tokens, N heads of size K, D = N K. Kernels read q, k and v out of rows of `qkv` [B, T, 3 D] and
write gradients into rows of `d_qkv` [B, T, 3 D]; a program never adds to memory that another one writes, so that
results do not depend on the order of programs. Softmax works in base 2 (one instruction on the GPU): its scale is
log2(e) / sqrt(K), and `lse` is the logarithm to base 2 of a row's normaliser.

Two forms:
- one tile: up to 128 tokens in 16 bit, one program has a whole head on chip, and the backward needs `qkv` alone;
- tiled: online softmax over tiles of keys (Milakov and Gimelshein 2018, Dao et al. 2022), on Hopper GPUs by
  `hopper_attention` where that is faster; the backward recomputes the probabilities from `lse`, once along rows for dq
  and once along columns for dk and dv.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.naive import RotaryTables

_HEAD_SIZES = (16, 32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _head_of_program(
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The tile and the head this program works on, as: tile, first row in [B T], first feature in [D], row in [B N].

    Tiles of one head are neighbours, so that they find its keys and values in the L2 cache.
    """
    program = tl.program_id(0)
    head = program // TILES
    return program % TILES, (head // N).to(tl.int64) * T, head % N * K, head.to(tl.int64)


@triton.jit
def _load(
    x: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr = True,
) -> tl.tensor:
    """`rows` of a head at `x`, [R, K]; those from T on are zeros."""
    at = x + rows[:, None] * STRIDE + tl.arange(0, K)[None, :]
    if MASKED:
        return tl.load(at, mask=(rows < T)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _load_angles(
    cos: tl.tensor, sin: tl.tensor, rows: tl.tensor, T: tl.constexpr, K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of `rows`, [R, K/2] each."""
    at = rows[:, None] * K + tl.arange(0, K // 2)[None, :]
    inside = (rows < T)[:, None]
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def _pair(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """The two halves [R, K/2] of heads as [R, K], in alternating groups of 8 features.

    Any order does where only inner products of q and k are formed. In this one the two vectors of 16 bytes that a
    thread holds are neighbours, which spares bank conflicts on the way to shared memory, and in the matrix unit's
    accumulators feature i and its partner i + K/2 meet in one thread.
    """
    R: tl.constexpr = first.shape[0]
    GROUPS: tl.constexpr = first.shape[1] // 8
    both = tl.join(tl.reshape(first, (R, GROUPS, 8)), tl.reshape(second, (R, GROUPS, 8)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (R, 16 * GROUPS))


@triton.jit
def _unpair(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Inverse of `_pair`."""
    R: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // 16
    first, second = tl.split(tl.permute(tl.reshape(x, (R, GROUPS, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(first, (R, 8 * GROUPS)), tl.reshape(second, (R, 8 * GROUPS))


@triton.jit
def _load_rotated(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """`rows` of a head of q or k, [R, K], rotated in float32 and in the order of `_pair`; as they are without cos."""
    if cos is None:
        return _load(x, rows, T, STRIDE, K)
    else:  # Triton compiles what follows a return, but not the branch not taken
        first = _load(x, rows, T, STRIDE, K // 2)
        second = _load(x + K // 2, rows, T, STRIDE, K // 2)
        c, s = _load_angles(cos, sin, rows, T, K)
        a, b = first.to(tl.float32), second.to(tl.float32)
        rotated = _pair((a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype))
        # Changes no value. It keeps the compiler from moving the step to the matrix unit's register layout up to
        # the loads, where it would carry both tables through shared memory as well.
        return tl.where((rows < T)[:, None], rotated, 0.0)


@triton.jit
def _store_unrotated(
    x: tl.tensor,
    grad: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Inverse of `_load_rotated` for the gradient [R, K]; rounded before it is rotated, as in `naive.rotate`."""
    inside = (rows < T)[:, None]
    grad = grad.to(x.dtype.element_ty)
    if cos is None:
        tl.store(x + rows[:, None] * STRIDE + tl.arange(0, K)[None, :], grad, mask=inside)
    else:
        first, second = _unpair(grad)
        c, s = _load_angles(cos, sin, rows, T, K)
        a, b = first.to(tl.float32), second.to(tl.float32)
        at = x + rows[:, None] * STRIDE + tl.arange(0, K // 2)[None, :]
        tl.store(at, (a * c + b * s).to(grad.dtype), mask=inside)
        tl.store(at + K // 2, (b * c - a * s).to(grad.dtype), mask=inside)


# ---- one tile a head


@triton.jit
def _one_tile_forward_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Keys and values [KEYS, K] stay on chip while tiles of ROWS queries pass."""
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    _, token, feature, _ = _head_of_program(T, N, K, 1)
    q_at = qkv + token * (3 * D) + feature
    keys = tl.arange(0, KEYS)
    k = _load_rotated(q_at + D, cos, sin, keys, T, 3 * D, K)
    v = _load(q_at + 2 * D, keys, T, 3 * D, K)
    for start in tl.static_range(0, T, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = _load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
        scores = tl.where((keys < T)[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
        p = tl.exp2(scores * SCALE - (tl.max(scores, 1) * SCALE)[:, None])
        mixed = tl.dot(p.to(v.dtype), v) * (1.0 / tl.sum(p, 1))[:, None]
        at = out + token * D + feature + rows[:, None] * D + tl.arange(0, K)[None, :]
        tl.store(at, mixed.to(out.dtype.element_ty), mask=(rows < T)[:, None])


@triton.jit
def _one_tile_backward_kernel(
    grad: tl.tensor,
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    d_qkv: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    _, token, feature, _ = _head_of_program(T, N, K, 1)
    q_at = qkv + token * (3 * D) + feature
    dq_at = d_qkv + token * (3 * D) + feature
    rows = tl.arange(0, ROWS)
    q = _load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
    k = _load_rotated(q_at + D, cos, sin, rows, T, 3 * D, K)
    v = _load(q_at + 2 * D, rows, T, 3 * D, K)
    d_mixed = _load(grad + token * D + feature, rows, T, D, K)
    # Queries past T are zeros with zero gradient: only keys need a mask.
    scores = tl.where((rows < T)[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
    p = tl.exp2(scores * SCALE - (tl.max(scores, 1) * SCALE)[:, None])
    p *= (1.0 / tl.sum(p, 1))[:, None]
    dv = tl.dot(tl.trans(p.to(v.dtype)), d_mixed)
    dv_at = dq_at + 2 * D + rows[:, None] * (3 * D) + tl.arange(0, K)[None, :]
    tl.store(dv_at, dv.to(v.dtype), mask=(rows < T)[:, None])
    dp = tl.dot(d_mixed, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * (K**-0.5)).to(v.dtype)
    _store_unrotated(dq_at + D, tl.dot(tl.trans(ds), q), cos, sin, rows, T, 3 * D, K)
    _store_unrotated(dq_at, tl.dot(ds, k), cos, sin, rows, T, 3 * D, K)


# ---- tiled


@triton.jit
def _rotate_keys_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rotated: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Every tile of queries reads all keys: rotating them once costs less than rotating each tile on its way in."""
    D: tl.constexpr = N * K
    tile, token, feature, _ = _head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    k = _load_rotated(qkv + token * (3 * D) + D + feature, cos, sin, rows, T, 3 * D, K)
    at = rotated + token * D + feature + rows[:, None] * D + tl.arange(0, K)[None, :]
    tl.store(at, k, mask=(rows < T)[:, None])


@triton.jit
def _attend(
    q: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    start: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax: take KEYS more keys into the running maximum, normaliser and mixture of values of each row."""
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    keys = start + tl.arange(0, KEYS)
    k = _load(k_at, keys, T, D, K, MASKED)
    v = _load(v_at, keys, T, 3 * D, K, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where((keys < T)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)
    p = tl.exp2(scores * SCALE - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
    return new_peak, total, mixed


@triton.jit
def _tiled_forward_kernel(
    qkv: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """A tile of ROWS queries; the T % KEYS last keys make a tile of REST, so that the loop needs no mask."""
    D: tl.constexpr = N * K
    FULL: tl.constexpr = T - T % KEYS
    tile, token, feature, head = _head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_at = qkv + token * (3 * D) + feature
    k_at = k + token * D + feature
    v_at = q_at + 2 * D
    q = _load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, K), tl.float32)
    for start in range(0, FULL, KEYS):
        peak, total, mixed = _attend(q, k_at, v_at, start, peak, total, mixed, T, K, D, KEYS, False)
    if FULL < T:
        peak, total, mixed = _attend(q, k_at, v_at, FULL, peak, total, mixed, T, K, D, REST, True)
    inside = rows < T
    at = out + token * D + feature + rows[:, None] * D + tl.arange(0, K)[None, :]
    tl.store(at, (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    if lse is not None:
        tl.store(lse + head * T + rows, peak + tl.log2(total), mask=inside)


@triton.jit
def _add_dq(
    dq: tl.tensor,
    q: tl.tensor,
    d_mixed: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    start: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    keys = start + tl.arange(0, KEYS)
    k = _load(k_at, keys, T, D, K, MASKED)
    v = _load(v_at, keys, T, 3 * D, K, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None])
    if MASKED:
        p = tl.where((keys < T)[None, :], p, 0.0)
    ds = p * (tl.dot(d_mixed, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _tiled_dq_kernel(
    grad: tl.tensor,
    qkv: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    d_qkv: tl.tensor,
    rotated_q: tl.tensor,
    row_statistics: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """dq of a tile of ROWS queries, and what `_tiled_dk_dv_kernel` reads of them: rotated rows and statistics."""
    D: tl.constexpr = N * K
    FULL: tl.constexpr = T - T % KEYS
    tile, token, feature, head = _head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    q_at = qkv + token * (3 * D) + feature
    k_at = k + token * D + feature
    v_at = q_at + 2 * D
    q = _load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
    at = token * D + feature + rows[:, None] * D + tl.arange(0, K)[None, :]
    tl.store(rotated_q + at, q, mask=inside[:, None])
    d_mixed = _load(grad + token * D + feature, rows, T, D, K)
    mixed = _load(out + token * D + feature, rows, T, D, K)
    delta = tl.sum(d_mixed.to(tl.float32) * mixed.to(tl.float32), 1)
    lse_of_rows = tl.load(lse + head * T + rows, mask=inside, other=0.0)
    statistics_at = row_statistics + (head * T + rows) * 4
    tl.store(statistics_at, lse_of_rows, mask=inside)
    tl.store(statistics_at + 2, delta, mask=inside)
    dq = tl.zeros((ROWS, K), tl.float32)
    for start in range(0, FULL, KEYS):
        dq = _add_dq(dq, q, d_mixed, lse_of_rows, delta, k_at, v_at, start, T, K, D, KEYS, False)
    if FULL < T:
        dq = _add_dq(dq, q, d_mixed, lse_of_rows, delta, k_at, v_at, FULL, T, K, D, REST, True)
    _store_unrotated(d_qkv + token * (3 * D) + feature, dq * (K**-0.5), cos, sin, rows, T, 3 * D, K)


@triton.jit
def _add_dk_dv(
    dk: tl.tensor,
    dv: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_at: tl.tensor,
    d_mixed_at: tl.tensor,
    statistics_at: tl.tensor,
    start: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scores are transposed, [keys, ROWS], so that probabilities enter the next product from registers."""
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    rows = start + tl.arange(0, ROWS)
    q = _load(q_at, rows, T, D, K, MASKED)
    d_mixed = _load(d_mixed_at, rows, T, D, K, MASKED)
    statistics = _load(statistics_at, rows, T, 4, 4, MASKED)
    kept, _ = tl.split(tl.reshape(statistics, (ROWS, 2, 2)))
    lse, delta = tl.split(kept)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE - lse[None, :])
    dv = tl.dot(p.to(v.dtype), d_mixed, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(d_mixed), input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds.to(v.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _tiled_dk_dv_kernel(
    grad: tl.tensor,
    qkv: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rotated_q: tl.tensor,
    row_statistics: tl.tensor,
    d_qkv: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """dk and dv of a tile of KEYS keys; the T % ROWS last queries make a tile of REST."""
    D: tl.constexpr = N * K
    FULL: tl.constexpr = T - T % ROWS
    tile, token, feature, head = _head_of_program(T, N, K, TILES)
    keys = tile * KEYS + tl.arange(0, KEYS)
    k_tile = _load(k + token * D + feature, keys, T, D, K)
    v_tile = _load(qkv + token * (3 * D) + 2 * D + feature, keys, T, 3 * D, K)
    q_at = rotated_q + token * D + feature
    d_mixed_at = grad + token * D + feature
    statistics_at = row_statistics + head * (T * 4)
    dk = tl.zeros((KEYS, K), tl.float32)
    dv = tl.zeros((KEYS, K), tl.float32)
    for start in range(0, FULL, ROWS):
        dk, dv = _add_dk_dv(dk, dv, k_tile, v_tile, q_at, d_mixed_at, statistics_at, start, T, K, D, ROWS, False)
    if FULL < T:
        dk, dv = _add_dk_dv(dk, dv, k_tile, v_tile, q_at, d_mixed_at, statistics_at, FULL, T, K, D, REST, True)
    dk_at = d_qkv + token * (3 * D) + D + feature
    at = dk_at + D + keys[:, None] * (3 * D) + tl.arange(0, K)[None, :]
    tl.store(at, dv.to(v_tile.dtype), mask=(keys < T)[:, None])
    _store_unrotated(dk_at, dk * (K**-0.5), cos, sin, keys, T, 3 * D, K)


# ---- the first token alone


@triton.jit
def _first_token_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """A head of one query. Bound by reading `kv`: products in float32, without matrix units, take less time."""
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = _LOG2_E * K**-0.5
    _, token, feature, head = _head_of_program(T, N, K, 1)
    k_at = kv + token * (2 * D) + feature
    q_at = q + head * K + tl.arange(0, K // 2)
    first = tl.load(q_at).to(tl.float32)[None, :] * SCALE
    second = tl.load(q_at + K // 2).to(tl.float32)[None, :] * SCALE
    peak = float("-inf")
    total = 0.0
    mixed = tl.zeros((K,), tl.float32)
    for start in range(0, T, KEYS):
        keys = start + tl.arange(0, KEYS)
        a = _load(k_at, keys, T, 2 * D, K // 2).to(tl.float32)
        b = _load(k_at + K // 2, keys, T, 2 * D, K // 2).to(tl.float32)
        v = _load(k_at + D, keys, T, 2 * D, K).to(tl.float32)
        products = first * a + second * b
        if cos is not None:
            c, s = _load_angles(cos, sin, keys, T, K)
            products = products * c + (second * a - first * b) * s
        scores = tl.where(keys < T, tl.sum(products, 1), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        p = tl.exp2(scores - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 0)
        mixed = mixed * shrink + tl.sum(p[:, None] * v, 0)
        peak = new_peak
    tl.store(out + head * K + tl.arange(0, K), mixed / total)


# ---- launchers


def _one_tile_holds(qkv: Tensor) -> bool:
    """Whether a head fits on chip. In float32 it would, but only without matrix units, and far from fast."""
    return qkv.shape[1] <= 128 and qkv.element_size() == 2


def _sizes(qkv: Tensor, num_heads: int) -> dict[str, int]:
    return {"T": qkv.shape[1], "N": num_heads, "K": qkv.shape[2] // (3 * num_heads)}


def _empty_result(qkv: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3, dtype=dtype)


def _tile_rows(tokens: int, most: int) -> int:
    """Rows of a tile for `tokens`: a power of two, as Triton asks, and at least 16, as matrix units ask."""
    return min(most, max(16, 1 << (tokens - 1).bit_length()))


def _one_tile_forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, dtype: torch.dtype | None = None
) -> Tensor:
    tokens = qkv.shape[1]
    sizes = _sizes(qkv, num_heads)
    out = _empty_result(qkv, dtype)
    _one_tile_forward_kernel[(qkv.shape[0] * num_heads,)](
        qkv,
        cos,
        sin,
        out,
        **sizes,
        # 64 queries are the least that Hopper's matrix unit takes, and leave registers for 4 programs on an SM.
        ROWS=_tile_rows(tokens, 64),
        KEYS=_tile_rows(tokens, 128),
        num_warps=4,
        maxnreg=128 if sizes["K"] <= 64 else None,
    )
    return out


def _one_tile_backward(grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    sizes = _sizes(qkv, num_heads)
    rows = _tile_rows(sizes["T"], 128)
    d_qkv = torch.empty_like(qkv)
    _one_tile_backward_kernel[(qkv.shape[0] * num_heads,)](
        grad,
        qkv,
        cos,
        sin,
        d_qkv,
        **sizes,
        ROWS=rows,
        num_warps=8 if sizes["K"] > 64 and rows == 128 else 4,
    )
    return d_qkv


def _tiles(qkv: Tensor, num_heads: int, kept: int, streamed: int) -> dict[str, int]:
    """Sizes for a grid of one program per `kept` tokens of a head, past which all its tokens stream in tiles."""
    sizes = _sizes(qkv, num_heads)
    return sizes | {"TILES": triton.cdiv(sizes["T"], kept), "REST": _tile_rows(sizes["T"] % streamed, streamed)}


def _resources(qkv: Tensor, num_heads: int) -> dict[str, int]:
    """Warps, pipeline stages and registers of a tiled program.

    Capped at 128 registers a thread, 4 programs share a Hopper SM and hide each other's latency; below 128 the
    compiler serialises matrix products. Heads of 128 features, and float32, need more than that.
    """
    if qkv.element_size() == 4 or _sizes(qkv, num_heads)["K"] > 64:
        return {"num_warps": 4, "num_stages": 2}
    return {"num_warps": 4, "num_stages": 3, "maxnreg": 128}


def _rotate_keys(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    """k [B, T, D], rotated, in the kernels' order of features."""
    rotated = _empty_result(qkv)
    tiles = triton.cdiv(qkv.shape[1], 32)
    _rotate_keys_kernel[(qkv.shape[0] * num_heads * tiles,)](
        qkv, cos, sin, rotated, **_sizes(qkv, num_heads), ROWS=32, TILES=tiles, num_warps=4
    )
    return rotated


def _tiled_forward(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    *,
    save_lse: bool,
    dtype: torch.dtype | None = None,
    gluon: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result and, if it is to be saved, `lse` [B, N, T]; with `gluon` by `hopper_attention` where that pays."""
    if gluon and cos is not None and sin is not None:
        from hrm.kernels.ops.hopper import (
            attention as hopper_attention,  # imported here: Gluon's interface changes with every Triton
        )

        if hopper_attention.pays(qkv, num_heads):
            return hopper_attention.attention_forward(qkv, cos, sin, num_heads, save_lse=save_lse)
    batch, tokens, _ = qkv.shape
    k = _rotate_keys(qkv, cos, sin, num_heads)
    out = _empty_result(qkv, dtype)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32) if save_lse else None
    rows = 32 if qkv.element_size() == 4 else 64
    sizes = _tiles(qkv, num_heads, kept=rows, streamed=rows)
    _tiled_forward_kernel[(batch * num_heads * sizes["TILES"],)](
        qkv, k, cos, sin, out, lse, **sizes, ROWS=rows, KEYS=rows, **_resources(qkv, num_heads)
    )
    return out, lse


def _tiled_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
) -> Tensor:
    k = _rotate_keys(qkv, cos, sin, num_heads)
    rotated_q = torch.empty_like(out)
    # lse, a gap, delta, a gap: a row of 16 bytes is what one asynchronous copy carries.
    row_statistics = lse.new_empty(*lse.shape, 4)
    d_qkv = torch.empty_like(qkv)
    # The side that a program keeps has longer tiles than the side that streams by, which costs registers twice.
    kept, streamed = (32, 32) if qkv.element_size() == 4 else (64, 32)
    sizes = _tiles(qkv, num_heads, kept, streamed) | _resources(qkv, num_heads)
    grid = (qkv.shape[0] * num_heads * sizes["TILES"],)
    _tiled_dq_kernel[grid](
        grad, qkv, k, cos, sin, out, lse, d_qkv, rotated_q, row_statistics, **sizes, ROWS=kept, KEYS=streamed
    )
    _tiled_dk_dv_kernel[grid](
        grad, qkv, k, cos, sin, rotated_q, row_statistics, d_qkv, **sizes, ROWS=streamed, KEYS=kept
    )
    return d_qkv


# ---- operators: torch.compile calls them as they are, and autograd knows how they differentiate


@torch.library.custom_op("hrm::attention", mutates_args=())
def _attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, differentiable: bool, gluon: bool
) -> tuple[Tensor, Tensor]:
    """The result and what the backward needs of it besides: `lse` for the tiled form, else nothing."""
    if _one_tile_holds(qkv):
        return _one_tile_forward(qkv, cos, sin, num_heads), qkv.new_empty(0)
    out, lse = _tiled_forward(qkv, cos, sin, num_heads, save_lse=differentiable, gluon=gluon)
    return out, qkv.new_empty(0) if lse is None else lse


@_attention.register_fake
def _attention_shapes(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, differentiable: bool, gluon: bool
) -> tuple[Tensor, Tensor]:
    if _one_tile_holds(qkv) or not differentiable:
        return _empty_result(qkv), qkv.new_empty(0)
    return _empty_result(qkv), qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1], dtype=torch.float32)


@torch.library.custom_op("hrm::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor | None, lse: Tensor, num_heads: int
) -> Tensor:
    grad = grad.contiguous()
    if out is None:
        return _one_tile_backward(grad, qkv, cos, sin, num_heads)
    return _tiled_backward(grad, qkv, cos, sin, out, lse, num_heads)


@_attention_backward.register_fake
def _attention_backward_shapes(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor | None, lse: Tensor, num_heads: int
) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, ctx.num_heads, *_ = inputs
    out, lse = output
    ctx.save_for_backward(qkv, cos, sin, None if _one_tile_holds(qkv) else out, lse)
    ctx.set_materialize_grads(False)  # lse has no gradient


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _attention_backward(grad, *ctx.saved_tensors, ctx.num_heads), *[None] * 5


_attention.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("hrm::first_token_attention", mutates_args=())
def _first_token_attention(q: Tensor, kv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    batch, tokens, _ = kv.shape
    out = torch.empty_like(q)
    head_size = q.shape[1] // num_heads
    # One warp a head, so that no sum crosses warps, and as many keys at once as its registers take.
    keys = _tile_rows(tokens, min(128, 8192 // head_size))
    _first_token_kernel[(batch * num_heads,)](
        q, kv, cos, sin, out, T=tokens, N=num_heads, K=head_size, KEYS=keys, num_warps=1
    )
    return out


@_first_token_attention.register_fake
def _first_token_shape(q: Tensor, kv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    return torch.empty_like(q)


def attention(qkv: Tensor, rotary: RotaryTables | None, num_heads: int, *, gluon: bool = False) -> Tensor:
    """Non-causal self-attention of projected tokens.

    Args:
        qkv: [B, T, 3 D], the features of all heads of q, then k, then v; bfloat16, float16 or float32.
        rotary: tables as `naive.rotary_tables` makes them (the halves of a row alike), for T tokens and heads of
            D / num_heads features, or None.
        num_heads: heads of 16, 32, 64 or 128 features.
        gluon: use the kernels made for Hopper in Gluon where they pay.

    Returns:
        [B, T, D] in the dtype of `qkv`, differentiable in `qkv`.

    Raises:
        UserError: a shape or dtype that the kernels are not made for.
    """
    _check(qkv, rotary, num_heads)
    cos, sin = (None, None) if rotary is None else rotary
    differentiable = torch.is_grad_enabled() and qkv.requires_grad
    result: Tensor = _attention(qkv.contiguous(), cos, sin, num_heads, differentiable, gluon)[0]
    return result


def attention_in_e4m3(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """The result of `attention` rounded to torch.float8_e4m3fn once, from float32; it cannot be differentiated."""
    _check(qkv, rotary, num_heads)
    qkv = qkv.contiguous()
    cos, sin = (None, None) if rotary is None else rotary
    if _one_tile_holds(qkv):
        return _one_tile_forward(qkv, cos, sin, num_heads, torch.float8_e4m3fn)
    return _tiled_forward(qkv, cos, sin, num_heads, save_lse=False, dtype=torch.float8_e4m3fn)[0]


def first_token_attention(q: Tensor, kv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """What `attention` gives for the first token of each sequence; it cannot be differentiated.

    Args:
        q: [B, D], the first token's features of all heads; position 0 turns by no angle.
        kv: [B, T, 2 D] in the dtype of `q`, the features of all heads of k, then v, of every token.
        rotary, num_heads: as for `attention`.

    Returns:
        [B, D] in the dtype of `q`.

    Raises:
        UserError: a shape or dtype that the kernel is not made for.
    """
    _check(kv, rotary, num_heads, parts=2)
    if q.dtype != kv.dtype or 2 * q.shape[-1] != kv.shape[-1] or q.shape != kv.shape[:1] + q.shape[-1:]:
        batch, _, width = kv.shape
        raise UserError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; kv needs [B, D] = {(batch, width // 2)} of {kv.dtype}."
        )
    cos, sin = (None, None) if rotary is None else rotary
    result: Tensor = _first_token_attention(q.contiguous(), kv.contiguous(), cos, sin, num_heads)
    return result


def _check(projected: Tensor, rotary: RotaryTables | None, num_heads: int, parts: int = 3) -> None:
    """Of q, k and v, `projected` [B, T, parts D] has the last `parts`."""
    name = "qkv"[-parts:]
    if projected.dtype not in _DTYPES:
        raise UserError(f"attention in Triton has no {projected.dtype} kernel; take bfloat16, float16 or float32.")
    if projected.ndim != 3 or projected.shape[-1] % (parts * num_heads):
        raise UserError(
            f"{name} has shape {tuple(projected.shape)}; "
            f"{num_heads} heads need [B, T, {parts} * {num_heads} * head size]."
        )
    tokens, head_size = projected.shape[1], projected.shape[-1] // (parts * num_heads)
    if head_size not in _HEAD_SIZES:
        raise UserError(
            f"attention in Triton has no kernel for heads of {head_size} features; "
            "choose hidden_size / num_heads among 16, 32, 64 and 128, or kernels=naive."
        )
    if rotary is not None and rotary.cos.shape != (tokens, head_size):
        raise UserError(
            f"rotary tables have shape {tuple(rotary.cos.shape)}; {name} needs (T, head size) = {(tokens, head_size)}."
        )
