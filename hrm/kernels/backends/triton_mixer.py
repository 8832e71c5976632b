"""Blocks that mix tokens by an MLP, in Triton: each half of a block is one operation, with and without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hrm.kernels.backend import Backend, KernelRequest
from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.context import KernelContext
from hrm.kernels.ops.triton.mixer import MOST_TOKENS
from hrm.kernels.ops.triton.mixer_backward import mix_features, mix_tokens
from hrm.kernels.requirements import is_measured, why_not_triton
from hrm.kernels.schedule import Schedule, States, looped


def reasoning_module(
    state: Tensor, injection: Tensor, blocks: Sequence[MixerWeights | NormGatedMixerWeights], context: KernelContext
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`."""
    x = state
    for index, weights in enumerate(blocks):
        x = mix_tokens(x, None if index else injection, weights, context.eps)
        x = mix_features(x.view(-1, x.shape[-1]), weights, context.eps).view(x.shape)
    return x if blocks else state + injection


def first_token_block(x: Tensor, weights: MixerWeights | NormGatedMixerWeights, context: KernelContext) -> Tensor:
    """As `hrm.kernels.naive.first_token_block`, without gradient."""
    first = mix_tokens(x, None, weights, context.eps)[:, 0]
    return mix_features(first.contiguous(), weights, context.eps)


@torch.no_grad()
def run(
    states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext
) -> dict[str, Tensor]:
    """As `hrm.kernels.schedule.Run`."""
    return looped(reasoning_module)(states, schedule, modules, context)


def why_not(request: KernelRequest) -> str | None:
    if reason := why_not_triton(request):
        return reason
    if request.device.type == "cuda" and request.dtype == torch.float32:
        return "its kernels compute in 16 bit"
    if request.num_tokens > MOST_TOKENS:
        return f"its kernels hold up to {MOST_TOKENS} tokens, not {request.num_tokens}"
    if request.width % 16:
        return f"its kernels are for widths that are multiples of 16, not {request.width}"
    return None


def _default(request: KernelRequest) -> dict[str, bool] | None:
    """On Hopper GPUs, whole steps recorded: what was measured."""
    return {"cuda_graphs": True, "fused_step": True} if is_measured(request) else None


BACKEND = Backend(
    reasoning_module,
    first_token_block,
    run=run,
    block_types=(MixerWeights, NormGatedMixerWeights),
    why_not=why_not,
    default=_default,
    compiles_definition=True,
)
