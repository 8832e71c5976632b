"""AdamW (Loshchilov & Hutter 2019) as one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hrm.models.layers import keep_copy
from hrm.optim.adam import Adam


class FusedAdamW(Adam):
    """`torch.optim.AdamW` in one launch of `hrm.kernels.ops.adamw_` for each 64 weights, on NVIDIA GPUs.

    Unlike PyTorch's it skips steps that `found_inf` marks, and writes copies of the weights in the compute dtype.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        """As for `torch.optim.AdamW`; the rest as for `Adam`."""
        super().__init__(params, lr, betas, weight_decay, fused=True, copy_dtype=copy_dtype)
        self.defaults["eps"] = eps
        for group in self.param_groups:
            group.setdefault("eps", eps)

    def _apply(self, params: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> None:
        from hrm.kernels.ops import adamw_

        copies = self._copies(params)
        adamw_(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            step,
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            copies=copies,
            found_inf=self.found_inf,
        )
        for param, copy in zip(params, copies, strict=False):
            keep_copy(param, copy)
