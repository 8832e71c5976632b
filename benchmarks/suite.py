"""All ways of computing a training step in one table: backends, recorded steps, and work that several GPUs share.

python -m benchmarks.suite                                on one GPU, or on a CPU
torchrun --nproc-per-node 8 -m benchmarks.suite           on the GPUs of a host
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m benchmarks.suite

Every way trains on the same global batch. What one process computes alone is measured on the first one while the others
wait; heads and layers are shared within a host, the batch between hosts. A way that cannot run here says why.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import (
    Shape,
    batches,
    by_main_alone,
    cpu_peak_bytes,
    machine,
    make_parser,
    median_ms,
    peak_gib,
    picture_file,
    preset_config,
    reset_peak,
    run_command,
    write_results,
)
from benchmarks.plot import draw_ways
from hrm.batch import Batch
from hrm.config import PretrainConfig
from hrm.distributed.world import World, gather_on_main, join_world, share_out
from hrm.errors import UserError
from hrm.evaluation.runner import make_runner
from hrm.models import build_model
from hrm.training.step import initial_state, make_train_step

Sharing = Callable[[PretrainConfig, int], list[str]]
"""The options by which processes, so many on a host, share a model; it raises a UserError where they cannot."""


def _heads(config: PretrainConfig, processes: int) -> list[str]:
    """Tensor parallelism over as many as divide the heads and the MLP's width."""
    sizes = [size for block in _blocks(config) for size in block.divisible().values()]
    return [f"parallel.tensor={_common_divisor('heads', processes, sizes)}"]


def _layers(config: PretrainConfig, processes: int) -> list[str]:
    """A pipeline of as many stages as divide the layers of every module."""
    stages = _common_divisor("layers of a module", processes, [len(stack.blocks) for stack in _stacks(config)])
    return [f"parallel.pipeline={stages}", f"parallel.micro_batches={max(4, stages)}"]


class Way(NamedTuple):
    """A way of computing a training step."""

    kernels: str  # a preset
    sharing: Sharing | None = None  # None: one process computes all


WAYS = {
    "naive": Way("naive"),
    "compile": Way("compile"),
    "CUDA graph": Way("cuda_graphs"),
    "unrolled": Way("triton_unrolled"),
    "head-parallel": Way("head_parallel"),
    "auto": Way("auto"),
    "heads over GPUs": Way("naive", _heads),
    "pipeline over GPUs": Way("auto", _layers),
    "FSDP over GPUs": Way("auto", lambda config, processes: ["parallel.fsdp=true"]),
    "batch over GPUs": Way("auto", lambda config, processes: []),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"several of: {', '.join(WAYS)}; default: all")
    parser.add_argument("--shape", type=Shape.parse, default="384x81", help="global batch size x sequence length")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--picture", type=picture_file, help="draw the table to this .svg or .png")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_intermixed_args(argv)
    names = arguments.ways.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        parser.error(f"--ways {','.join(unknown)}: there are {', '.join(WAYS)}")

    rows: list[dict[str, Any]] = []
    with join_world(arguments.device) as everyone:
        is_main, device, processes = everyone.is_main, everyone.device, everyone.size
        for name in names:
            way, shared = WAYS[name], WAYS[name].sharing is not None
            row: dict[str, Any] = {"way": name, "kernels": way.kernels, "processes": processes if shared else 1}
            try:
                config = preset_config(way.kernels, arguments.shape, arguments.overrides)
                if way.sharing is None:
                    row |= by_main_alone(lambda world: _measure(config, arguments, world), everyone)  # noqa: B023
                else:
                    options = _options(way.sharing, config, everyone)
                    config = preset_config(way.kernels, arguments.shape, [*arguments.overrides, *options])
                    row |= {"options": " ".join(options)} if options else {}
                    row |= _measure_together(config, arguments, everyone)
            except UserError as error:
                row["cannot run"] = str(error)
            rows.append(row)
            if is_main:
                print(row, flush=True)
    if is_main:
        about = machine(device) | {
            "processes": f"{processes}, {_on_a_host(processes)} on a host",
            "global batch": f"{arguments.shape.batch_size} sequences of {arguments.shape.seq_len} tokens",
        }
        naive = next((row.get("ms") for row in rows if row["way"] == "naive"), None)
        for row in rows:
            if naive and "ms" in row:
                row["x naive"] = naive / row["ms"]
        print(write_results(f"suite-{processes}", about, rows, arguments.output_dir))
        if arguments.picture:
            draw_ways(about, rows, arguments.picture)


