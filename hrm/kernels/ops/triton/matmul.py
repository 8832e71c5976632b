"""Kernels of `hrm.kernels.ops.matmul`; `norm_linear` uses the same product.

The product is a persistent kernel over tiles, in 16 bit through tensor descriptors (the bulk copy engine from Hopper
on), otherwise by pointers. Tiles come from a fixed table by size, so that results are the same each run.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.matmul import as_rows
from hrm.kernels.ops.triton.common import multiprocessor_count, shared_memory
from hrm.kernels.ops.triton.elementwise import as_result, tiles

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_GAUSS = tl.constexpr(0.3989422804014327)  # the normal density at 0


class Epilogue(NamedTuple):
    """What is done to a product [M, N] in float32 before it is stored, in this order; None is left out."""

    factors: Tensor | None = None  # [M] float32: its rows are multiplied by them
    shifts: Tensor | None = None  # [M] float32, with `sums`: shifts[:, None] * sums[None, :] is subtracted
    sums: Tensor | None = None  # [N] float32
    bias: Tensor | None = None  # [N]: is added
    activation: str | None = None


@triton.jit
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 / x for x > 0, to about 22 bits: a division takes several times as many instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _normal(x: tl.tensor) -> tl.tuple:
    """The normal distribution function of x, to a relative 4e-5, and exp(-x² / 2).

    The form of Abramowitz and Stegun, 7.1.26, with coefficients fitted to the least relative error.
    """
    t = reciprocal(1 + 0.38 * tl.abs(x))
    density = tl.exp2(x * (x * -0.7213475204444817))  # log2(e) / 2
    p = -0.08992946147918701 * t + 0.18887804448604584
    p = p * t + 0.09197960048913956
    p = p * t + 0.15782897174358368
    p = p * t + 0.151225283741951
    tail = p * t * density
    return tl.where(x > 0, 1 - tail, tail), density


@triton.jit
def _activate(x: tl.tensor, ACTIVATION: tl.constexpr, EXACT: tl.constexpr) -> tl.tensor:
    """EXACT: to float32, otherwise by far fewer instructions to what 16 bits show."""
    if ACTIVATION == "relu":
        # not tl.maximum, which would make 0 of NaN
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        return x * (tl.sigmoid(x) if EXACT else reciprocal(1 + tl.exp(-x)))
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF) if EXACT else _normal(x)[0])
    else:
        return x


@triton.jit
def _finish(
    acc: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
) -> tl.tensor:
    """A tile of the product after its `Epilogue`, but for the activation."""
    if factors is not None:
        acc = acc * tl.load(factors + rows, rows < M, 0.0)[:, None]
    if shifts is not None:
        shift = tl.load(shifts + rows, rows < M, 0.0)
        acc = acc - shift[:, None] * tl.load(sums + columns, columns < N, 0.0)[None, :]
    if bias is not None:
        acc = acc + tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store(
    target: tl.tensor,
    value: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    DESCRIBED: tl.constexpr,
) -> None:
    if DESCRIBED:
        target.store([m, n], value.to(target.dtype))
    else:
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(target + at, value.to(target.dtype.element_ty), inside)


@triton.jit
def tile_position(tile: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, GROUP: tl.constexpr = 8) -> tl.tuple:
    """Row and column of a tile: GROUP rows of tiles are done together, so that what they read stays in the L2 cache."""
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    rest = tile % (GROUP * tiles_n)
    return group * GROUP + rest % height, rest // height


@triton.jit
def _matmul_kernel(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    before: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """TRANSPOSED: `b` is [N, K] in memory. DESCRIBED: all are descriptors. SPLIT: results are stored by halves.

    EXACT: the activation is, to float32.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Flattened with the loop over K, so that a tile's epilogue overlaps with loads for the next one.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if DESCRIBED:
                left = a.load([m, k])
                right = b.load([n, k]).T if TRANSPOSED else b.load([k, n])
            else:
                inner = k + tl.arange(0, BLOCK_K)
                at = rows.to(tl.int64)[:, None] * a_stride + inner[None, :]
                left = tl.load(a + at, (rows[:, None] < M) & (inner[None, :] < K), 0.0)
                if TRANSPOSED:
                    at = columns.to(tl.int64)[None, :] * b_stride + inner[:, None]
                else:
                    at = inner.to(tl.int64)[:, None] * b_stride + columns[None, :]
                right = tl.load(b + at, (inner[:, None] < K) & (columns[None, :] < N), 0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        acc = _finish(acc, rows, columns, M, N, factors, shifts, sums, bias)
        if SPLIT:  # half a tile's room in shared memory leaves one more stage to the loads
            halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            for i in tl.static_range(2):
                at_n = n + i * (BLOCK_N // 2)
                some = at_n + tl.arange(0, BLOCK_N // 2)
                if before is not None:
                    _store(before, halves[i], m, at_n, rows, some, M, N, DESCRIBED)
                _store(out, _activate(halves[i], ACTIVATION, EXACT), m, at_n, rows, some, M, N, DESCRIBED)
        else:
            if before is not None:
                _store(before, acc, m, n, rows, columns, M, N, DESCRIBED)
            _store(out, _activate(acc, ACTIVATION, EXACT), m, n, rows, columns, M, N, DESCRIBED)


@triton.jit
def _activation_backward_kernel(
    grad: tl.tensor, kept: tl.tensor, out: tl.tensor, count: tl.tensor, ACTIVATION: tl.constexpr, SIZE: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    dy = tl.load(grad + at, inside).to(tl.float32)
    x = tl.load(kept + at, inside).to(tl.float32)
    if ACTIVATION == "relu":
        dx = tl.where(x > 0, dy, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        dx = dy * sigmoid * (1 + x * (1 - sigmoid))
    elif out.dtype.element_ty == tl.float32:
        dx = dy * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF) + x * _GAUSS * tl.exp(-0.5 * x * x))
    else:
        below, density = _normal(x)
        dx = dy * (below + x * _GAUSS * density)
    tl.store(out + at, dx, inside)


class Tile(NamedTuple):
    """Of a product: its size, how many of them are loaded ahead, and by how many warps it is multiplied."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


def choose_tile(
    sizes: Sequence[tuple[int, int]], device: torch.device, itemsize: int, out_itemsize: int, widest: int = 256
) -> Tile:
    """For products of `sizes` (M, N): the largest tile of which there is one for each multiprocessor, that fits it.

    Items of the operands and of the result have so many bytes; `widest` bounds the columns.
    """
    rows = max(M for M, _ in sizes)
    if itemsize == 4:  # without matrix units, which would round to 10 bits
        return Tile(64, 64, 32, 2, 4) if rows > 32 else Tile(16, 64, 32, 2, 4)
    room, wanted = shared_memory(device), multiprocessor_count(device)
    table = [Tile(128, 256, 64, 4, 8), Tile(128, 128, 64, 4, 8), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)]
    for tile in table:
        stages = min(tile.stages, (room - out_itemsize * tile.m * min(tile.n, 128)) // (2 * tile.k * (tile.m + tile.n)))
        tiles = sum(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n) for M, N in sizes)
        if tile.n <= widest and stages >= 2 and tiles >= wanted:
            return tile._replace(stages=stages)
    return Tile(16, 64, 64, 4, 4) if rows <= 16 else Tile(64, 64, 64, 4, 4)


def product(
    a: Tensor, b: Tensor, epilogue: Epilogue, save: bool = False, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """a @ b after its epilogue and, with `save`, what its activation was applied to, in the dtype of a or `out_dtype`.

    a [M, K] has dense rows; b [K, N] dense rows or dense columns. Hopper GPUs have kernels of their own for large ones.
    """
    stored = dense_side(b)
    if hopper.why_not(a.device) is None and a.shape[1] and b.shape[1] % 8 == 0 and all(map(describable, (a, stored))):
        from hrm.kernels.ops.hopper import linear, matmul

        bare = all(part is None for part in epilogue) and not save and out_dtype in (None, a.dtype)
        if bare and a.is_contiguous() and b.T.is_contiguous() and linear.pays_for_linear(a, b.T):
            return linear.linear(a, b.T), None  # a tile's rows of a stay in shared memory, and are read once
        if matmul.pays(a, b) and (out_dtype or a.dtype).itemsize == 2:
            return matmul.multiply(a, b, epilogue, save, out_dtype)
    return multiply(a, b, epilogue, save, out_dtype)


def multiply(
    a: Tensor, b: Tensor, epilogue: Epilogue, save: bool = False, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `product`, in Triton."""
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N, dtype=out_dtype)
    before = torch.empty_like(out) if save else None
    if M == 0 or N == 0:
        return out, before
    if K == 0:  # an empty sum is 0; the kernel takes at least one step
        a, b = a.new_zeros(M, 1), b.new_zeros(1, N)
    stored = dense_side(b)
    transposed = stored is not b
    described = a.dtype.itemsize == 2 and all(map(describable, (a, stored, out)))
    tile = choose_tile([(M, N)], a.device, a.itemsize, out.itemsize)
    halves = described and tile.n == 256
    operands: list[Tensor | TensorDescriptor | None] = [a, stored, out, before]
    if described:
        width = tile.n // 2 if halves else tile.n
        result = TensorDescriptor.from_tensor(out, [tile.m, width])
        operands = [
            TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(stored, [tile.n, tile.k] if transposed else [tile.k, tile.n]),
            result,
            None if before is None else TensorDescriptor.from_tensor(before, [tile.m, width]),
        ]
    programs = triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    _matmul_kernel[(min(programs, multiprocessor_count(a.device)),)](
        *operands,
        epilogue.factors,
        epilogue.shifts,
        epilogue.sums,
        epilogue.bias,
        M,
        N,
        a.shape[1],
        a.stride(0),
        stored.stride(0),
        epilogue.activation,
        out.dtype == torch.float32,
        transposed,
        described,
        halves,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, before


def describable(x: Tensor) -> bool:
    """Whether a matrix of dense rows can have a tensor descriptor: all rows begin at multiples of 16 bytes."""
    # In the interpreter of Triton 3.5, descriptors want rows of whole 16 numbers.
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] and (x.is_cuda or x.shape[1] % 16 == 0)


def dense_rows(x: Tensor) -> Tensor:
    """A matrix as it is if its rows lie dense, one after the other; else a copy."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def dense_rows_or_columns(x: Tensor) -> Tensor:
    """A matrix as it is if its rows lie dense, or its columns do; else a copy."""
    return x if x.stride(0) == 1 and x.stride(1) >= x.shape[0] else dense_rows(x)


def dense_side(b: Tensor) -> Tensor:
    """b if its rows lie dense; else its transpose, of which they do."""
    return b if b.stride(1) == 1 else b.T


def forward(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, save: bool) -> tuple[Tensor, Tensor]:
    """As the operator `hrm::matmul` says."""
    rows, b = dense_rows(as_rows(a)), dense_rows_or_columns(b)
    epilogue = Epilogue(bias=None if bias is None else bias.contiguous(), activation=activation)
    out, before = product(rows, b, epilogue, save)
    shape = (*a.shape[:-1], b.shape[1])
    return out.view(shape), a.new_empty(0) if before is None else before.view(shape)


def activation_backward(grad: Tensor, kept: Tensor, activation: str) -> Tensor:
    """As the operator `hrm::activation_backward` says."""
    out = torch.empty_like(kept)
    if out.numel():
        grid, tile = tiles(out)
        _activation_backward_kernel[grid](*as_result(out, grad, kept), out, out.numel(), activation, **tile)
    return out
