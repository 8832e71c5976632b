"""The CuTe backend: its formulas with the packages stood in for, and the packages themselves on a GPU that has them."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.config.paths import install_hint
from hrm.kernels import KernelRequest, attention, naive
from hrm.kernels.context import KernelContext
from hrm.kernels.experimental import cute as cute_module
from hrm.kernels.naive import BlockWeights, RotaryTables, rotary_tables

EPS = 1e-5
ON_CUDA = KernelRequest(torch.device("cuda"), torch.bfloat16, 64)
LACKING = "no NVIDIA GPU" if not torch.cuda.is_available() else cute_module.why_not(ON_CUDA)


def run(
    module: Callable[..., Tensor],
    batch: int,
    tokens: int,
    num_heads: int,
    head_size: int,
    inner: int,
    dtype: torch.dtype,
    device: str,
    drawn_in: torch.dtype,
    rotate: bool = True,
) -> list[Tensor]:
    """The result and the gradient of every input, with inputs that `drawn_in` holds exactly."""
    generator = torch.Generator().manual_seed(batch + tokens)
    width = num_heads * head_size

    def leaf(*shape: int, scale: float) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(drawn_in).to(device, dtype).requires_grad_()

    state, injection, grad = (leaf(batch, tokens, width, scale=1.0) for _ in range(3))
    sizes = [(3 * width, width), (width, width), (2 * inner, width), (width, inner)]
    leaves = [state, injection, *(leaf(*size, scale=size[1] ** -0.5) for size in sizes * 2)]
    wide = torch.promote_types(dtype, torch.float32)
    tables = RotaryTables(*(table.to(device, wide) for table in rotary_tables(tokens, head_size, 10000.0)))
    blocks = [BlockWeights(*leaves[2:6]), BlockWeights(*leaves[6:])]
    out = module(state, injection, blocks, KernelContext(tables if rotate else None, num_heads, EPS))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the backend imports of the packages, by its documented meaning and in plain PyTorch."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> tuple[Tensor, None]:
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.tensor_split(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    def gemm_add(A: Tensor, B: Tensor, C: Tensor, tuned: bool) -> Tensor:
        return A @ B + C

    def gemm_gated(
        A: Tensor, B: Tensor, activation: str, store_preact: bool, tuned: bool
    ) -> tuple[Tensor | None, Tensor]:
        assert activation == "swiglu"
        projected = A @ B
        return projected if store_preact else None, F.silu(projected[:, 0::2]) * projected[:, 1::2]

    def gemm_dgated(A: Tensor, B: Tensor, PreAct: Tensor, activation: str, tuned: bool) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        with torch.enable_grad():
            leaf = PreAct.detach().requires_grad_()
            product = F.silu(leaf[:, 0::2]) * leaf[:, 1::2]
            (d_projected,) = torch.autograd.grad(product, leaf, A @ B)
        return d_projected, product.detach()

    def rmsnorm_fwd(x: Tensor, eps: float, store_rstd: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        rstd = (x.square().mean(-1) + eps).rsqrt()
        return x * rstd[:, None], x, rstd if store_rstd else None

    def rmsnorm_bwd(x: Tensor, weight: None, dout: Tensor, rstd: Tensor) -> tuple[Tensor, None, None, None]:
        normal = x * rstd[:, None]
        return rstd[:, None] * (dout - normal * (dout * normal).mean(-1, keepdim=True)), None, None, None

    packages: dict[str, list[Callable[..., object]]] = {
        "flash_attn.cute": [flash_attn_func],
        "quack.rotary": [apply_rotary_emb],
        "quack.gemm_interface": [gemm_add, gemm_gated, gemm_dgated],
        "quack.rmsnorm": [rmsnorm_fwd, rmsnorm_bwd],
    }
    attention.get.cache_clear()
    for path, functions in packages.items():
        module = ModuleType(path)
        module.__dict__.update({function.__name__: function for function in functions})
        monkeypatch.setitem(sys.modules, path.partition(".")[0], ModuleType(path.partition(".")[0]))
        monkeypatch.setitem(sys.modules, path, module)
    yield
    attention.get.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("rotate", [True, False])
def test_formulas_are_the_definition(rotate: bool) -> None:
    def results(module: Callable[..., Tensor]) -> list[Tensor]:
        return run(module, 3, 5, 2, 8, 24, torch.float64, "cpu", torch.float64, rotate)

    for actual, expected in zip(results(cute_module.reasoning_module), results(naive.reasoning_module), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("stand_ins")
def test_projections_are_kept_for_a_backward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = sys.modules["quack.gemm_interface"]
    asked: list[bool] = []
    gemm_gated = interface.gemm_gated

    def recorded(*args: Tensor, store_preact: bool, **kwargs: object) -> tuple[Tensor | None, Tensor]:
        asked.append(store_preact)
        result: tuple[Tensor | None, Tensor] = gemm_gated(*args, store_preact=store_preact, **kwargs)
        return result

    monkeypatch.setattr(interface, "gemm_gated", recorded)
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    block = BlockWeights(*(torch.ones(shape).requires_grad_() for shape in ((48, 16), (16, 16), (48, 16), (16, 24))))
    tracked = cute_module.reasoning_module(x, x, [block], KernelContext(None, 2, EPS))
    with torch.no_grad():
        frozen = cute_module.reasoning_module(x, x, [block], KernelContext(None, 2, EPS))
    assert asked == [True, False]
    assert tracked.requires_grad
    assert not frozen.requires_grad
    assert torch.equal(tracked, frozen)


def test_it_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = KernelRequest(torch.device("cpu"), torch.bfloat16, 64)
    assert cute_module.why_not(on_cpu) == "it needs an NVIDIA GPU, not cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_installed", lambda module: False)
    assert cute_module.why_not(ON_CUDA) == f"flash_attn.cute is not installed ({install_hint('cute')})"
    monkeypatch.setattr(attention, "is_installed", lambda module: module == "flash_attn.cute")
    assert cute_module.why_not(ON_CUDA) == f"quack is not installed ({install_hint('cute')})"
    monkeypatch.setattr(attention, "is_installed", lambda module: True)
    assert cute_module.why_not(ON_CUDA) is None
    assert cute_module.why_not(ON_CUDA._replace(dtype=torch.float32)) == (
        "it computes in bfloat16 and float16, not float32"
    )


@pytest.mark.gpu
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 82), (1, 901)])
def test_module_on_gpu(batch: int, tokens: int, dtype: torch.dtype) -> None:
    """As near to float64 as the definition comes in 16 bit."""

    def results(module: Callable[..., Tensor], computed_in: torch.dtype) -> list[Tensor]:
        return run(module, batch, tokens, 8, 64, 1536, computed_in, "cuda", dtype)

    exact = results(naive.reasoning_module, torch.float64)

    def errors(found: list[Tensor]) -> list[float]:
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]

    found = errors(results(cute_module.reasoning_module, dtype))
    limits = [1.5 * error for error in errors(results(naive.reasoning_module, dtype))]
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, limits)
