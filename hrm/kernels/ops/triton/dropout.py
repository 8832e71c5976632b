"""Kernel of `hrm.kernels.ops.dropout`, forward and backward: each draws its random numbers again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = tl.constexpr(7)
_THREADS = 128
_TILES = 4  # of 16 bytes a thread, in a program


@triton.jit
def _random_bits(
    seed: tl.tensor, stream: tl.tensor, first: tl.tensor, THREADS: tl.constexpr, BLOCKS: tl.constexpr
) -> tl.tensor:
    """[THREADS * BLOCKS * 4] bits of as many elements from block `first`: a thread's stay with it, in order."""
    number = first + tl.arange(0, THREADS) * BLOCKS
    zero = number.to(tl.uint32) * 0
    low, high = zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, number.to(tl.uint32), (number >> 32).to(tl.uint32), low, high, _ROUNDS)
    if BLOCKS == 2:
        number += 1
        e, f, g, h = tl.philox(seed, number.to(tl.uint32), (number >> 32).to(tl.uint32), low, high, _ROUNDS)
        a, b, c, d = tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (THREADS * BLOCKS * 4,))


@triton.jit
def _drop(
    x: tl.tensor,
    out: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor | None,
    seed: tl.tensor,
    stream: tl.tensor,
    first: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    THREADS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    value = tl.load(x + at, inside).to(tl.float32)
    bits = _random_bits(seed, stream, first, THREADS, BLOCKS)
    tl.store(out + at, tl.where(bits >= threshold, value * scale, 0.0), inside)


@triton.jit(do_not_specialize=["seed", "offset", "threshold"])  # new ones at every step compile nothing
def _dropout_kernel(
    x: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    seed: tl.tensor,
    seed_on_device: tl.tensor | None,
    offset: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    SIZE: tl.constexpr = THREADS * BLOCKS * 4
    if seed_on_device is not None:
        seed = tl.load(seed_on_device)
    seed = seed.to(tl.uint64)
    stream = offset.to(tl.uint64)
    limit = threshold.to(tl.uint32)
    start = tl.program_id(0).to(tl.int64) * (TILES * SIZE)
    if start + TILES * SIZE <= count:
        for i in tl.static_range(TILES):
            begin = start + i * SIZE
            at = begin + tl.arange(0, SIZE)
            _drop(x, out, at, None, seed, stream, begin // 4, limit, scale, THREADS, BLOCKS)
    else:
        for i in tl.static_range(TILES):
            begin = start + i * SIZE
            at = begin + tl.arange(0, SIZE)
            _drop(x, out, at, at < count, seed, stream, begin // 4, limit, scale, THREADS, BLOCKS)


def forward(x: Tensor, threshold: int, scale: float, seed: int, seed_on_device: Tensor | None, offset: int) -> Tensor:
    """Elements whose 32 random bits are at least `threshold`, times `scale`, and zeros; contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        blocks = 4 // x.element_size()  # of four numbers, for 16 bytes
        grid = (triton.cdiv(out.numel(), _TILES * _THREADS * blocks * 4),)
        _dropout_kernel[grid](
            x.contiguous(),
            out,
            out.numel(),
            seed,
            seed_on_device,
            offset,
            threshold,
            scale,
            _TILES,
            _THREADS,
            blocks,
            num_warps=_THREADS // 32,
        )
    return out
