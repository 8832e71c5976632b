"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): keep few tensors, compute the others again backward.

What a backend saves for its backward pass is the most that training keeps in memory. Here a differentiable module keeps
what it was called with and nothing else; its own forward pass runs again when the backward pass gets to it, and what it
saves lives until that has used it. The second forward pass is the first one's kernels on the same tensors, so gradients
are the same to the last bit wherever kernels give the same result twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hrm.kernels.backend import ReasoningModule
from hrm.kernels.context import KernelContext


def recomputed(module: ReasoningModule, recompute: str) -> ReasoningModule:
    """A module that keeps for its backward pass what `recompute` says, and is `module` where no gradient is wanted.

    Args:
        module: differentiable.
        recompute: one of `hrm.config.kernels.RECOMPUTES`. none: all that `module` saves; block: the input of each
            block, and while backward works on a block, what that saves; module: the two inputs of each update, and
            while backward works on an update, what its blocks save.
    """
    if recompute == "none":
        return module
    differentiable = partial(_block_by_block if recompute == "block" else _checkpointed, module)

    def where_wanted(state: Tensor, injection: Tensor, blocks: Sequence[Any], context: KernelContext) -> Tensor:
        compute = differentiable if torch.is_grad_enabled() else module
        return compute(state, injection, blocks, context)

    return where_wanted


def _block_by_block(
    module: ReasoningModule, state: Tensor, injection: Tensor, blocks: Sequence[Any], context: KernelContext
) -> Tensor:
    def apply(x: Tensor, block: Any) -> Tensor:
        return module(x, torch.zeros_like(x), [block], context)

    x = state + injection
    for block in blocks:
        x = _checkpointed(apply, x, block)
    return x


def _checkpointed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's result, for whose backward pass the arguments alone are kept."""
    # Modules draw no random numbers. A generator's state, kept for the second pass, would make the host wait for the
    # device, which a CUDA graph cannot record.
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
