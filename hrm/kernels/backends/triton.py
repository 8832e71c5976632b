"""The reasoning module in Triton: each block is four matmuls with everything else fused into or between them.

Attention reads the fused projection as it lies and rotates queries and keys on the way (`ops.triton.attention`); the
gated MLP's activation, the residuals and the norms are epilogues of the matmuls before them (`ops.triton.linear`,
`ops.triton.residual_rms`). One puzzle alone has kernels of its own (`ops.triton.few_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.kernels.backend import Backend, KernelRequest
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, BlockWeights
from hrm.kernels.ops.triton import few_rows
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
from hrm.kernels.requirements import is_measured, why_not_triton_attention
from hrm.kernels.schedule import Schedule, States, Summed, Update


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    context: KernelContext,
    attend: Attend = attention,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`."""
    batch, tokens, width = state.shape
    x = (state + injection).view(-1, width)
    for weights in blocks:
        qkv, x = linear_and_input(x, weights.qkv)
        mixed = attend(qkv.view(batch, tokens, 3 * width), context.rotary, context.num_heads).view(-1, width)
        x = linear_residual_rms(mixed, weights.o, x, context.eps)
        inner, x = linear_swiglu_and_input(x, weights.gate_up)
        x = linear_residual_rms(inner, weights.down, x, context.eps)
    return x.view(batch, tokens, width)


@torch.no_grad()
def run(
    states: States,
    schedule: Schedule,
    modules: Mapping[str, Sequence[BlockWeights]],
    context: KernelContext,
    attend: Attend = attention,
) -> dict[str, Tensor]:
    """As `hrm.kernels.schedule.Run`, on the blocks of `naive`. An update's last norm adds what the next one takes."""
    if not schedule:
        return dict(states)
    if _is_ours(attend) and few_rows.pays(states, schedule, modules, context):
        return few_rows.run(states, schedule, modules, context)
    shape = states[schedule[0].state].shape
    rows = Summed({name: state.reshape(-1, shape[-1]) for name, state in states.items()})
    x = rows.states[schedule[0].state] + rows.sum(schedule[0].inputs)
    for update, following in zip(schedule, [*schedule[1:], None], strict=True):
        plan = _Fusion.of(update, following, rows) if following else _Fusion((), keep=True)
        z, sums = _apply_blocks(x, modules[update.module], shape, context, attend, plan.addends, keep=plan.keep)
        rows.replace(update.state, z)
        if following is None:
            break
        if len(sums) > 1:
            rows.keep_sum(following.inputs, sums[-2])
        x = sums[-1] if sums else rows.states[following.state] + rows.sum(following.inputs)
    return {name: state.view(shape) for name, state in rows.states.items()}


def _is_ours(attend: Attend) -> bool:
    """Whether it is `attention`, with whichever of its kernels."""
    return getattr(attend, "func", attend) is attention


class _Fusion(NamedTuple):
    """What the last norm of an update computes besides, for the one that follows."""

    addends: Sequence[Tensor]  # added one after the other to the result; the last sum is what the following one takes
    keep: bool  # whether the result itself is wanted

    @classmethod
    def of(cls, update: Update, following: Update, rows: Summed) -> _Fusion:
        state, inputs = following.state, following.inputs
        if state == update.state and state not in inputs:
            return cls((rows.sum(inputs),), keep=False)
        if state != update.state and inputs.count(update.state) == 1 and len(inputs) <= 2:
            others = [name for name in inputs if name != update.state]
            return cls([rows.states[name] for name in (*others, state)], keep=True)
        return cls((), keep=True)


def _apply_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    shape: torch.Size,
    context: KernelContext,
    attend: Attend,
    addends: Sequence[Tensor],
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The blocks' result on x [B T, D], which is overwritten, and its sums as in `linear_residual_rms_and_sums`."""
    batch, tokens, width = shape
    defers = False  # whether x still lacks its norm
    for index, weights in enumerate(blocks):
        qkv, factors = deferred_norm_linear(x, weights.qkv, context.eps) if defers else (linear(x, weights.qkv), None)
        mixed = attend(qkv.view(batch, tokens, 3 * width), context.rotary, context.num_heads).view(-1, width)
        if factors is None:
            x, _ = linear_residual_rms_and_sums(mixed, weights.o, x, context.eps)
        else:
            x = deferred_norm_residual_rms(mixed, weights.o, x, factors, context.eps)
        inner = linear_swiglu(x, weights.gate_up)
        if index + 1 == len(blocks):
            return linear_residual_rms_and_sums(inner, weights.down, x, context.eps, addends, keep=keep)
        if defers := defers_norm(x, weights.qkv, weights.o):
            x.addmm_(inner, weights.down.T)
        else:
            x, _ = linear_residual_rms_and_sums(inner, weights.down, x, context.eps)
    return x, list(accumulate(addends, initial=x))[1:]


def first_token_block(x: Tensor, weights: BlockWeights, context: KernelContext) -> Tensor:
    """As `hrm.kernels.naive.first_token_block`, without gradient."""
    width = x.shape[-1]
    first = x[:, 0]
    q, kv = F.linear(first, weights.qkv[:width]), F.linear(x, weights.qkv[width:])
    mixed = first_token_attention(q, kv, context.rotary, context.num_heads)
    first = linear_residual_rms(mixed, weights.o, first, context.eps)
    return linear_residual_rms(linear_swiglu(first, weights.gate_up), weights.down, first, context.eps)


def _default(request: KernelRequest) -> dict[str, bool] | None:
    """On Hopper GPUs, whole steps recorded, where RoPE rotates queries and keys: that is what was measured."""
    if not (request.rotary and is_measured(request)):
        return None
    return {"cuda_graphs": True, "fused_step": True}


BACKEND = Backend(
    reasoning_module,
    first_token_block,
    run=run,
    why_not=why_not_triton_attention,
    default=_default,
    takes_attention=True,
)
