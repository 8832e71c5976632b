"""The reasoning module in CuTe: FlashAttention 4, and quack's matmuls with what follows them as epilogues.

SwiGLU, its backward and the residuals are epilogues. The norm is a kernel of its own: quack's epilogue `gemm_rms` gives
1 / rms of each row but does not multiply by it, so that a second pass over the rows is needed all the same.

It does not pay: with that pass, a rotation before attention and gradients joined by PyTorch, a training step takes 1.23
times as long as with `triton` on an H200, and one puzzle twice as long (docs/kernels.md).

The packages (flash-attn-4 and quack-kernels, the extra `cute`) are imported, and compile their kernels, at
first use. They run in the configurations they were made with: to let quack search for better ones takes minutes.

Shapes: M = B T rows, D hidden size, F inner width of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm.config.paths import install_hint
from hrm.kernels import attention
from hrm.kernels.backend import Backend, KernelRequest
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, first_token_block


def why_not(request: KernelRequest) -> str | None:
    """The reason why this backend cannot run, or None."""
    if reason := attention.PROVIDERS["fa4"].why_not(request):
        return reason
    if not attention.is_installed("quack.gemm_interface"):
        return f"quack is not installed ({install_hint('cute')})"
    return None


def _interleave(gate_up: Tensor) -> Tensor:
    """The rows of gate and up [2 F, D] in turn, as quack wants them."""
    return gate_up.view(2, -1, gate_up.shape[1]).transpose(0, 1).reshape(gate_up.shape)


def _rms_norm(x: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor | None]:
    """`x` [M, D] with its rows divided by their root mean squares and, with `save`, 1 / rms [M]."""
    from quack.rmsnorm import rmsnorm_fwd

    y, _, rstd = rmsnorm_fwd(x, eps=eps, store_rstd=save)
    return y, rstd


class _LinearResidualRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> Tensor:
        from quack.gemm_interface import gemm_add

        total = gemm_add(x, weight.T, residual, tuned=False)
        y, rstd = _rms_norm(total, eps, save=True)
        ctx.save_for_backward(x, weight, total, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from quack.rmsnorm import rmsnorm_bwd

        x, weight, total, rstd = ctx.saved_tensors
        d_total = rmsnorm_bwd(total, None, d_y.contiguous(), rstd)[0]
        return d_total @ weight, d_total.T @ x, d_total, None


class _SwiGLUResidualRMS(torch.autograd.Function):
    """rms_norm(x + swiglu(x)); the backward computes the product of gate and up again, in an epilogue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, eps: float, save: bool) -> Tensor:
        from quack.gemm_interface import gemm_add, gemm_gated

        pairs = _interleave(gate_up)
        projected, product = gemm_gated(x, pairs.T, activation="swiglu", store_preact=save, tuned=False)
        total = gemm_add(product, down.T, x, tuned=False)
        y, rstd = _rms_norm(total, eps, save)
        if save:
            ctx.save_for_backward(x, pairs, down, projected, total, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from quack.gemm_interface import gemm_dgated
        from quack.rmsnorm import rmsnorm_bwd

        x, pairs, down, projected, total, rstd = ctx.saved_tensors
        d_total = rmsnorm_bwd(total, None, d_y.contiguous(), rstd)[0]
        d_projected, product = gemm_dgated(d_total, down, projected, activation="swiglu", tuned=False)
        d_x = torch.addmm(d_total, d_projected, pairs)
        d_pairs = d_projected.T @ x
        d_gate_up = d_pairs.view(-1, 2, pairs.shape[1]).transpose(0, 1).reshape(pairs.shape)
        return d_x, d_gate_up, d_total.T @ product, None, None


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[BlockWeights],
    context: KernelContext,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`."""
    shape = state.shape
    attend = attention.get("fa4")
    x = state + injection
    for weights in blocks:
        save = torch.is_grad_enabled() and (x.requires_grad or weights.gate_up.requires_grad)
        mixed = attend(F.linear(x, weights.qkv), context.rotary, context.num_heads)
        rows = _LinearResidualRMS.apply(mixed.flatten(0, 1), weights.o, x.flatten(0, 1), context.eps)  # type: ignore[no-untyped-call]
        rows = _SwiGLUResidualRMS.apply(rows, weights.gate_up, weights.down, context.eps, save)  # type: ignore[no-untyped-call]
        x = rows.view(shape)
    return x


BACKEND = Backend(reasoning_module, first_token_block, why_not=why_not, compiles=False)
