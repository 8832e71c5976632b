from collections.abc import Callable

import pytest
import torch

from hrm.errors import UserError
from hrm.kernels import ops
from hrm.kernels.ops.dropout import random_bits
from tests.helpers.operations import DEVICES, DTYPES, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (4096,), (2, 5001)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_result_and_gradient(device: str, dtype: torch.dtype, shape: tuple[int, ...], p: float) -> None:
    def dropped(x: torch.Tensor) -> torch.Tensor:
        return ops.dropout(x, p, 2**40 + 7, 2**33 + 5)

    def defined(x: torch.Tensor) -> torch.Tensor:
        return ops.dropout.naive(x, p, 2**40 + 7, 2**33 + 5)

    x = draw(device, dtype, shape)
    assert_accurate(dropped, defined, x)
    assert torch.equal(dropped(x[0]) == 0, defined(x[0]) == 0)


def test_random_bits_are_those_of_the_paper() -> None:
    """The known answer for seven rounds that comes with the Random123 library."""
    numbers = random_bits(4, 0, 0, torch.device("cpu"))
    assert [hex(n) for n in numbers.tolist()] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_share_of_p_is_dropped_and_what_stays_is_scaled(device: str) -> None:
    x = torch.ones(2**18, device=device)
    for p in (0.1, 0.5, 0.9):
        out = ops.dropout.naive(x, p, 3)
        dropped = (out == 0).double().mean().item()
        assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
        assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])


@pytest.mark.parametrize("device", DEVICES)
def test_seeds_and_offsets_choose_and_strides_do_not(device: str) -> None:
    (x,) = draw(device, torch.float32, (40, 50), grad=False)
    out = ops.dropout(x, 0.5, 1)
    assert torch.equal(out, ops.dropout(x, 0.5, 1))
    assert torch.equal(out, ops.dropout(x, 0.5, torch.tensor(1, device=device)))
    assert torch.equal(out, ops.dropout(x.T.contiguous().T, 0.5, 1))
    assert torch.equal(out == 0, ops.dropout(x.half(), 0.5, 1) == 0)
    for other in (ops.dropout(x, 0.5, 2), ops.dropout(x, 0.5, 1, 1), ops.dropout(x, 0.5, 1 + 2**32)):
        assert ((out == 0) == (other == 0)).double().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    (x,) = draw(device, torch.float32, (3, 5))
    torch.library.opcheck(torch.ops.hrm.dropout.default, (x, 0.3, 5, None, 1))
    torch.library.opcheck(torch.ops.hrm.dropout.default, (x, 0.3, 0, torch.tensor(5, device=device), 1))
    assert_compiles(lambda x: ops.dropout(x, 0.3, 5), [x])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_more_elements_than_32_bits_count(need_gib: Callable[[float], None]) -> None:
    need_gib(20)
    x = torch.ones(2**32 + 5000, device="cuda", dtype=torch.bfloat16)
    out = ops.dropout(x, 0.5, 1)
    assert torch.equal(out[:5000], ops.dropout.naive(x[:5000], 0.5, 1))
    assert out[-5000:].unique().tolist() == [0, 2]
    assert 0.4 < (out[-5000:] == 0).double().mean().item() < 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_no_mask_in_memory() -> None:
    x = torch.ones(2**24, device="cuda", requires_grad=True)
    ops.dropout(x, 0.5, 1).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = ops.dropout(x, 0.5, 1)
    assert torch.cuda.memory_allocated() - before == out.nbytes


def test_errors() -> None:
    x = torch.ones(3)
    with pytest.raises(UserError, match=r"dropout: p is 1\.5; give a probability"):
        ops.dropout(x, 1.5, 0)
    with pytest.raises(UserError, match="dropout: seed is -1; give a number from 0"):
        ops.dropout(x, 0.5, -1)
    with pytest.raises(UserError, match="dropout: offset is -1; give a number from 0"):
        ops.dropout(x, 0.5, 0, -1)
    with pytest.raises(UserError, match=r"dropout: seed is \[2\] of torch.int64 on cpu; give an int, or one element"):
        ops.dropout(x, 0.5, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="dropout: x is float64"):
        ops.dropout(x.double(), 0.5, 0)
