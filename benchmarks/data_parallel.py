"""Time training steps on several ranks, by the way in which they share the work, against one rank.

torchrun --nproc-per-node 2 -m benchmarks.data_parallel                      twice the batch on two GPUs
torchrun --nproc-per-node 2 -m benchmarks.data_parallel --global-batch 768   the same batch on two GPUs
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Shape,
    batches,
    by_main_alone,
    machine,
    make_parser,
    median_ms,
    peak_gib,
    preset_config,
    reset_peak,
    run_command,
    write_results,
)
from hrm.config import PretrainConfig
from hrm.distributed.world import World, join_world, share_out
from hrm.errors import UserError
from hrm.training.step import initial_state, make_train_step

WITHOUT_GRAPHS = "parallel.cuda_graphs=false"
WAYS = {
    "flat": [],
    "buckets of 1 MB": ["parallel.bucket_mb=1"],
    "buckets of 25 MB": ["parallel.bucket_mb=25"],
    "flat, exchange not recorded": [WITHOUT_GRAPHS],
    "buckets of 5 MB, exchange not recorded": [WITHOUT_GRAPHS, "parallel.bucket_mb=5"],
    "buckets of 25 MB, exchange not recorded": [WITHOUT_GRAPHS, "parallel.bucket_mb=25"],
    "fsdp": ["parallel.fsdp=true"],
    "tensor 2": ["parallel.tensor=2"],
    "pipeline 2": ["parallel.pipeline=2"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ways", default=";".join(list(WAYS)[:6]), help=f"separated by semicolons, of: {list(WAYS)}")
    parser.add_argument("--batch", type=int, default=768, help="sequences of one rank alone")
    parser.add_argument("--global-batch", type=int, help="of all ranks together; default: each has its --batch")
    parser.add_argument("--seq-len", type=int, default=81)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_intermixed_args(argv)

    def config(global_batch: int, options: Sequence[str] = ()) -> PretrainConfig:
        shape = Shape(global_batch, arguments.seq_len)
        return preset_config(arguments.kernels, shape, [*arguments.overrides, *options])

    rows: list[dict[str, Any]] = []
    with join_world(arguments.device) as everyone:
        is_main, device = everyone.is_main, everyone.device
        seq_len, repeats = arguments.seq_len, arguments.repeats
        one = config(arguments.batch)
        alone = by_main_alone(lambda world: _measure(one, seq_len, world, repeats), everyone)
        rows.append({"way": "one rank", "ranks": 1, "global batch": arguments.batch, **alone})
        global_batch = arguments.global_batch or everyone.size * arguments.batch
        for way in arguments.ways.split(";"):
            row: dict[str, Any] = {"way": way, "ranks": everyone.size, "global batch": global_batch}
            try:
                options = config(global_batch, WAYS[way])
                world = share_out(options.parallel, device)
                row |= _measure(options, seq_len, world, repeats)
                row["x one rank"] = row["puzzles/s"] / alone["puzzles/s"] if is_main else None
            except UserError as error:
                row["cannot run"] = str(error)
            rows.append(row)
            if is_main:
                print(row, flush=True)
    if is_main:
        name = f"data-parallel-{everyone.size}-{'fixed-batch' if arguments.global_batch else 'fixed-share'}"
        print(write_results(name, machine(device), rows, arguments.output_dir))


def _measure(config: PretrainConfig, seq_len: int, world: World, repeats: int) -> dict[str, Any]:
    reset_peak(world.device)
    with tempfile.TemporaryDirectory() as scratch:
        pack, stream = batches(None, Shape(config.global_batch_size // world.size, seq_len), Path(scratch))
        step = make_train_step(config, world, initial_state(config, pack, world))
        ms = median_ms(lambda: step(next(stream)), world.device, 5, repeats)
    return {"ms": ms, "puzzles/s": 1000 * config.global_batch_size / ms, "GiB": peak_gib(world.device)}


if __name__ == "__main__":
    run_command(main)
