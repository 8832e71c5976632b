"""Arcsine of each element: an example of a kernel that calls libdevice, NVIDIA's library of functions on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.kernels.ops.operator import check_tensors, operation, triton_kernels


def naive(x: Tensor) -> Tensor:
    return torch.asin(x)


@torch.library.custom_op("hrm::asin", mutates_args=())
def _asin(x: Tensor) -> Tensor:
    out: Tensor = triton_kernels("asin", x).forward(x)
    return out


@torch.library.custom_op("hrm::asin_backward", mutates_args=())
def _asin_backward(grad: Tensor, x: Tensor) -> Tensor:
    dx: Tensor = triton_kernels("asin", x).backward(grad, x)
    return dx


@_asin.register_fake
def _result(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_asin_backward.register_fake
def _gradient(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    dx: Tensor = _asin_backward(grad, *ctx.saved_tensors)
    return dx


_asin.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def asin(x: Tensor) -> Tensor:
    """Arcsine of each element, in radians; NaN outside of [-1, 1].

    Args:
        x: any shape and strides; bfloat16, float16 or float32, computed in float32.

    Returns:
        The shape, dtype and order in memory of `x`. Differentiable; the gradient is infinite at -1 and 1.

    Raises:
        UserError: the dtype is another one.

    Source: `__nv_asinf` of libdevice (CUDA's libdevice User's Guide). In Triton's interpreter, which has no libdevice,
    the definition runs.
    """
    check_tensors("asin", x=x)
    if not x.is_cuda:
        return naive(x)
    out: Tensor = _asin(x)
    return out
