"""Attention to any number of tokens: online softmax over tiles of keys (Milakov and Gimelshein 2018, Dao et al. 2022).

On Hopper GPUs the forward is `hrm.kernels.ops.hopper.attention` where that is faster. The backward recomputes the
probabilities from `lse`, once along rows for dq and once along columns for dk and dv. Shapes and conventions: see the
package.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.triton.attention.common import (
    LOG2_E,
    empty_result,
    head_of_program,
    load_head,
    load_rotated,
    shape_constants,
    store_unrotated,
)
from hrm.kernels.ops.triton.common import tile_rows


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
    tile, token, feature, _ = head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    k = load_rotated(qkv + token * (3 * D) + D + feature, cos, sin, rows, T, 3 * D, K)
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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    keys = start + tl.arange(0, KEYS)
    k = load_head(k_at, keys, T, D, K, MASKED)
    v = load_head(v_at, keys, T, 3 * D, K, MASKED)
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
    tile, token, feature, head = head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_at = qkv + token * (3 * D) + feature
    k_at = k + token * D + feature
    v_at = q_at + 2 * D
    q = load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    keys = start + tl.arange(0, KEYS)
    k = load_head(k_at, keys, T, D, K, MASKED)
    v = load_head(v_at, keys, T, 3 * D, K, MASKED)
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
    tile, token, feature, head = head_of_program(T, N, K, TILES)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    q_at = qkv + token * (3 * D) + feature
    k_at = k + token * D + feature
    v_at = q_at + 2 * D
    q = load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
    at = token * D + feature + rows[:, None] * D + tl.arange(0, K)[None, :]
    tl.store(rotated_q + at, q, mask=inside[:, None])
    d_mixed = load_head(grad + token * D + feature, rows, T, D, K)
    mixed = load_head(out + token * D + feature, rows, T, D, K)
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
    store_unrotated(d_qkv + token * (3 * D) + feature, dq * (K**-0.5), cos, sin, rows, T, 3 * D, K)


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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    rows = start + tl.arange(0, ROWS)
    q = load_head(q_at, rows, T, D, K, MASKED)
    d_mixed = load_head(d_mixed_at, rows, T, D, K, MASKED)
    statistics = load_head(statistics_at, rows, T, 4, 4, MASKED)
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
    tile, token, feature, head = head_of_program(T, N, K, TILES)
    keys = tile * KEYS + tl.arange(0, KEYS)
    k_tile = load_head(k + token * D + feature, keys, T, D, K)
    v_tile = load_head(qkv + token * (3 * D) + 2 * D + feature, keys, T, 3 * D, K)
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
    store_unrotated(dk_at, dk * (K**-0.5), cos, sin, keys, T, 3 * D, K)


def _tiles(qkv: Tensor, num_heads: int, kept: int, streamed: int) -> dict[str, int]:
    """Sizes for a grid of one program per `kept` tokens of a head, past which all its tokens stream in tiles."""
    sizes = shape_constants(qkv, num_heads)
    return sizes | {"TILES": triton.cdiv(sizes["T"], kept), "REST": tile_rows(sizes["T"] % streamed, streamed)}


def _resources(qkv: Tensor, num_heads: int) -> dict[str, int]:
    """Warps, pipeline stages and registers of a tiled program.

    Capped at 128 registers a thread, 4 programs share a Hopper SM and hide each other's latency; below 128 the
    compiler serialises matrix products. Heads of 128 features, and float32, need more than that.
    """
    if qkv.element_size() == 4 or shape_constants(qkv, num_heads)["K"] > 64:
        return {"num_warps": 4, "num_stages": 2}
    return {"num_warps": 4, "num_stages": 3, "maxnreg": 128}


def _backward_tiles(qkv: Tensor, num_heads: int) -> tuple[int, int, dict[str, int]]:
    """Rows that a program keeps and rows that stream by at a time, which cost registers twice; and `_resources`.

    With 168 registers a thread, three programs share a Hopper SM. Tiles half as long and four programs take longer.
    """
    if qkv.element_size() == 4:
        return 32, 32, _resources(qkv, num_heads)
    if shape_constants(qkv, num_heads)["K"] > 64:
        return 64, 32, _resources(qkv, num_heads)
    return 64, 64, {"num_warps": 4, "num_stages": 3, "maxnreg": 168}


def _rotate_keys(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    """k [B, T, D], rotated, in the kernels' order of features."""
    rotated = empty_result(qkv)
    tiles = triton.cdiv(qkv.shape[1], 32)
    _rotate_keys_kernel[(qkv.shape[0] * num_heads * tiles,)](
        qkv, cos, sin, rotated, **shape_constants(qkv, num_heads), ROWS=32, TILES=tiles, num_warps=4
    )
    return rotated


def long_forward(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    *,
    save_lse: bool,
    dtype: torch.dtype | None = None,
    gluon: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result and, if it is to be saved, `lse` [B, N, T]; with `gluon` by the kernel for Hopper where that pays."""
    if gluon and cos is not None and sin is not None:
        # Imported here: Gluon's interface changes with every Triton.
        from hrm.kernels.ops.hopper import attention as hopper_attention

        if hopper_attention.pays(qkv, num_heads):
            return hopper_attention.attention_forward(qkv, cos, sin, num_heads, save_lse=save_lse, dtype=dtype)
    batch, tokens, _ = qkv.shape
    k = _rotate_keys(qkv, cos, sin, num_heads)
    out = empty_result(qkv, dtype)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32) if save_lse else None
    rows = 32 if qkv.element_size() == 4 else 64
    sizes = _tiles(qkv, num_heads, kept=rows, streamed=rows)
    _tiled_forward_kernel[(batch * num_heads * sizes["TILES"],)](
        qkv, k, cos, sin, out, lse, **sizes, ROWS=rows, KEYS=rows, **_resources(qkv, num_heads)
    )
    return out, lse


def long_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
) -> Tensor:
    k = _rotate_keys(qkv, cos, sin, num_heads)
    rotated_q = torch.empty_like(out)
    # lse, a gap, delta, a gap: a row of 16 bytes is what one asynchronous copy carries.
    row_statistics = lse.new_empty(*lse.shape, 4)
    d_qkv = torch.empty_like(qkv)
    kept, streamed, resources = _backward_tiles(qkv, num_heads)
    sizes = _tiles(qkv, num_heads, kept, streamed) | resources
    grid = (qkv.shape[0] * num_heads * sizes["TILES"],)
    _tiled_dq_kernel[grid](
        grad, qkv, k, cos, sin, out, lse, d_qkv, rotated_q, row_statistics, **sizes, ROWS=kept, KEYS=streamed
    )
    _tiled_dk_dv_kernel[grid](
        grad, qkv, k, cos, sin, rotated_q, row_statistics, d_qkv, **sizes, ROWS=streamed, KEYS=kept
    )
    return d_qkv
