"""Matrix product with bias and activation in its epilogue.

Source: the tiled product is that of any BLAS; activations as `torch.nn.functional` defines them, gelu by the error
function (Hendrycks & Gimpel 1606.08415).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import check_shape, check_tensors, operation, runs_triton, triton_kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def naive(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    out = a @ b
    if bias is not None:
        out = out + bias
    return out if activation is None else ACTIVATIONS[activation](out)


def as_rows(x: Tensor) -> Tensor:
    """[..., M, K] as a matrix of rows; [K] as one of them."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


# ---- the operators: the product, and the gradient of its activation


@torch.library.custom_op("hrm::matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, save: bool) -> tuple[Tensor, Tensor]:
    """The result and, with `save`, what its activation was applied to (otherwise nothing, of shape [0])."""
    out, before = triton_kernels("matmul", a).forward(a, b, bias, activation, save)
    return out, before


@_matmul.register_fake
def _results(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, save: bool) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:-1], b.shape[1])
    return a.new_empty(shape), a.new_empty(shape if save else 0)


@torch.library.custom_op("hrm::activation_backward", mutates_args=())
def _activation_backward(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    """The gradient before an activation from that after it, and `kept`: its argument; of relu, its result."""
    out: Tensor = triton_kernels("matmul", grad).activation_backward(grad, kept, activation)
    return out


@_activation_backward.register_fake
def _gradient(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    return torch.empty_like(kept)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, bias, activation, save = inputs
    out, before = output
    ctx.mark_non_differentiable(before)
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.has_bias = activation, bias is not None
    kept = before if save else out
    ctx.save_for_backward(a, b, *([kept] if activation else []))


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    a, b, *kept = ctx.saved_tensors
    if ctx.activation:
        grad = torch.ops.hrm.activation_backward(grad, kept[0], ctx.activation)
    wants_a, wants_b, wants_bias, *_ = ctx.needs_input_grad
    rows = as_rows(grad)
    d_a = grad @ b.T if wants_a else None
    d_b = as_rows(a).T @ rows if wants_b else None
    d_bias = rows.sum(0) if ctx.has_bias and wants_bias else None
    return d_a, d_b, d_bias, None, None


_matmul.register_autograd(_differentiate, setup_context=_keep)


@operation(naive)
def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(a @ b + bias), with bias and activation applied in float32 before the result is rounded.

    Args:
        a: [..., M, K] or [K]; bfloat16, float16 or float32. Copied first unless its last dimension lies dense.
        b: [K, N], of the dtype of `a`. Read as it lies if its rows or its columns (as of `weight.T`) lie dense.
        bias: [N].
        activation: None, gelu (by the error function), silu or relu.

    Returns:
        [..., M, N], dense, in the dtype of `a`. Differentiable in `a`, `b` and `bias`. For the backward, gelu and silu
        keep what they are applied to, [..., M, N] in the dtype of `a`, and relu only the result; the gradient passes
        the activation in a kernel of its own, and the matrix products of the backward are the library's.

    Raises:
        UserError: shapes, dtypes or devices differ, the dtype is another one, or the activation is unknown.
    """
    check_tensors("matmul", a=a, b=b, bias=bias)
    if b.ndim != 2:
        raise UserError(f"matmul: b is {list(b.shape)} and should be [K, N], a matrix.")
    if a.ndim == 0 or a.shape[-1] != b.shape[0]:
        raise UserError(f"matmul: a is {list(a.shape)} and should be [..., M, {b.shape[0]}], as b is {list(b.shape)}.")
    check_shape("matmul", "bias", bias, b.shape[1:], "one for a column of b")
    if activation is not None and activation not in ACTIVATIONS:
        raise UserError(f"matmul: activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}, or None.")
    if not runs_triton(a):
        return naive(a, b, bias, activation)
    differentiates = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias))
    out: Tensor = _matmul(a, b, bias, activation, differentiates and activation in ("gelu", "silu"))[0]
    return out
