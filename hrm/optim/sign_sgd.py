"""SignSGD for the puzzle table, touching only the rows that a batch used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hrm.optim.schedule import set_lr


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

    Attributes:
        found_inf: 0-dimensional; when not 0, `step` changes nothing, without waiting to see.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        table: SparseTable,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        *,
        fused: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """As for other optimizers; give `lr` as a 0-dimensional float64 tensor for CUDA graphs, and fill it.

        Args:
            fused: update by one kernel in Triton, which runs on NVIDIA GPUs.
            group: of the ranks that take different sequences; None is all there are.
        """
        super().__init__([table.weights], {"lr": lr, "weight_decay": weight_decay})
        self._table = table
        self._fused = fused
        self._group = group
        self._kept: list[tuple[Tensor, Tensor]] = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the options of a state; a tensor that holds `lr` stays that tensor."""
        lr = self.param_groups[0]["lr"]
        super().load_state_dict(state_dict)
        set_lr(self.param_groups[0], float(self.param_groups[0]["lr"]), lr)

    def keep(self) -> None:
        """Put the last forward's rows aside, for `step` to update together with those of the forwards that follow."""
        if (rows := self._rows()) is not None:
            self._kept.append(rows)

    def gradients(self) -> list[Tensor]:
        """Of the rows that `step` is to update, [B, ndim] for each forward."""
        rows = self._rows()
        return [grads for _, grads in [*self._kept, *([rows] if rows else [])]]

    def _rows(self) -> tuple[Tensor, Tensor] | None:
        """Rows that the last training forward read, with their gradients."""
        table = self._table
        if table.local_ids is None or table.local_weights is None or table.local_weights.grad is None:
            return None
        return table.local_ids, table.local_weights.grad

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
        if (rows := self._rows()) is None:
            return loss
        lr = group["lr"]
        kept = [*self._kept, rows]
        ids, grads = (_gather_ranks(torch.cat(parts), self._group) for parts in zip(*kept, strict=True))
        if self._fused:
            from hrm.kernels.ops.triton.optim import sign_sgd_  # imported here: Triton is not everywhere

            sign_sgd_(table.weights, ids.contiguous(), grads.contiguous(), lr, group["weight_decay"], self.found_inf)
            return loss
        # Rows of equal ids get the same sum, so writing a row several times is harmless, and no step of the way
        # depends on how many different ids there are (which the host would have to wait for).
        same_id = (ids.unsqueeze(0) == ids.unsqueeze(1)).to(grads.dtype)
        direction = torch.sign(same_id @ grads)
        before = table.weights[ids]
        updated = before * (1 - lr * group["weight_decay"]) - lr * direction
        if self.found_inf is not None:
            updated = torch.where(self.found_inf > 0, before, updated)
        table.weights.index_copy_(0, ids.long(), updated)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._table.local_ids = self._table.local_weights = None
        self._kept.clear()


def _gather_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)
