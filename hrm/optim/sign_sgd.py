"""SignSGD for the puzzle table, touching only the rows that a batch used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class SparseTable(Protocol):
    """What the optimizer needs of a table; `hrm.models.layers.SparseEmbedding` is one."""

    weights: Tensor  # [N, ndim]
    local_ids: Tensor | None  # [B]: rows that the last training forward read
    local_weights: Tensor | None  # [B, ndim] leaf whose gradient that forward's backward filled


class SparseSignSGD(Optimizer):
    """Update the rows a batch touched by the sign of their summed gradient, with decoupled weight decay:

        w = w * (1 - lr * weight_decay) - lr * sign(sum of the gradient rows of w, over the batch and all ranks)

    Rows that nobody touched stay as they are, decay included. Nothing here waits for the device, and sums are taken in
    a fixed order, so equal inputs give equal bits.
    """

    def __init__(self, table: SparseTable, lr: float | Tensor, weight_decay: float = 0.0) -> None:
        super().__init__([table.weights], {"lr": lr, "weight_decay": weight_decay})
        self._table = table

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        table, group = self._table, self.param_groups[0]
        if table.local_ids is None or table.local_weights is None or table.local_weights.grad is None:
            return loss
        ids, grads = _gather_ranks(table.local_ids.long()), _gather_ranks(table.local_weights.grad)
        # Rows of equal ids get the same sum, so writing a row several times is harmless, and no step of the way
        # depends on how many different ids there are (which the host would have to wait for).
        same_id = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(grads.dtype)
        direction = torch.sign(same_id @ grads)
        lr = group["lr"]
        rows = table.weights[ids] * (1 - lr * group["weight_decay"]) - lr * direction
        table.weights.index_copy_(0, ids, rows)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._table.local_ids = self._table.local_weights = None


def _gather_ranks(local: Tensor) -> Tensor:
    """Concatenate the rows of all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)
