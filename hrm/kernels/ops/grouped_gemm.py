"""Matrix products of many pairs of operands, each of its own size, in one launch.

Source: the persistent grouped product of CUTLASS, whose programs walk over the tiles of all products as if of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, library

from hrm.errors import UserError
from hrm.kernels.ops.operator import check_tensors, operation, runs_triton, triton_kernels


def naive(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Tensor]:
    return [x @ w for x, w in zip(xs, ws, strict=True)]


@library.custom_op("hrm::grouped_gemm", mutates_args=())
def _grouped_gemm(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Tensor]:
    outs: list[Tensor] = triton_kernels("grouped_gemm", xs[0]).forward(xs, ws)
    return outs


@_grouped_gemm.register_fake
def _results(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[1]) for x, w in zip(xs, ws, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, ws = inputs
    ctx.save_for_backward(*xs, *ws)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Sequence[Tensor | None], ...]:
    count = len(grads)
    xs, ws = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    wants_xs, wants_ws = ctx.needs_input_grad
    d_xs = _grouped_gemm(grads, [w.T for w in ws]) if any(wants_xs) else [None] * count
    d_ws = _grouped_gemm([x.T for x in xs], grads) if any(wants_ws) else [None] * count
    return d_xs, d_ws


_grouped_gemm.register_autograd(_differentiate, setup_context=_keep)


@operation(naive)
def grouped_gemm(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Tensor]:
    """x @ w of each pair, all in one launch (of 64 pairs; more take more launches).

    Args:
        xs: [M_i, K_i] each, all of one dtype: bfloat16, float16 or float32. Read as they lie if the rows of all lie
            dense, or the columns of all do; else those that do not are copied.
        ws: [K_i, N_i] each, as `xs`.

    Returns:
        [M_i, N_i] each, dense, in the dtype of `xs`. Differentiable in all; the backward is two launches of the same
        kernel, one for the gradients of all `xs` and one for those of all `ws`.

    Raises:
        UserError: the lists are of unlike lengths, shapes do not fit, or dtypes or devices differ.
    """
    if len(xs) != len(ws):
        raise UserError(f"grouped_gemm: ws are {len(ws)} and xs {len(xs)}; give one for each.")
    for i, (x, w) in enumerate(zip(xs, ws, strict=True)):
        if x.ndim != 2:
            raise UserError(f"grouped_gemm: xs[{i}] is {list(x.shape)} and should be [M, K], a matrix.")
        if w.ndim != 2 or w.shape[0] != x.shape[1]:
            raise UserError(
                f"grouped_gemm: ws[{i}] is {list(w.shape)} and should be [{x.shape[1]}, N], as xs[{i}] is"
                f" {list(x.shape)}."
            )
        check_tensors("grouped_gemm", **{"xs[0]": xs[0], f"xs[{i}]": x, f"ws[{i}]": w})
    if not xs or not runs_triton(xs[0]):
        return naive(xs, ws)
    outs: list[Tensor] = _grouped_gemm(list(xs), list(ws))
    return outs
