"""Attention to at most 128 tokens in 16 bit: one program has a whole head on chip.

Forward, its keys and values stay on chip while queries pass; backward needs `qkv` alone and forms all probabilities
again. Shapes and conventions: see the package.
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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    _, token, feature, _ = head_of_program(T, N, K, 1)
    q_at = qkv + token * (3 * D) + feature
    keys = tl.arange(0, KEYS)
    k = load_rotated(q_at + D, cos, sin, keys, T, 3 * D, K)
    v = load_head(q_at + 2 * D, keys, T, 3 * D, K)
    for start in tl.static_range(0, T, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    _, token, feature, _ = head_of_program(T, N, K, 1)
    q_at = qkv + token * (3 * D) + feature
    dq_at = d_qkv + token * (3 * D) + feature
    rows = tl.arange(0, ROWS)
    q = load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
    k = load_rotated(q_at + D, cos, sin, rows, T, 3 * D, K)
    v = load_head(q_at + 2 * D, rows, T, 3 * D, K)
    d_mixed = load_head(grad + token * D + feature, rows, T, D, K)
    # Queries past T are zeros with zero gradient: only keys need a mask.
    scores = tl.where((rows < T)[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
    p = tl.exp2(scores * SCALE - (tl.max(scores, 1) * SCALE)[:, None])
    p *= (1.0 / tl.sum(p, 1))[:, None]
    dv = tl.dot(tl.trans(p.to(v.dtype)), d_mixed)
    dv_at = dq_at + 2 * D + rows[:, None] * (3 * D) + tl.arange(0, K)[None, :]
    tl.store(dv_at, dv.to(v.dtype), mask=(rows < T)[:, None])
    dp = tl.dot(d_mixed, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * (K**-0.5)).to(v.dtype)
    store_unrotated(dq_at + D, tl.dot(tl.trans(ds), q), cos, sin, rows, T, 3 * D, K)
    store_unrotated(dq_at, tl.dot(ds, k), cos, sin, rows, T, 3 * D, K)


def holds_head(qkv: Tensor) -> bool:
    """Whether a head fits on chip. In float32 it would, but only without matrix units, and far from fast."""
    return qkv.shape[1] <= 128 and qkv.element_size() == 2


def short_forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The result in the dtype of `qkv` or in `dtype`."""
    tokens = qkv.shape[1]
    sizes = shape_constants(qkv, num_heads)
    out = empty_result(qkv, dtype)
    _one_tile_forward_kernel[(qkv.shape[0] * num_heads,)](
        qkv,
        cos,
        sin,
        out,
        **sizes,
        # 64 queries are the least that Hopper's matrix unit takes, and leave registers for 4 programs on an SM.
        ROWS=tile_rows(tokens, 64),
        KEYS=tile_rows(tokens, 128),
        num_warps=4,
        maxnreg=128 if sizes["K"] <= 64 else None,
    )
    return out


def short_backward(grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    """The gradient of `qkv`."""
    sizes = shape_constants(qkv, num_heads)
    rows = tile_rows(sizes["T"], 128)
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
