"""Kernels of `hrm.kernels.ops.block_scaled_matmul`.

Quantising rounds to nearest by the chip's own conversion to e4m3 where there is one, and by arithmetic on bits, which
gives the same, elsewhere. The product has three ways, by `_way`: the matrix
unit's own scales (Blackwell), sums of e4m3 blocks of 128 scaled in registers (Hopper), and operands widened to
bfloat16 first, each in a launch, and multiplied as `hrm.kernels.ops.triton.matmul` does.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hrm.kernels.ops.block_scaled_matmul import BlockScaled
from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.matmul import as_rows
from hrm.kernels.ops.triton.common import multiprocessor_count
from hrm.kernels.ops.triton.matmul import Epilogue, dense_rows, product, tile_position

_PASSED = 4096  # numbers of a program of 4 warps: four vectors of 16 bytes a thread in 16 bit

Way = Literal["native", "scaled sums", "widened"]


@triton.jit
def _encode_e4m3(x: tl.tensor) -> tl.tensor:
    """Codes of numbers of up to 448, to nearest, ties to even; NaN is 127."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6, in steps of 2^-9: those of float32 at 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < (121 << 23), small, normal)
    code = tl.where(size > 0x7F800000, 127, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _encode_e2m1(x: tl.tensor) -> tl.tensor:
    """Codes of numbers of up to 6, to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x1FFFFF + ((size >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1, in steps of 1/2: those of float32 at 2^22.
    small = (tl.abs(x) + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(size < (127 << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0, code)  # its block's scale is NaN
    return (code | ((bits >> 28) & 8)).to(tl.uint8)


@triton.jit
def _decode_e4m3(code: tl.tensor) -> tl.tensor:
    size = code.to(tl.int32) & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 127, float("nan"), value)
    return tl.where(code.to(tl.int32) >= 128, -value, value)


@triton.jit
def _decode_e2m1(code: tl.tensor) -> tl.tensor:
    size = code.to(tl.int32) & 7
    normal = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where(code.to(tl.int32) >= 8, -value, value)


@triton.jit
def _decode_scale(code: tl.tensor) -> tl.tensor:
    """Powers of two from their exponents; 255 is NaN."""
    wide = code.to(tl.int32)
    bits = tl.where(wide == 0, 0x400000, wide << 23)  # 2^-127 has no exponent in float32
    return tl.where(wide == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _quantize_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    stride: tl.tensor,
    FOUR_BITS: tl.constexpr,
    CONVERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """CONVERTS: the chip converts to e4m3."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCK
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    number = tl.load(x + rows[:, None] * stride + columns[None, :], inside, 0.0).to(tl.float32)
    blocks = number.reshape(ROWS, BLOCKS, BLOCK)
    # As integers, sizes compare as they do as floats, with NaN above infinity.
    largest = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    fraction = largest & 0x7FFFFF
    if FOUR_BITS:  # 6 is 1.5 * 2^2
        exponent = (largest >> 23) - 2 + (fraction > 0x400000).to(tl.int32)
    else:  # 448 is 1.75 * 2^8
        exponent = (largest >> 23) - 8 + (fraction > 0x600000).to(tl.int32)
    exponent = tl.where(largest == 0, 127, tl.maximum(exponent, 1))
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    bad = largest >= 0x7F800000
    scaled = (blocks * tl.where(bad, float("nan"), factor)[:, :, None]).reshape(ROWS, COLUMNS)
    if FOUR_BITS:
        low, high = _encode_e2m1(scaled).reshape(ROWS, COLUMNS // 2, 2).split()
        pairs = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        at = rows[:, None] * (K // 2) + pairs[None, :]
        tl.store(values + at, low | (high << 4), (rows[:, None] < M) & (pairs[None, :] < K // 2))
    else:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if CONVERTS else _encode_e4m3(scaled)
        tl.store(values + rows[:, None] * K + columns[None, :], code, inside)
    of_row = tl.cdiv(K, BLOCK)
    number_of_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = rows[:, None] * of_row + number_of_block[None, :]
    code = tl.where(bad, 255, exponent).to(tl.uint8)
    tl.store(scales + at, code, (rows[:, None] < M) & (number_of_block[None, :] < of_row))


def _tile(K: int, block: int) -> tuple[int, int]:
    """Columns and rows of a program that passes over rows of K numbers."""
    width = max(block, min(512, triton.next_power_of_2(K)))
    return width, _PASSED // width


def _converts(device: torch.device) -> bool:
    """Whether a chip converts to e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(x: Tensor, block: int, format: str) -> tuple[Tensor, Tensor]:
    """As the operator `hrm::quantize_blocks` says."""
    rows, K = dense_rows(as_rows(x)), x.shape[-1]
    four_bits = format == "mxfp4"
    values = x.new_empty(*x.shape[:-1], K // 2 if four_bits else K, dtype=torch.uint8)
    scales = x.new_empty(*x.shape[:-1], triton.cdiv(K, block), dtype=torch.uint8)
    if x.numel():
        width, height = _tile(K, block)
        grid = (triton.cdiv(K, width), triton.cdiv(len(rows), height))
        _quantize_kernel[grid](
            rows,
            values,
            scales,
            len(rows),
            K,
            rows.stride(0),
            four_bits,
            _converts(x.device),
            block,
            height,
            width,
            num_warps=4,
        )
    return values if four_bits else values.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


@triton.jit
def _values(
    source: tl.tensor,
    m: tl.tensor,
    k: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
) -> tl.tensor:
    """A tile of a matrix of K columns, which are bytes."""
    if DESCRIBED:
        tile = source.load([m, k])
    else:
        rows, columns = (m + tl.arange(0, ROWS)).to(tl.int64), k + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        tile = tl.load(source + rows[:, None] * K + columns[None, :], inside, 0)
    return tile


@triton.jit
def _scales(
    source: tl.tensor,
    m: tl.tensor,
    block: tl.tensor,
    M: tl.tensor,
    of_row: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Codes of the scales of a tile; past the ends, of 1."""
    rows, columns = (m + tl.arange(0, ROWS)).to(tl.int64), block + tl.arange(0, BLOCKS)
    inside = (rows[:, None] < M) & (columns[None, :] < of_row)
    return tl.load(source + rows[:, None] * of_row + columns[None, :], inside, 127)


@triton.jit
def _widen_kernel(
    values: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    FOUR_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    m, k = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    if FOUR_BITS:
        codes = _values(values, m, k // 2, M, K // 2, ROWS, COLUMNS // 2, False)
        numbers = tl.join(_decode_e2m1(codes & 15), _decode_e2m1(codes >> 4)).reshape(ROWS, COLUMNS)
    else:
        numbers = _decode_e4m3(_values(values, m, k, M, K, ROWS, COLUMNS, False))
    scale = _decode_scale(_scales(scales, m, k // BLOCK, M, tl.cdiv(K, BLOCK), ROWS, COLUMNS // BLOCK))
    scaled = (numbers.reshape(ROWS, COLUMNS // BLOCK, BLOCK) * scale[:, :, None]).reshape(ROWS, COLUMNS)
    rows, columns = (m + tl.arange(0, ROWS)).to(tl.int64), k + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    tl.store(out + rows[:, None] * K + columns[None, :], scaled.to(out.dtype.element_ty), inside)


def _widened(values: Tensor, scales: Tensor, K: int, block: int, four_bits: bool, dtype: torch.dtype) -> Tensor:
    """The numbers [M, K] of codes."""
    M = len(values)
    out = torch.empty(M, K, dtype=dtype, device=values.device)
    width, height = _tile(K, block)
    grid = (triton.cdiv(K, width), triton.cdiv(M, height))
    _widen_kernel[grid](values, scales, out, M, K, four_bits, block, height, width, num_warps=4)
    return out


@triton.jit
def _block_scaled_kernel(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    a_scales: tl.tensor,
    b_scales: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    NATIVE: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """a [M, K] and b [N, K] in memory. NATIVE: the matrix unit scales; else sums are scaled, BLOCK_K being BLOCK.

    DESCRIBED: a and b are descriptors. INTERPRETED: by Triton's interpreter, which multiplies no e4m3.
    """
    FORMAT: tl.constexpr = "e2m1" if FOUR_BITS else "e4m3"
    PACKED: tl.constexpr = 2 if FOUR_BITS else 1
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    of_row = tl.cdiv(K, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = _values(a, m, k // PACKED, M, K // PACKED, BLOCK_M, BLOCK_K // PACKED, DESCRIBED)
            w = _values(b, n, k // PACKED, N, K // PACKED, BLOCK_N, BLOCK_K // PACKED, DESCRIBED)
            x_scale = _scales(a_scales, m, k // BLOCK, M, of_row, BLOCK_M, BLOCK_K // BLOCK)
            w_scale = _scales(b_scales, n, k // BLOCK, N, of_row, BLOCK_N, BLOCK_K // BLOCK)
            if NATIVE:
                acc = tl.dot_scaled(x, x_scale, FORMAT, w.T, w_scale, FORMAT, acc)
            else:
                if INTERPRETED:
                    x, w = _decode_e4m3(x), _decode_e4m3(w)
                elif not DESCRIBED:
                    x, w = x.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
                rows, columns = _decode_scale(x_scale), _decode_scale(w_scale)
                acc += tl.dot(x, w.T) * rows * columns.reshape(1, BLOCK_N)
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), inside)


@triton.jit
def _decode_scales_kernel(
    a: tl.tensor,
    b: tl.tensor,
    decoded: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,
    a_height: tl.tensor,
    b_height: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Of codes [M, blocks] and [N, blocks] the scales [blocks, height], those of b after a's; past the ends 1."""
    number, block = tl.program_id(0), tl.program_id(1)
    source, rows_of, height = a, M, a_height
    if number >= tl.cdiv(a_height, SIZE):
        number -= tl.cdiv(a_height, SIZE)
        source, rows_of, height = b, N, b_height
        decoded += blocks.to(tl.int64) * a_height
    rows = number * SIZE + tl.arange(0, SIZE)
    code = tl.load(source + rows.to(tl.int64) * blocks + block, rows < rows_of, 127)
    tl.store(decoded + block.to(tl.int64) * height + rows, _decode_scale(code), rows < height)


def decoded_scales(a: Tensor, b: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Scales [M, blocks] and [N, blocks] as float32 [blocks, M'], block by block, M rounded up to whole tiles."""
    (M, blocks), N, size = a.shape, len(b), 512
    heights = [triton.cdiv(rows, tile) * tile for rows in (M, N)]
    decoded = torch.empty(blocks * sum(heights), dtype=torch.float32, device=a.device)
    programs = sum(triton.cdiv(height, size) for height in heights)
    _decode_scales_kernel[(programs, blocks)](a, b, decoded, M, N, blocks, *heights, size)
    first, second = torch.split(decoded, [blocks * height for height in heights])
    return first.view(blocks, -1), second.view(blocks, -1)


def _way(device: torch.device, block: int, format: str) -> Way:
    """How a chip multiplies a format."""
    if device.type != "cuda":
        return "scaled sums" if block == 128 and format == "mxfp8" else "widened"
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 10 and block == 32:
        return "native"
    # Blocks of 128 pay only where sums of 8 bits are worth their scaling.
    return "scaled sums" if major == 9 and block == 128 and format == "mxfp8" else "widened"


def forward(a: BlockScaled, b: BlockScaled, out_dtype: torch.dtype) -> Tensor:
    """As the operator `hrm::block_scaled_matmul` says."""
    K, N, block, format = a.shape[-1], b.shape[0], a.block, a.format
    device = a.values.device
    left, right = as_rows(a.values).contiguous(), b.values.contiguous()
    M = len(left)
    out = torch.empty(*a.shape[:-1], N, dtype=out_dtype, device=device)
    if out.numel() == 0 or K == 0:
        return out.zero_()
    a_scales, b_scales = (x.contiguous().view(torch.uint8) for x in (as_rows(a.scales), b.scales))
    way, on_cuda = _way(device, block, format), device.type == "cuda"
    aligned = out_dtype.itemsize == 2 and K % 16 == 0 and N % 8 == 0
    if way == "scaled sums" and aligned and hopper.why_not(device) is None:
        from hrm.kernels.ops.hopper.block_scaled_matmul import TILE, multiply

        multiply(left, right, *decoded_scales(a_scales, b_scales, TILE), out.view(M, N))
        return out
    four_bits = format == "mxfp4"
    codes = [x.view(torch.uint8) for x in (left, right)]
    if way == "widened":
        dtype = torch.bfloat16 if on_cuda else torch.float32  # which Triton's interpreter misreads
        x, w = (
            _widened(values, scales, K, block, four_bits, dtype)
            for values, scales in zip(codes, (a_scales, b_scales), strict=True)
        )
        return product(x, w.T, Epilogue(), out_dtype=out_dtype)[0].view(out.shape)
    BLOCK_M, BLOCK_N = (128, 128) if M > 64 else (64, 64)
    BLOCK_K = 128
    described = way == "scaled sums" and on_cuda and K % 16 == 0
    operands: list[Tensor] | list[TensorDescriptor] = codes
    if described:
        operands = [
            TensorDescriptor.from_tensor(left, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(right, [BLOCK_N, BLOCK_K]),
        ]
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    _block_scaled_kernel[(min(tiles, multiprocessor_count(device)),)](
        *operands,
        out,
        a_scales,
        b_scales,
        M,
        N,
        K,
        way == "native",
        four_bits,
        described,
        not on_cuda,
        block,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        num_warps=8,
        num_stages=2 if way == "native" else 4,
    )
    return out
