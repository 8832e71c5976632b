"""The optimizers' updates in Triton: Adam-atan2 for all dense weights at once, SignSGD for rows of a table.

Both are bound by memory: Adam-atan2 reads and writes a weight and its two moments, reads the gradient and writes the
copy in the compute dtype, 30 bytes a weight. Nothing waits for the device, rates are read from device memory so that
CUDA graphs replay with new ones, and no sum depends on the order of programs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights of a program of 256 threads: one vector of 16 bytes a thread and operand. With more, threads would hold runs
# of 8 numbers for the sake of the 16-bit copy, and read 16 bytes out of every 32.
BLOCK = 1024
# Kernel arguments have 4 KiB; five addresses and two numbers for each of 64 weights are 3 KiB.
MAX_WEIGHTS = 64

_PI_2 = tl.constexpr(math.pi / 2)


@triton.jit
def _atan(x: tl.tensor) -> tl.tensor:
    """Arctangent on [0, 1] to 1e-7: x P(x^2) with P fitted to the least largest relative error (Lawson's method)."""
    t = x * x
    y = t * -0.0017539245243048563 + 0.010726918737358527
    y = y * t - 0.030804549677094534
    y = y * t + 0.05755205409871711
    y = y * t - 0.08377312629354387
    y = y * t + 0.10942029690219485
    y = y * t - 0.14261932915640171
    y = y * t + 0.19998266022898994
    y = y * t - 0.3333328364099112
    return x * (y * t + 0.9999999976305838)


@triton.jit
def _atan2(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Angle of the points (x, y) with x >= 0; 0 at the origin. libdevice's is not there in the interpreter."""
    length = tl.abs(y)
    larger = tl.maximum(length, x)
    ratio = tl.div_rn(tl.minimum(length, x), tl.where(larger > 0, larger, 1.0))
    angle = _atan(ratio)
    angle = tl.where(length > x, _PI_2 - angle, angle)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def weight_of(
    program: tl.tensor,
    weights: tl.tuple,
    grads: tl.tuple,
    firsts: tl.tuple,
    seconds: tl.tuple,
    copies: tl.tuple,
    sizes: tl.tuple,
    starts: tl.tuple,
) -> tl.tuple:
    """What a program works on: the last weight that starts at or before it.

    It is sought among 8 that a branch leaves: to choose among 64 by selection takes longer than the update, for their
    addresses pass what the cache of kernel arguments holds.
    """
    zero = program.to(tl.int64) * 0  # a size or start may be a constant, and branches want one type
    param, grad, first, second, copy = weights[0], grads[0], firsts[0], seconds[0], copies[0]
    size, start = zero + sizes[0], zero + starts[0]
    for block in tl.static_range(0, len(weights), 8):
        here = program >= starts[block]
        if block + 8 < len(weights):
            here = here & (program < starts[block + 8])
        if here:
            param, grad, first, second, copy = (
                weights[block],
                grads[block],
                firsts[block],
                seconds[block],
                copies[block],
            )
            size, start = zero + sizes[block], zero + starts[block]
            for i in tl.static_range(block + 1, block + 8):
                if i < len(weights):
                    later = program >= starts[i]
                    param = tl.where(later, weights[i], param)
                    grad = tl.where(later, grads[i], grad)
                    first = tl.where(later, firsts[i], first)
                    second = tl.where(later, seconds[i], second)
                    copy = tl.where(later, copies[i], copy)
                    size = tl.where(later, sizes[i], size)
                    start = tl.where(later, starts[i], start)
    return param, grad, first, second, copy, size, start


@triton.jit
def _adam_atan2_kernel(
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
    WEIGHT_DECAY: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    param, grad, first, second, copy, size, start = weight_of(
        program, weights, grads, firsts, seconds, copies, sizes, starts
    )
    at = (program - start) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    p = tl.load(param + at, inside)
    g = tl.load(grad + at, inside)
    m = tl.load(first + at, inside)
    v = tl.load(second + at, inside)

    # In float64 until they meet the weights, as in the plain update.
    count, rate = tl.maximum(tl.load(step), 1).to(tl.float64), tl.load(lr).to(tl.float64)
    decay = (1 - rate * WEIGHT_DECAY).to(tl.float32)
    rate = (rate / (1 - tl.exp2(count * LOG2_BETA1))).to(tl.float32)
    widen = (1 / tl.sqrt(1 - tl.exp2(count * LOG2_BETA2))).to(tl.float32)

    new_m = m + (1 - BETA1) * (g - m)
    new_v = BETA2 * v + (1 - BETA2) * (g * g)
    new_p = p * decay - rate * _atan2(new_m, tl.sqrt_rn(new_v) * widen)
    # What is to stay is written again, rather than left alone, for the copy, which may hold nothing yet.
    keep = False if found_inf is None else tl.load(found_inf) != 0
    p = tl.where(keep, p, new_p)
    tl.store(param + at, p, inside)
    tl.store(first + at, tl.where(keep, m, new_m), inside)
    tl.store(second + at, tl.where(keep, v, new_v), inside)
    if COPY:
        tl.store(copy + at, p, inside)


@triton.jit
def _sign_sgd_kernel(
    weights: tl.tensor,
    ids: tl.tensor,
    grads: tl.tensor,
    lr: tl.tensor,
    found_inf: tl.tensor,
    B: tl.constexpr,
    N: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # The first of equal ids does the work of all, so that a row is read and written once.
    own = tl.load(ids + tl.program_id(0))
    places = tl.arange(0, PLACES)
    same = (tl.load(ids + places, places < B, 0) == own) & (places < B)
    if tl.min(tl.where(same, places, B)) < tl.program_id(0):
        return
    last = tl.max(tl.where(same, places, 0))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    total = tl.zeros((COLUMNS,), grads.dtype.element_ty)
    begin = tl.program_id(0)
    while begin <= last:
        rows = begin + tl.arange(0, ROWS)
        wanted = (rows <= last) & (tl.load(ids + rows, rows <= last, 0) == own)
        at = grads + rows.to(tl.int64)[:, None] * N + columns
        total += tl.sum(tl.load(at, wanted[:, None] & inside, 0), 0)
        begin += ROWS
    rate = tl.load(lr).to(tl.float64)
    at = weights + own.to(tl.int64) * N + columns
    row = tl.load(at, inside)
    direction = (total > 0).to(row.dtype) - (total < 0).to(row.dtype)
    keep = False if found_inf is None else tl.load(found_inf) != 0
    new_row = row * (1 - rate * WEIGHT_DECAY).to(row.dtype) - rate.to(row.dtype) * direction
    tl.store(at, tl.where(keep, row, new_row), inside)


def adam_atan2_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """Update weights and their moments as `hrm.optim.AdamATan2` says, in place, in one launch or two for 64 of them.

    Args:
        params, grads, first, second: contiguous float32 tensors, of equal shapes across the four.
        copies: of the same shapes in any floating-point dtype, to be overwritten by the new weights; or none.
        step: 0-dimensional: the number of this step, from 1 (0 if the first is skipped).
        lr: a number, or 0-dimensional.
        found_inf: 0-dimensional; when not 0, all stays as it is and the copies are of that.
    """
    lr = _in_memory(lr, step.device)
    log2_betas = [math.log2(beta) if beta else -math.inf for beta in betas]
    operands = list(zip(params, grads, first, second, copies or params, strict=True))
    # Whole vectors are moved only where Triton knows all sizes to be multiples of them, so the others go apart.
    even = [operand for operand in operands if operand[0].numel() % 16 == 0]
    odd = [operand for operand in operands if operand[0].numel() % 16]
    for group in (even, odd):
        for begin in range(0, len(group), MAX_WEIGHTS):
            part = group[begin : begin + MAX_WEIGHTS]
            sizes = tuple(param.numel() for param, *_ in part)
            *starts, programs = itertools.accumulate((triton.cdiv(size, BLOCK) for size in sizes), initial=0)
            _adam_atan2_kernel[(programs,)](
                *zip(*part, strict=True), sizes, tuple(starts), step, lr, found_inf, weight_decay, *betas, *log2_betas,
                bool(copies), BLOCK, num_warps=8,
            )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *copies])


def sign_sgd_(
    weights: Tensor,
    ids: Tensor,
    grads: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """Update the rows `ids` of a table as `hrm.optim.SparseSignSGD` says, in place, in one launch.

    Rows of equal ids are summed in a fixed order.

    Args:
        weights: [rows, N], contiguous.
        ids: [B] integers.
        grads: [B, N], contiguous.
        lr: a number, or 0-dimensional.
        found_inf: 0-dimensional; when not 0, all stays as it is.
    """
    lr = _in_memory(lr, grads.device)
    B, N = grads.shape
    # Few columns a program, so that several share the sum where one id fills the batch.
    columns = min(64, triton.next_power_of_2(N))
    _sign_sgd_kernel[(B, triton.cdiv(N, columns))](
        weights, ids, grads, lr, found_inf, B, N, weight_decay, triton.next_power_of_2(B), 64, columns
    )
    torch.autograd.graph.increment_version(weights)


def _in_memory(lr: float | Tensor, device: torch.device) -> Tensor:
    """A rate as the kernels read it."""
    return lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device)
