"""Norm of the rows, then a projection, without the normalised rows in memory.

A row's norm commutes with the matrix product: for factors r (1 / rms, or 1 / standard deviation) and means m of the
rows of x, and weights g of the norm,

    norm(x) wᵀ = r (x (g w)ᵀ - m sum(g w))

so x is multiplied as it is, and rows are scaled in the epilogue.

Source: RMSNorm, Zhang & Sennrich 1910.07467; LayerNorm, Ba et al. 1607.06450 (here without bias).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.matmul import as_rows
from hrm.kernels.ops.operator import check_shape, check_tensors, operation, runs_triton, triton_kernels

KINDS = ("rms", "layer")


def naive(x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-5, kind: str = "rms") -> Tensor:
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], norm_weight, eps) @ w.T
    return F.layer_norm(x, x.shape[-1:], norm_weight, None, eps) @ w.T


# ---- the operators: the projection, and the gradient through the norm


@torch.library.custom_op("hrm::norm_linear", mutates_args=())
def _norm_linear(
    x: Tensor, w: Tensor, norm_weight: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of each row the factor r and, of a layer norm, r m; for others nothing, of shape [0]."""
    out, factors, shifts = triton_kernels("norm_linear", x).forward(x, w, norm_weight, eps, kind)
    return out, factors, shifts


@_norm_linear.register_fake
def _results(x: Tensor, w: Tensor, norm_weight: Tensor | None, eps: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    factors = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], w.shape[0]), factors, factors.new_empty(rows if kind == "layer" else 0)


@torch.library.custom_op("hrm::norm_backward", mutates_args=())
def _norm_backward(grad: Tensor, x: Tensor, factors: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows x [M, K]: the gradient from that of the normalised rows, and the normalised rows."""
    d_x, normalised = triton_kernels("norm_linear", x).backward(grad, x, factors, shifts)
    return d_x, normalised


@_norm_backward.register_fake
def _gradients(grad: Tensor, x: Tensor, factors: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("hrm::norm_weights_backward", mutates_args=())
def _weights_backward(grad: Tensor, w: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in w [N, K] and norm_weight [K] from that in their product [N, K]."""
    d_w, d_norm_weight = triton_kernels("norm_linear", w).weights_backward(grad, w, norm_weight)
    return d_w, d_norm_weight


@_weights_backward.register_fake
def _weights_gradients(grad: Tensor, w: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), norm_weight.new_empty(norm_weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, norm_weight, *_ = inputs
    _, factors, shifts = output
    ctx.mark_non_differentiable(factors, shifts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, norm_weight, factors, shifts)


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, w, norm_weight, factors, shifts = ctx.saved_tensors
    rows = as_rows(grad)
    weighted = w if norm_weight is None else w * norm_weight
    d_x, normalised = torch.ops.hrm.norm_backward(rows @ weighted, as_rows(x), factors, shifts)
    d_weighted = rows.T @ normalised
    if norm_weight is None:
        return d_x.view(x.shape), d_weighted, None, None, None
    d_w, d_norm_weight = torch.ops.hrm.norm_weights_backward(d_weighted, w, norm_weight)
    return d_x.view(x.shape), d_w, d_norm_weight, None, None


_norm_linear.register_autograd(_differentiate, setup_context=_keep)


@operation(naive)
def norm_linear(
    x: Tensor, w: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-5, kind: str = "rms"
) -> Tensor:
    """norm(x) @ w.T, the norm taken over the last dimension.

    Args:
        x: [..., K]; bfloat16, float16 or float32. Copied first unless its last dimension lies dense.
        w: [N, K], of the dtype of `x`.
        norm_weight: [K], the weights of the norm, or None for ones. They are multiplied into a copy of `w`, [N, K].
        eps: added to the mean square, or to the variance.
        kind: rms, or layer (without bias): divided by the root mean square, or by the standard deviation around 0.

    Returns:
        [..., N], dense, in the dtype of `x`. Differentiable in `x`, `w` and `norm_weight`. For the backward one float32
        a row is kept (two for layer) and the arguments; the normalised rows are made there for the one product that
        needs them, and the products are the library's.

    Raises:
        UserError: shapes, dtypes or devices differ, the dtype is another one, or the kind is unknown.
    """
    check_tensors("norm_linear", x=x, w=w, norm_weight=norm_weight)
    if w.ndim != 2:
        raise UserError(f"norm_linear: w is {list(w.shape)} and should be [N, K], a matrix.")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise UserError(
            f"norm_linear: x is {list(x.shape)} and should be [..., {w.shape[1]}], as w is {list(w.shape)}."
        )
    check_shape("norm_linear", "norm_weight", norm_weight, w.shape[1:], "one for a column of w")
    if kind not in KINDS:
        raise UserError(f"norm_linear: kind is {kind!r}; give rms or layer.")
    if not runs_triton(x):
        return naive(x, w, norm_weight, eps, kind)
    out: Tensor = _norm_linear(x, w, norm_weight, eps, kind)[0]
    return out
