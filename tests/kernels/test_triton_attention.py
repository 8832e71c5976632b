"""The attention kernels against `naive`: in Triton's interpreter where there is no GPU, compiled where there is one."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from hrm.errors import UserError
from hrm.kernels import KernelRequest, naive
from hrm.kernels.attention import PROVIDERS
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables
from hrm.kernels.ops.triton.attention import attention, first_token_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")

Run = Callable[[Tensor, RotaryTables | None, int], Tensor]


def reference(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """Attention spelt out, in the dtype of `qkv`."""
    batch, tokens, width = qkv.shape
    heads = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    if rotary is not None:
        q, k = naive.rotate(q, rotary), naive.rotate(k, rotary)
    probabilities = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return (probabilities @ v).transpose(1, 2).reshape(batch, tokens, width // 3)


def naive_attention(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """What `naive.attention` does between its projections."""
    batch, tokens, width = qkv.shape
    heads = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    if rotary is not None:
        q, k = naive.rotate(q, rotary), naive.rotate(k, rotary)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def draw(
    batch: int, tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, rotate: bool = True
) -> tuple[Tensor, RotaryTables | None, Tensor]:
    """A projection, its tables and a gradient of the result."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens + head_size)
    width = num_heads * head_size
    qkv = torch.randn(batch, tokens, 3 * width, generator=generator).to(DEVICE, dtype)
    grad = torch.randn(batch, tokens, width, generator=generator).to(DEVICE, dtype)
    tables = rotary_tables(tokens, head_size, 10000.0)
    rotary = RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE)) if rotate else None
    return qkv, rotary, grad


