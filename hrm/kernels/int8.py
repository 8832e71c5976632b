"""Reasoning modules in 8-bit integers, for passes that need no gradient.

Every matmul of a block rounds its two operands: a row of a weight by a scale of its own, as is done once, and each
token's row of activations, by the largest number in it, as it comes. Products are summed in 32-bit integers, so they
are exact, and then multiplied by the two scales. All else, norms, gates and attention between its projections, keeps
the precision that it has elsewhere.

This is what torchao calls dynamic activations with int8 weights. Without a compiler its tensors take two to five times
as long on a CPU as the two PyTorch operations here (benchmarks/results/reports/2026-11-28-quantized.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.kernels import naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, sdpa
from hrm.kernels.schedule import Module

BLOCK_TYPES = naive.BLOCK_TYPES  # of weights that it computes

_LARGEST = 127  # of what is stored: -128 has no counterpart
_LEAST = 1e-30  # what counts as the largest number of a row of zeros
# What PyTorch's product of integers wants on NVIDIA GPUs.
_LEAST_ROWS, _MULTIPLE = 17, 8


class Int8Matrix(NamedTuple):
    """A matrix of weights, `values * scales[:, None]`."""

    values: Tensor  # [N, K] int8
    scales: Tensor  # [N] float32


def quantize(matrix: Tensor) -> Int8Matrix:
    """Round a matrix [N, K], each row by the scale that makes its largest number 127."""
    values, scales = _rounded(matrix.detach())
    return Int8Matrix(values, scales.squeeze(-1))


def dequantize(matrix: Int8Matrix) -> Tensor:
    """The numbers that a rounded matrix stands for, [N, K] float32."""
    return matrix.values.float() * matrix.scales[:, None]


def quantize_blocks(blocks: Sequence[Any]) -> list[Any]:
    """Blocks of the same types whose matrices are rounded."""
    return [type(block)(*map(quantize, block)) for block in blocks]


def linear(x: Tensor, weight: Int8Matrix) -> Tensor:
    """`naive_linear` by a product of integers, where the device has one that is right.

    Args:
        x: [..., K].

    Returns:
        [..., N] in the dtype of `x`.
    """
    values, scales = _rounded(x)
    rows = values.flatten(0, -2)
    sums = _product(rows, weight.values).view(*x.shape[:-1], -1)
    return sums.mul_(scales).mul_(weight.scales).to(x.dtype)


def naive_linear(x: Tensor, weight: Int8Matrix) -> Tensor:
    """The definition of `linear`: the rounded operands, multiplied in float32."""
    values, scales = _rounded(x)
    return F.linear(values.float() * scales, dequantize(weight)).to(x.dtype)


def module(*, compiled: bool, attend: Attend = sdpa) -> Module[Any]:
    """`reasoning_module` with a core of attention, through torch.compile or not."""
    compute = functools.partial(reasoning_module, attend=attend)
    return torch.compile(compute, dynamic=False, fullgraph=True) if compiled else compute


@torch.no_grad()
def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[Any],
    context: KernelContext,
    attend: Attend = sdpa,
) -> Tensor:
    """As `hrm.kernels.naive.reasoning_module`, with weights from `quantize_blocks`; it cannot be differentiated."""
    return naive.reasoning_module(state, injection, blocks, context, attend, linear)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `x` [..., K] as int8, and its scale [..., 1] float32."""
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp_(min=_LEAST).div_(_LARGEST)
    return (wide / scales).round_().to(torch.int8), scales


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], int8, as float32 [M, N]."""
    if x.device.type == "cuda":
        return _product_on_cuda(x, weight)
    if x.device.type == "cpu" and cpu_sums_exactly():
        return torch._int_mm(x, weight.T).float()
    return F.linear(x.float(), weight.float())


def _product_on_cuda(x: Tensor, weight: Tensor) -> Tensor:
    rows, columns = len(x), len(weight)
    padding = -x.shape[1] % _MULTIPLE
    x = F.pad(x, (0, padding, 0, max(0, _LEAST_ROWS - rows)))
    weight = F.pad(weight, (0, padding, 0, -columns % _MULTIPLE))
    return torch._int_mm(x, weight.T)[:rows, :columns].float()


@torch.compiler.assume_constant_result
def cpu_sums_exactly() -> bool:
    """Whether this CPU's product of int8 is right: without VNNI, instructions are used that sum pairs in 16 bits.

    Where it is not, the same numbers are multiplied in float32.
    """
    return _cpu_sums_exactly()


@functools.cache
def _cpu_sums_exactly() -> bool:
    large = torch.full((16, 64), _LARGEST, dtype=torch.int8)
    sums: Tensor = torch._int_mm(large, large.T)
    return bool((sums == 64 * _LARGEST**2).all())
