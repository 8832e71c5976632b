"""Adam-atan2 (Everett et al. 2024), the optimizer of the dense weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamATan2(Optimizer):
    """Adam whose division by the second moment is an arctangent, so that it needs no epsilon and is scale-invariant.

    In this order, with decoupled weight decay and betas (b1, b2), at step t:

        p *= 1 - lr * weight_decay
        m  = b1 * m + (1 - b1) * g
        v  = b2 * v + (1 - b2) * g^2
        p -= lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))

    The correction of the first moment stands outside the arctangent, as in the published code. All parameters of a
    group are updated by a handful of multi-tensor kernels.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

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
        for group in self.param_groups:
            for step, params in self._advance(group["params"]).items():
                self._update(params, step, **{name: group[name] for name in self.defaults})
        return loss

    def _advance(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """Count a step for the parameters that have a gradient; returns them by their step number."""
        by_step: dict[int, list[Tensor]] = defaultdict(list)
        for param in params:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
            by_step[state["step"]].append(param)
        return by_step

    def _update(
        self, params: list[Tensor], step: int, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        beta1, beta2 = betas
        grads = [param.grad for param in params if param.grad is not None]
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        for moment, denominator in zip(first, scale, strict=True):
            torch.atan2(moment, denominator, out=denominator)  # there is no multi-tensor atan2
        torch._foreach_add_(params, scale, alpha=-lr / (1 - beta1**step))
