"""Attention of the first token of each sequence alone: one query for each head, without gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.naive import RotaryTables
from hrm.kernels.ops.triton.attention.common import (
    LOG2_E,
    check_projection,
    head_of_program,
    load_angles,
    load_head,
)
from hrm.kernels.ops.triton.common import tile_rows


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
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    _, token, feature, head = head_of_program(T, N, K, 1)
    k_at = kv + token * (2 * D) + feature
    q_at = q + head * K + tl.arange(0, K // 2)
    first = tl.load(q_at).to(tl.float32)[None, :] * SCALE
    second = tl.load(q_at + K // 2).to(tl.float32)[None, :] * SCALE
    peak = float("-inf")
    total = 0.0
    mixed = tl.zeros((K,), tl.float32)
    for start in range(0, T, KEYS):
        keys = start + tl.arange(0, KEYS)
        a = load_head(k_at, keys, T, 2 * D, K // 2).to(tl.float32)
        b = load_head(k_at + K // 2, keys, T, 2 * D, K // 2).to(tl.float32)
        v = load_head(k_at + D, keys, T, 2 * D, K).to(tl.float32)
        products = first * a + second * b
        if cos is not None:
            c, s = load_angles(cos, sin, keys, T, K)
            products = products * c + (second * a - first * b) * s
        scores = tl.where(keys < T, tl.sum(products, 1), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        p = tl.exp2(scores - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 0)
        mixed = mixed * shrink + tl.sum(p[:, None] * v, 0)
        peak = new_peak
    tl.store(out + head * K + tl.arange(0, K), mixed / total)


@torch.library.custom_op("hrm::first_token_attention", mutates_args=())
def _first_token_attention(q: Tensor, kv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    batch, tokens, _ = kv.shape
    out = torch.empty_like(q)
    head_size = q.shape[1] // num_heads
    # One warp a head, so that no sum crosses warps, and as many keys at once as its registers take.
    keys = tile_rows(tokens, min(128, 8192 // head_size))
    _first_token_kernel[(batch * num_heads,)](
        q, kv, cos, sin, out, T=tokens, N=num_heads, K=head_size, KEYS=keys, num_warps=1
    )
    return out


@_first_token_attention.register_fake
def _first_token_shape(q: Tensor, kv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
    return torch.empty_like(q)


def first_token_attention(q: Tensor, kv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """What `attention` gives for the first token of each sequence; it cannot be differentiated.

    Args:
        q: [B, D], the first token's features of all heads; position 0 is rotated by no angle.
        kv: [B, T, 2 D] in the dtype of `q`, the features of all heads of k, then v, of every token.
        rotary, num_heads: as for `attention`.

    Returns:
        [B, D] in the dtype of `q`.

    Raises:
        UserError: a shape or dtype that the kernel is not made for.
    """
    check_projection(kv, rotary, num_heads, parts=2)
    if q.dtype != kv.dtype or 2 * q.shape[-1] != kv.shape[-1] or q.shape != kv.shape[:1] + q.shape[-1:]:
        batch, _, width = kv.shape
        raise UserError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; kv needs [B, D] = {(batch, width // 2)} of {kv.dtype}."
        )
    cos, sin = (None, None) if rotary is None else rotary
    result: Tensor = _first_token_attention(q.contiguous(), kv.contiguous(), cos, sin, num_heads)
    return result
