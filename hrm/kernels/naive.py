"""The definition of a reasoning module, in plain PyTorch. Every other backend is tested against this file.

Shapes: B sequences, T tokens (puzzle prefix and input), D hidden size, N heads of size K = D / N, F inner width of the
gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.kernels.blocks import BlockWeights as BlockWeights
from hrm.kernels.blocks import MixerWeights as MixerWeights
from hrm.kernels.blocks import NormedBlockWeights, NormGatedBlockWeights, NormGatedMixerWeights
from hrm.kernels.context import KernelContext
from hrm.kernels.context import RotaryTables as RotaryTables

_AttentionBlock: TypeAlias = BlockWeights | NormGatedBlockWeights | NormedBlockWeights
AnyBlock: TypeAlias = BlockWeights | MixerWeights | NormGatedBlockWeights | NormGatedMixerWeights | NormedBlockWeights
_MIXERS = (MixerWeights, NormGatedMixerWeights)
_NORM_GATED = (NormGatedBlockWeights, NormGatedMixerWeights, NormedBlockWeights)
BLOCK_TYPES = (BlockWeights, MixerWeights, NormGatedBlockWeights, NormGatedMixerWeights, NormedBlockWeights)
Attend: TypeAlias = Callable[[Tensor, RotaryTables | None, int], Tensor]  # qkv, rotary, num_heads: see `sdpa`
Linear: TypeAlias = Callable[[Tensor, Any], Tensor]  # x [..., K] and a matrix [N, K], as it is held: see `F.linear`


def rotary_tables(num_tokens: int, head_size: int, theta: float) -> RotaryTables:
    """Angles of RoPE (Su et al. 2021) for positions 0 to `num_tokens` - 1."""
    return _rotary_tables([torch.arange(num_tokens)], head_size, theta)


def grid_rotary_tables(num_prefix: int, side: int, head_size: int, theta: float) -> RotaryTables:
    """Angles of RoPE for the cells of a square grid, row by row: half of the pairs rotate by row, half by column.

    The `num_prefix` tokens before the cells belong to none; they stand on the grid's diagonal, just before it. The
    first token is rotated by no angle, as kernels for it alone expect: only differences of positions matter.
    """
    before, cells = torch.arange(num_prefix), torch.arange(side * side)
    rows = torch.cat([before, num_prefix + cells // side])
    columns = torch.cat([before, num_prefix + cells % side])
    return _rotary_tables([rows, columns], head_size, theta)


def _rotary_tables(coordinates: Sequence[Tensor], head_size: int, theta: float) -> RotaryTables:
    """Angles for tokens at `coordinates`, each [T] int64, an equal part of the pairs for each."""
    pairs = head_size // 2 // len(coordinates)
    inverse_frequency = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = torch.cat([torch.outer(places.float(), inverse_frequency) for places in coordinates], 1).repeat(1, 2)
    return RotaryTables(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: RotaryTables) -> Tensor:
    """Rotate the heads `x` [B, N, T, K] by their positions, in the tables' dtype."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first, second), -1) * rotary.cos + torch.cat((-second, first), -1) * rotary.sin
    return rotated.to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide each row by its root mean square, in float32 at least; there is no gain."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def split_heads(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, N, T, K] of projected tokens `qkv` [B, T, 3 D], q and k rotated by their positions."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return q, k, v


def sdpa(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """Non-causal self-attention of projected tokens: the definition of `Attend`.

    Args:
        qkv: [B, T, 3 D], the features of all heads of q, then k, then v.
        rotary: tables for T tokens, or None.

    Returns:
        [B, T, D].
    """
    mixed = F.scaled_dot_product_attention(*split_heads(qkv, rotary, num_heads))
    return mixed.transpose(1, 2).flatten(2)


def attention(
    x: Tensor,
    weights: _AttentionBlock,
    rotary: RotaryTables | None,
    num_heads: int,
    attend: Attend = sdpa,
    eps: float = 1e-5,
    linear: Linear = F.linear,
) -> Tensor:
    """Non-causal self-attention over `x` [B, T, D] with its two projections; `eps` is of the norm between, if any."""
    return _project(attend(linear(x, weights.qkv), rotary, num_heads), weights, eps, linear)


def _project(mixed: Tensor, weights: _AttentionBlock, eps: float, linear: Linear = F.linear) -> Tensor:
    """The second projection of what was attended to, [..., D]."""
    return linear(rms_norm(mixed, eps) if isinstance(weights, NormedBlockWeights) else mixed, weights.o)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, linear: Linear = F.linear) -> Tensor:
    """Gated MLP over the last dimension of `x`."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down)


def norm_gated(x: Tensor, gate_up: Tensor, down: Tensor, eps: float, linear: Linear = F.linear) -> Tensor:
    """An MLP gated by sigmoid(gate) * rms_norm(gate * up), of which the product has no size that could grow.

    The gate of "Speed is Confidence" (arXiv 2601.19085). Between the two matmuls it is computed in float32 at least,
    where a product of two numbers of float16 does not overflow.

    Args:
        x: [..., I]; the MLP is over its last dimension.
        gate_up: [2 F, I], the rows of gate, then up.
        down: [I, F].
        eps: of the norm over the F hidden units, which has no gain.

    Returns:
        [..., I] in the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = linear(x, gate_up).to(wide).chunk(2, dim=-1)
    return linear((gate.sigmoid() * rms_norm(gate * up, eps)).to(x.dtype), down)


