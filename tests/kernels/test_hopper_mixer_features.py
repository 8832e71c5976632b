"""The half of mixer blocks over features on a Hopper GPU; `test_hopper_linear.py` runs its kernels' source on a CPU."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.kernels import naive
from hrm.kernels.naive import MixerWeights, NormGatedMixerWeights

ON_GPU = torch.cuda.is_available()
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="no GPU of compute capability 9.0")
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16]
ROWS = [1, 127, 300, 12_345, 33_792]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_normed(y: Tensor, total: Tensor) -> None:
    """`y` is the norm of `total`, as near as rounding twice leaves it: rows wait in 16 bit for their norm.

    On average that is 1.41 times as far off as rounding once, but 1.3 or 1.6 times in some single rows of 256.
    """
    scale = (total.square().mean(1, keepdim=True) + EPS).rsqrt()
    exact, twice = total * scale, (total.to(y.dtype) * scale).to(y.dtype)
    assert error(y, exact) < 1.06 * error(twice, exact)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "inner"), [(512, 1536), (512, 512), (256, 776), (1024, 328)])
def test_shared_rows(rows: int, dtype: torch.dtype, width: int, inner: int) -> None:
    """Twice: a program that read what an earlier launch left would be found."""
    from hrm.kernels.ops.hopper import shared_rows

    x, residual = draw(rows, inner).to(dtype), draw(rows, width, seed=1).to(dtype)
    squares = draw(5, rows, seed=2).square()
    for seed in (3, 4):
        weight = (draw(width, inner, seed=seed) / math.sqrt(inner)).to(dtype)
        rstd = torch.full((rows,), math.nan, device="cuda")
        rounded = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device="cuda")
        assert shared_rows.fits(x, weight)
        y = shared_rows.linear_residual_rms(x, weight, residual, EPS, rstd=rstd, rounded=rounded)
        total = residual.double() + x.double() @ weight.double().T
        factors = (total.square().mean(1) + EPS).rsqrt()
        expected = total * factors[:, None]
        assert_normed(y, total)
        torch.testing.assert_close(rstd.double(), factors, rtol=1e-4, atol=0)
        assert error(rounded, expected) < 1.02 * error(expected.float().to(rounded.dtype), expected)
        kept = torch.empty_like(residual)
        y = shared_rows.linear_residual_rms(
            x, weight, residual, EPS, squares=squares, scale=0.5, factors=rstd, product=kept
        )
        factors = (squares.double().sum(0) / inner + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), factors, rtol=1e-4, atol=0)
        product = 0.5 * x.double() @ weight.double().T
        assert error(kept, product) < 1.1 * error(product.to(dtype), product)
        assert_normed(y, residual.double() + product * factors[:, None])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", [MixerWeights, NormGatedMixerWeights])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "inner"), [(512, 1536), (256, 776)])
def test_gated_and_the_rest(kind: Any, rows: int, dtype: torch.dtype, width: int, inner: int) -> None:
    from hrm.kernels.ops.hopper import mixer_features

    shapes = [(8, 8), (8, 8), (2 * inner, width), (width, inner)]
    drawn = [draw(*shape, seed=i) / math.sqrt(shape[1]) for i, shape in enumerate(shapes)]
    weights, x = kind(*(matrix.to(dtype) for matrix in drawn)), draw(rows, width, seed=9).to(dtype)
    normed = kind is NormGatedMixerWeights

    def definition(dtype: torch.dtype) -> Tensor:
        wide, each = x.to(dtype), kind(*(matrix.to(dtype) for matrix in weights))
        return naive.rms_norm(wide + naive._mlp(each, wide, each.gate_up, each.down, EPS), EPS)

    def ours(save: bool) -> tuple[Tensor, Tensor | None]:
        product, squares, projected = mixer_features.gated(x, weights.gate_up, normed, save)
        return mixer_features.residual_rms(x, product, weights.down, squares, EPS, save)[0], projected

    exact = definition(torch.float64)
    actual, none = ours(save=False)
    again, projected = ours(save=True)
    assert none is None
    assert actual.dtype == dtype
    assert error(actual, exact) < 1.05 * error(definition(dtype), exact)
    assert torch.equal(actual, again)
    assert projected is not None
    expected = x.double() @ weights.gate_up.double().T
    assert error(projected, expected) < 1.1 * error(expected.to(dtype), expected)


@pytest.mark.slow
def test_kernels_compile() -> None:
    """Without a GPU."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("3.6."):
        pytest.skip(f"the kernels are written for the Gluon of Triton 3.6, not {version}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.compiling_hopper"]
    root = Path(__file__).parents[2]
    compiled = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root).stdout
    # Of mixers, in e4m3 and in 16 bit; of long rows; of products as they lie or transposed.
    of_mixers = {"_linear_kernel": 2, "_swiglu_kernel": 1, "_shared_rows_kernel": 3}
    for kernel, times in (of_mixers | {"_softmax_kernel": 1, "_norm_kernel": 1, "_grouped_kernel": 3}).items():
        assert compiled.split().count(kernel) == times
