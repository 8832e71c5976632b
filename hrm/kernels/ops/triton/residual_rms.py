"""A projection with the residual and the norm that follow it, forward and backward, in Triton.

Forward, one kernel of `hrm.kernels.ops.hopper.residual_rms` where that pays; else the matmul by the library, then one
kernel over rows. Backward, the norm is one kernel and the matmuls are the library's. Nothing waits for the device.

Shapes: M rows, K inputs, D outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.common import differentiates, row_wise
from hrm.kernels.ops.triton.linear import runs_on_hopper


@triton.jit
def _add_rms_kernel(
    a: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows.to(tl.int64)[:, None] * D + columns
    total = tl.load(a + at, inside, 0).to(tl.float32) + tl.load(b + at, inside, 0).to(tl.float32)
    row_scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)
    tl.store(y + at, total * row_scale[:, None], inside)
    if SAVE:
        tl.store(rstd + rows, row_scale, rows < M)


@triton.jit
def _rms_and_sums_kernel(
    x: tl.tensor,
    y: tl.tensor,
    a: tl.tensor,
    with_a: tl.tensor,
    b: tl.tensor,
    with_both: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows.to(tl.int64)[:, None] * D + columns
    value = tl.load(x + at, inside, 0)
    wide = value.to(tl.float32)
    # Each sum rounds as if it had been made of what is in memory.
    total = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]).to(value.dtype)
    if y is not None:
        tl.store(y + at, total, inside)
    if a is not None:
        total = (total.to(tl.float32) + tl.load(a + at, inside, 0).to(tl.float32)).to(value.dtype)
        tl.store(with_a + at, total, inside)
        if b is not None:
            total = (total.to(tl.float32) + tl.load(b + at, inside, 0).to(tl.float32)).to(value.dtype)
            tl.store(with_both + at, total, inside)


@triton.jit
def _rms_backward_kernel(
    dy: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    M: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows.to(tl.int64)[:, None] * D + columns
    grad = tl.load(dy + at, inside, 0).to(tl.float32)
    value = tl.load(y + at, inside, 0).to(tl.float32)
    row_scale = tl.load(rstd + rows, rows < M, 0)[:, None]
    along = tl.sum(grad * value, 1)[:, None] / D
    tl.store(dx + at, row_scale * (grad - value * along), inside)


def _linear_residual_rms_forward(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor | None]:
    """The result [M, D] and, with `save`, 1 / rms of the rows before the norm [M]."""
    kernels = _hopper(x)
    if kernels is not None and kernels.pays_for_residual_rms(x, weight):
        y, rstd = kernels.linear_residual_rms(x, weight, residual, eps, save)
        return y, rstd
    return _add_rms_forward(residual, x @ weight.T, eps, save=save)


def linear_residual_rms_and_sums(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float, addends: Sequence[Tensor] = (), *, keep: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """`linear_residual_rms` without gradient, and what comes of adding one tensor after the other to its result.

    Args:
        x, weight, residual, eps: as there, contiguous; `residual` is overwritten.
        addends: none, one or two, each [M, D].
        keep: whether the result itself is wanted too.

    Returns:
        `(result, sums)`, as many sums as addends. Without `keep`, the result holds nothing of use.
    """
    kernels = _hopper(x)
    if kernels is not None and kernels.pays_for_residual_rms(x, weight):
        y, _ = kernels.linear_residual_rms(x, weight, residual, eps, False)
        return y, list(accumulate(addends, initial=y))[1:]
    y = residual.addmm_(x, weight.T)
    sums = [torch.empty_like(y) for _ in addends]
    pairs: list[Tensor | None] = [operand for pair in zip(addends, sums, strict=True) for operand in pair]
    pairs += [None] * (4 - len(pairs))
    M, D = y.shape
    grid, tile = row_wise(M, D)
    _rms_and_sums_kernel[grid](y, y if keep else None, *pairs, M, eps, D, **tile)
    return y, sums


def defers_norm(x: Tensor, qkv: Tensor, o: Tensor) -> bool:
    """Whether a block may leave the norm of its result `x` [M, D] to the next one's `deferred_norm_linear` and
    `deferred_norm_residual_rms`: a row factor, which commutes with the matmul, found on the way.
    """
    kernels = _hopper(x)
    return kernels is not None and runs_on_hopper(x, qkv) and kernels.pays_for_residual_rms(x, o)


def deferred_norm_residual_rms(x: Tensor, weight: Tensor, residual: Tensor, factors: Tensor, eps: float) -> Tensor:
    """`linear_residual_rms` with the rows of the residual times `factors`, where `defers_norm` says so."""
    y: Tensor = _hopper(x).linear_residual_rms(x, weight, residual, eps, False, factors)[0]  # type: ignore[union-attr]
    return y


def _add_rms_forward(a: Tensor, b: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """The result [M, D] and, with `save`, 1 / rms of the rows of a + b [M]."""
    M, D = a.shape
    y = torch.empty_like(a)
    rstd = a.new_empty(M, dtype=torch.float32) if save else None
    grid, tile = row_wise(M, D)
    _add_rms_kernel[grid](a, b, y, rstd, M, eps, D, save, **tile)
    return y, rstd


def _rms_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    """Gradient with respect to what was normalised, from its result alone: rstd (dy - y mean(dy y)), all [M, D]."""
    M, D = y.shape
    dx = torch.empty_like(y)
    grid, tile = row_wise(M, D)
    _rms_backward_kernel[grid](dy, y, rstd, dx, M, D, **tile)
    return dx


def _hopper(x: Tensor) -> ModuleType | None:
    """The kernels made for Hopper if they run on the device of `x`."""
    if hopper.why_not(x.device):
        return None
    from hrm.kernels.ops.hopper import residual_rms as hopper_residual_rms

    return hopper_residual_rms


class _LinearResidualRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> Tensor:
        y, rstd = _linear_residual_rms_forward(x, weight, residual, eps, save=True)
        ctx.save_for_backward(x, weight, y, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        x, weight, y, rstd = ctx.saved_tensors
        d_sum = _rms_backward(d_y.contiguous(), y, rstd)
        d_x = d_sum @ weight if ctx.needs_input_grad[0] else None
        d_weight = d_sum.T @ x if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_sum, None


class _AddRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, eps: float) -> Tensor:
        y, rstd = _add_rms_forward(a, b, eps, save=True)
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        y, rstd = ctx.saved_tensors
        d_sum = _rms_backward(d_y.contiguous(), y, rstd)
        return d_sum, d_sum, None


def linear_residual_rms(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> Tensor:
    """rms_norm(residual + x @ weight.T), without a gain.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight: [D, K] of the same dtype.
        residual: [M, D] of the same dtype.
        eps: added to the mean square of a row.

    Returns:
        [M, D]. For a backward, x, the result and 1 / rms of each row are kept.
    """
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    if differentiates(x, weight, residual):
        return _LinearResidualRMS.apply(x, weight, residual, eps)  # type: ignore[no-any-return, no-untyped-call]
    return _linear_residual_rms_forward(x, weight, residual, eps, save=False)[0]


def add_rms(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """rms_norm(a + b) of a, b [M, D], without a gain; for a backward, the result and 1 / rms of each row are kept."""
    a, b = a.contiguous(), b.contiguous()
    if differentiates(a, b):
        return _AddRMS.apply(a, b, eps)  # type: ignore[no-any-return, no-untyped-call]
    return _add_rms_forward(a, b, eps, save=False)[0]