def _mlp(weights: AnyBlock, x: Tensor, gate_up: Tensor, down: Tensor, eps: float, linear: Linear = F.linear) -> Tensor:
    """The MLP of a block, with two of its matrices."""
    if isinstance(weights, _NORM_GATED):
        return norm_gated(x, gate_up, down, eps, linear)
    return swiglu(x, gate_up, down, linear)


def mix_tokens(
    x: Tensor, weights: MixerWeights | NormGatedMixerWeights, eps: float, linear: Linear = F.linear
) -> Tensor:
    """The first half of a block with an MLP over the tokens of `x` [B, T, D]: its norm, too, is over the tokens."""
    features = x.mT
    mixed = _mlp(weights, features, weights.token_gate_up, weights.token_down, eps, linear)
    return rms_norm(features + mixed, eps).mT


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[AnyBlock],
    context: KernelContext,
    attend: Attend = sdpa,
    linear: Linear = F.linear,
) -> Tensor:
    """Add the injection to the state and run the post-norm blocks (paper section 2).

    Args:
        state, injection: [B, T, D] of one dtype.
        blocks: weights of each block, in the same dtype, or what `linear` takes for them.
        attend: the core of attention, one that `hrm.kernels.attention.get` gives.
        linear: what multiplies by the weights.

    Returns:
        The new state [B, T, D].
    """
    x = state + injection
    for weights in blocks:
        if isinstance(weights, _MIXERS):
            x = mix_tokens(x, weights, context.eps, linear)
        else:
            mixed = attention(x, weights, context.rotary, context.num_heads, attend, context.eps, linear)
            x = rms_norm(x + mixed, context.eps)
        x = rms_norm(x + _mlp(weights, x, weights.gate_up, weights.down, context.eps, linear), context.eps)
    return x


def first_token_block(x: Tensor, weights: AnyBlock, context: KernelContext) -> Tensor:
    """One block where only token 0 of the result is wanted: the others still give their keys and values, or mix.

    Args:
        x: [B, T, D].

    Returns:
        [B, D], what `reasoning_module` would put into token 0.
    """
    if isinstance(weights, _MIXERS):
        first = mix_tokens(x, weights, context.eps)[:, 0]
    else:
        first = rms_norm(x[:, 0] + _first_token_attention(x, weights, context), context.eps)
    return rms_norm(first + _mlp(weights, first, weights.gate_up, weights.down, context.eps), context.eps)


def _first_token_attention(x: Tensor, weights: _AttentionBlock, context: KernelContext) -> Tensor:
    """Token 0 of `attention`, [B, D]."""
    batch, _, width = x.shape
    rotary, num_heads = context.rotary, context.num_heads

    def heads(rows: Tensor) -> Tensor:
        return rows.view(batch, -1, num_heads, width // num_heads).transpose(1, 2)

    q = heads(F.linear(x[:, 0], weights.qkv[:width]))  # position 0 is rotated by no angle
    k, v = map(heads, F.linear(x, weights.qkv[width:]).chunk(2, dim=-1))
    if rotary is not None:
        k = rotate(k, rotary)
    return _project(F.scaled_dot_product_attention(q, k, v).reshape(batch, width), weights, context.eps)


def reset_carry(
    states: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    halted: Tensor,
    steps: Tensor,
    data: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Give sequences that halted the initial states and new data, and count the step.

    Args:
        states: [B, T, D] each, by name.
        initial: [D], the vector that each state begins with at every token.
        halted: [B] bool.
        steps: [B] integers.
        data, fresh: fields [B, ...] of the sequences being worked on and of the batch to take from.

    Returns:
        The new `(states, steps, data)`.
    """

    def choose(if_halted: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(halted.view(-1, *[1] * (otherwise.ndim - 1)), if_halted, otherwise)

    return (
        {name: choose(initial[name].to(state.dtype), state) for name, state in states.items()},
        torch.where(halted, 0, steps) + 1,
        {name: choose(field, data[name]) for name, field in fresh.items()},
    )
