from collections.abc import Callable
from functools import partial

import pytest
import torch

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, DTYPES, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")

# No row, one, an odd number of columns, several tiles of rows, a tile that is not full; across rows of any length.
CASES = [
    ((0, 8), -1),
    ((3, 0), -1),
    ((1, 5), -1),
    ((5, 7, 11), 2),
    ((70, 32), 1),
    ((3, 1200), -1),
    ((5, 7, 11), 0),
    ((2, 300, 3), 1),
    ((3, 4, 70), -2),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_result_and_gradient(device: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    softmax, naive = partial(ops.softmax, dim=dim), partial(ops.softmax.naive, dim=dim)
    # The interpreter cuts off where a GPU rounds to bfloat16, and gradients are differences of such results.
    grad = device != "cpu" or dtype != torch.bfloat16
    # A few numbers of that size are nearly one-hot, and their gradient hardly more than rounding errors.
    scale = 3.0 if shape[dim] > 16 else 1.0
    assert_accurate(softmax, naive, draw(device, dtype, shape, scale=scale, grad=grad))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_longer_than_a_tile(device: str) -> None:
    assert_accurate(ops.softmax, ops.softmax.naive, draw(device, torch.float32, (2, 33_000), scale=3.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "dim"), [((4, 40), -1), ((4, 33_000), -1), ((4, 100, 2), 1)])
def test_large_values_and_infinities(device: str, shape: tuple[int, ...], dim: int) -> None:
    x = torch.zeros(shape, device=device)
    x[0] = -float("inf")  # a row of nothing
    x[1] = 1e30
    x[2].view(-1)[::3] = -float("inf")
    x[3].view(-1)[0] = float("inf")
    torch.testing.assert_close(ops.softmax(x, dim), torch.softmax(x, dim), equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    (wide,) = draw(device, torch.float32, (6, 5, 24), grad=False)
    for x in (wide[..., :16], wide[::2], wide.transpose(0, 1), wide.transpose(1, 2), wide[:, :1].expand(6, 5, 24)):
        for dim in range(3):
            out = ops.softmax(x, dim)
            torch.testing.assert_close(out, torch.softmax(x, dim))
            assert out.is_contiguous()
    x = wide.requires_grad_()  # the gradient of a sum has strides of 0
    (d_x,) = torch.autograd.grad(ops.softmax(x).sum(), x)
    torch.testing.assert_close(d_x, torch.zeros_like(d_x), rtol=0, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((384 * 82, 512), -1),
        ((384, 82, 11), -1),
        ((64, 8, 82, 82), -1),
        ((1025, 4096), -1),
        ((515, 16384), -1),
        ((300, 32768), -1),
        ((300, 65536), -1),
        ((3, 40_000), -1),
        ((100, 200_001), -1),
        ((64, 900, 513), 1),
    ],
)
def test_on_models_sizes(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    softmax, naive = partial(ops.softmax, dim=dim), partial(ops.softmax.naive, dim=dim)
    assert_accurate(softmax, naive, draw("cuda", dtype, shape, scale=3.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_more_elements_than_32_bits_count(need_gib: Callable[[float], None]) -> None:
    need_gib(20)
    x = torch.randn(2**22 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(ops.softmax(x)[-8:], torch.softmax(x[-8:], -1))


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    (x,) = draw(device, torch.float32, (5, 3, 4))
    for dim in (1, 2):
        torch.library.opcheck(torch.ops.hrm.softmax.default, (x, dim))
    assert_compiles(ops.softmax, [x])


def test_errors() -> None:
    with pytest.raises(UserError, match=r"softmax: dim is 2; x has 2 dimensions, give one from -2 to 1\."):
        ops.softmax(torch.ones(3, 4), 2)
    with pytest.raises(UserError, match="softmax: x is int64"):
        ops.softmax(torch.ones(3, 4).long())
    with pytest.raises(UserError, match=r"softmax: x is \[\]; give at least one dimension"):
        ops.softmax(torch.ones(()))
