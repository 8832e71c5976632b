"""Time a trained model's answers to test puzzles by several kernels, with all ACT steps and with early halting.

    python -m benchmarks.answering checkpoints/run
    python -m benchmarks.answering checkpoints/run --presets auto,fp8 --puzzles 6000 --published HRM

The same weights, puzzles and batch size for all, each after first batches that compile. This code reads the pack
meanwhile; the published code's batches wait in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    PUBLISHED,
    data_path_of,
    machine,
    make_parser,
    over_all_sets,
    presets_of,
    reset_peak,
    run_command,
    write_results,
)
from benchmarks.ensembles import spread_out
from benchmarks.published import Published
from hrm.checkpoint.weights import find_checkpoint, read_weights
from hrm.data.loader import EvalLoader
from hrm.data.pack import open_pack, write_split
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.early_halting import EarlyHalting, halting_metrics
from hrm.evaluation.loading import ModelSizes, load_model
from hrm.evaluation.metrics import MetricSums, Throughput
from hrm.evaluation.runner import evaluate, parts_of
from hrm.models import ACTLossHead, arch_config

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="as evaluate.py takes it")
    parser.add_argument("--data", help="a pack; default: the one that the checkpoint was trained on")
    parser.add_argument("--presets", default="compile,auto,fp8", help="several of config/kernels/")
    parser.add_argument("--puzzles", type=int, help="of each test set, evenly spread over it; default: all")
    parser.add_argument("--batch-size", type=int, default=768)
    parser.add_argument("--published", type=Path, metavar="CHECKOUT", help="the published code's checkout too")
    arguments = parser.parse_args(argv)
    if arguments.puzzles is not None and arguments.puzzles < 1:
        raise UserError(f"--puzzles {arguments.puzzles} is too small: give 1 or more.")
    presets = presets_of(arguments.presets)
    theirs = Published(arguments.published) if arguments.published else None
    checkpoint = find_checkpoint(arguments.checkpoint)
    data_path = data_path_of(checkpoint, arguments.data)
    weights = read_weights(checkpoint.weights_file)
    pack = open_pack(data_path, "test")
    if arguments.puzzles is not None:
        pack = spread_out(pack, arguments.puzzles)
    sizes = ModelSizes.of(pack.metadata, arguments.batch_size)
    rows: list[Row] = []
    with join_world(arguments.device) as world:
        loader = EvalLoader(pack, arguments.batch_size, pin_memory=world.device.type == "cuda")
        load_model(checkpoint, weights, sizes, "naive", world)  # what fits no kernels ends it here
        for preset in presets:
            for steps, answer in _WAYS.items():
                row: Row = {"kernels": preset, "ACT steps": steps}
                try:
                    reset_peak(world.device)
                    model = load_model(checkpoint, weights, sizes, preset, world)
                    row |= answer(model, loader, sizes, world)
                except UserError as error:
                    row["cannot run"] = str(error)
                rows.append(row)
                print(row, flush=True)
        if theirs:
            row = {"kernels": PUBLISHED, "ACT steps": "all"}
            try:
                reset_peak(world.device)
                arch = arch_config(checkpoint.config["arch"], sizes.of_data(), where=f"{checkpoint.config_file}: arch")
                with tempfile.TemporaryDirectory() as scratch:
                    same = Path(scratch)
                    write_split(same / "test", pack.metadata, pack.sets)
                    (same / "train").symlink_to((pack.path / "train").resolve())
                    found = theirs.answer(arch, same, weights, arguments.batch_size, world.device)
                row |= _row(found["puzzles/s"], over_all_sets(found["test"]))
                row["stand-ins"] = " and ".join(found["stand-ins"])
            except UserError as error:
                row["cannot run"] = str(error)
            rows.append(row)
            print(row, flush=True)
        about = machine(world.device)
    slow = next((row.get("puzzles/s") for row in rows if row["kernels"] == PUBLISHED), None)
    for row in rows:
        if slow and "puzzles/s" in row:
            row[f"x {PUBLISHED}"] = row["puzzles/s"] / slow
    about |= {
        "checkpoint": str(checkpoint.weights_file),
        "puzzles": f"{sum(len(data.inputs) for data in pack.sets.values())} of {data_path}/test, "
        f"{arguments.batch_size} at a time",
    }
    print(write_results("answering", about, rows, arguments.output_dir))


def _all_steps(model: ACTLossHead, loader: EvalLoader, sizes: ModelSizes, world: World) -> Row:
    throughput = Throughput(world)
    metrics, _ = evaluate(model, loader, world, throughput=throughput)
    return _row(throughput.per_second(), over_all_sets(metrics))


def _early_halting(model: ACTLossHead, loader: EvalLoader, sizes: ModelSizes, world: World) -> Row:
    throughput, sums = Throughput(world), MetricSums(world)
    early = EarlyHalting(model, sizes.batch_size, world.device)
    for set_name, puzzles, predictions in early.answer(parts_of(loader, world), throughput):
        sums.add(set_name, halting_metrics(puzzles, predictions))
    return _row(throughput.per_second(), over_all_sets(sums.averages()))


_WAYS: dict[str, Callable[[ACTLossHead, EvalLoader, ModelSizes, World], Row]] = {
    "all": _all_steps,
    "early halting": _early_halting,
}


def _row(puzzles_per_second: float, metrics: Mapping[str, float]) -> Row:
    return {
        "puzzles/s": puzzles_per_second,
        "exact, %": 100 * metrics["exact_accuracy"],
        "cells, %": 100 * metrics["accuracy"],
        "q_halt right, %": 100 * metrics["q_halt_accuracy"],
        "steps a puzzle": metrics["steps"],
    }


if __name__ == "__main__":
    run_command(main)
