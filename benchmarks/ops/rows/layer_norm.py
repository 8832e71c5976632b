from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.row import HRM_STATES, Bar, Function, Row, backward, compiled, forward, imported, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """With weights and biases in float32, which alone quack takes: the HRM's width, and two that more warps share."""
    rivals = {"eager": plain(ops.layer_norm.naive), "compile": compiled(ops.layer_norm.naive), "quack": _quack}
    bar = Bar(times_rival=1, rivals=("compile", "quack"))
    for shape in [(24, 32)] if toy else [HRM_STATES, (2**15, 2**12), (2**13, 2**14)]:
        inputs, moved = partial(_inputs, shape), 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", inputs, ops.layer_norm, rivals, bar, 2 * moved)
        yield backward(f"{shape[0]}x{shape[1]}", inputs, ops.layer_norm, rivals, bar, 3 * moved)


def _quack() -> Function:
    """Its two passes under one roof: it has no function with a gradient."""
    run_forward, run_backward = (imported("quack.rmsnorm", f"layernorm_{name}")() for name in ("fwd", "bwd"))

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, rstd, mean = run_forward(x, weight, bias, 1e-5, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            out: Tensor = y
            return out

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight, rstd, mean = ctx.saved_tensors
            dx, d_weight, d_bias = run_backward(x, weight, dy, rstd, mean)
            return dx, d_weight, d_bias

    return LayerNorm.apply


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    return [random(device, *shape), *(random(device, shape[1], dtype=torch.float32) for _ in range(2))]
