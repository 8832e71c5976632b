"""The half of a mixer block over features, on Hopper GPUs: two kernels.

Matmul and gate are one, the second matmul, residual and norm the other. What a normed gate (`naive.norm_gated`) divides
by, one number for a token, commutes with the second matmul: see `hrm.kernels.ops.triton.mixer`, which calls what is
here where it pays.

Shapes: M = B T rows, D features, F inner width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.ops.e4m3 import PRODUCT_SCALE, WEIGHT_SCALE
from hrm.kernels.ops.hopper import fp8, linear, shared_rows
from hrm.kernels.ops.hopper.common import ROWS, multiprocessor_count


def pays_for_gated(x: Tensor, gate_up: Tensor) -> bool:
    """Whether `gated` takes these operands, and faster than Triton's kernel."""
    return linear.fits_swiglu(x.shape[1]) and x.itemsize == 2 and gate_up.shape[0] % 16 == 0 and _fill(x)


def gated(x: Tensor, gate_up: Tensor, normed: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `hrm.kernels.ops.triton.mixer.gated`, where it pays."""
    if normed:
        return linear.linear_swiglu_and_squares(x, gate_up, save)
    inner, projected = linear.linear_swiglu(x, gate_up, save)
    return inner, None, projected


def pays_for_residual_rms(inner: Tensor, down: Tensor) -> bool:
    """Whether `residual_rms` takes these operands, and faster than the library followed by a norm."""
    return inner.itemsize == 2 and shared_rows.fits(inner, down) and _fill(inner)


def residual_rms(
    x: Tensor, inner: Tensor, down: Tensor, squares: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `hrm.kernels.ops.triton.mixer.residual_rms`, where it pays."""
    rstd = product = factors = None
    if save:
        rstd = x.new_empty(x.shape[0], dtype=torch.float32)
        if squares is not None:
            product, factors = torch.empty_like(x), torch.empty_like(rstd)
    y = shared_rows.linear_residual_rms(
        inner, down, x, eps, squares=squares, rstd=rstd, factors=factors, product=product
    )
    return y, product, rstd, factors


def mix_features_in_e4m3(
    x: Tensor, rounded: Tensor, weights: MixerWeights | NormGatedMixerWeights, eps: float
) -> Tensor:
    """`hrm.kernels.ops.triton.mixer.mix_features` of x, also given in e4m3, by such weights times WEIGHT_SCALE."""
    squares, scale = None, 1 / WEIGHT_SCALE
    if isinstance(weights, NormGatedMixerWeights):
        inner, squares = fp8.linear_swiglu_and_squares(rounded, weights.gate_up)
        scale /= PRODUCT_SCALE
    else:
        inner = fp8.linear_swiglu(rounded, weights.gate_up)
    return shared_rows.linear_residual_rms(inner, weights.down, x, eps, squares=squares, scale=scale)


def _fill(x: Tensor) -> bool:
    """Whether there are rows enough: on an H200, 8,448 are, and 4,224 are not."""
    tiles: int = triton.cdiv(x.shape[0], ROWS)
    return 2 * tiles >= multiprocessor_count(x.device)
