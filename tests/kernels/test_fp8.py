"""Reasoning modules in e4m3: the definition against arithmetic done here, every other way against the definition.

The kernels for Hopper are written in Gluon, which cannot be interpreted: they are tested on such a GPU alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.kernels import fp8, naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights, RotaryTables
from hrm.kernels.ops.e4m3 import E4M3, PRODUCT_SCALE, WEIGHT_SCALE, Fp8BlockWeights, to_e4m3
from hrm.models.layers import truncated_normal

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="no GPU of compute capability 9.0")


def all_of_e4m3() -> Tensor:
    """Every number of the format, from its bits."""
    numbers = []
    for bits in range(127):  # 127 is NaN
        exponent, mantissa = bits >> 3, bits & 7
        numbers.append((1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6)
    return torch.tensor([-x for x in reversed(numbers)] + numbers[1:], dtype=torch.float64)


def draw_block(width: int, inner: int, generator: torch.Generator) -> BlockWeights:
    """Weights as the model starts with them."""
    shapes = BlockWeights((3 * width, width), (width, width), (2 * inner, width), (width, inner))  # type: ignore[arg-type]
    return BlockWeights(*(truncated_normal(shape, shape[1] ** -0.5, generator).to(DEVICE) for shape in shapes))


class Case:
    """A module's operands in float32, on the device."""

    def __init__(self, batch: int, tokens: int, width: int, num_heads: int, inner: int, num_blocks: int = 2) -> None:
        generator = torch.Generator().manual_seed(0)
        self.state, self.injection = (
            torch.randn(batch, tokens, width, generator=generator).to(DEVICE) for _ in range(2)
        )
        self.blocks = [draw_block(width, inner, generator) for _ in range(num_blocks)]
        tables = naive.rotary_tables(tokens, width // num_heads, 10000.0)
        self.rotary = RotaryTables(*(table.to(DEVICE) for table in tables))
        self.num_heads = num_heads
        self.context = KernelContext(self.rotary, num_heads, EPS)

    def exactly(self) -> Tensor:
        """What nothing rounds but float64."""
        blocks = [BlockWeights(*(matrix.double() for matrix in weights)) for weights in self.blocks]
        rotary = RotaryTables(*(table.double() for table in self.rotary))
        operands = self.state.double(), self.injection.double()
        return naive.reasoning_module(*operands, blocks, KernelContext(rotary, self.num_heads, EPS))

    def run(self, module: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        blocks = [BlockWeights(*(matrix.to(dtype) for matrix in weights)) for weights in self.blocks]
        operands = self.state.to(dtype), self.injection.to(dtype)
        return module(*operands, fp8.quantize_blocks(blocks), self.context)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def test_rounds_to_the_nearest_number_of_the_format() -> None:
    numbers = all_of_e4m3()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator) * torch.logspace(-4, 3, 2000)
    assert x.abs().max() > numbers.max()
    distance = (to_e4m3(x).double() - x).abs()
    torch.testing.assert_close(distance, (x.double()[:, None] - numbers).abs().amin(1), rtol=0, atol=0)


def test_weights_keep_their_shape_and_three_bits() -> None:
    (block,) = Case(1, 1, 32, 2, 64, num_blocks=1).blocks
    block.o[0, 0], block.o[0, 1] = 20.0, -20.0  # beyond what is left to weights
    (quantized,) = fp8.quantize_blocks([block])
    for matrix, rounded in zip(block, quantized, strict=True):
        assert rounded.dtype == E4M3
        error = (rounded.double() / WEIGHT_SCALE - matrix.clamp(-14, 14)).abs()
        assert (error <= matrix.abs() / 16 + 2.0**-10 / WEIGHT_SCALE).all()
    assert quantized.o[0, :2].float().tolist() == [448.0, -448.0]


def test_without_rounding_it_is_the_naive_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "to_e4m3", lambda x: x)
    case = Case(2, 5, 32, 2, 48)
    blocks = [Fp8BlockWeights(*(WEIGHT_SCALE * matrix for matrix in weights)) for weights in case.blocks]
    for rotary in (case.rotary, None):
        context = KernelContext(rotary, case.num_heads, EPS)
        actual = fp8.naive_reasoning_module(case.state, case.injection, blocks, context)
        expected = naive.reasoning_module(case.state, case.injection, case.blocks, context)
        torch.testing.assert_close(actual, expected)


