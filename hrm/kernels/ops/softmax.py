"""Softmax along a dimension, however long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import check_rows, check_tensors, operation, runs_triton, triton_kernels


def naive(x: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(x, dim)


@torch.library.custom_op("hrm::softmax", mutates_args=())
def _softmax(x: Tensor, dim: int) -> Tensor:
    y: Tensor = triton_kernels("softmax", x).forward(x, dim)
    return y


@_softmax.register_fake
def _result(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hrm::softmax_backward", mutates_args=())
def _backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dx: Tensor = triton_kernels("softmax", y).backward(dy, y, dim)
    return dx


@_backward.register_fake
def _gradient(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return torch.empty_like(y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dim = inputs[1]
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors, ctx.dim), None


_softmax.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along a dimension.

    Args:
        x: [..., D, ...], bfloat16, float16 or float32; computed in float32 from differences to the largest value, and
            rounded once. -inf gives 0; a row of nothing else, or with inf or NaN in it, gives NaN. Along the last
            dimension, rows may lie at any one stride; other tensors are copied first.
        dim: the dimension, from -x.ndim to x.ndim - 1, of any length: beyond 32,768 along the last (16,384 in the
            backward) a row is read twice.

    Returns:
        The shape and dtype of `x`, contiguous. Differentiable; the result is kept for it.

    Raises:
        UserError: there is no such dimension, or the dtype is another one.

    Source: the running peak of long rows is that of Milakov & Gimelshein, Online normalizer calculation for softmax,
    1805.02867, alg. 3.
    """
    check_tensors("softmax", x=x)
    check_rows("softmax", x)
    if not -x.ndim <= dim < x.ndim:
        raise UserError(f"softmax: dim is {dim}; x has {x.ndim} dimensions, give one from {-x.ndim} to {x.ndim - 1}.")
    if not runs_triton(x):
        return naive(x, dim)
    y: Tensor = _softmax(x, dim % x.ndim)
    return y
