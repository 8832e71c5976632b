"""Reasoning modules in int8: the definition against arithmetic done here, every other way against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.kernels import int8, naive
from hrm.kernels.context import KernelContext

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
B, T, D, F, G = 3, 9, 32, 48, 20  # sizes that are no multiples of 8 among them
SHAPES = {"qkv": (3 * D, D), "o": (D, D), "gate_up": (2 * F, D), "down": (D, F)}
SHAPES |= {"token_gate_up": (2 * G, T), "token_down": (T, G)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def drawn_block(kind: Any, seed: int) -> Any:
    """Weights as a model starts with them."""
    shapes = [SHAPES[name] for name in kind._fields]
    return kind(*(drawn(*shape, seed=seed + index) * shape[1] ** -0.5 for index, shape in enumerate(shapes)))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def test_each_row_is_rounded_by_its_largest_number() -> None:
    matrix = drawn(5, 7) * torch.logspace(-6, 6, 5, device=DEVICE)[:, None]
    matrix[2] = 0
    values, scales = int8.quantize(matrix)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    others = [0, 1, 3, 4]
    assert (values.abs().amax(1)[others] == 127).all()
    assert (values[2] == 0).all()
    error = (int8.dequantize(int8.Int8Matrix(values, scales)) - matrix).abs()
    assert (error <= 0.5001 * matrix.abs().amax(1, keepdim=True) / 127).all()


def test_what_is_rounded_stays_as_it_is() -> None:
    once = int8.quantize(drawn(40, 33))
    twice = int8.quantize(int8.dequantize(once))
    assert torch.equal(once.values, twice.values)
    torch.testing.assert_close(once.scales, twice.scales, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_linear(dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the rounded operands, added up without error, whether the CPU multiplies integers or not."""
    if not exact:
        monkeypatch.setattr(int8, "cpu_sums_exactly", lambda: False)
    weight = int8.quantize(drawn(50, 33, seed=1))
    given = (drawn(4, 6, 33), drawn(4, 33, 6).mT, drawn(1, 33), torch.zeros(2, 33, device=DEVICE))
    for x in (each.to(dtype) for each in given):
        scales = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (x.double() / scales).round() * scales
        expected = rounded @ (weight.values.double() * weight.scales.double()[:, None]).T
        for linear in (int8.linear, int8.naive_linear):
            actual = linear(x, weight)
            assert actual.dtype == dtype
            tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-4
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=1e-4)


def test_this_cpu_says_what_it_can() -> None:
    """Without VNNI, PyTorch's product of integers is wrong where sums of two products pass 32,767."""
    x = torch.full((40, 96), 127, dtype=torch.int8)
    right = torch.equal(torch._int_mm(x, x.T), torch.full((40, 40), 96 * 127**2, dtype=torch.int32))
    assert int8.cpu_sums_exactly() == right


def test_sizes_that_a_gpu_does_not_take_are_filled_up() -> None:
    x, weight = (torch.randint(-127, 128, (rows, 9), dtype=torch.int8).to(DEVICE) for rows in (5, 11))
    assert torch.equal(int8._product_on_cuda(x, weight), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("kind", int8.BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module(kind: Any, dtype: torch.dtype) -> None:
    """Every type of block: as with the definition of `linear`, and near what nothing rounds."""
    blocks = [drawn_block(kind, seed) for seed in (0, 10)]
    state, injection = (drawn(B, T, D, seed=seed).to(dtype) for seed in (20, 21))
    tables = naive.rotary_tables(T, D // 2, 10000.0)
    context = KernelContext(naive.RotaryTables(*(table.to(DEVICE) for table in tables)), 2, 1e-5)
    quantized = int8.quantize_blocks(blocks)
    assert all(type(block) is kind for block in quantized)
    actual = int8.reasoning_module(state, injection, quantized, context)
    assert actual.dtype == dtype
    by_definition = naive.reasoning_module(state, injection, quantized, context, linear=int8.naive_linear)
    # Where activations lie between two integers, the last bit of what came before decides.
    assert relative_error(actual, by_definition) < (2e-3 if dtype == torch.float32 else 2e-2)
    exact = naive.reasoning_module(state.float(), injection.float(), blocks, context)
    assert 1e-3 < relative_error(actual, exact) < 0.05


def test_nothing_is_kept_for_a_backward() -> None:
    block = drawn_block(naive.MixerWeights, 0)
    for matrix in block:
        matrix.requires_grad_()
    quantized = int8.quantize_blocks([block])
    state = drawn(B, T, D).requires_grad_()
    result = int8.reasoning_module(state, state, quantized, KernelContext(None, 2, 1e-5))
    assert not result.requires_grad
    assert not any(matrix.values.requires_grad or matrix.scales.requires_grad for matrix in quantized[0])


def test_no_number_stays_no_number() -> None:
    weight = int8.quantize(drawn(4, 8))
    x = drawn(3, 8)
    x[1, 2] = float("nan")
    assert int8.linear(x, weight).isnan().any(1).tolist() == [False, True, False]


def test_torch_compile_takes_it_whole() -> None:
    """Without graph breaks; what it is compiled to is the compiler's."""
    module = torch.compile(int8.reasoning_module, backend="eager", fullgraph=True)
    quantized = int8.quantize_blocks([drawn_block(naive.NormGatedMixerWeights, 0)])
    state, context = drawn(B, T, D), KernelContext(None, 2, 1e-5)
    expected = int8.reasoning_module(state, state, quantized, context)
    torch.testing.assert_close(module(state, state, quantized, context), expected)