def _options(sharing: Sharing, config: PretrainConfig, everyone: World) -> list[str]:
    if everyone.size == 1:
        raise UserError("it is for several processes: start with torchrun --nproc-per-node 2, or more.")
    if config.global_batch_size % everyone.size:
        raise UserError(
            f"the {everyone.size} processes do not divide the batch of {config.global_batch_size}: change --shape."
        )
    options = sharing(config, _on_a_host(everyone.size))
    if everyone.device.type == "cuda" and config.kernels.backend == "naive":  # as the others' steps are
        options.append("kernels.cuda_graphs=true")
    return options


def _on_a_host(processes: int) -> int:
    """How many of the processes torchrun started on each host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def _common_divisor(what: str, processes: int, sizes: Sequence[int]) -> int:
    if processes == 1:
        raise UserError(f"it shares {what} within a host, which has one process: raise --nproc-per-node.")
    divisor = math.gcd(processes, *sizes)
    if divisor == 1:
        raise UserError(
            f"the {min(sizes)} {what} do not divide over the {processes} processes of a host: change arch or "
            "--nproc-per-node."
        )
    return divisor


def _stacks(config: PretrainConfig) -> list[Any]:
    """The modules of a model as `config` says, for any data."""
    model = build_model(config.arch, batch_size=1, seq_len=1, vocab_size=1, num_puzzle_identifiers=1)
    return list(model.model.inner.stacks.values())


def _blocks(config: PretrainConfig) -> list[Any]:
    return [block for stack in _stacks(config) for block in stack.blocks]


def _measure_together(config: PretrainConfig, arguments: Any, everyone: World) -> dict[str, Any]:
    """The row of all processes: the slowest time, the most memory."""
    measured = _measure(config, arguments, share_out(config.parallel, everyone.device))
    slowest = gather_on_main(measured, everyone)
    if not slowest:
        return {}
    return (
        measured
        | {name: max(row[name] for row in slowest) for name in ("ms", "MB", "ACT step ms")}
        | {"tokens/s": min(row["tokens/s"] for row in slowest)}
    )


def _measure(config: PretrainConfig, arguments: Any, world: World) -> dict[str, Any]:
    """Training steps, then ACT steps of evaluation, on this process's part of the batch."""
    device, part = world.device, replace(arguments.shape, batch_size=config.global_batch_size // world.size)
    reset_peak(device)
    torch.compiler.reset()  # what other ways compiled would count against the limit
    with tempfile.TemporaryDirectory() as scratch:
        pack, stream = batches(None, part, Path(scratch))

        def started() -> tuple[Any, Callable[[], object]]:
            state = initial_state(config, pack, world)
            step = make_train_step(config, world, state)
            return state, lambda: step(next(stream))

        def begun() -> None:
            step = started()[1]
            for _ in range(2):
                step()

        state, step = started()
        ms = median_ms(step, device, 5, arguments.repeats)
        gib = peak_gib(device)
        mb = cpu_peak_bytes(begun) / 2**20 if gib is None else 1024 * gib
        model = state.model.eval()
        run = make_runner(model, world)

        def answer() -> object:
            batch: Batch = next(stream)
            return run({name: field.to(device, non_blocking=True) for name, field in batch.items()})

        with model.weights_at_hand():
            act_ms = median_ms(answer, device, 2, max(1, arguments.repeats // 5)) / model.halt_max_steps
    tokens = config.global_batch_size * model.model.inner.num_tokens
    return {"ms": ms, "MB": mb, "tokens/s": 1000 * tokens / ms, "ACT step ms": act_ms}


if __name__ == "__main__":
    run_command(main)
