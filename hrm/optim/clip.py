"""Clipping of gradients by their global norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def clip_gradients(
    whole: Sequence[Tensor], parts: Sequence[Tensor], groups: Iterable[dist.ProcessGroup | None], max_norm: float
) -> Tensor:
    """Scale gradients, in place, so that the norm of all of them together is at most `max_norm`. Does not wait.

    Args:
        whole: gradients that are the same on all processes.
        parts: gradients of which other processes hold other parts.
        groups: each part's square is summed over each of these in turn; None is all processes.

    Returns:
        The norm before, 0-dimensional.
    """
    square = _square(parts)
    for group in groups:
        dist.all_reduce(square, group=group)
    norm = (square + _square(whole)).sqrt()
    if whole or parts:  # all may be frozen
        torch._foreach_mul_([*whole, *parts], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def _square(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(grads))).square().sum() if grads else torch.zeros(())
