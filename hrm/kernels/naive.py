"""The definition of a reasoning module, in plain PyTorch. Every other backend is tested against this file.

Shapes: B sequences, T tokens (puzzle prefix and input), D hidden size, N heads of size K = D / N, F inner width of the
gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockWeights(NamedTuple):
    """The matrices of one block, in the dtype of the activations."""

    qkv: Tensor  # [3 D, D]: the rows of all q heads, then k, then v
    o: Tensor  # [D, D]
    gate_up: Tensor  # [2 F, D]: gate, then up
    down: Tensor  # [D, F]


class RotaryTables(NamedTuple):
    """Rotary position embedding, half-split: feature i turns with feature i + K/2."""

    cos: Tensor  # [T, K], float32
    sin: Tensor  # [T, K], float32


def rotary_tables(num_tokens: int, head_size: int, theta: float) -> RotaryTables:
    """Angles of RoPE (Su et al. 2021) for positions 0 to `num_tokens` - 1."""
    inverse_frequency = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), inverse_frequency).repeat(1, 2)
    return RotaryTables(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: RotaryTables) -> Tensor:
    """Turn the heads `x` [B, N, T, K] by their positions, in the tables' dtype."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first, second), -1) * rotary.cos + torch.cat((-second, first), -1) * rotary.sin
    return turned.to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, in float32 at least; there is no gain."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def attention(x: Tensor, weights: BlockWeights, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """Non-causal self-attention over `x` [B, T, D]."""
    batch, tokens, width = x.shape
    qkv = F.linear(x, weights.qkv).view(batch, tokens, 3, num_heads, width // num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return F.linear(mixed.transpose(1, 2).reshape(batch, tokens, width), weights.o)


def swiglu(x: Tensor, weights: BlockWeights) -> Tensor:
    """Gated MLP over `x` [B, T, D]."""
    gate, up = F.linear(x, weights.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights.down)


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    rotary: RotaryTables | None,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Add the injection to the state and run the post-norm blocks (paper section 2).

    Args:
        state, injection: [B, T, D] of one dtype.
        blocks: weights of each block, in the same dtype.
        rotary: position tables, or None where positions are learned.

    Returns:
        The new state [B, T, D].
    """
    x = state + injection
    for weights in blocks:
        x = rms_norm(x + attention(x, weights, rotary, num_heads), eps)
        x = rms_norm(x + swiglu(x, weights), eps)
    return x
