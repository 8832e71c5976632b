"""Compiles the kernels that operations launch for a GPU that need not be there, and runs none of them.

python -m tests.helpers.compiling 100

The interpreter forgives types and shapes that the compiler refuses. Started without TRITON_INTERPRET, this stands in
for the driver, so that the operations' own launches reach the compiler with the arguments and sizes they really have,
for compute capability 10.0 here. Prints the name of each kernel that came to the end.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hrm.kernels import ops
from hrm.kernels.blocks import NormGatedMixerWeights
from hrm.kernels.ops import operator
from hrm.kernels.ops.triton import memory_mlp, mixer


def launch_without_running(capability: int) -> None:
    """From now on, a launch compiles for that compute capability (times 10) and does no more."""
    properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
    driver.set_active(
        SimpleNamespace(
            utils=SimpleNamespace(get_device_properties=lambda device: properties),
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        print(self.fn.__name__, flush=True)
        return kernel

    JITFunction.run = compile_only
    operator._INTERPRETED = True  # a CPU tensor goes to the kernels


def main() -> None:
    launch_without_running(int(sys.argv[1]))

    def draw(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)

    for columns in (512, 40_000):
        x, weight, bias = draw(3, columns), draw(columns), draw(columns)
        for out in (ops.layer_norm(x, weight, bias), ops.rms_norm(x), ops.softmax(x)):
            out.backward(x.detach())
    ops.rms_norm(draw(3, 16_384))
    x = draw(3, 90, 64)
    for out in (ops.softmax(x, 1), ops.dropout(x, 0.5, 1), torch.ops.hrm.asin(x), ops.vector_add(x, x)):
        out.backward(x.detach())
    memory_mlp._run_at_once = lambda k: True  # as on a GPU: its phases in one launch
    k, v = draw(256, 64).detach(), draw(256, 64).detach()
    weights, momentum = (ops.MemoryWeights(*map(torch.ones, ((64, 64), 64, (64, 64), 64))) for _ in range(2))
    saved = ops.memory_mlp_forward_loss(k, v, *weights)
    ops.memory_mlp_backward_update_(saved, weights, momentum, torch.tensor(0.1), 0.9, 0.1, 1.0)
    state = draw(2, 88, 64).detach()
    shapes = ((512, 88), (88, 256), (384, 64), (64, 192))
    mixing = NormGatedMixerWeights(*(draw(*shape).detach() for shape in shapes))
    mixer.mix_tokens(state, state, mixing, 1e-5, torch.empty_like(state, dtype=torch.float8_e4m3fn))
    mixer.mix_features(state.view(-1, 64), mixing, 1e-5)


if __name__ == "__main__":
    main()
