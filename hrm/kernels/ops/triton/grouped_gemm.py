"""Kernel of `hrm.kernels.ops.grouped_gemm`: addresses and sizes of all products are its arguments.

Each program takes a run of neighbouring tiles, so that it sees few products; but where some products are much deeper
than others, tiles one by one in turn, the deepest first, so that all programs end together. In 16 bit it makes tensor
descriptors for each product on the device (the bulk copy engine from Hopper on); otherwise it goes by pointers. Hopper
GPUs have a kernel of their own for most of what has a tile for each multiprocessor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.common import multiprocessor_count, shared_memory
from hrm.kernels.ops.triton.matmul import Tile, choose_tile, dense_rows, describable, tile_position

# Kernel arguments have 4 KiB; three addresses and six numbers for each of 64 products are 3 KiB.
_MAX_PRODUCTS = 64


@triton.jit
def _size(coded: tl.tensor) -> tl.tensor:
    return (coded - 3) // 2


@triton.jit
def _product_of(
    tile: tl.tensor,
    lefts: tl.tuple,
    rights: tl.tuple,
    outs: tl.tuple,
    heights: tl.tuple,
    widths: tl.tuple,
    depths: tl.tuple,
    left_strides: tl.tuple,
    right_strides: tl.tuple,
    starts: tl.tuple,
) -> tl.tuple:
    """The product that a tile belongs to: the last one that starts at or before it, sought among 8 (see `optim`)."""
    zero = tile * 0
    wide = zero.to(tl.int64)
    left, right, out = lefts[0], rights[0], outs[0]
    M, N, K, start = zero + heights[0], zero + widths[0], zero + depths[0], zero + starts[0]
    left_stride, right_stride = wide + left_strides[0], wide + right_strides[0]
    for block in tl.static_range(0, len(lefts), 8):
        here = tile >= _size(starts[block])
        if block + 8 < len(lefts):
            here = here & (tile < _size(starts[block + 8]))
        if here:
            left, right, out = lefts[block], rights[block], outs[block]
            M, N, K, start = zero + heights[block], zero + widths[block], zero + depths[block], zero + starts[block]
            left_stride, right_stride = wide + left_strides[block], wide + right_strides[block]
            for i in tl.static_range(block + 1, block + 8):
                if i < len(lefts):
                    later = tile >= _size(starts[i])
                    left = tl.where(later, lefts[i], left)
                    right = tl.where(later, rights[i], right)
                    out = tl.where(later, outs[i], out)
                    M = tl.where(later, heights[i], M)
                    N = tl.where(later, widths[i], N)
                    K = tl.where(later, depths[i], K)
                    left_stride = tl.where(later, left_strides[i], left_stride)
                    right_stride = tl.where(later, right_strides[i], right_stride)
                    start = tl.where(later, starts[i], start)
    return left, right, out, _size(M), _size(N), _size(K), left_stride, right_stride, _size(start)


def _coded(size: int) -> int:
    """A size as the kernel takes it: odd and above 1, for Triton compiles anew for multiples of 16 and for 1."""
    return 2 * size + 3


@triton.jit
def _grouped_kernel(
    lefts: tl.tuple,
    rights: tl.tuple,
    outs: tl.tuple,
    heights: tl.tuple,
    widths: tl.tuple,
    depths: tl.tuple,
    left_strides: tl.tuple,
    right_strides: tl.tuple,
    starts: tl.tuple,
    total: tl.tensor,
    run: tl.tensor,
    LEFT_TRANSPOSED: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Programs take runs of `run` tiles in turn. TRANSPOSED: that operand is [K, M], or [N, K], in memory."""
    tiles, most = _size(total), _size(run)
    for first in range(tl.program_id(0) * most, tiles, tl.num_programs(0) * most):
        tile = first
        end = tl.minimum(first + most, tiles)
        while tile < end:
            left, right, out, M, N, K, left_stride, right_stride, start = _product_of(
                tile, lefts, rights, outs, heights, widths, depths, left_strides, right_strides, starts
            )
            tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
            last = tl.minimum(end, start + tiles_m * tiles_n)
            if DESCRIBED:
                if LEFT_TRANSPOSED:
                    a = tl.make_tensor_descriptor(left, [K, M], [left_stride, 1], [BLOCK_K, BLOCK_M])
                else:
                    a = tl.make_tensor_descriptor(left, [M, K], [left_stride, 1], [BLOCK_M, BLOCK_K])
                if RIGHT_TRANSPOSED:
                    b = tl.make_tensor_descriptor(right, [N, K], [right_stride, 1], [BLOCK_N, BLOCK_K])
                else:
                    b = tl.make_tensor_descriptor(right, [K, N], [right_stride, 1], [BLOCK_K, BLOCK_N])
                c = tl.make_tensor_descriptor(out, [M, N], [N.to(tl.int64), 1], [BLOCK_M, BLOCK_N])
            for t in tl.range(tile, last, flatten=DESCRIBED):
                tile_m, tile_n = tile_position(t - start, tiles_m, tiles_n)
                m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
                rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for k in range(0, K, BLOCK_K):
                    if DESCRIBED:
                        x = a.load([k, m]).T if LEFT_TRANSPOSED else a.load([m, k])
                        w = b.load([n, k]).T if RIGHT_TRANSPOSED else b.load([k, n])
                    else:
                        inner = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
                        if LEFT_TRANSPOSED:
                            at = inner[None, :] * left_stride + rows[:, None]
                        else:
                            at = rows.to(tl.int64)[:, None] * left_stride + inner[None, :]
                        x = tl.load(left + at, (rows[:, None] < M) & (inner[None, :] < K), 0.0)
                        if RIGHT_TRANSPOSED:
                            at = columns.to(tl.int64)[None, :] * right_stride + inner[:, None]
                        else:
                            at = inner[:, None] * right_stride + columns[None, :]
                        w = tl.load(right + at, (inner[:, None] < K) & (columns[None, :] < N), 0.0)
                    acc = tl.dot(x, w, acc, input_precision="ieee")
                if DESCRIBED:
                    c.store([m, n], acc.to(c.dtype))
                else:
                    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
                    tl.store(out + at, acc.to(out.dtype.element_ty), (rows[:, None] < M) & (columns[None, :] < N))
            tile = last


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts the descriptors that it makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def forward(xs: Sequence[Tensor], ws: Sequence[Tensor]) -> list[Tensor]:
    """As the operator `hrm::grouped_gemm` says."""
    outs = [x.new_empty(x.shape[0], w.shape[1]) for x, w in zip(xs, ws, strict=True)]
    lefts, left_transposed = _stored(xs)
    rights, right_transposed = _stored(ws)
    products = [product for product in zip(lefts, rights, outs, strict=True) if product[2].numel()]
    for left, _, out in products:
        if left.numel() == 0:
            out.zero_()  # empty sums
    products = [product for product in products if product[0].numel()]
    for begin in range(0, len(products), _MAX_PRODUCTS):
        _launch(products[begin : begin + _MAX_PRODUCTS], left_transposed, right_transposed)
    return outs