def test_rounds_operands_and_nothing_else() -> None:
    """A block of one token, by hand: attention over it alone gives its value back."""
    case = Case(3, 1, 32, 2, 48, num_blocks=1)
    q = Fp8BlockWeights(*(matrix.double() / WEIGHT_SCALE for matrix in fp8.quantize_blocks(case.blocks)[0]))
    rounded = lambda x: to_e4m3(x.float()).double()  # noqa: E731
    x = case.state.double() + case.injection.double()
    value = rounded(x) @ q.qkv[2 * 32 :].T
    x = naive.rms_norm(x + rounded(value) @ q.o.T, EPS)
    gate, up = (rounded(x) @ q.gate_up.T).chunk(2, -1)
    x = naive.rms_norm(x + rounded(gate * gate.sigmoid() * up) @ q.down.T, EPS)
    assert relative_error(case.run(fp8.naive_reasoning_module, torch.float32), x) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "num_heads", "inner"), [(32, 2, 48), (40, 1, 72)])
def test_module_without_fp8_kernels(dtype: torch.dtype, width: int, num_heads: int, inner: int) -> None:
    case = Case(2, 5, width, num_heads, inner)
    actual = case.run(fp8.reasoning_module, dtype)
    assert actual.dtype == dtype
    # Eight roundings to 3 bits in a row, of 2.6 % each and of both operands, a part of which the residual carries by.
    assert 0.01 < relative_error(actual, case.exactly()) < 0.12
    assert relative_error(actual, case.run(fp8.naive_reasoning_module, dtype)) < 0.1


OTHER_BLOCKS = [kind for kind in fp8.BLOCK_TYPES if kind is not BlockWeights]
MIXERS = [kind for kind in OTHER_BLOCKS if "token_down" in kind._fields]


def draw_other_blocks(kind: Any, case: Case, tokens: int, token_inner: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"token_gate_up": (2 * token_inner, tokens), "token_down": (tokens, token_inner)}
    drawn = [block._asdict() for block in case.blocks]
    for matrices in drawn:
        for name, shape in shapes.items():
            matrices[name] = truncated_normal(shape, shape[1] ** -0.5, generator).to(DEVICE)
    return [kind(*(matrices[name] for name in kind._fields)) for matrices in drawn]


