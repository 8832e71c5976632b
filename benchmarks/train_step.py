"""Time training steps under the kernel presets, side by side.

python -m benchmarks.train_step --data data/sudoku-extreme-1k-aug-1000
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.common import (
    Shape,
    act_step_blocks,
    batches,
    block_flops,
    machine,
    matmul_tflops,
    median_ms,
    write_results,
)
from hrm.config import CONFIG_DIR, PretrainConfig, register_schemas
from hrm.distributed import World, join_world
from hrm.training.step import initial_state, make_train_step

BASELINE = "compile"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a pack of real puzzles; shapes of another length get random tokens")
    parser.add_argument("--presets", default="naive,compile")
    parser.add_argument("--shapes", default="384x81,768x81,96x900", help="batch size x sequence length, several")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_args(argv)

    register_schemas()
    rows = []
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as scratch:
        ceiling = matmul_tflops(world.device)
        for shape in map(Shape.parse, arguments.shapes.split(",")):
            measured = []
            for preset in arguments.presets.split(","):
                overrides = [*arguments.overrides, f"kernels={preset}", f"global_batch_size={shape.batch_size}"]
                with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                    config = OmegaConf.to_object(compose("pretrain", overrides=overrides))
                assert isinstance(config, PretrainConfig)
                measured.append(_measure(config, preset, shape, arguments, world, Path(scratch), ceiling))
                print(measured[-1], flush=True)
            baseline = next((row["ms"] for row in measured if row["kernels"] == BASELINE), None)
            rows += [row | {f"to {BASELINE}": baseline and row["ms"] / baseline} for row in measured]
    about = machine(world.device) | {"bf16 matmul ceiling": f"{ceiling:.0f} TFLOP/s"}
    print(write_results("train-step", about, rows, arguments.output_dir))


def _measure(
    config: PretrainConfig,
    preset: str,
    shape: Shape,
    arguments: argparse.Namespace,
    world: World,
    scratch: Path,
    ceiling: float,
) -> dict[str, Any]:
    torch.compiler.reset()  # what other shapes compiled would count against the limit
    pack, stream = batches(arguments.data, shape, scratch)
    step = make_train_step(config, world, initial_state(config, pack, world))
    on_cuda = world.device.type == "cuda"
    first_ms = median_ms(lambda: step(next(stream)), world.device, 0, 1)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(lambda: step(next(stream)), world.device, 5, arguments.repeats)
    arch = config.arch
    # Two recurrences forward (the second for the target), and a backward of twice the cost through the last L and H.
    passes = 2 * act_step_blocks(arch) + 2 * (arch.L_layers + arch.H_layers)
    num_tokens = arch.prefix_len + shape.seq_len
    tflops = shape.batch_size * num_tokens * passes * block_flops(arch, num_tokens) / ms / 1e9
    return {
        "kernels": preset,
        "S": shape.seq_len,
        "batch": shape.batch_size,
        "ms": ms,
        "puzzles/s": 1000 * shape.batch_size / ms,
        "tokens/s": 1000 * shape.batch_size * num_tokens / ms,
        "TFLOP/s": tflops,
        "of matmul": tflops / ceiling,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "first step s": first_ms / 1000,
    }


if __name__ == "__main__":
    main()
