"""Reasoning modules in 8-bit floating point (e4m3), for passes that need no gradient.

Operands of the matmuls of a block are rounded to e4m3; sums, the norms and the residual stream keep the precision
they have elsewhere, and so does attention between its projections. Three ways compute the same:

- `hrm.kernels.ops.hopper.fp8` and `fp8_mixer`, where the rounding is an epilogue of the kernel before: GPUs of compute
  capability 9.0, in 16 bit, for blocks with attention and SwiGLU (`BlockWeights`) and those that mix tokens by an MLP;
- the library's fp8 matmul: other blocks, other NVIDIA GPUs from 8.9 on, and sizes that the kernels for Hopper are not
  made for;
- `naive_reasoning_module`, matmuls of the rounded numbers in float32: anywhere, and what the others are tested against.

An MLP over tokens keeps the precision it has elsewhere: it is a small part of a block, and the products of its normed
gate reach 10,000, beyond the format.

Nothing is scaled by what the data is. From 2^-6 to 448, e4m3 is equally precise, and below it keeps an absolute error
of 2^-10: activations, of rms 0.1 to 2, are rounded as they are, weights times a constant. Scales taken from the largest
number of a row or of a matrix gain nothing: after four blocks of fresh weights, either way, the result is 10.6 % off in
relative norm, where bfloat16 is 1 % off. Constants also spare a pass over the weights and work in every epilogue.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.kernels import attention, naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, BlockWeights, rms_norm, sdpa
from hrm.kernels.ops.e4m3 import E4M3, WEIGHT_SCALE, Fp8BlockWeights, to_e4m3
from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.schedule import Module

Matmul = Callable[[Tensor, Tensor], Tensor]

BLOCK_TYPES = naive.BLOCK_TYPES  # of weights that it computes

_KEPT = ("token_gate_up", "token_down")  # matrices that are not rounded
_MULTIPLE = 16  # sizes that the library's matmul takes


def quantize_blocks(blocks: Sequence[Any]) -> list[Any]:
    """Round weights to e4m3 on their device, without waiting for it; what lies beyond ±14 becomes ±14.

    Returns:
        `Fp8BlockWeights` for `BlockWeights`; blocks of the same type, of matrices times WEIGHT_SCALE, for others, but
        those of MLPs over tokens as they are.
    """
    return [_quantize_block(weights) for weights in blocks]


def module(*, compiled: bool, attend: Attend = sdpa) -> Module[Any]:
    """`reasoning_module`; what has no kernels of its own goes through torch.compile where it says so."""
    own_module: Module[Any] = functools.partial(reasoning_module, attend=attend)
    other_module: Module[Any] = functools.partial(_other_module, attend=attend)
    if compiled:
        other_module = torch.compile(other_module, dynamic=False, fullgraph=True)

    def by_blocks(state: Tensor, injection: Tensor, blocks: Sequence[Any], context: KernelContext) -> Tensor:
        own = _are_fp8_blocks(blocks) or _kernels(state, blocks, context, attend) is not None
        return (own_module if own else other_module)(state, injection, blocks, context)

    return by_blocks


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[Any],
    context: KernelContext,
    attend: Attend = sdpa,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`, with weights from `quantize_blocks`; it cannot be differentiated.

    Args:
        state, injection: [B, T, D] of one dtype, which is the result's too.
        attend: the attention of blocks without kernels of their own; to those for Hopper it says whether theirs may be
            in Gluon.
    """
    if (kernels := _kernels(state, blocks, context, attend)) is not None:
        return kernels(state, injection, blocks, context)
    if not _are_fp8_blocks(blocks):
        return _other_module(state, injection, blocks, context, attend)
    matmul = _library_matmul if _library_takes(state.device, blocks) else _naive_matmul
    return _reasoning_module(state, injection, blocks, context, matmul)


def naive_reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[Any],
    context: KernelContext,
) -> Tensor:
    """The definition of `reasoning_module`, in plain PyTorch."""
    if _are_fp8_blocks(blocks):
        return _reasoning_module(state, injection, blocks, context, _naive_matmul)
    return naive.reasoning_module(state, injection, blocks, context, linear=_naive_linear)


def _are_fp8_blocks(blocks: Sequence[Any]) -> bool:
    """Whether they are what `quantize_blocks` makes of `BlockWeights`."""
    return all(isinstance(weights, Fp8BlockWeights) for weights in blocks)


