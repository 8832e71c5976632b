"""The product for Hopper, its source run by threads on the CPU; on such a GPU `test_matmul.py` runs it."""

import math

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels.ops.hopper import matmul as hopper_matmul  # noqa: E402
from tests.helpers.fake_gluon import Descriptor, FakeGluon, Number, Pointer, on_cpu  # noqa: E402


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "programs"),
    [
        (300, 128, 320, 1),  # rows and columns past the end; one program with all tiles
        (130, 448, 72, 2),  # more slices than stages; the second half of the last tile has no rows
        (1200, 40, 256, 3),  # more than one group of rows of tiles
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("activation", "save"), [(None, False), ("gelu", True), ("silu", False), ("relu", False)])
def test_product(
    rows: int, inputs: int, outputs: int, programs: int, transposed: bool, activation: str | None, save: bool
) -> None:
    a, b = draw(rows, inputs).half(), (draw(inputs, outputs) * inputs**-0.5).half()
    factors, shifts, sums, bias = draw(rows), draw(rows), draw(outputs), draw(outputs).half()
    affine = activation is None
    out, before = (torch.full((rows, outputs), math.nan, dtype=torch.float16) for _ in range(2))
    for program in range(programs):
        on_cpu(hopper_matmul, "_matmul_kernel", FakeGluon(program, programs, seed=program))(
            Descriptor(a, 64, 64),
            Descriptor(b.T.contiguous(), 256, 64) if transposed else Descriptor(b, 64, 256),
            Descriptor(out, 64, 64),
            Descriptor(before, 64, 64) if save else None,
            Pointer(factors) if affine else None,
            Pointer(shifts) if affine else None,
            Pointer(sums) if affine else None,
            Pointer(bias),
            Number(rows),
            Number(outputs),
            Number(inputs),
            activation,
            transposed,
            4,
        )
    exact = a.double() @ b.double()
    if affine:
        exact = exact * factors[:, None] - shifts[:, None].double() * sums
    exact = exact + bias
    if save:
        torch.testing.assert_close(before.double(), exact, rtol=6e-4, atol=1e-4)
    if activation is not None:
        exact = getattr(torch.nn.functional, activation)(exact)
    torch.testing.assert_close(out.double(), exact, rtol=6e-4, atol=1e-4)
