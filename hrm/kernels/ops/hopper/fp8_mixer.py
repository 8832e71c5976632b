"""Blocks that mix tokens by an MLP, the MLP over features in e4m3, for passes without gradient on Hopper GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.context import KernelContext
from hrm.kernels.ops.e4m3 import E4M3
from hrm.kernels.ops.hopper.mixer_features import mix_features_in_e4m3
from hrm.kernels.ops.triton.mixer import MOST_TOKENS, mix_tokens

_LEAST_ROWS = 2048  # with fewer, the library's matmul is faster


def fits(state: Tensor, blocks: Sequence[MixerWeights | NormGatedMixerWeights], num_heads: int) -> bool:
    """Whether the kernels take these operands, and pay."""
    return (
        state.dtype in (torch.bfloat16, torch.float16)
        and state.shape[0] * state.shape[1] >= _LEAST_ROWS
        and state.shape[1] <= MOST_TOKENS
        and state.shape[2] in (256, 512)
        and all(isinstance(weights, MixerWeights | NormGatedMixerWeights) for weights in blocks)
        and all(weights.down.shape[1] % 16 == 0 for weights in blocks)
    )


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[MixerWeights | NormGatedMixerWeights],
    context: KernelContext,
) -> Tensor:
    """As `hrm.kernels.fp8.reasoning_module`, for operands that it `fits`, or would if there were more rows."""
    x, addend = state.contiguous(), injection.contiguous()
    for index, weights in enumerate(blocks):
        rounded = torch.empty_like(x, dtype=E4M3)
        x = mix_tokens(x, None if index else addend, weights, context.eps, rounded)
        rows = x.view(-1, x.shape[-1]), rounded.view(-1, x.shape[-1])
        x = mix_features_in_e4m3(*rows, weights, context.eps).view(x.shape)
    return x
