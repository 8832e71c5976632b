"""`layer_norm` and `rms_norm`, which share their kernels."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, DTYPES, assert_accurate, assert_compiles, draw, results

pytest.importorskip("triton", reason="Triton is not installed")

NORMS = {"layer_norm": ops.layer_norm, "rms_norm": ops.rms_norm}
NAMES = pytest.mark.parametrize("name", NORMS)
# No row, one, an odd number of columns, several tiles of rows, a tile that is not full, more columns than lie in
# registers beside the sums over rows, or at all.
SHAPES = [(0, 8), (3, 0), (1, 5), (5, 7, 11), (70, 32), (33, 520), (17, 9000), (2, 16400)]


def inputs_of(name: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    """x, weight and, of a layer norm, bias."""
    gains = [(shape[-1],)] * (2 if name == "layer_norm" else 1)
    return draw(device, dtype, shape, *gains)


@NAMES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients(name: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = NORMS[name]
    if dtype != torch.float32 and shape[-1] > 16384:
        pytest.skip("float32 has shown it")
    assert_accurate(norm, norm.naive, inputs_of(name, device, dtype, shape))


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_without_weight_or_its_gradient(name: str, device: str) -> None:
    norm = NORMS[name]
    inputs = inputs_of(name, device, torch.float32, (9, 40))
    assert_accurate(norm, norm.naive, inputs[:1])
    for frozen in range(len(inputs)):
        assert_accurate(norm, norm.naive, [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)])


@NAMES
def test_definition_is_that_of_pytorch(name: str) -> None:
    inputs = inputs_of(name, "cpu", torch.float64, (9, 40))
    wanted = {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}[name]
    torch.testing.assert_close(NORMS[name].naive(*inputs, eps=1e-3), wanted(inputs[0], (40,), *inputs[1:], eps=1e-3))


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_weight_in_float32_beside_16_bit(name: str, device: str) -> None:
    x, *gains = inputs_of(name, device, torch.float32, (9, 40))
    inputs = [x.detach().half().requires_grad_(), *gains]
    out, d_x, *d_gains = results(NORMS[name], inputs)
    plain, plain_d_x, *plain_d_gains = results(NORMS[name].naive, inputs)
    assert out.dtype == d_x.dtype == torch.float16
    torch.testing.assert_close(out, plain, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(d_x, plain_d_x, rtol=1e-2, atol=1e-3)
    for actual, wanted in zip(d_gains, plain_d_gains, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_large_values_and_shifts(name: str, device: str) -> None:
    """Squares of float16 overflow in float16; a mean far from zero leaves few digits of what differs from it."""
    for numbers in (torch.linspace(-6e4, 6e4, 48), 1000 + torch.linspace(-1, 1, 48)):
        x = numbers.repeat(3, 1).to(device, torch.float16).requires_grad_()
        norm = NORMS[name]
        assert_accurate(norm, norm.naive, [x], slack=2.0)


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_strides(name: str, device: str) -> None:
    norm, (wide,) = NORMS[name], draw(device, torch.float32, (6, 5, 24), grad=False)
    for x in (wide[..., :16], wide[::2], wide.transpose(0, 1), wide.transpose(1, 2), wide[:, :1].expand(6, 5, 24)):
        out = norm(x)
        torch.testing.assert_close(out, norm.naive(x), rtol=1e-5, atol=1e-6)
        assert out.is_contiguous()
    x = wide.requires_grad_()  # the gradient of a sum has strides of 0
    ours, defined = (torch.autograd.grad(function(x).sum(), x)[0] for function in (norm, norm.naive))
    torch.testing.assert_close(ours, defined, rtol=1e-5, atol=1e-6)


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_same_gradients_every_time(name: str, device: str) -> None:
    inputs = inputs_of(name, device, torch.float32, (300, 32))
    first, second = (results(NORMS[name], inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@NAMES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(384, 82, 512), (4097, 1000), (1025, 4096), (515, 8192), (300, 9000), (300, 16384), (100, 70001)]
)
def test_on_models_sizes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = NORMS[name]
    assert_accurate(norm, norm.naive, inputs_of(name, "cuda", dtype, shape))


@NAMES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_more_elements_than_32_bits_count(name: str, need_gib: Callable[[float], None]) -> None:
    need_gib(20)
    x = torch.randn(2**22 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(NORMS[name](x)[-8:], NORMS[name].naive(x[-8:]))


@NAMES
@pytest.mark.parametrize("device", DEVICES)
def test_operator(name: str, device: str) -> None:
    inputs = inputs_of(name, device, torch.float32, (5, 24))
    torch.library.opcheck(getattr(torch.ops.hrm, name).default, (*inputs, 1e-5))
    assert_compiles(partial(NORMS[name], eps=1e-3), inputs)


def test_errors() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(UserError, match=r"rms_norm: weight is \[7\] and should be \[8\], one for each column of x"):
        ops.rms_norm(x, torch.ones(7))
    with pytest.raises(UserError, match="rms_norm: weight is float16; give float32"):
        ops.rms_norm(x, weight.half())
    with pytest.raises(UserError, match="layer_norm: bias is float32 and weight is float16; give both one dtype"):
        ops.layer_norm(x.half(), weight.half(), weight)
    with pytest.raises(UserError, match="layer_norm: there is a bias and no weight"):
        ops.layer_norm(x, None, weight)
    with pytest.raises(UserError, match="layer_norm: weight is on meta and x is on cpu"):
        ops.layer_norm(x, weight.to("meta"))
    with pytest.raises(UserError, match="layer_norm: x is float64"):
        ops.layer_norm(x.double())
    with pytest.raises(UserError, match=r"rms_norm: x is \[\]; give at least one dimension"):
        ops.rms_norm(torch.ones(()))
