"""Train under the kernel presets and compare their loss curves with the definition's.

python -m benchmarks.loss_curves --data data/sudoku-extreme-1k-aug-1000

A preset passes if its curve, from the same seed, stays as close to the definition's as the definition's own curves from
other seeds do. Exits with 1 if one does not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import PRESETS, Shape, batches, machine, preset_config, write_results
from hrm.config import KernelsConfig, PretrainConfig, register_schemas
from hrm.distributed import World, join_world
from hrm.errors import UserError
from hrm.training.step import initial_state, make_train_step

WINDOW = 25  # steps that a point of a curve averages


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a pack of real puzzles; without it, random tokens")
    parser.add_argument("--presets", default=PRESETS.removeprefix("naive,"))
    parser.add_argument("--shape", default="128x81", help="batch size x sequence length")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the definition that make its spread")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_args(argv)

    register_schemas()
    shape = Shape.parse(arguments.shape)
    rows: list[dict[str, object]] = []
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as scratch:

        def curve(config: PretrainConfig) -> torch.Tensor:
            return loss_curve(config, shape, arguments.steps, arguments.data, Path(scratch), world)

        naive = preset_config("naive", shape, arguments.overrides)
        # A graph replays the definition's own kernels, only sooner.
        naive = replace(naive, kernels=KernelsConfig("naive", cuda_graphs=world.device.type == "cuda"))
        reference, *others = [curve(replace(naive, seed=seed)) for seed in range(arguments.seeds)]
        spread = max(distance(reference, other) for other in others)
        rows.append(_row("naive", reference, spread))
        for preset in arguments.presets.split(","):
            try:
                found = curve(preset_config(preset, shape, arguments.overrides))
            except UserError as error:
                rows.append({"kernels": preset, "cannot run": str(error)})
            else:
                away = distance(reference, found)
                rows.append(_row(preset, found, away) | {"within the spread": "yes" if away <= spread else "NO"})
            print(rows[-1], flush=True)
    about = machine(world.device) | {
        "runs": f"{arguments.steps} steps of {shape.batch_size}, means over {WINDOW} steps",
        "distance": "largest difference between two curves' points, as a share; naive's: between its own seeds",
    }
    print(write_results("loss-curves", about, rows, arguments.output_dir))
    if any(row.get("within the spread") == "NO" for row in rows):
        raise SystemExit(1)


def loss_curve(
    config: PretrainConfig, shape: Shape, steps: int, data_path: str | None, scratch: Path, world: World
) -> torch.Tensor:
    """Language-model loss per sequence, averaged over windows of `WINDOW` steps, from the seed in `config`."""
    torch.compiler.reset()
    pack, stream = batches(data_path, shape, scratch)
    step = make_train_step(config, world, initial_state(config, pack, world))
    # On the device until the end, so that nothing waits; cloned because the next step overwrites it.
    losses = [step(next(stream))["lm_loss"].clone() for _ in range(steps)]
    curve: torch.Tensor = torch.stack(losses).cpu().double().view(-1, WINDOW).mean(1) / shape.batch_size
    return curve


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between two curves, relative to the first."""
    return float(((a - b).abs() / a).max())


def _row(preset: str, curve: torch.Tensor, away: float) -> dict[str, object]:
    points = {f"loss at {(index + 1) * WINDOW}": float(curve[index]) for index in range(3, len(curve), 4)}
    return {"kernels": preset, "first": float(curve[0]), **points, "distance": away}


if __name__ == "__main__":
    main()
