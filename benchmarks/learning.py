"""Do ours and the published code learn alike? Both on one pack by one recipe, several seeds of each.

    git clone https://github.com/sapientinc/HRM
    python -m benchmarks.learning --published HRM --data PACK --epochs 2500 --seeds 0,1,2

The recipe is experiment=sudoku_extreme_1k, and a run is evaluated once, at its end. Seeds of the two codes have nothing
in common, so `chance` says how much a difference of their means is worth: the share of all ways to divide these runs
among the two codes in which the means are at least as far apart. Runs are written down as they end in learning.jsonl,
and a command given again goes on with those that are missing: a table may take several sittings, each bounded by
--stop-after. For runs on several GPUs at a time give each a folder of its own (--out), and put the files together.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, make_parser, over_all_sets, reset_peak, run_command, write_results
from benchmarks.published import Published
from benchmarks.sittings import Run, Sittings, add_options, numbers_of
from hrm.config import PretrainConfig
from hrm.config.compose import compose
from hrm.data.pack import open_pack
from hrm.distributed.world import join_world
from hrm.errors import UserError
from hrm.training.loop import pretrain

CODES = ("published", "ours")
_SOLVES = 0.01  # of the training puzzles that halt: from there on a run is taken to solve some
_POINTS = 100  # of a curve
_CURVE = ("lm_loss", "exact_accuracy", "steps")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--published", type=Path, metavar="CHECKOUT", required=True, help="the published code")
    parser.add_argument("--data", required=True, help="a pack, its training puzzles augmented")
    parser.add_argument("--epochs", type=int, default=2500, help="of a run")
    parser.add_argument("--codes", default=",".join(CODES), help="several")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep this code's runs, as FOLDER/seed-N")
    add_options(parser)
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py that both have, and kernels= of ours")
    arguments = parser.parse_intermixed_args(argv)
    codes, seeds = arguments.codes.split(","), numbers_of(arguments.seeds)
    if unknown := [code for code in codes if code not in CODES]:
        raise UserError(f"--codes {unknown[0]} is not a choice; there are {', '.join(CODES)}.")
    if arguments.epochs < 1:
        raise UserError(f"--epochs {arguments.epochs} is too small: give 1 or more.")
    theirs = Published(arguments.published)
    pack = open_pack(arguments.data, "train")
    recipe = ["experiment=sudoku_extreme_1k", f"epochs={arguments.epochs}", *arguments.overrides]
    options = [*recipe, f"data_path={pack.path}", "eval_interval=null", "wandb=disabled"]
    asked = {"recipe": " ".join(recipe), "pack": pack.path.name}
    with join_world(arguments.device) as world:
        about = machine(world.device)
        sittings = Sittings(arguments.output_dir / "learning.jsonl", asked, arguments.stop_after)
        for seed, code in itertools.product(seeds, codes):
            took = max((run["minutes"] for run in sittings.of(code=code, device=about["device"])), default=0.0)
            if sittings.of(code=code, seed=seed) or not sittings.has_time_for(took):
                continue
            chosen = [*options, f"device={world.device.type}", f"seed={seed}"]
            config = compose(PretrainConfig, "pretrain", chosen)
            window = max(1, arguments.epochs * pack.metadata.total_groups // config.global_batch_size // _POINTS)
            reset_peak(world.device)
            if code == "published":
                found = theirs.learn(config, pack.path, world.device, window)
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    folder = (arguments.keep or Path(scratch)) / f"seed-{seed}"
                    found = _ours([*chosen, f"log_interval={window}", f"checkpoint_path={folder}"])
            found["test"] = over_all_sets(found["test"])
            sittings.add({"code": code, "seed": seed, "device": about["device"], **found})
            print({name: value for name, value in sittings.runs[-1].items() if name != "curve"}, flush=True)
    rows = [row_of(code, runs) for code in codes if (runs := sittings.of(code=code))]
    about |= {"device": ", ".join(dict.fromkeys(run["device"] for run in sittings.runs)), **asked}
    about |= {f"chance, {name}": text for name, text in chances(sittings.runs).items()}
    print(write_results("learning", about, rows, arguments.output_dir, runs=sittings.runs))


def _ours(options: Sequence[str]) -> dict[str, Any]:
    """A run of this code, as `Published.learn` tells of one."""
    began = time.perf_counter()
    result = pretrain(compose(PretrainConfig, "pretrain", options))
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {"step": record["step"]} | {name: record[f"train/{name}"] for name in _CURVE if f"train/{name}" in record}
        for record in records
        if "train/lm_loss" in record
    ]
    minutes = (time.perf_counter() - began) / 60
    return {"test": result.metrics, "curve": curve, "steps": result.step, "minutes": minutes}


def measures(run: Mapping[str, Any]) -> dict[str, float]:
    """What of a run is compared: its test puzzles, its loss in the last fifth, and when it begins to solve puzzles.

    A run that solves none begins after its end.
    """
    last = run["steps"]
    late = [point["lm_loss"] for point in run["curve"] if point["step"] > 0.8 * last]
    begins = (point["step"] for point in run["curve"] if point.get("exact_accuracy", 0.0) > _SOLVES)
    return {
        "exact, %": 100 * run["test"]["exact_accuracy"],
        "cells, %": 100 * run["test"]["accuracy"],
        "loss": statistics.fmean(late),
        "solves from step": float(next(begins, last + 1)),
    }


def row_of(code: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Of the table: means over seeds and, for the puzzles that are right, how far these lie apart."""
    found = [measures(run) for run in runs]
    exact = [one["exact, %"] for one in found]
    return {
        "code": code,
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        **{name: statistics.fmean(one[name] for one in found) for name in found[0]},
        "least exact": min(exact),
        "most exact": max(exact),
        "minutes": statistics.fmean(run["minutes"] for run in runs),
    }


def chances(runs: Sequence[Run]) -> dict[str, str]:
    """For each measure, how often the means of a random division of the runs are as far apart as those of the codes."""
    found = [measures(run) for run in runs]
    ours = [number for number, run in enumerate(runs) if run["code"] == CODES[1]]
    if not 0 < len(ours) < len(runs):
        return {}
    told = {}
    for name in found[0]:
        values = [one[name] for one in found]
        apart = [_apart(values, chosen) for chosen in itertools.combinations(range(len(runs)), len(ours))]
        as_far = sum(distance >= _apart(values, ours) * (1 - 1e-9) for distance in apart)
        told[name] = f"{as_far} of {len(apart)} divisions"
    return told


def _apart(values: Sequence[float], chosen: Sequence[int]) -> float:
    """How far the mean of the chosen values is from that of the others."""
    inside = statistics.fmean(values[number] for number in chosen)
    return abs(inside - statistics.fmean(value for number, value in enumerate(values) if number not in chosen))


if __name__ == "__main__":
    run_command(main)
