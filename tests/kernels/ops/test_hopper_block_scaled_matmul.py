"""The block-scaled product for Hopper by threads on the CPU; on such a GPU `test_block_scaled_matmul.py` runs it."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

from hrm.kernels import ops  # noqa: E402
from hrm.kernels.ops.hopper import block_scaled_matmul as hopper_block_scaled  # noqa: E402
from hrm.kernels.ops.triton.block_scaled_matmul import decoded_scales  # noqa: E402
from tests.helpers.fake_gluon import Descriptor, FakeGluon, Number, Pointer, on_cpu  # noqa: E402
from tests.helpers.operations import draw  # noqa: E402


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "programs"),
    [
        (300, 256, 136, 1),  # rows and columns past the end; one program with all tiles
        (70, 1040, 72, 2),  # more slices than stages, the last one short; the last half of a tile has no rows
    ],
)
def test_product(rows: int, inputs: int, outputs: int, programs: int) -> None:
    a, b = draw("cpu", torch.float32, (rows, inputs), (outputs, inputs), grad=False)
    a *= (torch.arange(inputs) // 128 + 1) * (torch.arange(rows) % 7 + 1)[:, None]  # blocks of unlike scales
    left, right = (ops.quantize_blocks(x, 128) for x in (a, b))
    out = torch.full((rows, outputs), math.nan, dtype=torch.float16)
    scales = decoded_scales(*(x.scales.view(torch.uint8) for x in (left, right)), hopper_block_scaled.TILE)
    for program in range(programs):
        on_cpu(hopper_block_scaled, "_block_scaled_kernel", FakeGluon(program, programs, seed=program))(
            Descriptor(left.values, 64, 128),
            Descriptor(right.values, 128, 128),
            Descriptor(out, 64, 64),
            *map(Pointer, scales),
            Number(rows),
            Number(outputs),
            Number(inputs),
            6,
        )
    exact = ops.block_scaled_matmul.naive(left, right, out_dtype=torch.float32)
    torch.testing.assert_close(out.float(), exact, rtol=1e-3, atol=1e-3)
