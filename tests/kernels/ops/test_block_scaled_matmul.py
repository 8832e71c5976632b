from functools import partial

import pytest
import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, DTYPES, assert_compiles, draw, relative_error

pytest.importorskip("triton", reason="Triton is not installed")

FORMATS = ["mxfp8", "mxfp4"]
BLOCKS = [32, 64, 128]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def spread(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers over many powers of two, zeros among them, rows of zeros and rows of the largest and the smallest."""
    (x,) = draw("cpu", torch.float32, shape, grad=False)
    (sizes,) = draw("cpu", torch.float32, shape, seed=1, grad=False)
    x = torch.where(sizes < -1.5, 0, x * (2 * sizes).exp2())
    if len(x) > 4:
        x[1], x[2], x[3] = 0, x[2] * 1e4, x[3] * 1e-4
    return x.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 130), (1, 2), (0, 64), (3, 0), (40, 1100)])
def test_quantized_to_the_bit(device: str, dtype: torch.dtype, format: str, block: int, shape: tuple[int, ...]) -> None:
    x = spread(device, dtype, *shape)
    actual, wanted = ops.quantize_blocks(x, block, format), ops.quantize_blocks.naive(x, block, format)
    assert actual.shape == wanted.shape == x.shape
    for one, other in zip(actual[:2], wanted[:2], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_formats_hold_comes_back(device: str, format: str) -> None:
    """Every number of a format times powers of two; what lies in the middle of two goes to the even one."""
    if format == "mxfp8":
        codes = torch.arange(127, dtype=torch.uint8)
        numbers = codes.view(torch.float8_e4m3fn).float()
    else:
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (numbers[1:] + numbers[:-1]) / 2
    evens = torch.where(torch.arange(len(middles)) % 2 == 0, numbers[:-1], numbers[1:])
    for values, wanted in ((numbers, numbers), (middles, evens)):
        rows = torch.nn.functional.pad(values, (0, 127 - len(values)), value=0.0)
        # In one block with the largest number, so that the scale is known.
        rows = torch.cat((rows, numbers[-1:])) * torch.tensor([1.0, -1.0, 2.0**60, 2.0**-60])[:, None]
        back = ops.dequantize_blocks(ops.quantize_blocks(rows.to(device), 128, format)).cpu()
        expected = wanted * torch.tensor([1.0, -1.0, 2.0**60, 2.0**-60])[:, None]
        assert torch.equal(back[:, : len(values)], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nothing_finite_comes_of_what_is_not(device: str, format: str, bad: float) -> None:
    x = torch.ones(2, 64, device=device)
    x[1, 40] = bad
    blocks = ops.quantize_blocks(x, 32, format)
    assert torch.equal(
        blocks.scales.view(torch.uint8), ops.quantize_blocks.naive(x, 32, format).scales.view(torch.uint8)
    )
    back = ops.dequantize_blocks(blocks)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1, :32], x[1, :32])
    assert back[1, 32:].isnan().all()
    out = ops.block_scaled_matmul(blocks, ops.quantize_blocks(torch.ones(4, 64, device=device), 32, format))
    assert (out[0] == 64).all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_all_exponents(device: str) -> None:
    """Those that quantize_blocks never writes too, as other producers may."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    values = torch.ones(256, 32, device=device).to(torch.float8_e4m3fn)
    blocks = ops.BlockScaled(values, codes.view(torch.float8_e8m0fnu), 32, "mxfp8")
    back = ops.dequantize_blocks(blocks, torch.float64)
    assert torch.equal(back[:255, 0].cpu(), 2.0 ** (torch.arange(255, dtype=torch.float64) - 127))
    assert back[255].isnan().all()
    one = ops.quantize_blocks(torch.eye(32, device=device))
    out = ops.block_scaled_matmul(blocks, one, out_dtype=torch.float32)
    torch.testing.assert_close(out[1:255].double(), back[1:255], rtol=1e-6, atol=0)


def test_rounding_is_as_fine_as_the_formats_are() -> None:
    x = spread("cpu", torch.float32, 64, 256)
    for format, most in (("mxfp8", 2**-4), ("mxfp4", 2**-2)):
        back = ops.dequantize_blocks(ops.quantize_blocks(x, 32, format))
        largest = x.view(64, 8, 32).abs().amax(-1).repeat_interleave(32, 1)
        assert ((back - x).abs() <= most * largest).all()
        assert relative_error(back, x) < most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(5, 32, 3), (70, 160, 33), (1, 256, 64), (0, 32, 8), (3, 2, 2), (130, 130, 70)]
)
def test_products(device: str, format: str, block: int, rows: int, inputs: int, outputs: int) -> None:
    """As of the dequantised operands in float32, whose sums the matrix unit of Hopper rounds to about 14 bits."""
    a, b = spread(device, torch.float32, rows, inputs), spread(device, torch.float32, inputs, outputs)
    actual = ops.block_scaled_matmul(a, b, block, format)
    assert actual.dtype == torch.float32
    left, right = (ops.dequantize_blocks(ops.quantize_blocks(x, block, format)).double() for x in (a, b.T))
    allowed = 1e-6 if device == "cpu" else 5e-4
    assert relative_error(actual, left @ right.T) < allowed


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [pytest.param((384 * 82, 512, 1536), marks=on_gpu)])
def test_sizes_of_the_model(format: str, block: int, size: tuple[int, int, int]) -> None:
    M, K, N = size
    a, b = draw("cuda", torch.bfloat16, (M, K), (K, N), grad=False)
    actual = ops.block_scaled_matmul(a, b, block, format)
    assert actual.dtype == torch.bfloat16
    left, right = (ops.dequantize_blocks(ops.quantize_blocks(x, block, format)) for x in (a, b.T))
    assert relative_error(actual, left.double() @ right.double().T) < 3e-3


