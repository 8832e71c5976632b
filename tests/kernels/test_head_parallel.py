"""The backend of a program per sequence and head against the definition."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.context import KernelContext
from hrm.kernels.experimental import head_parallel
from hrm.kernels.experimental.head_parallel import project_and_attend
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5


def definition(x: Tensor, weight: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    return naive.sdpa(F.linear(x, weight), rotary, num_heads)


def draw_tables(tokens: int, head_size: int, dtype: torch.dtype = torch.float32) -> RotaryTables:
    tables = rotary_tables(tokens, head_size, 10000.0)
    return RotaryTables(tables.cos.to(DEVICE, dtype), tables.sin.to(DEVICE, dtype))


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, exact, strict=True)]


def check(ours: Callable[..., list[Tensor]], plain: Callable[..., list[Tensor]], dtype: torch.dtype) -> None:
    """In float32 to rounding; in 16 bit as near to float64 as the definition comes. Both take a dtype."""
    exact = plain(torch.float64)
    found = errors(ours(dtype), exact)
    limits = [1e-5] * len(exact) if dtype == torch.float32 else [1.5 * e for e in errors(plain(dtype), exact)]
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, limits)


def check_attention(
    batch: int, tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, rotate: bool = True
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    width = num_heads * head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x, weight, grad = normal(batch, tokens, width), normal(3 * width, width) / width**0.5, normal(batch, tokens, width)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        wide = torch.promote_types(dtype, torch.float32)
        out = function(*leaves, draw_tables(tokens, head_size, wide) if rotate else None, num_heads)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    check(lambda dtype: run(project_and_attend, dtype), lambda dtype: run(definition, dtype), dtype)


def check_module(batch: int, tokens: int, num_heads: int, head_size: int, inner: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(batch + tokens)
    width = num_heads * head_size

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div(columns**0.5).to(dtype).to(DEVICE)

    state, injection, grad = (linear(batch * tokens, width).view(batch, tokens, width) * width**0.5 for _ in range(3))
    matrices = [linear(3 * width, width), linear(width, width), linear(2 * inner, width), linear(width, inner)]

    def run(module: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (state, injection, *matrices)]
        blocks = [BlockWeights(*leaves[2:])] * 2
        tables = draw_tables(tokens, head_size, torch.promote_types(dtype, torch.float32))
        out = module(*leaves[:2], blocks, KernelContext(tables, num_heads, EPS))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    check(
        lambda dtype: run(head_parallel.reasoning_module, dtype),
        lambda dtype: run(naive.reasoning_module, dtype),
        dtype,
    )


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_size", "dtype"),
    [
        (1, 2, 16, torch.float16),
        (17, 3, 16, torch.float16),  # a width that 32 does not divide
        (40, 2, 32, torch.float16),
        (82, 1, 64, torch.float16),
        (20, 1, 128, torch.float16),
        (129, 2, 16, torch.float16),  # more than fit on chip
        (20, 2, 16, torch.float32),
    ],
)
def test_attention_is_the_definition(
    tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, rotate: bool
) -> None:
    if tokens == 1:  # a single probability is 1: whatever q and k are, the result is v
        x = torch.linspace(-1, 1, 32).to(DEVICE, dtype).view(1, 1, 32)
        weight = torch.eye(32).repeat(3, 1).to(DEVICE, dtype)
        rotary = draw_tables(1, 16) if rotate else None
        assert torch.equal(project_and_attend(x, weight, rotary, num_heads), x)
        return
    check_attention(2, tokens, num_heads, head_size, dtype, rotate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 17), (3, 40)])
def test_module_is_the_definition(batch: int, tokens: int, dtype: torch.dtype) -> None:
    check_module(batch, tokens, num_heads=2, head_size=16, inner=48, dtype=dtype)


def test_sequences_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 32, generator=generator).to(DEVICE, torch.float16)
    weight = torch.randn(96, 32, generator=generator).to(DEVICE, torch.float16)
    whole = project_and_attend(x, weight, draw_tables(20, 16), 2)
    for i in range(3):
        assert torch.equal(whole[i], project_and_attend(x[i : i + 1].clone(), weight, draw_tables(20, 16), 2)[0])


def test_only_the_input_is_kept_for_a_backward() -> None:
    kept: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x

    x = torch.ones(2, 20, 32, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.ones(96, 32, dtype=torch.float16, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        project_and_attend(x.detach(), weight, None, 2)
        assert kept == []
        project_and_attend(x, weight, None, 2)
    assert kept == [x.shape, weight.shape]


@pytest.mark.parametrize("tokens", [20, 130])
def test_errors_name_the_culprit(tokens: int) -> None:
    x = torch.zeros(1, tokens, 24, dtype=torch.float16, device=DEVICE)
    with pytest.raises(UserError, match="12 features"):
        project_and_attend(x, x.new_zeros(72, 24), None, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 31, 82, 128, 129])
def test_attention_on_gpu(tokens: int, head_size: int) -> None:
    if tokens > 1:
        check_attention(3, tokens, 3, head_size, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 82), (1, 901), (5, 901)])
def test_module_on_gpu(batch: int, tokens: int, dtype: torch.dtype) -> None:
    check_module(batch, tokens, num_heads=8, head_size=64, inner=1536, dtype=dtype)
