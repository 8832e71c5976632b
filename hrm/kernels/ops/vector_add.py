"""Sum of two tensors of one shape: the smallest operation, to be copied when the next one is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.kernels.ops.operator import check_shape, check_tensors, operation, runs_triton, triton_kernels


def naive(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@torch.library.custom_op("hrm::vector_add", mutates_args=())
def _vector_add(x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = triton_kernels("vector_add", x).forward(x, y)
    return out


@_vector_add.register_fake
def _result(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad, grad


_vector_add.register_autograd(_differentiate)


@operation(naive)
def vector_add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of two tensors of one shape.

    Args:
        x: any shape; bfloat16, float16 or float32. Any strides: what lies dense in memory is read as it lies.
        y: as `x`. It is copied first where its strides are others.

    Returns:
        The shape, dtype and order in memory of `x`. Differentiable in both.

    Raises:
        UserError: shapes, dtypes or devices differ, or the dtype is another one.
    """
    check_tensors("vector_add", x=x, y=y)
    check_shape("vector_add", "y", y, x.shape, "as x")
    if not runs_triton(x):
        return naive(x, y)
    out: Tensor = _vector_add(x, y)
    return out
