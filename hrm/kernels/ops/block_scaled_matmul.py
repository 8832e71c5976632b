"""Matrix product of operands in 8 or 4 bits, with one scale for each block along K.

Source: OCP Microscaling Formats (MX) v1.0. Unlike there, a block's scale is the least power of two under which nothing
in it passes the largest number of the format, so that no value is cut off.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import DTYPES, check_tensors, dtype_name, operation, runs_triton, triton_kernels

BLOCKS = (32, 64, 128)
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_LARGEST = {"mxfp8": 448.0, "mxfp4": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _NOT_A_NUMBER = 127, 255  # of e8m0


class BlockScaled(NamedTuple):
    """Rows of K numbers in 8 or 4 bits: number k of a row is value[k] * scale[k // block]."""

    values: Tensor  # mxfp8: [..., K] float8_e4m3fn; mxfp4: [..., K / 2] uint8, two e2m1 numbers each, the lower first
    scales: Tensor  # [..., ceil(K / block)] float8_e8m0fnu: powers of two
    block: int
    format: str

    @property
    def shape(self) -> torch.Size:
        """That of the numbers, [..., K]."""
        *rows, columns = self.values.shape
        return torch.Size([*rows, 2 * columns if self.format == "mxfp4" else columns])


def _naive_quantize(x: Tensor, block: int = 32, format: str = "mxfp8") -> BlockScaled:
    *rows, K = x.shape
    blocks = -(-K // block)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * block - K)).view(*rows, blocks, block)
    # largest = fraction * 2^exponent, the fraction from 1/2 to 1.
    fraction, exponent = torch.frexp(padded.abs().amax(-1))
    most, of_most = math.frexp(_LARGEST[format])
    biased = (exponent - of_most + (fraction > most).int() + _BIAS).clamp(1, 254)
    biased = torch.where(fraction == 0, _BIAS, biased)  # of zeros
    scale = (biased << 23).view(torch.float32)
    biased = torch.where(fraction.isfinite(), biased, _NOT_A_NUMBER)
    scaled = torch.where(fraction.isfinite()[..., None], padded / scale[..., None], torch.nan)
    scaled = scaled.reshape(*rows, blocks * block)[..., :K]
    scales = biased.to(torch.uint8).view(_E8M0)
    if format == "mxfp8":
        return BlockScaled(scaled.to(_E4M3), scales, block, format)
    codes = scaled.signbit().to(torch.uint8) * 8
    for i, (lower, upper) in enumerate(itertools.pairwise(_E2M1)):
        middle = (lower + upper) / 2  # between two, the one with an even code
        codes += scaled.abs() >= middle if i % 2 else scaled.abs() > middle
    return BlockScaled(codes[..., ::2] | codes[..., 1::2] << 4, scales, block, format)


def _naive_dequantize(blocks: BlockScaled, dtype: torch.dtype = torch.float32) -> Tensor:
    values, scales, block, format = blocks
    if format == "mxfp8":
        numbers = values.float()
    else:
        codes = torch.stack((values & 15, values >> 4), -1).flatten(-2)
        table = torch.tensor(_E2M1, device=values.device)
        numbers = table[(codes & 7).long()] * torch.where(codes >= 8, -1.0, 1.0)
    codes = scales.view(torch.uint8).int()
    powers = torch.where(codes == 0, 0x400000, codes << 23).view(torch.float32)  # 2^-127 has no exponent in float32
    powers = torch.where(codes == _NOT_A_NUMBER, torch.nan, powers)
    return (numbers * powers.repeat_interleave(block, -1)[..., : numbers.shape[-1]]).to(dtype)


def naive(
    a: Tensor | BlockScaled,
    b: Tensor | BlockScaled,
    block: int = 32,
    format: str = "mxfp8",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Of the dequantised operands, in float32."""
    left = a if isinstance(a, BlockScaled) else _naive_quantize(a, block, format)
    right = b if isinstance(b, BlockScaled) else _naive_quantize(b.T, block, format)
    return (_naive_dequantize(left) @ _naive_dequantize(right).T).to(_result_dtype(a, b, out_dtype))


# ---- the operators


@torch.library.custom_op("hrm::quantize_blocks", mutates_args=())
def _quantize(x: Tensor, block: int, format: str) -> tuple[Tensor, Tensor]:
    values, scales = triton_kernels("block_scaled_matmul", x).quantize(x, block, format)
    return values, scales


@_quantize.register_fake
def _quantized(x: Tensor, block: int, format: str) -> tuple[Tensor, Tensor]:
    *rows, K = x.shape
    is_8_bit = format == "mxfp8"
    values = x.new_empty(*rows, K if is_8_bit else K // 2, dtype=_E4M3 if is_8_bit else torch.uint8)
    return values, x.new_empty(*rows, -(-K // block), dtype=_E8M0)


@torch.library.custom_op("hrm::block_scaled_matmul", mutates_args=())
def _multiply(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block: int, format: str, out_dtype: torch.dtype
) -> Tensor:
    left, right = BlockScaled(a, a_scales, block, format), BlockScaled(b, b_scales, block, format)
    out: Tensor = triton_kernels("block_scaled_matmul", a).forward(left, right, out_dtype)
    return out


@_multiply.register_fake
def _result(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, block: int, format: str, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0], dtype=out_dtype)


# ---- what is public


@operation(_naive_quantize)
def quantize_blocks(x: Tensor, block: int = 32, format: str = "mxfp8") -> BlockScaled:
    """Round to 8 or 4 bits, with one scale for each block of the last dimension.

    Args:
        x: [..., K]; bfloat16, float16 or float32. The last block may be shorter. A block that holds an infinity or NaN
            becomes NaN.
        block: 32 (as MX has it), 64 or 128.
        format: mxfp8 (e4m3: 4 bits of exponent, 3 of fraction) or mxfp4 (e2m1; K must be even).

    Returns:
        Values to nearest, ties to even, and scales: powers of two. No gradient passes.

    Raises:
        UserError: the dtype, block or format is another one, or K is odd for mxfp4.
    """
    check_tensors("quantize_blocks", x=x)
    if block not in BLOCKS:
        raise UserError(f"quantize_blocks: block is {block}; give 32, 64 or 128.")
    if format not in _LARGEST:
        raise UserError(f"quantize_blocks: format is {format!r}; give mxfp8 or mxfp4.")
    if x.ndim == 0 or (format == "mxfp4" and x.shape[-1] % 2):
        raise UserError(
            f"quantize_blocks: x is {list(x.shape)}; give a last dimension, and for mxfp4 one of even size."
        )
    x = x.detach()
    if not runs_triton(x):
        return _naive_quantize(x, block, format)
    values, scales = _quantize(x, block, format)
    return BlockScaled(values, scales, block, format)


@operation(_naive_dequantize)
def dequantize_blocks(blocks: BlockScaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [..., K] that `quantize_blocks` rounded to: exact in float32, and but for the least in bfloat16."""
    return _naive_dequantize(blocks, dtype)


@operation(naive)
def block_scaled_matmul(
    a: Tensor | BlockScaled,
    b: Tensor | BlockScaled,
    block: int = 32,
    format: str = "mxfp8",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """a @ b of operands in 8 or 4 bits with one scale for each block of K, added up in float32.

    What the chip multiplies: from compute capability 10.0 on, mxfp8 and mxfp4 in blocks of 32 as they are. On 9.0, e4m3
    in blocks of 128, whose sums are scaled in float32; between its scales the matrix unit keeps about 14 bits of a sum.
    All else is widened to bfloat16, which changes no number, and multiplied as that: right, but not faster.

    Args:
        a: [..., M, K]; bfloat16, float16 or float32, quantised here; or `quantize_blocks(a)`, whose `block` and
            `format` then count.
        b: [K, N] likewise; or `quantize_blocks(b.T)`, [N, K], for blocks run along K.
        block, format: as for `quantize_blocks`.
        out_dtype: of the result; None: that of `a`, else of `b`, if either is a tensor, or bfloat16.

    Returns:
        [..., M, N], dense. Without gradient.

    Raises:
        UserError: shapes, dtypes, devices, blocks or formats do not fit, or an operand requires a gradient.
    """
    for name, x in (("a", a), ("b", b)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise UserError(
                f"block_scaled_matmul: {name} requires a gradient, and there is none; give {name}.detach()."
            )
    if isinstance(b, Tensor) and b.ndim != 2:
        raise UserError(f"block_scaled_matmul: b is {list(b.shape)} and should be [K, N], a matrix.")
    given = next((x for x in (a, b) if isinstance(x, BlockScaled)), None)
    if given is not None:
        block, format = given.block, given.format
    left = a if isinstance(a, BlockScaled) else quantize_blocks(a, block, format)
    right = b if isinstance(b, BlockScaled) else quantize_blocks(b.T, block, format)
    if (left.block, left.format) != (right.block, right.format):
        raise UserError(
            f"block_scaled_matmul: a is {left.format} in blocks of {left.block} and b {right.format} in blocks of"
            f" {right.block}; give both alike."
        )
    if len(right.shape) != 2 or left.shape[-1] != right.shape[1]:
        raise UserError(
            f"block_scaled_matmul: a is {list(left.shape)} and b {list(right.shape)[::-1]};"
            " give [..., M, K] and [K, N]."
        )
    if left.values.device != right.values.device:
        raise UserError(
            f"block_scaled_matmul: b is on {right.values.device} and a is on {left.values.device}; move both to one"
            " device."
        )
    dtype = _result_dtype(a, b, out_dtype)
    if dtype not in DTYPES:
        raise UserError(f"block_scaled_matmul: out_dtype is {dtype_name(dtype)}; give float32, float16 or bfloat16.")
    if not runs_triton(left.values):
        return naive(left, right, out_dtype=dtype)
    out: Tensor = _multiply(left.values, left.scales, right.values, right.scales, left.block, left.format, dtype)
    return out


def _result_dtype(a: Tensor | BlockScaled, b: Tensor | BlockScaled, out_dtype: torch.dtype | None) -> torch.dtype:
    given = [x.dtype for x in (a, b) if isinstance(x, Tensor)]
    return out_dtype or (given[0] if given else torch.bfloat16)
