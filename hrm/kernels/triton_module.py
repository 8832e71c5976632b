"""The reasoning module in Triton: each block is four matmuls with everything else fused into or between them.

Attention reads the fused projection as it lies and turns queries and keys on the way (`triton_attention`); the gated
MLP's activation, the residuals and the norms are epilogues of the matmuls before them (`triton_linear`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hrm.kernels.naive import Attend, BlockWeights, RotaryTables
from hrm.kernels.triton_attention import attention, first_token_attention
from hrm.kernels.triton_linear import linear_residual_rms, linear_swiglu


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
        qkv = F.linear(x, weights.qkv).view(batch, tokens, 3 * width)
        mixed = attend(qkv, rotary, num_heads).view(-1, width)
        x = linear_residual_rms(mixed, weights.o, x, eps)
        x = linear_residual_rms(linear_swiglu(x, weights.gate_up), weights.down, x, eps)
    return x.view(batch, tokens, width)


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
