"""Norm of the last dimension by its mean and standard deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import (
    check_gain,
    check_rows,
    check_tensors,
    dtype_name,
    operation,
    runs_triton,
    triton_kernels,
)


def naive(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


@torch.library.custom_op("hrm::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and 1 / deviation of each row."""
    y, mean, rstd = triton_kernels("norm", x).forward(x, weight, bias, eps, centred=True)
    return y, mean, rstd


@_layer_norm.register_fake
def _results(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


@torch.library.custom_op("hrm::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, d_weight: bool, d_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients in x, and in weight and bias where they are asked for, in float32: [0, 1 or 2, D]."""
    dx, sums = triton_kernels("norm", x).backward(dy, x, weight, mean, rstd, d_weight=d_weight, d_bias=d_bias)
    return dx, sums


@_backward.register_fake
def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, d_weight: bool, d_bias: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(d_weight + d_bias, x.shape[-1], dtype=None if weight is None else weight.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.set_materialize_grads(False)  # the statistics have no gradient


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    x, weight, mean, rstd = ctx.saved_tensors
    _, d_weight, d_bias, _ = ctx.needs_input_grad
    dx, sums = _backward(dy, x, weight, mean, rstd, d_weight, d_bias)
    return dx, sums[0] if d_weight else None, sums[-1] if d_bias else None, None


_layer_norm.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps), over the last dimension, times the weight, plus the bias.

    Args:
        x: [..., D], bfloat16, float16 or float32; computed in float32, and rounded once. Rows may lie at any one
            stride; other tensors are copied first.
        weight: [D], in the dtype of `x` or float32, or None for 1.
        bias: [D], in the dtype of the weight, or None for 0. Only beside a weight.
        eps: added to the variance (that of the row as a whole, divided by D).

    Returns:
        [..., D], contiguous, in the dtype of `x`. Differentiable in all three tensors; gradients of weight and bias are
        added up in float32, in the same order in every run on a device. Kept for it: x, and two floats for each row.

    Raises:
        UserError: weight or bias have another shape, there is a bias without a weight, or dtypes or devices are others.

    Source: Ba, Kiros & Hinton, Layer Normalization, 1607.06450, eq. 3.
    """
    check_tensors("layer_norm", x=x)
    check_rows("layer_norm", x)
    check_gain("layer_norm", "weight", weight, x)
    check_gain("layer_norm", "bias", bias, x)
    if bias is not None:
        if weight is None:
            raise UserError("layer_norm: there is a bias and no weight; give both, a weight of ones if need be.")
        if bias.dtype != weight.dtype:
            raise UserError(
                f"layer_norm: bias is {dtype_name(bias.dtype)} and weight is {dtype_name(weight.dtype)};"
                " give both one dtype."
            )
    if not runs_triton(x):
        return naive(x, weight, bias, eps)
    y: Tensor = _layer_norm(x, weight, bias, eps)[0]
    return y
