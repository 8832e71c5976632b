"""Adam-atan2 (Everett et al. 2024), the optimizer of the dense weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.models.layers import keep_copy
from hrm.optim.adam import Adam


class AdamATan2(Adam):
    """Adam whose division by the second moment is an arctangent, so that it needs no epsilon and is scale-invariant.

    In this order, with decoupled weight decay and betas (b1, b2), at step t:

        p *= 1 - lr * weight_decay
        m  = b1 * m + (1 - b1) * g
        v  = b2 * v + (1 - b2) * g^2
        p -= lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))

    The correction of the first moment stands outside the arctangent, as in the published code. All parameters of a
    group are updated by a handful of multi-tensor kernels, or by one (`fused`).
    """

    def _apply(self, params: list[Tensor], step: int | Tensor, group: dict[str, Any]) -> None:
        update = self._update_fused if group["fused"] else self._update
        update(params, step, group["lr"], group["betas"], group["weight_decay"])

    def _update(
        self,
        params: list[Tensor],
        step: int | Tensor,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        beta1, beta2 = betas
        grads = [param.grad for param in params if param.grad is not None]
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        # In float64 until they meet the weights, on the device as on the host, so that both round alike.
        count = step.double() if isinstance(step, Tensor) else step
        second_decay: float | Tensor = beta2
        if self.found_inf is not None:
            # Numbers under which the same kernels change nothing: from a moment to itself, then a gradient of 0.
            assert isinstance(count, Tensor)
            skip = self.found_inf.double()
            count, lr, second_decay = count.clamp(min=1), lr * (1 - skip), beta2 * (1 - skip) + skip
            hold(first, grads, self.found_inf)
        decay, rate, widen = 1 - lr * weight_decay, -lr / (1 - beta1**count), (1 - beta2**count) ** -0.5
        torch._foreach_mul_(params, as_scalar(decay, params))
        torch._foreach_lerp_(first, grads, 1 - beta1)
        if self.found_inf is not None:
            torch._foreach_mul_(grads, 1 - self.found_inf)
        torch._foreach_mul_(second, as_scalar(second_decay, params))
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        update = torch._foreach_sqrt(second)
        torch._foreach_mul_(update, as_scalar(widen, params))
        for moment, scale in zip(first, update, strict=True):
            torch.atan2(moment, scale, out=scale)  # there is no multi-tensor atan2
        torch._foreach_mul_(update, as_scalar(rate, params))
        torch._foreach_add_(params, update)

    def _update_fused(
        self,
        params: list[Tensor],
        step: int | Tensor,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        from hrm.kernels.ops.triton.optim import adam_atan2_  # imported here: Triton is not everywhere

        assert isinstance(step, Tensor)
        copies = self._copies(params)
        adam_atan2_(
            params,
            [param.grad.contiguous() for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            copies,
            step=step,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            found_inf=self.found_inf,
        )
        for param, copy in zip(params, copies, strict=False):
            keep_copy(param, copy)


def hold(moments: list[Tensor], grads: list[Tensor], found_inf: Tensor) -> None:
    """Where `found_inf` is not 0, put each moment in the place of its gradient: averaging the two changes nothing."""
    for moment, grad in zip(moments, grads, strict=True):
        torch.where(found_inf > 0, moment, grad, out=grad)


def as_scalar(value: float | Tensor, params: list[Tensor]) -> float | Tensor:
    """A factor for all of `params`, in their dtype if it is on the device."""
    return value.to(params[0].dtype) if isinstance(value, Tensor) else value
