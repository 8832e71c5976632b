"""On Blackwell, blocks of 32 are multiplied by instructions that take the scales: compiled for it, not run."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.entry_points import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hrm.kernels.ops.triton.block_scaled_matmul import _block_scaled_kernel as kernel

capability, four_bits = int(sys.argv[1]), sys.argv[2] == "mxfp4"
constants = {"NATIVE": True, "FOUR_BITS": four_bits, "DESCRIBED": False, "INTERPRETED": False, "BLOCK": 32}
constants |= {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
types = {name: "i32" for name in ("M", "N", "K")} | {"out": "*bf16"}
types |= {name: "*u8" for name in ("a", "b", "a_scales", "b_scales")}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(kernel, signature=signature, constexprs=at)
ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
print(json.dumps(sorted(set(re.findall(r"(?:tcgen05[.]mma|mma[.]sync)[\\w.:]*", ptx)))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "format", "unit"),
    [
        (100, "mxfp8", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"),
        (100, "mxfp4", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale"),
        (120, "mxfp4", "kind::mxf4nvf4.block_scale"),
    ],
)
def test_compiles_to_the_native_unit(capability: int, format: str, unit: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability), format]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    instructions = json.loads(done.stdout.splitlines()[-1])
    assert instructions
    assert all(unit in instruction for instruction in instructions), instructions
