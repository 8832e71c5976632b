"""Norm of the last dimension by its root mean square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.kernels.ops.operator import check_gain, check_rows, check_tensors, operation, runs_triton, triton_kernels


def naive(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


@torch.library.custom_op("hrm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms of each row."""
    y, _, rstd = triton_kernels("norm", x).forward(x, weight, None, eps, centred=False)
    return y, rstd


@_rms_norm.register_fake
def _results(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("hrm::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, d_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients in x, and in the weight where it is asked for: [0 or 1, D]."""
    dx, sums = triton_kernels("norm", x).backward(dy, x, weight, None, rstd, d_weight=d_weight, d_bias=False)
    return dx, sums


@_backward.register_fake
def _gradients(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, d_weight: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(int(d_weight), x.shape[-1], dtype=None if weight is None else weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # the factors have no gradient


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    dx, sums = _backward(dy, x, weight, rstd, ctx.needs_input_grad[1])
    return dx, sums[0] if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps), over the last dimension, times the weight.

    Args:
        x: [..., D], bfloat16, float16 or float32; computed in float32, and rounded once. Rows may lie at any one
            stride; other tensors are copied first.
        weight: [D], in the dtype of `x` or float32, or None for 1.
        eps: added to the mean square.

    Returns:
        [..., D], contiguous, in the dtype of `x`. Differentiable in `x` and `weight`; the gradient of the weight is
        added up in float32, in the same order in every run on a device. Kept for it: x, and a float for each row.

    Raises:
        UserError: the weight has another shape, or dtypes or devices are others.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, 1910.07467, eq. 4.
    """
    check_tensors("rms_norm", x=x)
    check_rows("rms_norm", x)
    check_gain("rms_norm", "weight", weight, x)
    if not runs_triton(x):
        return naive(x, weight, eps)
    y: Tensor = _rms_norm(x, weight, eps)[0]
    return y
