"""Time the fused kernels of a block beside the same maths through torch.compile, and beside what the chip allows.

python -m benchmarks.kernels

The bound is the larger of two times: that of the bytes that must pass (inputs and results once) at the measured rate of
a device copy, and that of the operations at the measured rate of a large bf16 matmul.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Shape, machine, matmul_tflops, median_ms, run_command, write_results
from hrm.distributed.world import join_world
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.naive import BlockWeights, RotaryTables

WIDTH, HEADS, INNER, EPS = 512, 8, 1536, 1e-5
_CALLS_PER_GRAPH = 20


class Op(NamedTuple):
    """A piece of a block: ours and the plain one, on the same arguments, and what it must move and multiply."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    numbers: int  # 16-bit ones, read or written
    multiplications: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="384x82,96x901", help="sequences x tokens, several")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results/tables"))
    arguments = parser.parse_args(argv)
    with join_world("auto") as world:
        if world.device.type != "cuda":
            raise UserError(f"benchmarks.kernels needs an NVIDIA GPU, not {world.device.type}.")
        flops, copied = 1e12 * matmul_tflops(world.device), _copy_rate(world.device)
        rows: list[dict[str, Any]] = []
        for shape in map(Shape.parse, arguments.shapes.split(",")):
            for op in _ops(shape, world.device):
                for row in _measure(op, shape, flops, copied):
                    print(row, flush=True)
                    rows.append(row)
        about = machine(world.device) | {
            "bf16 matmul": f"{flops / 1e12:.0f} TFLOP/s",
            "device copy": f"{copied / 1e12:.2f} TB/s",
            "times": f"medians of CUDA graphs of {_CALLS_PER_GRAPH} calls",
        }
        print(write_results("kernels", about, rows, arguments.output_dir))


def _ops(shape: Shape, device: torch.device) -> Iterator[Op]:
    from hrm.kernels.ops.triton.attention import attention
    from hrm.kernels.ops.triton.linear import linear_swiglu
    from hrm.kernels.ops.triton.residual_rms import linear_residual_rms

    rows, tokens = shape.batch_size * shape.seq_len, shape.seq_len
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device) * scale
        return drawn.bfloat16().requires_grad_()

    x, inner = random(rows, WIDTH), random(rows, INNER)
    weights = BlockWeights(
        random(3 * WIDTH, WIDTH, scale=WIDTH**-0.5),
        random(WIDTH, WIDTH, scale=WIDTH**-0.5),
        random(2 * INNER, WIDTH, scale=WIDTH**-0.5),
        random(WIDTH, INNER, scale=INNER**-0.5),
    )
    rotary = RotaryTables(*(table.to(device) for table in naive.rotary_tables(tokens, WIDTH // HEADS, 10000.0)))
    qkv = random(shape.batch_size, tokens, 3 * WIDTH)

    def plain_swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up

    def plain_residual_rms(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> Tensor:
        return naive.rms_norm(residual + F.linear(x, weight), eps)

    attended = 2 * shape.batch_size * tokens**2 * WIDTH
    yield Op("attention", attention, naive.sdpa, (qkv, rotary, HEADS), 4 * rows * WIDTH, attended)
    yield Op(
        "matmul + SwiGLU",
        linear_swiglu,
        plain_swiglu,
        (x, weights.gate_up),
        rows * (WIDTH + INNER),
        2 * rows * WIDTH * INNER,
    )
    for name, source, weight in (("o", x, weights.o), ("down", inner, weights.down)):
        yield Op(
            f"{name} matmul + residual + norm",
            linear_residual_rms,
            plain_residual_rms,
            (source, weight, random(rows, WIDTH), EPS),
            rows * (source.shape[1] + 2 * WIDTH),
            rows * source.shape[1] * WIDTH,
        )


def _measure(op: Op, shape: Shape, flops: float, copied: float) -> Iterator[dict[str, Any]]:
    """A row for the forward, and one for the backward, which moves and multiplies about twice as much."""
    torch.compiler.reset()
    compiled = torch.compile(op.plain, dynamic=False, fullgraph=True)
    leaves = [value for value in op.arguments if isinstance(value, Tensor)]
    for direction, factor in (("forward", 1), ("backward", 2)):
        times = []
        for function in (op.ours, compiled):
            if direction == "forward":
                with torch.no_grad():
                    times.append(_graph_us(lambda function=function: function(*op.arguments)))  # type: ignore[misc]
            else:
                out = function(*op.arguments)
                grad = torch.randn_like(out)
                times.append(
                    _graph_us(lambda out=out, grad=grad: torch.autograd.grad(out, leaves, grad, retain_graph=True))  # type: ignore[misc]
                )
        bytes_us = 1e6 * 2 * factor * op.numbers / copied
        flops_us = 1e6 * 2 * factor * op.multiplications / flops
        yield {
            "kernel": op.name,
            "pass": direction,
            "shape": f"{shape.batch_size}x{shape.seq_len}",
            "us": times[0],
            "compile us": times[1],
            "x compile": times[1] / times[0],
            "bytes us": bytes_us,
            "operations us": flops_us,
            "of bound": max(bytes_us, flops_us) / times[0],
        }


def _graph_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call among `_CALLS_PER_GRAPH` in a CUDA graph, so that launching costs little."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_PER_GRAPH):
            call()
    return 1000 * median_ms(graph.replay, torch.device("cuda"), 2, 10) / _CALLS_PER_GRAPH


def _copy_rate(device: torch.device) -> float:
    """Bytes a second that a device copy reads and writes together."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), device, 3, 10) / 1000)


if __name__ == "__main__":
    run_command(main)