def _stored(matrices: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """Matrices as they are read, with dense rows, and whether they are the transposed ones."""
    columns_lie_dense = all(x.stride(0) == 1 and x.stride(1) >= x.shape[0] for x in matrices)
    rows_lie_dense = all(x.stride(1) == 1 and x.stride(0) >= x.shape[1] for x in matrices)
    if columns_lie_dense and not rows_lie_dense:
        return [x.T for x in matrices], True
    return [dense_rows(x) for x in matrices], False


def _choose_tile(sizes: Sequence[tuple[int, int]], device: torch.device, itemsize: int) -> Tile:
    """As `choose_tile`, by what was measured on an H200.

    Wide tiles pay for many rows a product, of which few tiles are cut off, and where there is work for several of each
    program; narrow ones take half as many warps, each with twice the sums.
    """
    tile = choose_tile(sizes, device, itemsize, itemsize, widest=128)
    if itemsize == 4 or (tile.m, tile.n) != (128, 128) or shared_memory(device) < 227 * 1024:
        return tile
    wide = sum(triton.cdiv(M, 128) * triton.cdiv(N, 256) for M, N in sizes)
    if sum(M for M, _ in sizes) >= 2048 * len(sizes) and wide >= 3 * multiprocessor_count(device):
        return Tile(128, 256, 64, 3, 8)
    return tile._replace(warps=4)


def _launch(products: Sequence[tuple[Tensor, Tensor, Tensor]], left_transposed: bool, right_transposed: bool) -> None:
    device = products[0][0].device

    def depth(product: tuple[Tensor, Tensor, Tensor]) -> int:
        return product[0].shape[0 if left_transposed else 1]

    products = sorted(products, key=depth, reverse=True)
    heights, widths = [out.shape[0] for *_, out in products], [out.shape[1] for *_, out in products]
    depths = [depth(product) for product in products]
    sizes = list(zip(heights, widths, strict=True))
    itemsize = products[0][0].itemsize
    described = itemsize == 2 and all(describable(x) for product in products for x in product)
    if described and device.type == "cuda":
        triton.set_allocator(_scratch)  # at each launch: it holds for a thread, and the backward has one of its own
    in_runs = depths[0] <= 1.5 * depths[-1]
    # On an H200, 64 products of 492 rows on average, as they lie, took 156 us by Hopper's kernel and 140 by this one.
    few_rows = not (left_transposed or right_transposed) and sum(heights) < 2048 * len(products)
    if described and not few_rows and hopper.why_not(device) is None:
        from hrm.kernels.ops.hopper import grouped_gemm

        width = grouped_gemm.choose_width(sizes, multiprocessor_count(device))
        if width is not None:
            grouped_gemm.multiply(products, sizes, depths, width, in_runs, left_transposed, right_transposed)
            return
    tile = _choose_tile(sizes, device, itemsize)
    *starts, total = itertools.accumulate(
        (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n) for M, N in sizes), initial=0
    )
    programs = min(total, multiprocessor_count(device))
    run = triton.cdiv(total, programs) if in_runs else 1

    def coded(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(_coded, sizes))

    lefts, rights, outs = zip(*products, strict=True)
    _grouped_kernel[(programs,)](
        lefts,
        rights,
        outs,
        coded(heights),
        coded(widths),
        coded(depths),
        tuple(x.stride(0) for x in lefts),
        tuple(x.stride(0) for x in rights),
        coded(starts),
        _coded(total),
        _coded(run),
        left_transposed,
        right_transposed,
        described,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