def result_and_gradient(
    run: Run, qkv: Tensor, rotary: RotaryTables | None, grad: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = run(qkv, rotary, num_heads)
    (d_qkv,) = torch.autograd.grad(out, qkv, grad)
    return out.detach(), d_qkv


def errors(results: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative errors of: the result, dq, dk, dv."""

    def relative(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item()

    gradients = zip(results[1].chunk(3, -1), exact[1].chunk(3, -1), strict=True)
    return [relative(results[0], exact[0]), *(relative(x, y) for x, y in gradients)]


def check(
    batch: int,
    tokens: int,
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    rotate: bool = True,
    attend: Run = attention,
) -> None:
    """In float32 to rounding; in 16 bit as near to float64 as `naive` comes."""
    qkv, rotary, grad = draw(batch, tokens, num_heads, head_size, dtype, rotate)
    wide = RotaryTables(rotary.cos.double(), rotary.sin.double()) if rotary is not None else None
    exact = result_and_gradient(reference, qkv.double(), wide, grad.double(), num_heads)
    results = result_and_gradient(attend, qkv, rotary, grad, num_heads)
    assert results[0].dtype == results[1].dtype == dtype
    if dtype == torch.float32:
        limits = [1e-5] * 4
    else:
        limits = [1.5 * e for e in errors(result_and_gradient(naive_attention, qkv, rotary, grad, num_heads), exact)]
    found = errors(results, exact)
    if tokens == 1:  # a single probability is 1, whatever q and k are
        assert results[1][..., : 2 * num_heads * head_size].abs().max() < 1e-5
        found, limits = [found[0], found[3]], [1e-6, 1e-6]
    assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(
    ("tokens", "head_size"),
    [(1, 16), (5, 16), (16, 64), (17, 32), (33, 128), (64, 16), (65, 32), (82, 64), (128, 16)],
)
def test_one_tile(tokens: int, head_size: int, rotate: bool) -> None:
    check(2, tokens, 2, head_size, torch.float16, rotate)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 16), (9, 128), (32, 32), (33, 16), (70, 64), (100, 32)])
def test_tiles_in_float32(tokens: int, head_size: int, rotate: bool) -> None:
    check(2, tokens, 2, head_size, torch.float32, rotate)


@pytest.mark.parametrize(("tokens", "head_size"), [(129, 64), (192, 16), (203, 32)])
def test_tiles_in_16_bit(tokens: int, head_size: int) -> None:
    check(1, tokens, 2, head_size, torch.float16)


def test_it_is_what_naive_does_between_its_projections() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 32, generator=generator).to(DEVICE)
    qkv, o = (torch.randn(rows, 32, generator=generator).to(DEVICE) for rows in (96, 32))
    weights = BlockWeights(qkv, o, gate_up=qkv, down=o)
    rotary = RotaryTables(*(table.to(DEVICE) for table in rotary_tables(40, 16, 10000.0)))
    ours = F.linear(attention(F.linear(x, weights.qkv), rotary, num_heads=2), weights.o)
    torch.testing.assert_close(ours, naive.attention(x, weights, rotary, num_heads=2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tokens", "dtype"), [(20, torch.float16), (40, torch.float32)])
def test_large_scores_neither_overflow_nor_lose_a_row(tokens: int, dtype: torch.dtype) -> None:
    qkv, _, grad = draw(1, tokens, 1, 16, dtype)
    qkv[..., :32] *= 30  # scores of thousands, of either sign: every softmax is one-hot
    results = result_and_gradient(attention, qkv, None, grad, 1)
    exact = result_and_gradient(reference, qkv.double(), None, grad.double(), 1)
    assert torch.isfinite(results[1]).all()
    assert errors(results, exact)[0] < 1e-3


@pytest.mark.parametrize(("tokens", "dtype"), [(20, torch.float16), (40, torch.float32)])
def test_sequences_of_a_batch_do_not_meet(tokens: int, dtype: torch.dtype) -> None:
    qkv, rotary, grad = draw(3, tokens, 2, 16, dtype)
    whole = result_and_gradient(attention, qkv, rotary, grad, 2)
    for i in range(3):
        alone = result_and_gradient(attention, qkv[i : i + 1].clone(), rotary, grad[i : i + 1].clone(), 2)
        assert torch.equal(whole[0][i], alone[0][0])
        assert torch.equal(whole[1][i], alone[1][0])


@pytest.mark.parametrize(("tokens", "dtype"), [(20, torch.float16), (40, torch.float32)])
def test_inputs_need_not_be_contiguous(tokens: int, dtype: torch.dtype) -> None:
    qkv, rotary, _ = draw(2, tokens, 2, 16, dtype)
    spread = torch.stack((qkv, qkv), dim=-1).detach().requires_grad_()
    out = attention(spread[..., 0], rotary, 2)
    (d_spread,) = torch.autograd.grad(out.sum(), spread)  # the gradient of a sum has strides of zero
    expected = result_and_gradient(attention, qkv, rotary, torch.ones_like(out), 2)
    assert torch.equal(out, expected[0])
    assert torch.equal(d_spread[..., 0], expected[1])


@pytest.mark.parametrize(("tokens", "dtype", "saved"), [(20, torch.float16, 4), (40, torch.float32, 5)])
def test_only_a_differentiable_call_saves_anything(tokens: int, dtype: torch.dtype, saved: int) -> None:
    qkv, rotary, _ = draw(1, tokens, 1, 16, dtype)
    shapes: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        plain = attention(qkv, rotary, 1)
        with torch.no_grad():
            frozen = attention(qkv.requires_grad_(), rotary, 1)
        assert shapes == []
        tracked = attention(qkv, rotary, 1)
    assert len(shapes) == saved
    assert not plain.requires_grad
    assert not frozen.requires_grad
    assert tracked.requires_grad
    assert torch.equal(plain, tracked)
    assert torch.equal(frozen, tracked)


@pytest.mark.parametrize(("tokens", "dtype"), [(20, torch.float16), (40, torch.float32)])
def test_torch_compile_needs_no_graph_break(tokens: int, dtype: torch.dtype) -> None:
    qkv, rotary, grad = draw(1, tokens, 1, 16, dtype)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected = result_and_gradient(attention, qkv, rotary, grad, 1)
    results = result_and_gradient(compiled, qkv, rotary, grad, 1)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize(
    ("shape", "dtype", "tables", "num_heads", "named"),
    [
        ((2, 5, 96), torch.float64, (5, 16), 2, "float64"),
        ((2, 5, 100), torch.float32, (5, 16), 2, r"\(2, 5, 100\)"),
        ((5, 96), torch.float32, (5, 16), 2, r"\(5, 96\)"),
        ((2, 5, 72), torch.float32, (5, 12), 2, "12 features"),
        ((2, 5, 96), torch.float32, (6, 16), 2, r"\(6, 16\)"),
    ],
)
def test_errors_name_the_culprit(
    shape: tuple[int, ...], dtype: torch.dtype, tables: tuple[int, int], num_heads: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        attention(torch.zeros(shape, dtype=dtype), RotaryTables(torch.ones(tables), torch.ones(tables)), num_heads)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [
        (16, torch.bfloat16),
        (32, torch.bfloat16),
        (64, torch.bfloat16),
        (128, torch.bfloat16),
        (64, torch.float16),
        (32, torch.float32),
        (128, torch.float32),
    ],
)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 31), (2, 40), (7, 82), (2, 128), (3, 129), (2, 901)])
def test_on_the_gpu(batch: int, tokens: int, head_size: int, dtype: torch.dtype) -> None:
    check(batch, tokens, 3, head_size, dtype)


def check_first_token(
    batch: int, tokens: int, num_heads: int, head_size: int, dtype: torch.dtype, rotate: bool = True
) -> None:
    """As near to the first row of the definition as rounding the result comes."""
    qkv, rotary, _ = draw(batch, tokens, num_heads, head_size, dtype, rotate)
    width = num_heads * head_size
    wide = RotaryTables(rotary.cos.double(), rotary.sin.double()) if rotary is not None else None
    exact = reference(qkv.double(), wide, num_heads)[:, 0]
    ours = first_token_attention(qkv[:, 0, :width], qkv[..., width:], rotary, num_heads)
    assert ours.dtype == dtype
    limit = max(1e-6, 1.5 * ((exact.to(dtype).double() - exact).norm() / exact.norm()).item())
    assert (ours.double() - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 16), (5, 128), (64, 32), (82, 64), (150, 16)])
def test_first_token(tokens: int, head_size: int, dtype: torch.dtype, rotate: bool) -> None:
    check_first_token(3, tokens, 2, head_size, dtype, rotate)


@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "named"),
    [((2, 64), (2, 5, 64), r"\(2, 32\)"), ((3, 32), (2, 5, 64), r"\(3, 32\)"), ((2, 32), (2, 5, 62), "kv has shape")],
)
def test_first_token_errors_name_the_culprit(q_shape: tuple[int, ...], kv_shape: tuple[int, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        first_token_attention(torch.zeros(q_shape), torch.zeros(kv_shape), None, 2)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (7, 82), (3, 901)])
def test_first_token_on_the_gpu(batch: int, tokens: int, head_size: int, dtype: torch.dtype) -> None:
    check_first_token(batch, tokens, 3, head_size, dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [82, 901])
def test_on_the_gpu_without_rotation(tokens: int, dtype: torch.dtype) -> None:
    check(5, tokens, 3, 64, dtype, rotate=False)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_for_hopper_and_their_gradient(dtype: torch.dtype) -> None:
    request = KernelRequest(torch.device("cuda"), dtype, 64, num_tokens=901)
    if reason := PROVIDERS["gluon"].why_not(request):
        pytest.skip(reason)
    check(45, 901, 3, 64, dtype, attend=functools.partial(attention, gluon=True))


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [82, 901])
def test_repeats_are_bit_identical(tokens: int) -> None:
    qkv, rotary, grad = draw(16, tokens, 8, 64, torch.bfloat16)
    first = result_and_gradient(attention, qkv, rotary, grad, 8)
    for _ in range(3):
        again = result_and_gradient(attention, qkv, rotary, grad, 8)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [82, 901])
def test_it_can_be_captured_and_compiled(tokens: int) -> None:
    qkv, rotary, grad = draw(2, tokens, 8, 64, torch.bfloat16)
    expected = result_and_gradient(attention, qkv, rotary, grad, 8)

    compiled = result_and_gradient(torch.compile(attention, fullgraph=True), qkv, rotary, grad, 8)
    assert torch.equal(compiled[0], expected[0])
    assert torch.equal(compiled[1], expected[1])

    fresh = torch.zeros_like(qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = result_and_gradient(attention, fresh, rotary, grad, 8)
    fresh.copy_(qkv)
    graph.replay()
    assert torch.equal(captured[0], expected[0])
    assert torch.equal(captured[1], expected[1])
