"""How an operation of `hrm.kernels.ops` is compared with its definition.

On a CPU the kernels run in Triton's interpreter; the same tests take a GPU where there is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Where kernels multiply matrices: those in bfloat16 are misread by Triton's interpreter.
PRODUCTS = [
    *(("cpu", dtype) for dtype in DTYPES[:2]),
    *(
        pytest.param("cuda", dtype, marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU")])
        for dtype in DTYPES
    ),
]

Function = Callable[..., Any]  # a tensor or several


def draw(
    device: str, dtype: torch.dtype, *shapes: Sequence[int], scale: float = 1.0, seed: int = 0, grad: bool = True
) -> list[Tensor]:
    """Normal numbers times `scale`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(tuple(shape), generator=generator) * scale for shape in shapes]
    return [x.to(device, dtype).requires_grad_(grad) for x in numbers]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact; 0 for tensors without elements."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `function` returns for `inputs`, and the gradients in those that require one."""
    out = function(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:
        return [out.detach() for out in outs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out.device, inputs[0].dtype).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, wanted, grads)]


def assert_accurate(
    fast: Function, naive: Function, inputs: Sequence[Tensor], *, slack: float = 1.5, roundings: int = 1
) -> None:
    """Results and gradients of `fast` against those of `naive` in float64.

    Allowed is a relative error of 1e-5 in float32; otherwise `slack` times that of `naive` in the same dtype, and in
    any case that of rounding `roundings` times. The interpreter cuts off where a GPU rounds to bfloat16.
    """
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact = results(naive, double)
    plain = results(naive, inputs)
    for i, (actual, same_dtype, wanted) in enumerate(zip(results(fast, inputs), plain, exact, strict=True)):
        assert actual.dtype == same_dtype.dtype, i
        assert actual.device == same_dtype.device, i
        if actual.dtype == torch.float32:
            allowed = 1e-5
        else:
            cuts_off = actual.dtype == torch.bfloat16 and not actual.is_cuda
            rounding = roundings * torch.finfo(actual.dtype).eps * (1.0 if cuts_off else 0.5)
            allowed = max(slack * relative_error(same_dtype, wanted), rounding)
        error = relative_error(actual, wanted)
        assert error <= allowed, (i, error, allowed)


def assert_compiles(fast: Function, inputs: Sequence[Tensor]) -> None:
    """In one graph of torch.compile, results and gradients stay what they are."""
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(results(compiled, inputs), results(fast, inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
