"""Kernel of `hrm.kernels.ops.adamw_`.

Bound by memory: a weight and its two moments are read and written, the gradient read, the copy written: 30 bytes a
weight where all is float32 and the copy of 16 bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.triton.optim import BLOCK, MAX_WEIGHTS, weight_of


@triton.jit
def _update(
    pointers: tl.tuple,
    at: tl.tensor,
    inside: tl.tensor,
    decay: tl.tensor,
    rate: tl.tensor,
    widen: tl.tensor,
    keep: tl.tensor,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    COPY: tl.constexpr,
) -> None:
    param, grad, first, second, copy = pointers
    old_p, old_m, old_v = tl.load(param + at, inside), tl.load(first + at, inside), tl.load(second + at, inside)
    g = tl.load(grad + at, inside).to(tl.float32)
    p, m, v = old_p.to(tl.float32), old_m.to(tl.float32), old_v.to(tl.float32)
    m = m + (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * (g * g)
    p = p * decay - rate * tl.div_rn(m, tl.sqrt_rn(v) * widen + EPS)
    # What is to stay is written again, rather than left alone, for the copy, which may hold nothing yet.
    p = tl.where(keep, old_p, p.to(old_p.dtype))
    tl.store(param + at, p, inside)
    tl.store(first + at, tl.where(keep, old_m, m.to(old_m.dtype)), inside)
    tl.store(second + at, tl.where(keep, old_v, v.to(old_v.dtype)), inside)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), inside)


@triton.jit
def _adamw_kernel(
    weights: tl.tuple,  # Triton's launcher cannot have an argument called params
    grads: tl.tuple,
    firsts: tl.tuple,
    seconds: tl.tuple,
    copies: tl.tuple,
    sizes: tl.tuple,
    starts: tl.tuple,
    step: tl.tensor,
    lr: tl.tensor,
    found_inf: tl.tensor,
    number: tl.tensor,
    rate_high: tl.tensor,
    rate_low: tl.tensor,
    WEIGHT_DECAY: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    param, grad, first, second, copy, size, start = weight_of(
        program, weights, grads, firsts, seconds, copies, sizes, starts
    )
    # In float64 until they meet the weights, as in the plain update.
    zero = tl.zeros((), tl.float64)
    count = tl.maximum(zero + number if step is None else tl.load(step).to(tl.float64), 1.0)
    rate = zero + rate_high + rate_low if lr is None else tl.load(lr).to(tl.float64)
    decay = (1 - rate * WEIGHT_DECAY).to(tl.float32)
    rate = (rate / (1 - tl.exp2(count * LOG2_BETA1))).to(tl.float32)
    widen = (1 / tl.sqrt(1 - tl.exp2(count * LOG2_BETA2))).to(tl.float32)
    keep = False if found_inf is None else tl.load(found_inf) != 0

    pointers = (param, grad, first, second, copy)
    begin = (program - start) * BLOCK
    # Triton moves whole vectors only up to what it knows to be a multiple of them; what is left goes apart.
    whole = size // 16 * 16
    at = begin + tl.arange(0, BLOCK)
    _update(pointers, at, at < whole, decay, rate, widen, keep, BETA1, BETA2, EPS, COPY)
    if (begin + BLOCK >= size) & (whole < size):
        rest = whole + tl.arange(0, 16)
        _update(pointers, rest, rest < size, decay, rate, widen, keep, BETA1, BETA2, EPS, COPY)


def update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    step: Tensor | None,
    lr: Tensor | None,
    found_inf: Tensor | None,
    number: float,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """As the operator `hrm::adamw_` says."""
    log2_betas = [math.log2(beta) if beta else -math.inf for beta in betas]
    rate_high = float(np.float32(rate))  # a kernel's numbers have 32 bits: two of them keep the rate's
    operands = [
        operand
        for operand in zip(params, grads, exp_avgs, exp_avg_sqs, copies or params, strict=True)
        if operand[0].numel()
    ]
    for begin in range(0, len(operands), MAX_WEIGHTS):
        part = operands[begin : begin + MAX_WEIGHTS]
        sizes = tuple(param.numel() for param, *_ in part)
        *starts, programs = itertools.accumulate((triton.cdiv(size, BLOCK) for size in sizes), initial=0)
        _adamw_kernel[(programs,)](
            *zip(*part, strict=True), sizes, tuple(starts), step, lr, found_inf, number, rate_high, rate - rate_high,
            weight_decay, *betas, *log2_betas, eps, bool(copies), BLOCK, num_warps=8,
        )  # fmt: skip
