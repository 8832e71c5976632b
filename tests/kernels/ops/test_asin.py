from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrm.errors import UserError
from hrm.kernels import ops
from tests.helpers.operations import DEVICES, DTYPES, assert_accurate, assert_compiles, draw

pytest.importorskip("triton", reason="Triton is not installed")

from hrm.kernels.ops.triton import asin as kernels

asin = torch.ops.hrm.asin.default  # the public function runs the definition in the interpreter


@pytest.fixture(autouse=True)
def libdevice_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no libdevice: numpy's arcsine stands for it, and all the rest of the kernels is tested."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def numpy_asin(x: tl.tensor) -> tl.tensor:
        return tl.tensor(TensorHandle(np.arcsin(x.handle.data), x.dtype), x.type)

    monkeypatch.setattr(kernels, "libdevice", SimpleNamespace(asin=numpy_asin))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (2, 5001)])
def test_arcsine_and_gradient(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    (x,) = draw(device, dtype, shape, scale=0.3)
    x = x.detach().clamp(-0.99, 0.99).requires_grad_()
    assert_accurate(asin, ops.asin.naive, [x])
    assert_accurate(ops.asin, ops.asin.naive, [x])


@pytest.mark.parametrize("device", DEVICES)
def test_ends_and_outside(device: str) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 1.5, -float("inf"), float("nan")], device=device, requires_grad=True)
    out = asin(x)
    torch.testing.assert_close(out, torch.asin(x), equal_nan=True)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx[:3].tolist() == [float("inf"), 1, float("inf")]
    assert dx[3:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    (x,) = draw(device, torch.float32, (6, 7), scale=0.3, grad=False)
    for view in (x.T, x[::2, 1:], x.expand(2, 6, 7)):
        out = asin(view)
        torch.testing.assert_close(out, torch.asin(view))
        assert out.stride() == torch.asin(view).stride()


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    x = draw(device, torch.float32, (3, 5), scale=0.3)
    torch.library.opcheck(asin, x)
    assert_compiles(asin, x)
    assert_compiles(ops.asin, x)


def test_errors() -> None:
    with pytest.raises(UserError, match="asin: x is int64; give float32, float16 or bfloat16"):
        ops.asin(torch.ones(3).long())
