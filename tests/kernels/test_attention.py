"""The attention providers against attention spelt out, and the choice between them."""

import functools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels import KernelRequest, attention, naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, BlockWeights, RotaryTables, rotary_tables
from hrm.kernels.ops.hopper import device as hopper

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HEADS = 2


def request_for(
    dtype: torch.dtype = torch.float32, head_size: int = 16, device: torch.device = DEVICE, num_tokens: int = 20
) -> KernelRequest:
    return KernelRequest(device, dtype, head_size, num_tokens=num_tokens)


def draw(
    batch: int, tokens: int, head_size: int, dtype: torch.dtype, rotate: bool = True
) -> tuple[Tensor, RotaryTables | None, Tensor]:
    """A projection, its tables and a gradient of the result."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    width = HEADS * head_size
    qkv = torch.randn(batch, tokens, 3 * width, generator=generator).to(DEVICE, dtype)
    grad = torch.randn(batch, tokens, width, generator=generator).to(DEVICE, dtype)
    tables = rotary_tables(tokens, head_size, 10000.0)
    return qkv, RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE)) if rotate else None, grad


def exact(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
    """Attention in float64, a head and its rotation at a time: feature i and i + K/2 are a complex number."""
    width = qkv.shape[-1] // 3
    size = width // num_heads
    results = []
    for head in range(num_heads):
        q, k, v = (qkv.double()[..., part * width + head * size :][..., :size] for part in range(3))
        if rotary is not None:
            angle = torch.polar(torch.ones_like(rotary.cos.double()), torch.atan2(rotary.sin, rotary.cos).double())
            turn = angle[:, : size // 2]
            q, k = (torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn for x in (q, k))
            scores = (q @ k.mH).real
        else:
            scores = q @ k.mT
        results.append(torch.softmax(scores / size**0.5, -1) @ v)
    return torch.cat(results, -1)


def result_and_gradient(attend: Attend, qkv: Tensor, rotary: RotaryTables | None, grad: Tensor) -> list[Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv, rotary, HEADS)
    (d_qkv,) = torch.autograd.grad(out, qkv, grad.to(out.dtype))
    return [out.detach(), d_qkv]


def errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative, of the result and its gradient."""
    return [((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True)]


def check(name: str, batch: int, tokens: int, head_size: int, dtype: torch.dtype, rotate: bool = True) -> None:
    """In float32 to rounding; in 16 bit as near to the exact result as the definition comes."""
    qkv, rotary, grad = draw(batch, tokens, head_size, dtype, rotate)
    expected = result_and_gradient(exact, qkv.double(), rotary, grad)
    results = result_and_gradient(attention.get(name), qkv, rotary, grad)
    assert [result.dtype for result in results] == [dtype, dtype]
    if dtype == torch.float32:
        limits = [1e-5, 1e-5]
    else:
        limits = [1.5 * error for error in errors(result_and_gradient(naive.sdpa, qkv, rotary, grad), expected)]
    found = errors(results, expected)
    assert all(error <= limit for error, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 17), (3, 40)])
@pytest.mark.parametrize("name", ["sdpa", "flash", "math", "triton"])
def test_attention_on_cpu(name: str, batch: int, tokens: int, rotate: bool) -> None:
    if ON_GPU and name == "flash":
        pytest.skip("flash attention takes float32 on CPU only")
    if name == "triton":
        pytest.importorskip("triton")
    check(name, batch, tokens, 16, torch.float32, rotate)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 82), (5, 82), (1, 901)])
@pytest.mark.parametrize("name", attention.PROVIDERS)
def test_attention_on_gpu(name: str, batch: int, tokens: int, dtype: torch.dtype) -> None:
    if reason := attention.PROVIDERS[name].why_not(request_for(dtype, 64, num_tokens=tokens)):
        pytest.skip(reason)
    check(name, batch, tokens, 64, dtype)


def test_the_packages_are_called_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for by a function of the same interface: heads after tokens, and a request for repeatable gradients."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool) -> Tensor:
        assert deterministic
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    package = ModuleType("flash_attn_interface")
    package.__dict__["flash_attn_func"] = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    qkv, rotary, grad = draw(2, 9, 16, torch.float32)
    found = result_and_gradient(attention.PROVIDERS["fa3"].load(), qkv, rotary, grad)
    expected = result_and_gradient(naive.sdpa, qkv, rotary, grad)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa", "flash", "math", "triton", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_a_compiled_module_has_one_graph(name: str) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    if attention.PROVIDERS[name].why_not(request_for(dtype)):
        pytest.skip("does not run here")
    if name == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).to(DEVICE, dtype)

    blocks = [BlockWeights(normal(96, 32), normal(32, 32), normal(96, 32), normal(32, 48))]
    state, injection = normal(2, 20, 32).requires_grad_(), normal(2, 20, 32)
    tables = rotary_tables(20, 16, 10000.0)
    rotary = RotaryTables(tables.cos.to(DEVICE), tables.sin.to(DEVICE))
    plain = functools.partial(naive.reasoning_module, attend=attention.get(name))
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    context = KernelContext(rotary, HEADS, 1e-5)
    expected, actual = (module(state, injection, blocks, context) for module in (plain, compiled))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(out.square().sum(), state)[0] for out in (expected, actual)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)


