"""The fused projections against their definition in float64, forward and backward.

Without a GPU the kernels run in Triton's interpreter, which checks everything but speed; its matmul misreads bfloat16.
On a GPU the same tests take the sizes that models have.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels import naive  # noqa: E402
from hrm.kernels.ops.triton import linear as triton_linear  # noqa: E402
from hrm.kernels.ops.triton import residual_rms  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU

Operation = Callable[..., Tensor]


def naive_linear_swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def naive_linear_residual_rms(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return naive.rms_norm(residual + F.linear(x, weight), EPS)


def naive_add_rms(a: Tensor, b: Tensor) -> Tensor:
    return naive.rms_norm(a + b, EPS)


def linear_residual_rms(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual_rms.linear_residual_rms(x, weight, residual, EPS)


def add_rms(a: Tensor, b: Tensor) -> Tensor:
    return residual_rms.add_rms(a, b, EPS)


def draw(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Normal numbers; those of a matrix of weights (the second shape) of variance 1 / inputs."""
    generator = torch.Generator().manual_seed(seed)
    scales = [1.0, shapes[1][1] ** -0.5, 1.0]
    numbers = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=False)]
    return [x.to(DEVICE, dtype).requires_grad_() for x in numbers]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact).norm() / exact.norm()).item()


