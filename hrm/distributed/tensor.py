"""The naive backend with the heads and the MLP of every block shared by several processes (Shoeybi et al. 2019).

A process holds its heads' rows of `qkv` and columns of `o`, and its share of the rows of `gate_up` and columns of
`down`; states, and all that is computed from them outside of attention and MLP, are the same on every process. Each
sublayer's partial results are summed once, before the residual and the norm; backward, its input's gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.distributed.world import Axis
from hrm.kernels import FirstTokenBlock, ReasoningModule
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, BlockWeights, attention, rms_norm, swiglu


def make(axis: Axis, attend: Attend) -> tuple[ReasoningModule, FirstTokenBlock]:
    """A backend's two functions for the processes of `axis`; `num_heads` stays that of the whole model."""
    return partial(reasoning_module, attend=attend, axis=axis), partial(first_token_block, attend=attend, axis=axis)


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    context: KernelContext,
    *,
    attend: Attend,
    axis: Axis,
) -> Tensor:
    """See `hrm.kernels.naive.reasoning_module`; `blocks` are this process's slices."""
    own_heads = context.num_heads // axis.size
    x = state + injection
    for weights in blocks:
        mixed = attention(_Share.apply(x, axis), weights, context.rotary, own_heads, attend)  # type: ignore[no-untyped-call]
        x = rms_norm(x + _Sum.apply(mixed, axis), context.eps)  # type: ignore[no-untyped-call]
        gated = swiglu(_Share.apply(x, axis), weights.gate_up, weights.down)  # type: ignore[no-untyped-call]
        x = rms_norm(x + _Sum.apply(gated, axis), context.eps)  # type: ignore[no-untyped-call]
    return x


def first_token_block(
    x: Tensor,
    weights: BlockWeights,
    context: KernelContext,
    *,
    attend: Attend,
    axis: Axis,
) -> Tensor:
    """See `hrm.kernels.naive.first_token_block`. Computes the other tokens too: one block of a step's many."""
    whole = reasoning_module(x, torch.zeros_like(x), [weights], context, attend=attend, axis=axis)
    return whole[:, 0]


class _Share(torch.autograd.Function):
    """What every process computes with: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.group = axis.group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)  # autograd may give others this gradient too
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum, in place, of what the processes computed: its gradient is that of every summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=axis.group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
