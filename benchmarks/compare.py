"""Architectures at equal minutes of one GPU: what each has learnt when the time is over.

python -m benchmarks.compare --task sudoku --data PACK --minutes 2 --seeds 0,1,2 --out benchmarks/results/tables/sudoku
python -m benchmarks.compare --task maze --data PACK --models hrm,trm-attention --minutes 4

All of them learn by one recipe, that of the task's record (`config/experiment/`); they differ in what MODELS says. A
model's training step is timed first, and it gets as many steps as fill the minutes, its learning rate falling to 0
over all of them; its other seeds get as many on a GPU of the same kind. So minutes count the training alone, neither
compiling nor evaluating. Runs are written down as they end in compare-<task>.jsonl, and a command given again goes on
with those that are missing: a table may take several sittings, each bounded by --stop-after.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from benchmarks.common import (
    Shape,
    batches,
    machine,
    make_parser,
    median_ms,
    picture_file,
    reset_peak,
    run_command,
    write_results,
)
from benchmarks.sittings import Sittings, add_options, numbers_of
from hrm.api import overrides
from hrm.config import CONFIG_DIR, PretrainConfig
from hrm.config.compose import compose
from hrm.data.pack import Pack, open_pack
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture
from hrm.models import architectures
from hrm.training.loop import pretrain
from hrm.training.step import initial_state, make_train_step

EXPERIMENTS = {"sudoku": "sudoku_speedrun", "maze": "maze_speedrun"}
"""Whose recipe is taken, by task."""


class Model(NamedTuple):
    """What takes part."""

    arch: str  # a file in config/arch/
    about: str
    options: Mapping[str, Any] = {}  # of the architecture, beside the recipe's
    tokens: str = "attend"  # to one another; mix: by an MLP; as_record: as in the record's model


_ONE_ACT_STEP = {"halt_max_steps": 1, "halt_exploration_prob": 0}
_IDENTIFIER = {"puzzle_emb_ndim": "${.hidden_size}", "register_tokens": 0}
MODELS = {
    "trm-mixer": Model("trm", "TRM that mixes tokens; the record's model in Sudoku", tokens="mix"),
    "trm-attention": Model("trm", "TRM with attention; the record's model in mazes"),
    "hrm": Model(
        "hrm_v1", "HRM as published: two modules, 2 cycles of 2, gradient of one step", {"H_cycles": 2, "L_cycles": 2}
    ),
    "transformer-looped": Model(
        "transformer", "a plain transformer of 8 blocks, up to 16 ACT steps", {"halt_max_steps": 16}
    ),
    "transformer": Model("transformer", "the same, once"),
    # What matters: the record's model, and one thing less or other.
    "no-outer-loop": Model("trm", "the record's model, one ACT step", _ONE_ACT_STEP, "as_record"),
    "no-inner-loop": Model(
        "trm", "the record's model, one cycle of one update", {"H_cycles": 1, "L_cycles": 1}, "as_record"
    ),
    "no-hierarchy": Model(
        "transformer",
        "the blocks of the record's model on one state, up to 16 ACT steps",
        {"num_layers": 2, "halt_max_steps": 16},
        "as_record",
    ),
    "identifier": Model(
        "trm", "the record's model, its registers a vector for the puzzle's identifier", _IDENTIFIER, "as_record"
    ),
}
_OWN = ("H_cycles", "L_cycles", "mlp_t", "pos_encodings", "attention_norm")  # to the record's own model
_START_MINUTES = 0.75  # of a first run besides its training: compiling, evaluating


def main(argv: Sequence[str] | None = None) -> None:
    listed = "\n".join(f"  {name:20}{model.about}" for name, model in MODELS.items())
    parser = make_parser(f"{__doc__}\nmodels:\n{listed}")
    parser.add_argument("--task", choices=[*EXPERIMENTS], required=True)
    parser.add_argument(
        "--data", required=True, help="a pack of the task; of few test puzzles, or evaluating takes long"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="several; default: all")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each run")
    add_options(parser)
    parser.add_argument("--picture", type=picture_file, help="draw it, as .svg or .png")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py for all models")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.minutes <= 0:
        raise UserError(f"--minutes {arguments.minutes:g} is too short: give more than 0.")
    names, seeds = _names(arguments.models), numbers_of(arguments.seeds)
    puzzles = open_pack(arguments.data, "test").metadata  # a mistake is told before the first run
    with join_world(arguments.device) as world:
        about = machine(world.device)
        asked = {"minutes given": arguments.minutes, "puzzle cells": puzzles.seq_len}
        sittings = Sittings(arguments.output_dir / f"compare-{arguments.task}.jsonl", asked, arguments.stop_after)
        beside: list[float] = []  # minutes that the runs took besides their training
        for seed, name in product(seeds, names):  # a whole table of the first seed, then of the next
            takes = arguments.minutes + max(beside, default=_START_MINUTES)
            if sittings.of(model=name, seed=seed) or not sittings.has_time_for(takes):
                continue
            earlier = sittings.of(model=name, device=about["device"])
            timed = {key: earlier[0][key] for key in TIMED} if earlier else None
            run = {"model": name, "device": about["device"], "seed": seed, **_run(name, seed, timed, arguments, world)}
            beside.append(run["minutes in all"] - run["minutes"])
            sittings.add(run)
            print(run, flush=True)
    runs = sittings.runs
    about |= {
        "device": ", ".join(dict.fromkeys(run["device"] for run in runs)),
        "task": f"{arguments.task} of {puzzles.seq_len} cells, the recipe of experiment={EXPERIMENTS[arguments.task]}",
        "minutes": f"{arguments.minutes:g} of training for each run, compiling and evaluating beside them",
        **{name: MODELS[name].about for name in names},
    }
    table = [row for name in names if (row := _row(name, [run for run in runs if run["model"] == name]))]
    print(write_results(f"compare-{arguments.task}", about, table, arguments.output_dir, runs=runs))
    if arguments.picture:
        draw(table, runs, arguments.picture)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in MODELS:
            raise UserError(f"--models {name} is not a choice; there are {', '.join(MODELS)}.")
    return names


def _run(
    name: str, seed: int, timed: Mapping[str, float] | None, arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Train and evaluate one model, whose training step takes as long as `timed` says, if it was timed before."""
    began = time.perf_counter()
    options = [*recipe(arguments.task, MODELS[name]), *arguments.overrides]
    options += [f"data_path={arguments.data}", f"device={world.device.type}", f"seed={seed}", "wandb=disabled"]
    config, pack = compose(PretrainConfig, "pretrain", options), open_pack(arguments.data, "train")
    torch.compiler.reset()  # what other models compiled would count against the limit
    if timed is None:
        reset_peak(world.device)
        timed = _step(config, pack, world)
    ms = timed["ms a step"]
    steps = max(1, round(60_000 * arguments.minutes / ms))
    epochs = max(1, round(steps * config.global_batch_size / pack.metadata.total_groups))
    reset_peak(world.device)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [*options, f"epochs={epochs}", "eval_interval=null", f"checkpoint_path={folder}/run"]
        chosen += ["lr_min_ratio=0", "ema_start=0", "checkpoint_interval=100000"]
        result = pretrain(compose(PretrainConfig, "pretrain", chosen))
    learnt = result.metrics["all" if config.ema_decay is None else "ema/all"]
    return {
        "exact": learnt["exact_accuracy"],
        "cells": learnt["accuracy"],
        "weights exact": result.metrics["all"]["exact_accuracy"],
        "steps": result.step,
        **timed,
        "minutes": result.step * ms / 60_000,
        "minutes in all": (time.perf_counter() - began) / 60,
    }