@pytest.mark.parametrize("kind", OTHER_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_without_kernels_of_their_own(kind: Any, dtype: torch.dtype) -> None:
    """Operands of their matmuls but those over tokens are rounded to e4m3, and nothing else of them; of any size."""
    tokens = 9
    case = Case(2, tokens, 32, 2, 48)
    blocks = draw_other_blocks(kind, case, tokens, token_inner=20)
    quantized = fp8.quantize_blocks([kind(*(matrix.to(dtype) for matrix in block)) for block in blocks])
    for block in quantized:
        assert type(block) is kind
        of_tokens = {name for name, matrix in block._asdict().items() if matrix.dtype != E4M3}
        assert of_tokens == {name for name in kind._fields if name.startswith("token_")}
    state, injection = case.state.to(dtype), case.injection.to(dtype)
    actual = fp8.module(compiled=False)(state, injection, quantized, case.context)
    assert actual.dtype == dtype

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if weight.dtype != E4M3:
            return torch.nn.functional.linear(x, weight)
        return (to_e4m3(x).double() @ weight.double().T / WEIGHT_SCALE).to(x.dtype)

    expected = naive.reasoning_module(state, injection, quantized, case.context, linear=linear)
    assert relative_error(actual, expected) < 0.03  # activations between two numbers of e4m3 go either way
    exact = naive.reasoning_module(state.float(), injection.float(), blocks, case.context)
    assert 0.01 < relative_error(actual, exact) < 0.15


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 40), (88, 512), (256, 88), (32, 16)])
def test_the_library_takes_sizes_that_are_filled_up(inputs: int, outputs: int) -> None:
    x = torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = to_e4m3(WEIGHT_SCALE * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    try:
        actual = fp8._library_linear(x.to(torch.bfloat16), weight)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"PyTorch multiplies no e4m3 here: {error}")
    assert actual.shape == (2, 5, outputs)
    expected = fp8._naive_linear(x.to(torch.bfloat16), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_nothing_is_kept_for_a_backward() -> None:
    case = Case(1, 2, 32, 2, 48)
    for operand in (case.state, *case.blocks[0]):
        operand.requires_grad_()
    blocks = fp8.quantize_blocks(case.blocks)
    assert not any(matrix.requires_grad for weights in blocks for matrix in weights)
    result = fp8.reasoning_module(case.state, case.injection, blocks, case.context)
    assert not result.requires_grad


def test_no_block_is_the_sum() -> None:
    state, injection = torch.ones(1, 2, 8), torch.full((1, 2, 8), 2.0)
    assert torch.equal(fp8.reasoning_module(state, injection, [], KernelContext(None, 2, EPS)), state + injection)


@pytest.mark.gpu  # Triton's interpreter rounds 1.95 to 1 in e4m3
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 19, 82, 901])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_attention_in_e4m3(dtype: torch.dtype, tokens: int, positions: str) -> None:
    from hrm.kernels.ops.triton import attention as triton_attention

    qkv = torch.randn(2, tokens, 3 * 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    tables = naive.rotary_tables(tokens, 32, 10000.0)
    rotary = RotaryTables(*(table.to(DEVICE) for table in tables)) if positions == "rope" else None
    actual = triton_attention.attention_in_e4m3(qkv, rotary, 2)
    assert actual.dtype == E4M3
    exact = RotaryTables(*(table.double() for table in rotary)) if rotary else None
    expected = naive.sdpa(qkv.double(), exact, 2)
    assert relative_error(actual, expected) < 1.05 * relative_error(to_e4m3(expected), expected) + 1e-3


def hopper_operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, inputs] and weight [outputs, inputs] in e4m3, and what their product should be."""
    generator = torch.Generator().manual_seed(rows)
    x = to_e4m3(torch.randn(rows, inputs, generator=generator)).to(DEVICE)
    weight = to_e4m3(WEIGHT_SCALE * inputs**-0.5 * torch.randn(outputs, inputs, generator=generator)).to(DEVICE)
    return x, weight, x.double() @ weight.double().T / WEIGHT_SCALE


ROWS = [1, 82, 255, 257, 12_345, 31_488]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 1536), (128, 200)])
def test_linear(rows: int, inputs: int, outputs: int) -> None:
    from hrm.kernels.ops.hopper import fp8 as hopper_fp8

    x, weight, expected = hopper_operands(rows, inputs, outputs)
    for dtype, allowed in ((torch.bfloat16, 2e-3), (torch.float16, 1e-3)):
        actual = hopper_fp8.linear(x, weight, dtype)
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < allowed  # the matrix units' sums alone: 4e-4


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "inner"), [(512, 1536), (256, 384)])
def test_linear_swiglu(rows: int, inputs: int, inner: int) -> None:
    from hrm.kernels.ops.hopper import fp8 as hopper_fp8

    x, weight, expected = hopper_operands(rows, inputs, 2 * inner)
    gate, up = expected.chunk(2, -1)
    expected = gate * gate.sigmoid() * up
    rounded = to_e4m3(expected.float())
    actual = hopper_fp8.linear_swiglu(x, weight)
    assert relative_error(actual, expected) < 1.01 * relative_error(rounded, expected)
    assert (actual.view(torch.uint8) != rounded.view(torch.uint8)).float().mean() < 0.02  # ties, nearly


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [512, 1536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_residual_rms(rows: int, inputs: int, dtype: torch.dtype) -> None:
    from hrm.kernels.ops.hopper import fp8 as hopper_fp8

    x, weight, product = hopper_operands(rows, inputs, 512)
    residual = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected = naive.rms_norm(residual.double() + product, EPS)
    y, rounded = hopper_fp8.linear_residual_rms(x, weight, residual, EPS)
    alone, _ = hopper_fp8.linear_residual_rms(x, weight, residual, EPS, only_y=True)
    assert torch.equal(y, alone)
    assert y.dtype == dtype
    assert relative_error(y, expected) < 1.5 * relative_error(expected.to(dtype), expected) + 5e-4
    assert relative_error(rounded, expected) < 1.02 * relative_error(to_e4m3(expected.float()), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 82), (2, 901)])
@pytest.mark.parametrize(("width", "num_heads", "inner"), [(512, 8, 1536), (512, 8, 1600), (128, 4, 512)])
def test_module_on_models_sizes(
    dtype: torch.dtype, batch: int, tokens: int, width: int, num_heads: int, inner: int
) -> None:
    case = Case(batch, tokens, width, num_heads, inner, num_blocks=4)
    exact = case.exactly()
    actual = case.run(fp8.reasoning_module, dtype)
    assert actual.dtype == dtype
    # Roundings differ where sums do in their last bits, so results agree no closer than two roundings do.
    definition = case.run(fp8.naive_reasoning_module, dtype)
    assert relative_error(actual, exact) < 1.2 * relative_error(definition, exact)
    assert relative_error(actual, definition) < relative_error(definition, exact)
    assert torch.equal(actual, case.run(fp8.reasoning_module, dtype))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "inner"), [(512, 1536), (256, 336)])
def test_linear_swiglu_and_squares(rows: int, inputs: int, inner: int) -> None:
    from hrm.kernels.ops.hopper import fp8 as hopper_fp8

    x, weight, expected = hopper_operands(rows, inputs, 2 * inner)
    gate, up = expected.chunk(2, -1)
    actual, squares = hopper_fp8.linear_swiglu_and_squares(x, weight)
    expected = PRODUCT_SCALE * gate * gate.sigmoid() * up
    assert relative_error(actual, expected) < 1.02 * relative_error(to_e4m3(expected.float()), expected)
    torch.testing.assert_close(squares.double().sum(0), (gate * up).square().sum(1), rtol=2e-3, atol=0)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 88), (48, 97)])
@pytest.mark.parametrize(("width", "inner"), [(512, 1536), (256, 784)])
def test_mixers(kind: Any, dtype: torch.dtype, batch: int, tokens: int, width: int, inner: int) -> None:
    """Where a normed gate is rounded before its norm, roundings fall elsewhere than the definition's."""
    from hrm.kernels.ops.hopper import fp8_mixer

    case = Case(batch, tokens, width, 2, inner)
    exact = draw_other_blocks(kind, case, tokens, token_inner=256)
    blocks = fp8.quantize_blocks([kind(*(matrix.to(dtype) for matrix in block)) for block in exact])
    state, injection = case.state.to(dtype), case.injection.to(dtype)
    assert fp8_mixer.fits(state, blocks, 2) == (batch == 48)
    actual = fp8_mixer.reasoning_module(state, injection, blocks, case.context)
    assert actual.dtype == dtype
    definition = fp8.naive_reasoning_module(state, injection, blocks, case.context)
    wide = [kind(*(matrix.double() for matrix in block)) for block in exact]
    expected = naive.reasoning_module(case.state.double(), case.injection.double(), wide, case.context)
    assert relative_error(actual, expected) < 1.2 * relative_error(definition, expected)
    if batch == 48:
        assert torch.equal(actual, fp8.module(compiled=True)(state, injection, blocks, case.context))


@pytest.mark.gpu
@needs_hopper
def test_quantised_alike_on_the_device() -> None:
    case = Case(1, 1, 512, 8, 1536)
    case.blocks[0].down[0, 0] = 20.0
    for dtype in (torch.bfloat16, torch.float32):
        for weights in case.blocks:
            cast = BlockWeights(*(matrix.to(dtype) for matrix in weights))
            expected = [to_e4m3(WEIGHT_SCALE * matrix.float()) for matrix in cast]
            for actual, wanted in zip(*fp8.quantize_blocks([cast]), *[expected], strict=True):
                assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.gpu
@needs_hopper
def test_in_a_cuda_graph() -> None:
    """Replays see new inputs, and capture would fail on any wait for the device."""
    case = Case(3, 82, 512, 8, 1536)
    blocks = [BlockWeights(*(matrix.bfloat16() for matrix in weights)) for weights in case.blocks]
    state, injection = case.state.bfloat16(), case.injection.bfloat16()

    def step() -> Tensor:
        return fp8.reasoning_module(state, injection, fp8.quantize_blocks(blocks), case.context)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    state.copy_(torch.randn_like(state))
    blocks[0].o.mul_(0.5)
    graph.replay()
    assert torch.equal(captured, step())
