from functools import partial

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, PRODUCTS, assert_accurate, assert_compiles, draw, relative_error

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [((0, 8), 4), ((1, 16), 16), ((5, 7), 3), ((3, 23, 80), 144), ((2, 3), 0), ((33, 520), 17)]
HRM_V1 = [((384, 82, 512), 1536), ((384, 82, 512), 3072), ((384, 82, 1536), 512)]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def arguments(device: str, dtype: torch.dtype, shape: tuple[int, ...], outputs: int, weighted: bool) -> list[Tensor]:
    """x around 0.5, w of variance 1 / K and, if `weighted`, weights of the norm around 1."""
    x, w, norm_weight = draw(device, dtype, shape, (outputs, shape[-1]), shape[-1:], grad=False)
    tensors = [x + 0.5, w * shape[-1] ** -0.5, 1 + norm_weight * 0.3]
    return [tensor.requires_grad_() for tensor in tensors[: 2 + weighted]]


@pytest.mark.parametrize(("device", "dtype"), PRODUCTS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_values_and_gradients(
    device: str, dtype: torch.dtype, kind: str, weighted: bool, shape: tuple[int, ...], outputs: int
) -> None:
    # The normalised x is rounded on its way into the product, and so are results.
    inputs = arguments(device, dtype, shape, outputs, weighted)
    assert_accurate(
        partial(ops.norm_linear, kind=kind), partial(ops.norm_linear.naive, kind=kind), inputs, slack=2, roundings=2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), [pytest.param(*case, marks=on_gpu) for case in HRM_V1])
def test_sizes_of_the_model(
    dtype: torch.dtype, kind: str, weighted: bool, shape: tuple[int, ...], outputs: int
) -> None:
    inputs = arguments("cuda", dtype, shape, outputs, weighted)
    assert_accurate(partial(ops.norm_linear, kind=kind), partial(ops.norm_linear.naive, kind=kind), inputs, slack=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_strides(device: str, kind: str) -> None:
    x, w = draw(device, torch.float32, (40, 64), (64, 48), grad=False)
    for rows, weight in ((x[:, 16:48], w[:32].T), (x.T, w.T[:, :40]), (x[::2, 1::2], w.T[:, :32])):
        actual = ops.norm_linear(rows, weight, kind=kind)
        torch.testing.assert_close(actual, ops.norm_linear.naive(rows, weight, kind=kind), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_large_values(device: str, kind: str) -> None:
    """Whose squares pass float16 by far, around a mean that is large beside their spread; rows of zeros."""
    x, w = draw(device, torch.float16, (6, 128), (32, 128), grad=False)
    x = x * torch.tensor([1e4, 1.0, 1e-3, 1.0, 1e4, 0.0], device=device).half()[:, None]
    x[3] += 1000
    exact = ops.norm_linear.naive(x.double(), w.double(), kind=kind)
    actual = ops.norm_linear(x, w, kind=kind)
    assert actual.isfinite().all()
    for row, wanted in zip(actual, exact, strict=True):
        assert relative_error(row, wanted) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_operator(device: str, kind: str) -> None:
    inputs = arguments(device, torch.float32, (2, 3, 8), 4, True)
    torch.library.opcheck(torch.ops.hrm.norm_linear.default, (*inputs, 1e-5, kind))
    _, w, norm_weight = (tensor.detach() for tensor in inputs)
    torch.library.opcheck(torch.ops.hrm.norm_weights_backward.default, (w.flip(0), w, norm_weight))
    assert_compiles(partial(ops.norm_linear, kind=kind), inputs)


def test_errors() -> None:
    x, w, norm_weight = draw("cpu", torch.float32, (3, 5), (4, 5), (5,), grad=False)
    with pytest.raises(UserError, match=r"norm_linear: x is \[3, 5\] and should be \[\.\.\., 4\], as w is \[5, 4\]\."):
        ops.norm_linear(x, w.T)
    with pytest.raises(
        UserError, match=r"norm_linear: norm_weight is \[4\] and should be \[5\], one for a column of w"
    ):
        ops.norm_linear(x, w, norm_weight[:4])
    with pytest.raises(UserError, match="norm_linear: w is float16 and x is float32; give both one dtype"):
        ops.norm_linear(x, w.half())
    with pytest.raises(UserError, match="norm_linear: kind is 'batch'; give rms or layer"):
        ops.norm_linear(x, w, kind="batch")