def _kernels(state: Tensor, blocks: Sequence[Any], context: KernelContext, attend: Attend) -> Module[Any] | None:
    """`reasoning_module` by kernels made for Hopper that take these operands, if there are any."""
    if hopper.why_not(state.device):
        return None
    from hrm.kernels.ops.hopper import fp8 as of_attention
    from hrm.kernels.ops.hopper import fp8_mixer

    if not _are_fp8_blocks(blocks):
        return fp8_mixer.reasoning_module if fp8_mixer.fits(state, blocks, context.num_heads) else None
    if not of_attention.fits(state, blocks, context.num_heads):
        return None
    return functools.partial(of_attention.reasoning_module, gluon=attend is attention.get("gluon"))


@torch.no_grad()
def _other_module(
    state: Tensor, injection: Tensor, blocks: Sequence[Any], context: KernelContext, attend: Attend = sdpa
) -> Tensor:
    """`reasoning_module` for blocks without kernels of their own."""
    linear = _library_linear if _has_fp8(state.device) else _naive_linear
    return naive.reasoning_module(state, injection, blocks, context, attend, linear)


def _naive_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x [..., K] and weight [N, K] in the dtype of `x`, which is rounded to e4m3 where the weight is."""
    if weight.dtype != E4M3:
        return F.linear(x, weight)
    return _naive_matmul(to_e4m3(x), weight).to(x.dtype)


def _library_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`_naive_linear` on the matrix units of an NVIDIA GPU, for weights of any size."""
    if weight.dtype != E4M3:
        return F.linear(x, weight)
    columns, inputs = weight.shape
    product = _library_matmul(_padded(to_e4m3(x), inputs), _padded(weight, inputs, columns), x.dtype)
    return product[..., :columns]


def _padded(values: Tensor, *sizes: int) -> Tensor:
    """`values` in e4m3, with zeros behind the last dimensions, whose sizes, last first, are made multiples."""
    padding = [size for each in sizes for size in (0, -each % _MULTIPLE)]
    if not any(padding):
        return values
    return F.pad(values.view(torch.uint8), padding).view(values.dtype)


@torch.no_grad()
def _reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[Fp8BlockWeights],
    context: KernelContext,
    matmul: Matmul,
) -> Tensor:
    """As `naive.reasoning_module`; what is to be rounded to e4m3 is not rounded to the dtype of `state` before."""
    exact = state.float() + injection.float()
    x = exact.to(state.dtype)
    for weights in blocks:
        qkv = matmul(to_e4m3(exact), weights.qkv).to(x.dtype)
        exact = rms_norm(x + matmul(to_e4m3(sdpa(qkv, context.rotary, context.num_heads)), weights.o), context.eps)
        x = exact.to(x.dtype)
        gate, up = matmul(to_e4m3(exact), weights.gate_up).chunk(2, dim=-1)
        exact = rms_norm(x + matmul(to_e4m3(F.silu(gate) * up), weights.down), context.eps)
        x = exact.to(x.dtype)
    return x


def _quantize_block(weights: Any) -> Any:
    matrices = {name: matrix.detach() for name, matrix in weights._asdict().items()}
    names = [name for name in matrices if name not in _KEPT]
    matrices |= zip(names, _quantize([matrices[name] for name in names]), strict=True)
    kind = Fp8BlockWeights if isinstance(weights, BlockWeights) else type(weights)
    return kind(**matrices)


def _quantize(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """The matrices times WEIGHT_SCALE, rounded."""
    if hopper.why_not(matrices[0].device):
        return [to_e4m3(WEIGHT_SCALE * matrix.float()) for matrix in matrices]
    from hrm.kernels.ops.hopper import fp8 as kernels

    return kernels.quantize(matrices)


def _naive_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x [..., K] and weight [N, K], in float32 and unscaled, [..., N]."""
    return F.linear(x.float(), weight.float()) / WEIGHT_SCALE


def _library_matmul(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`_naive_matmul` on the matrix units of an NVIDIA GPU, rounded to `dtype`."""
    one, unscale = _scales(x.device)
    rows = x.reshape(-1, x.shape[-1])
    product = torch._scaled_mm(rows, weight.T, one, unscale, out_dtype=dtype, use_fast_accum=True)
    return product.view(*x.shape[:-1], -1)


def _library_takes(device: torch.device, blocks: Sequence[Fp8BlockWeights]) -> bool:
    """Whether the library has a matmul in e4m3 for these weights on `device`."""
    return _has_fp8(device) and all(size % _MULTIPLE == 0 for weights in blocks for size in weights.down.shape)


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def _scales(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones((), device=device), torch.full((), 1 / WEIGHT_SCALE, device=device)