def test_restricting_pytorch_restricts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bit PyTorch's kernels round differently, so that each name must give the bits of its own kernel."""
    qkv, rotary, _ = draw(1, 40, 16, torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        by_math = naive.sdpa(qkv, rotary, HEADS)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        by_flash = naive.sdpa(qkv, rotary, HEADS)
    assert not torch.equal(by_math, by_flash)
    assert torch.equal(attention.get("math")(qkv, rotary, HEADS), by_math)
    assert torch.equal(attention.get("flash")(qkv, rotary, HEADS), by_flash)


def test_auto_is_a_provider_that_runs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in (False, True):
            name = attention.choose("auto", request_for(dtype, 64), compiled=compiled)
            assert attention.choose(name, request_for(dtype, 64), compiled=compiled) == name
    assert attention.choose("auto", request_for(device=torch.device("cpu"))) == "sdpa"
    assert attention.choose("auto", request_for(device=torch.device("mps"))) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "head_size", "no_gluon", "chosen"),
    [
        ((9, 0), 64, None, "gluon"),
        ((9, 0), 64, "it is of another version", "triton"),
        ((9, 0), 48, None, "sdpa"),
        ((8, 0), 64, None, "sdpa"),
    ],
)
def test_auto_takes_what_was_measured_where_it_runs(
    capability: tuple[int, int], head_size: int, no_gluon: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(hopper, "why_not", lambda device: no_gluon)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_cuda = request_for(torch.bfloat16, head_size, torch.device("cuda"))
    assert attention.choose("auto", on_cuda) == chosen


def test_the_kernels_for_positions_in_a_row_are_not_taken_for_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """They carry angles on from token to token, which is wrong for rows and columns."""
    pytest.importorskip("triton")
    monkeypatch.setattr(hopper, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    grid = request_for(torch.bfloat16, 64, torch.device("cuda"))._replace(positions_in_row=False)
    assert attention.choose("auto", grid) == "triton"
    with pytest.raises(UserError, match="positions in a row, not by rows and columns"):
        attention.choose("gluon", grid)


@pytest.mark.parametrize(
    ("name", "request_", "said"),
    [
        ("flsh", request_for(), r"is not one; did you mean flash\?"),
        ("cudnn", request_for(device=torch.device("cpu")), "it needs an NVIDIA GPU, not cpu"),
        ("flash", request_for(device=torch.device("mps")), "it needs an NVIDIA GPU, not mps"),
        ("fa2", request_for(device=torch.device("cpu")), "it needs an NVIDIA GPU, not cpu"),
        ("fa4", request_for(device=torch.device("cpu")), "it needs an NVIDIA GPU, not cpu"),
        ("triton", request_for(head_size=48), "heads of 16, 32, 64 and 128, not 48"),
        ("triton", request_for(torch.float64), "no kernels for float64"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(name: str, request_: KernelRequest, said: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UserError, match=rf"^kernels\.attention={name} .*{said}"):
        attention.choose(name, request_)


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability", "installed", "said"),
    [
        (torch.bfloat16, 64, (9, 0), False, r"flash_attn\.cute is not installed \(pip install .*\[cute\]'\)"),
        (torch.float32, 64, (9, 0), True, "bfloat16 and float16, not float32"),
        (torch.bfloat16, 60, (9, 0), True, "not 60"),
        (torch.bfloat16, 136, (9, 0), True, "not 136"),
        (torch.bfloat16, 64, (8, 6), True, r"no kernels for compute capability 8\.6"),
    ],
)
def test_packages_say_what_they_lack(
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int],
    installed: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "is_installed", lambda module: installed)
    with pytest.raises(UserError, match=said):
        attention.choose("fa4", request_for(dtype, head_size, torch.device("cuda")))
    if installed:
        good = request_for(torch.bfloat16, 64, torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert attention.choose("fa4", good) == "fa4"
        with pytest.raises(UserError, match=r"torch\.compile"):
            attention.choose("fa4", good, compiled=True)


def test_a_package_is_found_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.is_installed("torch.nn")
    assert not attention.is_installed("torch.no_such_module")
    assert not attention.is_installed("no_such_package.module")
