"""Muon (Jordan 2024) for the hidden matrices, with Adam-atan2 for the rest: learns in far fewer steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hrm.models.layers import keep_copy
from hrm.optim.adam_atan2 import AdamATan2, as_scalar, hold

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan 2024: singular values end between about 0.7 and 1.2


class Muon(AdamATan2):
    """Hidden matrices move by their momentum with all its singular values made about 1; everything else, embeddings
    and heads, by Adam-atan2 at a rate and a weight decay of their own.

    For a matrix of R rows and C columns, with decoupled weight decay:

        p *= 1 - lr * weight_decay
        m  = momentum * m + (1 - momentum) * g
        p -= lr * scale * orthogonal(momentum * m + (1 - momentum) * g)

    A scale of 0.2 sqrt(max(R, C)) gives the update the size that Adam's has (Liu et al. 2025), so rates compare; one of
    sqrt(max(1, R / C)) bounds what it changes in outputs (Jordan 2024). Matrices of one shape are made orthogonal
    together, and nothing waits for the device: a step may be part of a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        *,
        matrices: Mapping[Tensor, int],
        momentum: float = 0.95,
        rest_lr_ratio: float = 1.0,
        rest_weight_decay: float = 0.0,
        scale: str = "adam",
        iterations: int = 5,
        capturable: bool = False,
        fused: bool = False,
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        """As for `AdamATan2`, whose `betas` and `fused` are the rest's.

        Args:
            matrices: those of `params` that are hidden matrices, each with how many of one height it has, one above
                the other: they are made orthogonal one by one.
            momentum: of the hidden matrices.
            rest_lr_ratio: rate of the rest, as a multiple of `lr`.
            rest_weight_decay: weight decay of the rest.
            scale: of the orthogonal step: `adam`, 0.2 sqrt(max(R, C)), or `spectral`, sqrt(max(1, R / C)).
            iterations: of Newton-Schulz. With few, small singular values stay small, and so does what they move.
        """
        super().__init__(params, lr, betas, weight_decay, capturable=capturable, fused=fused, copy_dtype=copy_dtype)
        self._matrices = dict(matrices)
        self._momentum = momentum
        self._rest_lr_ratio = rest_lr_ratio
        self._rest_weight_decay = rest_weight_decay
        self._scale = scale
        self._iterations = iterations

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        return {"exp_avg": torch.zeros_like(param)} if param in self._matrices else super()._new_state(param)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if rest := [param for param in params if param not in self._matrices]:
            rest_lr, rest_weight_decay = group["lr"] * self._rest_lr_ratio, self._rest_weight_decay
            super()._step_group(group | {"params": rest, "lr": rest_lr, "weight_decay": rest_weight_decay})
        if matrices := [param for param in params if param in self._matrices]:
            self._count_step(matrices, group["capturable"])
            self._update_matrices(matrices, group["lr"], group["weight_decay"])

    def _scale_of(self, rows: int, columns: int) -> float:
        if self._scale == "spectral":
            return float(max(1.0, rows / columns) ** 0.5)
        return float(0.2 * max(rows, columns) ** 0.5)

    def _update_matrices(self, params: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        moments = [self.state[param]["exp_avg"] for param in params]
        if self.found_inf is not None:  # from a moment to itself, at a rate of 0: nothing changes
            lr = lr * (1 - self.found_inf.double())
            hold(moments, grads, self.found_inf)
        torch._foreach_lerp_(moments, grads, 1 - self._momentum)
        torch._foreach_lerp_(grads, moments, self._momentum)

        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, grad in zip(params, grads, strict=True):
            by_shape[param.shape[0] // self._matrices[param], param.shape[1]].append((param, grad))
        torch._foreach_mul_(params, as_scalar(1 - lr * weight_decay, params))
        for (rows, columns), pairs in by_shape.items():
            stack = torch.cat([grad.reshape(-1, rows, columns) for _, grad in pairs])
            stack = orthogonal(stack, self._iterations).to(stack.dtype) * (-lr * self._scale_of(rows, columns))
            same = [param for param, _ in pairs]
            updates = stack.split_with_sizes([self._matrices[param] for param in same])
            torch._foreach_add_(same, [x.reshape(param.shape) for x, param in zip(updates, same, strict=True)])
        if copies := self._copies(params):
            torch._foreach_copy_(copies, params)
            for param, copy in zip(params, copies, strict=True):
                keep_copy(param, copy)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to [N, R, C], about: by Newton-Schulz steps, in bfloat16 on a GPU."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)  # zeros stay zeros
    a, b, c = _NEWTON_SCHULZ
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
