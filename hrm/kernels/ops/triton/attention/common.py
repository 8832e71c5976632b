"""What kernels of attention share: where a head lies in memory, its rotation, and the check of their operands.

Shapes: B sequences, T tokens, N heads of size K, D = N K; R rows of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.naive import RotaryTables
from hrm.kernels.ops.triton.common import DTYPES

HEAD_SIZES = (16, 32, 64, 128)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def head_of_program(
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The tile and the head this program works on, as: tile, first row in [B T], first feature in [D], row in [B N].

    Tiles of one head are neighbours, so that they find its keys and values in the L2 cache.
    """
    program = tl.program_id(0)
    head = program // TILES
    return program % TILES, (head // N).to(tl.int64) * T, head % N * K, head.to(tl.int64)


@triton.jit
def load_head(
    x: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr = True,
) -> tl.tensor:
    """`rows` of a head at `x`, [R, K]; those from T on are zeros."""
    at = x + rows[:, None] * STRIDE + tl.arange(0, K)[None, :]
    if MASKED:
        return tl.load(at, mask=(rows < T)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_angles(
    cos: tl.tensor, sin: tl.tensor, rows: tl.tensor, T: tl.constexpr, K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of `rows`, [R, K/2] each."""
    at = rows[:, None] * K + tl.arange(0, K // 2)[None, :]
    inside = (rows < T)[:, None]
    return tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)


@triton.jit
def pair(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """The two halves [R, K/2] of heads as [R, K], in alternating groups of 8 features.

    Any order does where only inner products of q and k are formed. In this one the two vectors of 16 bytes that a
    thread holds are neighbours, which spares bank conflicts on the way to shared memory, and in the matrix unit's
    accumulators feature i and its partner i + K/2 meet in one thread.
    """
    R: tl.constexpr = first.shape[0]
    GROUPS: tl.constexpr = first.shape[1] // 8
    both = tl.join(tl.reshape(first, (R, GROUPS, 8)), tl.reshape(second, (R, GROUPS, 8)))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (R, 16 * GROUPS))


@triton.jit
def unpair(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Inverse of `pair`."""
    R: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1] // 16
    first, second = tl.split(tl.permute(tl.reshape(x, (R, GROUPS, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(first, (R, 8 * GROUPS)), tl.reshape(second, (R, 8 * GROUPS))


@triton.jit
def load_rotated(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """`rows` of a head of q or k, [R, K], rotated in float32 and in the order of `pair`; as they are without cos."""
    if cos is None:
        return load_head(x, rows, T, STRIDE, K)
    else:  # Triton compiles what follows a return, but not the branch not taken
        first = load_head(x, rows, T, STRIDE, K // 2)
        second = load_head(x + K // 2, rows, T, STRIDE, K // 2)
        c, s = load_angles(cos, sin, rows, T, K)
        a, b = first.to(tl.float32), second.to(tl.float32)
        rotated = pair((a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype))
        # Changes no value. It keeps the compiler from moving the step to the matrix unit's register layout up to
        # the loads, where it would carry both tables through shared memory as well.
        return tl.where((rows < T)[:, None], rotated, 0.0)


@triton.jit
def store_unrotated(
    x: tl.tensor,
    grad: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """Inverse of `load_rotated` for the gradient [R, K]; rounded before it is rotated, as in `naive.rotate`."""
    inside = (rows < T)[:, None]
    grad = grad.to(x.dtype.element_ty)
    if cos is None:
        tl.store(x + rows[:, None] * STRIDE + tl.arange(0, K)[None, :], grad, mask=inside)
    else:
        first, second = unpair(grad)
        c, s = load_angles(cos, sin, rows, T, K)
        a, b = first.to(tl.float32), second.to(tl.float32)
        at = x + rows[:, None] * STRIDE + tl.arange(0, K // 2)[None, :]
        tl.store(at, (a * c + b * s).to(grad.dtype), mask=inside)
        tl.store(at + K // 2, (b * c - a * s).to(grad.dtype), mask=inside)


def shape_constants(qkv: Tensor, num_heads: int) -> dict[str, int]:
    return {"T": qkv.shape[1], "N": num_heads, "K": qkv.shape[2] // (3 * num_heads)}


def empty_result(qkv: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3, dtype=dtype)


def check_projection(projected: Tensor, rotary: RotaryTables | None, num_heads: int, parts: int = 3) -> None:
    """Of q, k and v, `projected` [B, T, parts D] has the last `parts`."""
    name = "qkv"[-parts:]
    if projected.dtype not in DTYPES:
        raise UserError(f"attention in Triton has no {projected.dtype} kernel; take bfloat16, float16 or float32.")
    if projected.ndim != 3 or projected.shape[-1] % (parts * num_heads):
        raise UserError(
            f"{name} has shape {tuple(projected.shape)}; "
            f"{num_heads} heads need [B, T, {parts} * {num_heads} * head size]."
        )
    tokens, head_size = projected.shape[1], projected.shape[-1] // (parts * num_heads)
    if head_size not in HEAD_SIZES:
        raise UserError(
            f"attention in Triton has no kernel for heads of {head_size} features; "
            "choose hidden_size / num_heads among 16, 32, 64 and 128, or kernels=naive."
        )
    if rotary is not None and rotary.cos.shape != (tokens, head_size):
        raise UserError(
            f"rotary tables have shape {tuple(rotary.cos.shape)}; {name} needs (T, head size) = {(tokens, head_size)}."
        )
