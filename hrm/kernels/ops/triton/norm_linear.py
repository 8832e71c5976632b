"""Kernels of `hrm.kernels.ops.norm_linear`; the product is that of `matmul`.

Forward: what there is to know of each row, and the weights of both in one, are a small kernel each; of rows of up to
512 numbers on Hopper GPUs, the product finds it itself. Backward: two kernels beside the products.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.matmul import as_rows
from hrm.kernels.ops.triton.common import row_wise
from hrm.kernels.ops.triton.matmul import Epilogue, dense_rows, product


@triton.jit
def _statistics_kernel(
    x: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Of each row the factor and, where there are `shifts`, mean times factor: then of a layer norm."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows[:, None] < M) & (columns < K)
    row = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns, inside, 0.0).to(tl.float32)
    if shifts is None:
        factor = tl.rsqrt(tl.sum(row * row, 1) / K + eps)
    else:
        mean = tl.sum(row, 1) / K
        rest = tl.where(inside, row - mean[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(rest * rest, 1) / K + eps)
        tl.store(shifts + rows, mean * factor, rows < M)
    tl.store(factors + rows, factor, rows < M)


@triton.jit
def _weights_kernel(
    w: tl.tensor,
    norm_weight: tl.tensor,
    weighted: tl.tensor,
    sums: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """w times the norm's weights and, where wanted, the sums of the rows of that, as it is multiplied later."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    row = tl.load(w + rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, 0.0)
    if norm_weight is not None:
        scale = tl.load(norm_weight + columns, columns < K, 0.0).to(tl.float32)
        row = (row.to(tl.float32) * scale[None, :]).to(w.dtype.element_ty)
        tl.store(weighted + rows.to(tl.int64)[:, None] * K + columns[None, :], row, inside)
    if sums is not None:
        tl.store(sums + rows, tl.sum(row.to(tl.float32), 1), rows < N)


@triton.jit
def _backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    d_x: tl.tensor,
    normalised: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    grad_stride: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows[:, None] < M) & (columns < K)
    row = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns, inside, 0.0).to(tl.float32)
    dy = tl.load(grad + rows.to(tl.int64)[:, None] * grad_stride + columns, inside, 0.0).to(tl.float32)
    factor = tl.load(factors + rows, rows < M, 0.0)[:, None]
    y = row * factor
    if shifts is not None:
        y = y - tl.load(shifts + rows, rows < M, 0.0)[:, None]
        y = tl.where(inside, y, 0.0)
    dx = dy - y * (tl.sum(dy * y, 1) / K)[:, None]
    if shifts is not None:
        dx = dx - (tl.sum(dy, 1) / K)[:, None]
    at = rows.to(tl.int64)[:, None] * K + columns
    tl.store(d_x + at, dx * factor, inside)
    tl.store(normalised + at, y, inside)


@triton.jit
def _weights_backward_kernel(
    grad: tl.tensor,
    w: tl.tensor,
    norm_weight: tl.tensor,
    d_w: tl.tensor,
    parts: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of some rows of d_w, and the sum of what they add to the gradient of the norm's weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    at = rows.to(tl.int64)[:, None]
    slope = tl.load(grad + at * K + columns[None, :], inside, 0.0).to(tl.float32)
    weight = tl.load(w + at * stride + columns[None, :], inside, 0.0).to(tl.float32)
    scale = tl.load(norm_weight + columns, columns < K, 0.0).to(tl.float32)
    tl.store(d_w + at * K + columns[None, :], slope * scale[None, :], inside)
    tl.store(parts + tl.program_id(0) * K + columns, tl.sum(slope * weight, 0), columns < K)


def forward(x: Tensor, w: Tensor, norm_weight: Tensor | None, eps: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator `hrm::norm_linear` says."""
    rows, (N, K) = dense_rows(as_rows(x)), w.shape
    M = len(rows)
    is_layer = kind == "layer"
    factors = rows.new_empty(M, dtype=torch.float32)
    shifts = rows.new_empty(M if is_layer else 0, dtype=torch.float32)
    shape = (*x.shape[:-1], N)
    if M == 0 or N == 0 or K == 0:
        return x.new_zeros(shape), factors.zero_(), shifts.zero_()
    weighted, sums = _fold(dense_rows(w), norm_weight, is_layer)
    if hopper.why_not(x.device) is None and rows.is_contiguous():
        from hrm.kernels.ops.hopper import linear

        if linear.pays_for_linear(rows, weighted):
            if sums is None:
                out, factors = linear.norm_linear(rows, weighted.contiguous(), eps)
            else:
                out, factors, shifts = linear.layer_norm_linear(rows, weighted.contiguous(), sums, eps)
            return out.view(shape), factors, shifts
    grid, tile = row_wise(M, K)
    _statistics_kernel[grid](rows, factors, shifts if is_layer else None, M, K, rows.stride(0), eps, **tile)
    epilogue = Epilogue(factors, shifts if is_layer else None, sums)
    return product(rows, weighted.T, epilogue)[0].view(shape), factors, shifts


def _fold(w: Tensor, norm_weight: Tensor | None, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    """w [N, K] with the norm's weights in it, and if wanted the sums of its rows, float32."""
    N, K = w.shape
    weighted = w if norm_weight is None else w.new_empty(N, K)
    sums = w.new_empty(N, dtype=torch.float32) if wants_sums else None
    if norm_weight is not None or wants_sums:
        grid, tile = row_wise(N, K)
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        _weights_kernel[grid](w, norm_weight, weighted, sums, N, K, w.stride(0), **tile)
    return weighted, sums


def backward(grad: Tensor, x: Tensor, factors: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """As the operator `hrm::norm_backward` says."""
    grad, x = dense_rows(grad), dense_rows(x)
    M, K = x.shape
    d_x, normalised = x.new_empty(M, K), x.new_empty(M, K)
    if d_x.numel():
        grid, tile = row_wise(M, K)
        _backward_kernel[grid](
            grad,
            x,
            factors,
            shifts if len(shifts) else None,
            d_x,
            normalised,
            M,
            K,
            grad.stride(0),
            x.stride(0),
            **tile,
        )
    return d_x, normalised


def weights_backward(grad: Tensor, w: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the operator `hrm::norm_weights_backward` says."""
    grad, w = grad.contiguous(), dense_rows(w)
    (N, K), height, width = w.shape, 32, 128
    d_w = w.new_empty(N, K)
    parts = w.new_empty(triton.cdiv(N, height), K, dtype=torch.float32)
    if d_w.numel():
        _weights_backward_kernel[(len(parts), triton.cdiv(K, width))](
            grad, w, norm_weight.contiguous(), d_w, parts, N, K, w.stride(0), height, width
        )
    return d_w, parts.sum(0).to(norm_weight.dtype)