def recipe(task: str, model: Model) -> list[str]:
    """Options of pretrain.py: the task's record, as far as the model's architecture has them, and the model's own."""
    file: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "experiment" / f"{EXPERIMENTS[task]}.yaml"))
    groups = {
        group.removeprefix("override /"): choice
        for default in file.pop("defaults")
        for group, choice in default.items()
    }
    of_arch = file.pop("arch")
    known = {field.name for field in fields(_config_of(model.arch))}
    if model.tokens == "attend" or (model.tokens == "as_record" and not of_arch.get("mlp_t")):
        positions = of_arch["pos_encodings"]
        own = {"pos_encodings": "rope" if positions == "none" else positions, "attention_norm": True}
    else:
        own = {"mlp_t": True, "pos_encodings": "none"}
    if model.arch == "trm":
        own |= {name: of_arch[name] for name in ("H_cycles", "L_cycles")}
    shared = {name: value for name, value in of_arch.items() if name in known and name not in _OWN}
    chosen = shared | {"q_continue": False} | own | dict(model.options)
    if not chosen["register_tokens"]:
        chosen["puzzle_emb_len"] = of_arch["register_tokens"]  # as many tokens
    for name in ("epochs", "eval_interval", "ema_start"):
        file.pop(name, None)
    return [
        f"arch={model.arch}",
        *(f"{group}={choice}" for group, choice in groups.items() if group != "arch"),
        *overrides({"arch": chosen, **file}),
    ]


def _config_of(arch: str) -> type:
    name = OmegaConf.load(CONFIG_DIR / "arch" / f"{arch}.yaml").name
    return next(found.config for found in architectures().values() if found.config().name == name)


TIMED = ("ms a step", "TFLOP/s", "parameters")


def _step(config: PretrainConfig, pack: Pack, world: World) -> dict[str, float]:
    """How long a training step takes, and of what: TIMED."""
    with tempfile.TemporaryDirectory() as scratch:
        shape = Shape(config.global_batch_size, pack.metadata.seq_len)
        _, stream = batches(str(pack.path), shape, Path(scratch))
        state = initial_state(config, pack, world)
        step = make_train_step(config, world, state)
        ms = median_ms(lambda: step(next(stream)), world.device, 6, 10)
    return {
        "ms a step": ms,
        "TFLOP/s": config.global_batch_size * state.model.train_step_flops() / ms / 1e9,
        "parameters": sum(weight.numel() for weight in state.model.parameters()),
    }


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the table: means over seeds, and how far these lie apart."""
    if not runs:
        return {}
    exact = [100 * run["exact"] for run in runs]
    mean = {
        key: statistics.fmean(run[key] for run in runs) for key in ("cells", "steps", "ms a step", "minutes", "TFLOP/s")
    }
    return {
        "model": name,
        "parameters": runs[0]["parameters"],
        "seeds": len(runs),
        "exact, %": statistics.fmean(exact),
        "least": min(exact),
        "most": max(exact),
        "cells, %": 100 * mean.pop("cells"),
        **mean,
    }


def draw(table: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A bar for the mean of each model, a dot for each seed."""
    figure, axes = new_picture(size=(7, 0.5 * len(table) + 1))
    ax = axes[0, 0]
    names = [row["model"] for row in table]
    ax.barh(names, [row["exact, %"] for row in table], color=PALETTE[5])
    for run in runs:
        if run["model"] in names:
            ax.plot(100 * run["exact"], run["model"], "o", color=PALETTE[0], markersize=4)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("test puzzles exactly right, % (dots: seeds)")
    save_picture(figure, file)


if __name__ == "__main__":
    run_command(main)