@pytest.mark.parametrize("device", DEVICES)
def test_operands_as_given(device: str) -> None:
    """Tensors, or what quantize_blocks made of them, with leading dimensions and any strides."""
    a, b = draw(device, torch.float16, (2, 96, 5), (96, 40), grad=False)
    a = a.transpose(1, 2)
    wanted = ops.block_scaled_matmul(a, b)
    assert wanted.shape == (2, 5, 40)
    assert wanted.dtype == torch.float16
    left, right = ops.quantize_blocks(a), ops.quantize_blocks(b.T)
    for one, other in ((left, b), (a, right), (left, right)):
        assert torch.equal(ops.block_scaled_matmul(one, other, out_dtype=torch.float16), wanted)
    assert ops.block_scaled_matmul(left, right).dtype == torch.bfloat16
    exact = ops.block_scaled_matmul.naive(left, right, out_dtype=torch.float32)
    torch.testing.assert_close(wanted.float(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device: str) -> None:
    a, b = draw(device, torch.float32, (3, 64), (64, 5), grad=False)
    for format in FORMATS:
        # The other tests of an operator compute with its arguments, which PyTorch cannot in 8 bits.
        only = ("test_faketensor",)
        torch.library.opcheck(torch.ops.hrm.quantize_blocks.default, (a, 32, format), test_utils=only)
        left, right = ops.quantize_blocks(a, 32, format), ops.quantize_blocks(b.T, 32, format)
        arguments = (left.values, left.scales, right.values, right.scales, 32, format, torch.float32)
        torch.library.opcheck(torch.ops.hrm.block_scaled_matmul.default, arguments, test_utils=only)
    assert_compiles(partial(ops.block_scaled_matmul, block=128), [a, b])


def test_errors() -> None:
    a, b = draw("cpu", torch.float32, (3, 5), (5, 4), grad=False)
    with pytest.raises(UserError, match="quantize_blocks: block is 48; give 32, 64 or 128"):
        ops.quantize_blocks(a, 48)
    with pytest.raises(UserError, match="quantize_blocks: format is 'int8'; give mxfp8 or mxfp4"):
        ops.block_scaled_matmul(a, b, format="int8")
    with pytest.raises(UserError, match=r"quantize_blocks: x is \[3, 5\]; give .* for mxfp4 one of even size"):
        ops.quantize_blocks(a, 32, "mxfp4")
    with pytest.raises(UserError, match=r"a is \[3, 5\] and b \[4, 5\]; give \[\.\.\., M, K\] and \[K, N\]"):
        ops.block_scaled_matmul(a, b.T)
    with pytest.raises(UserError, match="a is mxfp8 in blocks of 64 and b mxfp8 in blocks of 32; give both alike"):
        ops.block_scaled_matmul(ops.quantize_blocks(a, 64), ops.quantize_blocks(b.T, 32))
    with pytest.raises(UserError, match=r"a requires a gradient, and there is none; give a\.detach\(\)"):
        ops.block_scaled_matmul(a.requires_grad_(), b)
    with pytest.raises(UserError, match="block_scaled_matmul: out_dtype is int64; give float32, float16 or bfloat16"):
        ops.block_scaled_matmul(a.detach(), b, out_dtype=torch.int64)
