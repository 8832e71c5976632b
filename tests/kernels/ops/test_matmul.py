from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, PRODUCTS, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")

ACTIVATIONS = [None, "gelu", "silu", "relu"]
SHAPES = [(0, 8, 8), (1, 16, 16), (5, 7, 3), (70, 80, 144), (130, 33, 65), (2, 0, 5), (3, 4, 0)]  # M, K, N
HRM_V1 = [(384 * 82, 512, 1536), (384 * 82, 512, 512), (384 * 82, 512, 3072), (384 * 82, 1536, 512)]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize(("device", "dtype"), PRODUCTS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_product_and_gradients(device: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    assert_accurate(ops.matmul, ops.matmul.naive, draw(device, dtype, (rows, inputs), (inputs, outputs)))


@pytest.mark.parametrize(("device", "dtype"), PRODUCTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(device: str, dtype: torch.dtype, activation: str | None) -> None:
    inputs = draw(device, dtype, (3, 19, 48), (48, 80), (80,), scale=0.5)
    chosen = {"activation": activation}
    assert_accurate(partial(ops.matmul, **chosen), partial(ops.matmul.naive, **chosen), inputs)
    without_grad = [x.detach() for x in inputs]
    assert_accurate(partial(ops.matmul, **chosen), partial(ops.matmul.naive, **chosen), without_grad)


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=on_gpu) for shape in HRM_V1])
@pytest.mark.parametrize(
    ("dtype", "activation", "columns"),
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, "gelu", False),
        (torch.bfloat16, "silu", True),
        (torch.float16, "relu", True),
    ],
)
def test_sizes_of_the_model(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, columns: bool
) -> None:
    """b lies by rows or by columns."""
    M, K, N = shape
    a, weight, bias = draw("cuda", dtype, (M, K), (N, K) if columns else (K, N), (N,))
    weight = (weight.detach() * K**-0.5).requires_grad_()

    def fast(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.matmul(a, weight.T if columns else weight, bias, activation)

    def naive(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.matmul.naive(a, weight.T if columns else weight, bias, activation)

    assert_accurate(fast, naive, [a, weight, bias])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(device: str, dtype: torch.dtype) -> None:
    """Transposed, cut out of something larger, repeated; begun at an address that descriptors do not take."""
    a, b = draw(device, dtype, (64, 96), (96, 64), grad=False)
    pairs = [(b.T, a.T), (a[:, 16:48], b[16:48, 32:]), (a[::2, 1::2], b[:48, ::2]), (a[:, 1:], b[1:, 3:])]
    pairs += [(a[:1].expand(5, 96), b[:, :1].expand(96, 7)), (a.view(4, 16, 96).transpose(0, 1), b)]
    for left, right in pairs:
        out = ops.matmul(left, right)
        assert out.is_contiguous()
        torch.testing.assert_close(out.float(), left.float() @ right.float(), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device: str) -> None:
    a, b = draw(device, torch.float32, (2, 3, 5, 8), (8, 4), grad=False)
    torch.testing.assert_close(ops.matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)
    assert ops.matmul(a[:, :0], b).shape == (2, 0, 5, 4)
    torch.testing.assert_close(ops.matmul(a[0, 0, 0], b), a[0, 0, 0] @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_missing_values(device: str, activation: str | None) -> None:
    """What passes float16 becomes infinite, sums are taken in float32, and NaN stays where it is."""
    a = torch.full((4, 256), 200.0, device=device, dtype=torch.float16)
    b = torch.full((256, 16), 200.0, device=device, dtype=torch.float16)
    b[:, 1] *= -1
    b[128:, 2] *= -1  # whose sum passes float16 and comes back to 0
    a[3, 7] = float("nan")
    out = ops.matmul(a, b, activation=activation)
    assert out[0, 0].item() == float("inf")
    assert out[0, 1].item() == (float("-inf") if activation is None else 0.0)
    assert out[0, 2].item() == 0.0
    assert out[3].isnan().all()
    assert not out[:3].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's, where 0 is what comes out
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_of_numbers_of_16_bits(device: str, dtype: torch.dtype, activation: str) -> None:
    """Within a rounding of float64, the interpreter, which cuts off where it makes bfloat16, for every 17th number.

    Slopes pass zero, where cancellation leaves an absolute error.
    """
    numbers = torch.arange(-(2**15), 2**15, 17 if device == "cpu" else 1).short().view(dtype).to(device)
    numbers = numbers[numbers.isfinite()]
    nothing = numbers.new_zeros(1, 16), numbers.new_zeros(16, len(numbers))
    wide = numbers.double()
    exact = F.silu(wide) if activation == "silu" else wide * 0.5 * torch.special.erfc(-wide * 0.5**0.5)
    slope = wide.clone().requires_grad_()
    (F.silu(slope) if activation == "silu" else F.gelu(slope)).sum().backward()
    bias = numbers.clone().requires_grad_()
    out = ops.matmul(*nothing, bias, activation)
    out.backward(torch.ones_like(out))
    rounding = torch.finfo(dtype).eps * (1.0 if device == "cpu" and dtype == torch.bfloat16 else 0.55)
    for found, wanted, least in ((out[0], exact, torch.finfo(torch.float16).tiny), (bias.grad, slope.grad, 0.1)):
        assert ((found.double() - wanted).abs() <= rounding * wanted.abs().clamp_min(least)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_operator(device: str, activation: str | None) -> None:
    a, b, bias = draw(device, torch.float32, (2, 3, 8), (8, 4), (4,))
    torch.library.opcheck(torch.ops.hrm.matmul.default, (a, b, bias, activation, activation == "gelu"))
    assert_compiles(partial(ops.matmul, activation=activation), [a, b, bias])


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_each_time(device: str) -> None:
    a, b = draw(device, torch.float16, (300, 96), (96, 272), grad=False)
    first = ops.matmul(a, b, activation="silu")
    assert all(torch.equal(ops.matmul(a, b, activation="silu"), first) for _ in range(3))


def test_relu_keeps_only_its_result() -> None:
    a, b = draw("cpu", torch.float32, (3, 8), (8, 4))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = ops.matmul(a, b, activation="relu")
    assert [x.shape for x in kept] == [a.shape, b.shape, out.shape]
    torch.testing.assert_close(kept[2], F.relu(a @ b))


def test_errors() -> None:
    a, b, bias = draw("cpu", torch.float32, (3, 5), (5, 4), (4,), grad=False)
    with pytest.raises(UserError, match=r"matmul: a is \[3, 5\] and should be \[\.\.\., M, 4\], as b is \[4, 5\]\."):
        ops.matmul(a, b.T)
    with pytest.raises(UserError, match=r"matmul: b is \[5\] and should be \[K, N\], a matrix\."):
        ops.matmul(a, a[0])
    with pytest.raises(UserError, match=r"matmul: bias is \[3\] and should be \[4\], one for a column of b\."):
        ops.matmul(a, b, bias[:3])
    with pytest.raises(UserError, match="matmul: bias is float16 and a is float32; give both one dtype"):
        ops.matmul(a, b, bias.half())
    with pytest.raises(UserError, match="matmul: activation is 'tanh'; give one of gelu, silu, relu, or None"):
        ops.matmul(a, b, bias, "tanh")
