"""The reasoning module in Triton: each block is four matmuls with everything else fused into or between them.

Attention reads the fused projection as it lies and rotates queries and keys on the way (`ops.triton.attention`); the
gated MLP's activation, the residuals and the norms are epilogues of the matmuls before them (`ops.triton.linear`,
`ops.triton.residual_rms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.kernels.naive import Attend, BlockWeights, RotaryTables
from hrm.kernels.ops.triton.attention import attention, first_token_attention
from hrm.kernels.ops.triton.linear import (
    deferred_norm_linear,
    linear,
    linear_and_input,
    linear_swiglu,
    linear_swiglu_and_input,
)
from hrm.kernels.ops.triton.residual_rms import (
    deferred_norm_residual_rms,
    defers_norm,
    linear_residual_rms,
    linear_residual_rms_and_sums,
)


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    rotary: RotaryTables | None,
    num_heads: int,
    eps: float,
    attend: Attend = attention,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`."""
    batch, tokens, width = state.shape
    x = (state + injection).view(-1, width)
    for weights in blocks:
        qkv, x = linear_and_input(x, weights.qkv)
        mixed = attend(qkv.view(batch, tokens, 3 * width), rotary, num_heads).view(-1, width)
        x = linear_residual_rms(mixed, weights.o, x, eps)
        inner, x = linear_swiglu_and_input(x, weights.gate_up)
        x = linear_residual_rms(inner, weights.down, x, eps)
    return x.view(batch, tokens, width)


@torch.no_grad()
def cycles(
    z_H: Tensor,
    z_L: Tensor,
    embeddings: Tensor,
    H_blocks: Sequence[BlockWeights],
    L_blocks: Sequence[BlockWeights],
    updates: str,
    rotary: RotaryTables | None,
    num_heads: int,
    eps: float,
    attend: Attend = attention,
) -> tuple[Tensor, Tensor]:
    """As `hrm.kernels.cycles.Cycles`, on the blocks of `naive`. An update's last norm adds what the next takes."""
    shape = z_H.shape
    z_H, z_L, embeddings = (tensor.reshape(-1, shape[-1]) for tensor in (z_H, z_L, embeddings))
    injection = z_H + embeddings if updates.startswith("L") else z_L
    x = (z_L if updates.startswith("L") else z_H) + injection
    for level, following in zip_longest(updates, updates[1:]):
        # What makes the input of the update that follows from this one's result; in the H level's case by two steps.
        addends = {"LL": (injection,), "LH": (z_H,), "HL": (embeddings, z_L), "HH": (z_L,)}.get(
            f"{level}{following}", ()
        )
        blocks = L_blocks if level == "L" else H_blocks
        z, sums = _apply_blocks(x, blocks, shape, rotary, num_heads, eps, attend, addends, keep=level != following)
        if level == "L":
            z_L = z
        else:
            z_H = z
        if sums:
            injection, x = (sums[0] if len(sums) == 2 else injection), sums[-1]
    return z_H.view(shape), z_L.view(shape)


def _apply_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    shape: torch.Size,
    rotary: RotaryTables | None,
    num_heads: int,
    eps: float,
    attend: Attend,
    addends: Sequence[Tensor],
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The blocks' result on x [B T, D], which is overwritten, and its sums as in `linear_residual_rms_and_sums`."""
    batch, tokens, width = shape
    defers = False  # whether x still lacks its norm
    for index, weights in enumerate(blocks):
        qkv, factors = deferred_norm_linear(x, weights.qkv, eps) if defers else (linear(x, weights.qkv), None)
        mixed = attend(qkv.view(batch, tokens, 3 * width), rotary, num_heads).view(-1, width)
        if factors is None:
            x, _ = linear_residual_rms_and_sums(mixed, weights.o, x, eps)
        else:
            x = deferred_norm_residual_rms(mixed, weights.o, x, factors, eps)
        inner = linear_swiglu(x, weights.gate_up)
        if index + 1 == len(blocks):
            return linear_residual_rms_and_sums(inner, weights.down, x, eps, addends, keep=keep)
        if defers := defers_norm(x, weights.qkv, weights.o):
            x.addmm_(inner, weights.down.T)
        else:
            x, _ = linear_residual_rms_and_sums(inner, weights.down, x, eps)
    return x, list(accumulate(addends, initial=x))[1:]


def first_token_block(
    x: Tensor, weights: BlockWeights, rotary: RotaryTables | None, num_heads: int, eps: float
) -> Tensor:
    """As `hrm.kernels.naive.first_token_block`, without gradient."""
    width = x.shape[-1]
    first = x[:, 0]
    q, kv = F.linear(first, weights.qkv[:width]), F.linear(x, weights.qkv[width:])
    mixed = first_token_attention(q, kv, rotary, num_heads)
    first = linear_residual_rms(mixed, weights.o, first, eps)
    return linear_residual_rms(linear_swiglu(first, weights.gate_up), weights.down, first, eps)
