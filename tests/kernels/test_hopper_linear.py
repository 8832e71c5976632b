"""The matmuls for Hopper, their source run by threads on the CPU; on such a GPU `test_triton_linear.py` runs them."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels.ops.hopper import linear as hopper_linear  # noqa: E402
from hrm.kernels.ops.hopper import residual_rms as hopper_residual_rms  # noqa: E402
from hrm.kernels.ops.hopper import shared_rows  # noqa: E402
from tests.helpers.fake_gluon import Block, Descriptor, FakeGluon, Number, Pointer, block, on_cpu  # noqa: E402

EPS = 1e-5
EPSILON = torch.finfo(torch.float16).eps


def draw(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(rows * columns for rows, columns in shapes))
    return [torch.randn(*shape, generator=generator).half() for shape in shapes]


def empty(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), math.nan, dtype=torch.float16)


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    assert (actual.double() - exact).norm() / exact.norm() < EPSILON / 2


@pytest.mark.parametrize(
    ("rows", "inputs", "inner", "programs"),
    [
        (300, 128, 192, 1),  # rows and columns past the end; one program with all tiles
        (300, 64, 320, 4),  # runs of tiles that begin and end within some rows
        (130, 512, 128, 2),  # more slices of x than stages of weights
    ],
)
@pytest.mark.parametrize(
    ("save", "activate", "norm"),
    [(False, True, ""), (True, True, ""), (True, False, ""), (True, False, "rms"), (True, False, "layer")],
)
def test_swiglu(rows: int, inputs: int, inner: int, programs: int, save: bool, activate: bool, norm: str) -> None:
    x, gate_up = draw((rows, inputs), (2 * inner, inputs))
    if norm:
        x *= 1 + torch.arange(rows)[:, None] % 5  # rows of unlike sizes
    if norm == "layer":
        x += torch.arange(rows)[:, None] % 7 * 100  # and means, larger than the spread around them
    out, projected = empty(rows, inner), empty(rows, 2 * inner)
    rstd, shifts = torch.full((2, rows), math.nan)
    squares = torch.full((inner // 64, rows), math.nan)
    for program in range(programs):
        on_cpu(hopper_linear, "_swiglu_kernel", FakeGluon(program, programs, seed=program), sigmoid=torch.sigmoid)(
            Descriptor(x, 128, 64),
            Descriptor(gate_up.view(2, inner, inputs), 2, 64, 64),
            Descriptor(out, 128, 64),
            Descriptor(projected[:, :inner], 128, 64),
            Descriptor(projected[:, inner:], 128, 64),
            Pointer(rstd),
            Pointer(shifts) if norm == "layer" else None,
            Pointer(gate_up.float().sum(1)) if norm == "layer" else None,
            Pointer(squares) if activate else None,
            Number(rows),
            Number(inner),
            EPS,
            inputs // 64,
            4,
            save,
            activate,
            bool(norm),
        )
    exact = x.double()
    if norm:
        means = exact.mean(1, keepdim=True) if norm == "layer" else torch.zeros(rows, 1)
        exact = exact - means
        factors = (exact.square().mean(1) + EPS).rsqrt()
        if norm == "layer":
            torch.testing.assert_close(shifts.double(), means[:, 0] * factors, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rstd.double(), factors, rtol=1e-5, atol=0)
        exact = exact * factors[:, None]
    exact = exact @ gate_up.double().T
    if save:
        assert_rounded_once(projected, exact)
    if activate:
        gate, up = exact.chunk(2, dim=1)
        of_some_units = (gate * up).square().view(rows, -1, 64).sum(2)
        torch.testing.assert_close(squares.T.double(), of_some_units, rtol=1e-4, atol=0)
        assert_rounded_once(out, torch.nn.functional.silu(gate) * up)


def pack(x: Block, dtype: torch.dtype) -> Block:
    return x.half().contiguous().view(torch.int32)  # type: ignore[return-value]


def unpack(words: Block, dtype: torch.dtype, layout: object) -> Block:
    return words.contiguous().view(torch.float16).float()  # type: ignore[return-value]


@pytest.mark.parametrize(("rows", "inputs", "programs"), [(300, 64, 2), (128, 192, 1), (5, 512, 3)])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_rms(rows: int, inputs: int, programs: int, save: bool, scaled: bool) -> None:
    x, weight, residual = draw((rows, inputs), (512, inputs), (rows, 512))
    scales = torch.arange(rows) % 3 + 0.5
    y, rstd = empty(rows, 512), torch.full((rows,), math.nan)
    results = Descriptor(y, 128, 64)
    for program in range(programs):
        gluon = FakeGluon(program, programs, seed=program)
        on_cpu(hopper_residual_rms, "norm_kernel", gluon, pack=pack, unpack=unpack)(
            Descriptor(x, 128, 64),
            Descriptor(weight, 256, 64),
            Descriptor(residual, 128, 64),
            results,
            results,
            Pointer(scales) if scaled else None,
            Pointer(rstd),
            Number(rows),
            Number(inputs),
            EPS,
            1.0,
            3,
            save,
            False,
        )
    total = residual.double() * (scales[:, None] if scaled else 1) + x.double() @ weight.double().T
    factors = (total.square().mean(1) + EPS).rsqrt()
    # Half of a row waits in 16 bit for its norm.
    assert (y.double() - total * factors[:, None]).norm() / math.sqrt(y.numel()) < EPSILON
    if save:
        torch.testing.assert_close(rstd.double(), factors, rtol=1e-5, atol=0)


def wait_for(at: Pointer) -> Block:
    """In place of assembly."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = at.memory.view(-1)[at.offsets]
        if (found >= 0).all():
            return block(found)
        time.sleep(1e-4)
    raise AssertionError("deadlock")


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "programs"),
    [
        (300, 384, 512, 2),  # rows past the end; some tiles for each program; the least of slices
        (5, 640, 256, 1),  # one program has the whole row
        (200, 424, 1024, 4),
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_shared_rows(rows: int, inputs: int, outputs: int, programs: int, rounded: bool, divided: bool) -> None:
    x, weight, residual = draw((rows, inputs), (outputs, inputs), (rows, outputs))
    y, y8, kept = (empty(rows, outputs) for _ in range(3))
    rstd, factors = torch.full((2, rows), math.nan)
    squares = torch.rand(3, rows, generator=torch.Generator().manual_seed(0))
    shares = outputs // 256
    sums = torch.full((shares, -(-rows // 128) * 128), -1.0)

    def run(program: int) -> None:
        gluon = FakeGluon(program, programs, seed=program)
        on_cpu(shared_rows, "_shared_rows_kernel", gluon, _wait_for=wait_for, pack=pack, unpack=unpack)(
            Descriptor(x, 64, 64),
            Descriptor(weight, 256, 64),
            Pointer(residual.view(torch.int32)),
            *(Descriptor(rows_of, 64, 64) for rows_of in (y, y8)),
            None if rounded else Descriptor(kept, 64, 64),
            Pointer(squares) if divided else None,
            Pointer(sums),
            None if rounded else Pointer(rstd),
            Pointer(factors),
            Number(rows),
            Number(inputs),
            EPS,
            0.5,
            3,
            20,
            shares,
            3,
            rounded,
        )

    with ThreadPoolExecutor(programs) as pool:  # those that share rows wait for one another
        list(pool.map(run, range(programs)))
    product = 0.5 * x.double() @ weight.double().T
    if not rounded:
        assert_rounded_once(kept, product)
    if divided:
        of_units = (squares.double().sum(0) / 20 + EPS).rsqrt()
        torch.testing.assert_close(factors.double(), of_units, rtol=1e-5, atol=0)
        product *= of_units[:, None]
    total = residual.double() + product
    scale = (total.square().mean(1) + EPS).rsqrt()
    # Rows wait in 16 bit for their norm.
    assert (y.double() - total * scale[:, None]).norm() / math.sqrt(y.numel()) < EPSILON
    if rounded:
        assert torch.equal(y8, y)
    else:
        torch.testing.assert_close(rstd.double(), scale, rtol=1e-5, atol=0)
