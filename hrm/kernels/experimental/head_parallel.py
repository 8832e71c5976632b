"""The reasoning module with a program per sequence and head: its slice of the projection, the rotation and attention.

Projected tokens then never pass through memory, and a block is one launch shorter than in `triton`. The price:
each head reads its weights and inputs again, and multiplies a whole tile of rows, 128 of them for 82 tokens. On an H200
that price is higher than the gain at large batches and as high at small ones
(benchmarks/results/reports/2026-11-22-attention.md): `triton` is the faster choice.

Beyond 128 tokens, and in float32, a head does not fit on chip: projection by the library, then `ops.triton.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.kernels.backend import Backend
from hrm.kernels.backends.triton import first_token_block
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, RotaryTables
from hrm.kernels.ops.triton.attention import attention
from hrm.kernels.ops.triton.attention.common import LOG2_E, check_projection, load_angles, pair, unpair
from hrm.kernels.ops.triton.attention.short import holds_head, short_backward
from hrm.kernels.ops.triton.common import tile_rows
from hrm.kernels.ops.triton.linear import linear_swiglu_and_input
from hrm.kernels.ops.triton.residual_rms import linear_residual_rms
from hrm.kernels.requirements import why_not_triton_attention


@triton.jit
def _rotate(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, rows: tl.tensor, T: tl.constexpr, K: tl.constexpr
) -> tl.tensor:
    """A head [R, K] of q or k in the order of `pair`, turned in float32; as it is without cos."""
    if cos is None:
        return x
    else:  # Triton compiles what follows a return, but not the branch not taken
        first, second = unpair(x)
        c, s = load_angles(cos, sin, rows, T, K)
        a, b = first.to(tl.float32), second.to(tl.float32)
        return pair((a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype))


@triton.jit
def _project_and_attend_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    # Heads of one sequence are neighbours, so that they find its tokens in the L2 cache.
    head = tl.program_id(0) % N * K
    token = (tl.program_id(0) // N).to(tl.int64) * T
    rows = tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    column = tl.arange(0, K)
    # Reading q's and k's rows of the weight in the order of `pair` spares a shuffle of what is multiplied.
    paired = column // 16 * 8 + column % 8 + column // 8 % 2 * (K // 2)
    x_at = x + token * D + rows[:, None] * D + inputs[None, :]
    q_at = weight + (head + paired)[None, :] * D + inputs[:, None]
    v_at = weight + (2 * D + head + column)[None, :] * D + inputs[:, None]
    q = tl.zeros((ROWS, K), tl.float32)
    k = tl.zeros((ROWS, K), tl.float32)
    v = tl.zeros((ROWS, K), tl.float32)
    for start in range(0, D, INPUTS):
        x_tile = tl.load(x_at + start, mask=(rows < T)[:, None], other=0.0)
        q = tl.dot(x_tile, tl.load(q_at + start), q)
        k = tl.dot(x_tile, tl.load(q_at + D * D + start), k)
        v = tl.dot(x_tile, tl.load(v_at + start), v)
    dtype = x.dtype.element_ty
    turned_q = _rotate(q.to(dtype), cos, sin, rows, T, K)
    turned_k = _rotate(k.to(dtype), cos, sin, rows, T, K)
    scores = tl.where((rows < T)[None, :], tl.dot(turned_q, tl.trans(turned_k)), float("-inf"))
    p = tl.exp2(scores * SCALE - (tl.max(scores, 1) * SCALE)[:, None])
    mixed = tl.dot(p.to(dtype), v.to(dtype)) * (1.0 / tl.sum(p, 1))[:, None]
    at = out + token * D + head + rows[:, None] * D + column[None, :]
    tl.store(at, mixed.to(dtype), mask=(rows < T)[:, None])


def _project_and_attend_forward(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int
) -> Tensor:
    batch, tokens, width = x.shape
    head_size = width // num_heads
    out = torch.empty_like(x)
    rows = tile_rows(tokens, 128)
    _project_and_attend_kernel[(batch * num_heads,)](
        x,
        weight,
        cos,
        sin,
        out,
        T=tokens,
        N=num_heads,
        K=head_size,
        ROWS=rows,
        INPUTS=_inputs(width, head_size),
        num_warps=8 if rows == 128 else 4,
        num_stages=3,
    )
    return out


def _inputs(width: int, head_size: int) -> int:
    """A power of two that divides the width: 64 inputs of 16 bits are the 128 bytes of a line of the cache.

    Less than the width: what Triton 3.6 makes of the loop when it has one round only gives wrong results on an H200.
    """
    inputs = min(64 if head_size <= 64 else 32, width & -width)
    return inputs // 2 if inputs == width else inputs


class _ProjectAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.num_heads = num_heads
        return _project_and_attend_forward(x, weight, cos, sin, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, cos, sin = ctx.saved_tensors
        qkv = F.linear(x, weight)
        d_qkv = short_backward(grad.contiguous(), qkv, cos, sin, ctx.num_heads)
        d_x = d_qkv @ weight if ctx.needs_input_grad[0] else None
        d_weight = d_qkv.flatten(0, 1).T @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None, None, None


def project_and_attend(x: Tensor, weight: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """`ops.triton.attention` of x @ weight.T, in one kernel where a head fits on chip.

    Args:
        x: [B, T, D], bfloat16, float16 or float32.
        weight: [3 D, D] of the same dtype: the rows of all q heads, then k, then v.
        rotary: tables for T tokens, or None.
        num_heads: heads of 16, 32, 64 or 128 features.

    Returns:
        [B, T, D]. For a backward, only `x` is kept: it projects again.

    Raises:
        UserError: a shape or dtype that the kernels are not made for.
    """
    check_projection(x, rotary, num_heads, parts=1)
    if not holds_head(x) or _inputs(x.shape[2], x.shape[2] // num_heads) < 16:
        return attention(F.linear(x, weight), rotary, num_heads)
    x, weight = x.contiguous(), weight.contiguous()
    cos, sin = (None, None) if rotary is None else rotary
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _ProjectAndAttend.apply(x, weight, cos, sin, num_heads)  # type: ignore[no-any-return, no-untyped-call]
    return _project_and_attend_forward(x, weight, cos, sin, num_heads)


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    context: KernelContext,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`."""
    shape = state.shape
    x = (state + injection).view(-1, shape[-1])
    for weights in blocks:
        mixed = project_and_attend(x.view(shape), weights.qkv, context.rotary, context.num_heads).view(-1, shape[-1])
        x = linear_residual_rms(mixed, weights.o, x, context.eps)
        inner, x = linear_swiglu_and_input(x, weights.gate_up)
        x = linear_residual_rms(inner, weights.down, x, context.eps)
    return x.view(shape)


BACKEND = Backend(reasoning_module, first_token_block, why_not=why_not_triton_attention)