def results(operation: Operation, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    out = operation(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


def assert_accurate(fused: Operation, reference: Operation, inputs: list[Tensor]) -> None:
    """Result and gradients: 1e-5 in float32, otherwise at most 1.5 times the error of the definition in that dtype."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    shape = reference(*exact_inputs).shape
    d_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, inputs[0].dtype)
    exact = results(reference, exact_inputs, d_out)
    plain = results(reference, inputs, d_out)
    for i, (actual, same_dtype, wanted) in enumerate(zip(results(fused, inputs, d_out), plain, exact, strict=True)):
        assert actual.dtype == inputs[0].dtype
        allowed = 1e-5 if actual.dtype == torch.float32 else 1.5 * relative_error(same_dtype, wanted)
        assert relative_error(actual, wanted) < allowed, i
    with torch.no_grad():
        assert relative_error(fused(*inputs), exact[0]) < (1e-5 if inputs[0].dtype == torch.float32 else 5e-3)


def swiglu_case(dtype: torch.dtype, rows: int, width: int, inner: int) -> None:
    inputs = draw(dtype, (rows, width), (2 * inner, width))
    assert_accurate(triton_linear.linear_swiglu, naive_linear_swiglu, inputs)


def residual_rms_case(dtype: torch.dtype, rows: int, inner: int, width: int) -> None:
    inputs = draw(dtype, (rows, inner), (width, inner), (rows, width))
    assert_accurate(linear_residual_rms, naive_linear_residual_rms, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "inner"), [(82, 64, 96), (129, 32, 64), (1, 72, 40)])
def test_linear_swiglu(dtype: torch.dtype, rows: int, width: int, inner: int) -> None:
    swiglu_case(dtype, rows, width, inner)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "width"), [(82, 96, 64), (5, 32, 96), (1, 40, 24)])
def test_linear_residual_rms(dtype: torch.dtype, rows: int, inner: int, width: int) -> None:
    residual_rms_case(dtype, rows, inner, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(7, 64), (33, 96), (1, 8)])
def test_add_rms(dtype: torch.dtype, rows: int, width: int) -> None:
    a, b = draw(dtype, (rows, width), (rows, width))
    assert_accurate(add_rms, naive_add_rms, [a, b])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [82, 901, 12_345, 31_488])
@pytest.mark.parametrize(("width", "inner"), [(128, 256), (512, 1536), (576, 1536)])
def test_on_models_sizes(dtype: torch.dtype, rows: int, width: int, inner: int) -> None:
    swiglu_case(dtype, rows, width, inner)
    residual_rms_case(dtype, rows, width, width)
    residual_rms_case(dtype, rows, inner, width)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [82, 12_345])
def test_without_the_kernels_for_hopper(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    for operation in (triton_linear, residual_rms):
        monkeypatch.setattr(operation, "_hopper", lambda x: None)
    swiglu_case(dtype, rows, 512, 1536)
    residual_rms_case(dtype, rows, 1536, 512)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("rows", [82, 12_345])
def test_in_a_cuda_graph(rows: int) -> None:
    """Replays see new inputs, and capture would fail on any wait for the device."""
    x, gate_up = (t.detach() for t in draw(torch.bfloat16, (rows, 512), (3072, 512)))
    down, residual = (t.detach() for t in draw(torch.bfloat16, (512, 1536), (rows, 512)))

    def mlp() -> Tensor:
        return linear_residual_rms(triton_linear.linear_swiglu(x, gate_up), down, residual)

    mlp()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mlp()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, mlp())


def test_eps_bounds_the_scale_of_small_rows() -> None:
    a, b = (x.detach().mul_(1e-3).requires_grad_() for x in draw(torch.float32, (4, 64), (4, 64)))
    assert_accurate(add_rms, naive_add_rms, [a, b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operands_need_not_be_contiguous(dtype: torch.dtype) -> None:
    def run(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
        return [
            triton_linear.linear_swiglu(x, weight),
            linear_residual_rms(x, weight, residual),
            add_rms(residual, residual),
        ]

    operands = [t.detach() for t in draw(dtype, (8, 16), (64, 16), (8, 64))]
    rows_apart = [torch.stack([t, t], dim=1)[:, 0] for t in operands]
    columns_first = [t.T.contiguous().T for t in operands]
    for strided in (rows_apart, columns_first):
        assert not any(t.is_contiguous() for t in strided)
        torch.testing.assert_close(run(*strided), run(*operands))


def test_without_gradient_nothing_is_made_for_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, residual = draw(torch.float32, (8, 16), (64, 16), (8, 64))
    made = []
    for operation, name in (
        (triton_linear, "_linear_swiglu_forward"),
        (residual_rms, "_linear_residual_rms_forward"),
        (residual_rms, "_add_rms_forward"),
    ):
        forward = getattr(operation, name)

        def watched(
            *args: object, save: bool, forward: Callable[..., tuple[Tensor, Tensor | None]] = forward
        ) -> object:
            results = forward(*args, save=save)
            made.append(save)
            return results

        monkeypatch.setattr(operation, name, watched)

    def run(x: Tensor, weight: Tensor, residual: Tensor) -> None:
        triton_linear.linear_swiglu(x, weight)
        linear_residual_rms(x, weight, residual)
        add_rms(residual, residual)

    with torch.no_grad():
        run(x, weight, residual)
    run(x.detach(), weight.detach(), residual.detach())
    assert set(made) == {False}
    made.clear()
    run(x, weight, residual)
    assert set(made) == {True}


def test_only_wanted_gradients_are_computed() -> None:
    x, weight, residual = draw(torch.float32, (8, 16), (32, 16), (8, 32))
    y = linear_residual_rms(x.detach(), weight, residual.detach())
    (d_weight,) = torch.autograd.grad(y.sum(), weight)
    full = torch.autograd.grad(linear_residual_rms(x, weight, residual).sum(), [x, weight, residual])
    torch.testing.assert_close(d_weight, full[1])


def test_gradients_need_not_be_contiguous() -> None:
    x, gate_up = draw(torch.float32, (8, 16), (64, 16))
    out = triton_linear.linear_swiglu(x, gate_up)
    ones = torch.ones_like(out)
    expanded = torch.ones(1, 1).to(DEVICE).expand_as(out)
    for strided, plain in zip(
        torch.autograd.grad(out, [x, gate_up], expanded, retain_graph=True),
        torch.autograd.grad(out, [x, gate_up], ones),
        strict=True,
    ):
        torch.testing.assert_close(strided, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [12_345, 16_896, 31_488])
def test_a_norm_put_off(dtype: torch.dtype, rows: int) -> None:
    """Applied by the two matmuls that read the row, it is as exact as one applied before."""
    x, qkv, o = (t.detach() for t in draw(dtype, (rows, 512), (1536, 512), (512, 512)))
    mixed = torch.randn(rows, 512, device=x.device, generator=torch.Generator(x.device).manual_seed(1)).to(dtype)
    x *= 1 + torch.arange(rows, device=x.device, dtype=dtype)[:, None] % 7
    if not residual_rms.defers_norm(x, qkv, o):
        pytest.skip("does not pay for so many rows")
    found, factors = triton_linear.deferred_norm_linear(x, qkv, EPS)
    normed = x.double() * (x.double().square().mean(1) + EPS).rsqrt()[:, None]
    plain = normed.to(dtype)
    for ours, theirs, exact in (
        (found, plain @ qkv.T, normed @ qkv.double().T),
        (
            residual_rms.deferred_norm_residual_rms(mixed, o, x, factors, EPS),
            linear_residual_rms(mixed, o, plain),
            torch.nn.functional.rms_norm(normed + mixed.double() @ o.double().T, (512,), eps=EPS),
        ),
    ):
        error, limit = ((result.double() - exact).norm() / exact.norm() for result in (ours, theirs))
        assert error <= 1.1 * limit
    again, factors_again = triton_linear.deferred_norm_linear(x, qkv, EPS)
    assert torch.equal(found, again)
    assert torch.equal(factors, factors_again)
