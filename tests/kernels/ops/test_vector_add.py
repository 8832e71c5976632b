from collections.abc import Callable

import pytest
import torch

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, DTYPES, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [(0,), (1,), (17,), (0, 8), (3, 5, 7), (4096,), (2, 5001)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_gradients(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_accurate(ops.vector_add, ops.vector_add.naive, draw(device, dtype, shape, shape))


@pytest.mark.parametrize("device", DEVICES)
def test_large_values_become_infinite_as_defined(device: str) -> None:
    x, y = (torch.full((5,), 6e4, device=device, dtype=torch.float16) for _ in range(2))
    assert ops.vector_add(x, y).tolist() == (x + y).tolist() == [float("inf")] * 5


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    x, y = draw(device, torch.float32, (6, 7), (7, 6), grad=False)
    for left, right in ((x.T, y), (x, y.T), (x[::2, 1:], x[1::2, :-1]), (x.expand(3, 6, 7), x.expand(3, 6, 7))):
        out = ops.vector_add(left, right)
        assert torch.equal(out, left + right)
        assert out.stride() == (left + right).stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_more_elements_than_32_bits_count(need_gib: Callable[[float], None]) -> None:
    need_gib(10)
    x = torch.ones(2**31 + 5, device="cuda", dtype=torch.bfloat16)
    x[-3:] = 2
    assert ops.vector_add(x, x)[-4:].tolist() == [2, 4, 4, 4]


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    inputs = draw(device, torch.float32, (3, 5), (3, 5))
    torch.library.opcheck(torch.ops.hrm.vector_add.default, inputs)
    assert_compiles(ops.vector_add, inputs)


def test_errors() -> None:
    x, y = draw("cpu", torch.float32, (3, 5), (3, 4))
    with pytest.raises(UserError, match=r"vector_add: y is \[3, 4\] and should be \[3, 5\], as x"):
        ops.vector_add(x, y)
    with pytest.raises(UserError, match=r"vector_add: y is float16 and x is float32; give both one dtype\."):
        ops.vector_add(x, x.half())
    with pytest.raises(UserError, match="vector_add: x is int64; give float32, float16 or bfloat16"):
        ops.vector_add(x.long(), x.long())
    with pytest.raises(UserError, match="vector_add: y is on meta and x is on cpu; move both to one device"):
        ops.vector_add(x, x.to("meta"))
