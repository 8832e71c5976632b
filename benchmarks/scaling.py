"""Measure training on 1, 2, 4 processes, fit a cost model to it, and predict 8 to 1024 GPUs over hosts.

python -m benchmarks.scaling --processes 1,2,4                       measures on this host, one launch for each number
python -m benchmarks.scaling --measured FILE...                      predicts anew from what was measured before
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m benchmarks.scaling --measure two-hosts.json                   measures over hosts, to be added to --measured

`benchmarks/cost_model.py` says what the model is. It is fitted to steps of one process and to exchanges by themselves;
the steps of several processes are what it is held to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import (
    Shape,
    batches,
    machine,
    make_parser,
    markdown,
    picture_file,
    preset_config,
    run_command,
    times_ms,
)
from benchmarks.cost_model import AllReduce, Machine, Scaled, Work, fit_compute, fit_exchange, pays_until, strong, weak
from hrm.config import PretrainConfig
from hrm.data.loader import TrainLoader
from hrm.distributed.world import World, gather_on_main, join_world
from hrm.errors import UserError
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture
from hrm.evaluation.runner import make_runner
from hrm.models.architecture import architecture_of
from hrm.models.recurrent import DataSizes, RecurrentModel
from hrm.training.step import initial_state, make_train_step

_SCALES = tuple(2**power for power in range(11))
_WIDE = ("arch.hidden_size=2048", "arch.num_heads=32")
_WIDE_BATCH = 8
_STATE_BYTES = 16  # of a weight, which FSDP divides: master, gradient and two moments in float32
_COPY_BYTES = 2  # of a weight, which it keeps whole


class Run(NamedTuple):
    """A whole training run."""

    name: str
    epochs: int
    examples: float  # in an epoch
    batch: int
    evaluations: int
    evaluated: int  # puzzles in each

    @property
    def steps(self) -> int:
        return int(self.epochs * self.examples / self.batch)


# The published recipe on the 800 tasks of ARC-AGI-1, without ConceptARC: their 3081 examples to train on are an epoch,
# their 419 test inputs are answered in 1000 augmentations and as they are.
ARC_1 = Run("ARC-1", epochs=100_000, examples=3081, batch=768, evaluations=10, evaluated=419 * 1001)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", default="", help="numbers to measure; default: 1, 2 and 4, as many as GPUs")
    parser.add_argument(
        "--shapes", default="384x81,96x900", help="sequences of a process x tokens, the ARC-1 run's last"
    )
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure with these processes alone, into a file")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", help="measure nothing, read these")
    parser.add_argument("--gpus-on-host", type=int, default=8, help="of the hosts to predict")
    parser.add_argument(
        "--network", type=float, default=50.0, help="GB/s between hosts for each GPU, where not measured"
    )
    parser.add_argument("--network-latency", type=float, default=0.02, help="ms of an exchange, each doubling of hosts")
    parser.add_argument("--picture", type=picture_file, help="draw efficiency against GPUs to this .svg or .png")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.measure:
        with join_world(arguments.device) as world:
            found = _measure(arguments, world)
        if world.is_main:
            arguments.measure.write_text(json.dumps(found) + "\n")
        return
    measured = _joined(
        [json.loads(file.read_text()) for file in arguments.measured] if arguments.measured else _launched(arguments)
    )
    print(_report(measured, arguments))


# ---- measuring


def _launched(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each number of processes measured, in a launch of its own."""
    if not all(count.isdecimal() for count in arguments.processes.split(",") if count):
        raise UserError(f"--processes {arguments.processes} is no list of numbers; give such as 1,2,4.")
    counts = [int(count) for count in arguments.processes.split(",") if count] or [
        count for count in (1, 2, 4) if count <= max(1, torch.cuda.device_count())
    ]
    if 1 not in counts:
        raise UserError(f"--processes {arguments.processes} leaves out 1, which all others are compared with: add it.")
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            file = Path(scratch) / f"{count}.json"
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            asked = ["--device", arguments.device, "--shapes", arguments.shapes, "--kernels", arguments.kernels]
            asked += ["--repeats", str(arguments.repeats), "--measure", str(file), *arguments.overrides]
            command = [sys.executable, *(torchrun if count > 1 else ()), "-m", "benchmarks.scaling", *asked]
            if subprocess.run(command, env=environment, check=False).returncode:
                raise UserError(f"measuring with {count} process(es) failed: the lines above say why.")
            found.append(json.loads(file.read_text()))
    return found


def _measure(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Steps, evaluation and loader by shape, and exchanges, on all processes there are."""
    steps, models = [], []
    for shape in map(Shape.parse, arguments.shapes.split(",")):
        # One process tells what a sequence costs, several what the same share and the same batch cost.
        shares = [shape.batch_size // part for part in ((1, 2, 4) if world.size == 1 else (1, world.size))]
        for share in dict.fromkeys(share for share in shares if share):
            config = preset_config(
                arguments.kernels, replace(shape, batch_size=share * world.size), arguments.overrides
            )
            row, model = _measure_share(config, replace(shape, batch_size=share), world, arguments.repeats)
            slowest = gather_on_main(row, world)
            steps.append(
                row | {name: max(each[name] for each in slowest) for name in row if slowest and name != "batch"}
            )
            if world.is_main:
                print({"processes": world.size, **steps[-1]}, flush=True)
        models.append(model)
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    exchanges = _exchanges(int(models[0]["exchanged"]), world, arguments.repeats)
    about = {"processes": world.size, "hosts": world.size // on_host}
    return {
        "about": machine(world.device),
        "steps": [about | step for step in steps],
        "exchanges": [about | exchange for exchange in exchanges],
        "models": models,
    }


def _measure_share(
    config: PretrainConfig, shape: Shape, world: World, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What this process measures with its share of a batch, and what it knows of the model."""
    device = world.device
    torch.compiler.reset()  # what other shapes compiled would count against the limit
    with tempfile.TemporaryDirectory() as scratch:
        pack, stream = batches(None, shape, Path(scratch))
        state = initial_state(config, pack, world)
        step = make_train_step(config, world, state)
        times = times_ms(lambda: step(next(stream)), device, 5, repeats)
        model, batch = state.model.eval(), next(stream)
        run = make_runner(model, world)
        on_device = {name: field.to(device) for name, field in batch.items()}
        with model.weights_at_hand():
            evaluation = statistics.median(times_ms(lambda: run(on_device), device, 2, max(1, repeats // 5)))
        loader = TrainLoader(pack, shape.batch_size, 0, epochs_per_pass=1 + 30 * shape.batch_size // 1000).iterate(0)
        loading = times_ms(lambda: next(loader), torch.device("cpu"), 5, 20)
    inner = model.model.inner
    row = {
        "seq_len": shape.seq_len,
        "batch": shape.batch_size,
        "ms": statistics.median(times),
        "spread ms": _spread(times),
        "ACT step ms": evaluation / model.halt_max_steps,
        "loader ms": statistics.median(loading),
    }
    return row, {
        "seq_len": shape.seq_len,
        "exchanged": _dense_bytes(inner),
        "rows": 4 * config.arch.puzzle_emb_ndim,
        "flops": model.train_step_flops(),
    }


def _spread(times: Sequence[float]) -> float:
    """A normal distribution's deviation, from the upper decile: what others wait for is the slow side."""
    if len(times) < 10:
        return 0.0
    return max(0.0, (statistics.quantiles(times, n=10)[-1] - statistics.median(times)) / 1.2816)


def _dense_bytes(model: RecurrentModel) -> int:
    """Of the gradients that are summed in float32: of all weights but the puzzle table, which hands over rows."""
    return sum(4 * weight.numel() for weight in model.parameters())


def _exchanges(size: int, world: World, repeats: int) -> list[dict[str, float]]:
    """All-reduces of a few bytes, of the gradients and of a quarter of them."""
    if world.size == 1:
        return []
    found = []
    for count in (1, size // 16, size // 4):
        values = torch.zeros(count, device=world.device)
        times = times_ms(partial(dist.all_reduce, values), world.device, 5, repeats)
        found.append({"size": 4.0 * count, "ms": statistics.median(times)})
    return found


# ---- predicting


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several measurements as one; files that this benchmark wrote hold theirs in `measured`."""
    parts = [part.get("measured", part) for part in parts]
    joined: dict[str, Any] = {"about": parts[0]["about"], "models": parts[0]["models"]}
    return joined | {name: [row for part in parts for row in part[name]] for name in ("steps", "exchanges")}


def fit(measured: Mapping[str, Any], arguments: argparse.Namespace) -> tuple[Machine, dict[int, Work]]:
    """The machine, and the work of a training step by the tokens of a sequence."""
    exchanges = measured["exchanges"]
    on_host = [AllReduce(row["processes"], row["size"], row["ms"]) for row in exchanges if row["hosts"] == 1]
    latency, bus = fit_exchange(on_host) if on_host else (0.0, math.inf)
    network = arguments.network * 1e6
    if between := [row for row in exchanges if row["hosts"] > 1]:
        largest = max(between, key=lambda row: (row["size"], row["processes"]))
        processes, hosts = largest["processes"], largest["hosts"]
        network = 2 * (processes - 1) / processes * largest["size"] / largest["ms"] / (processes / hosts)
    of_machine = Machine(latency, bus, network, arguments.network_latency, arguments.gpus_on_host)
    works = {}
    for model in measured["models"]:
        alone = [row for row in measured["steps"] if row["processes"] == 1 and row["seq_len"] == model["seq_len"]]
        launch, sequence = fit_compute({row["batch"]: row["ms"] for row in alone})
        most = max(alone, key=lambda row: row["batch"])
        works[model["seq_len"]] = Work(
            launch,
            sequence,
            most["spread ms"],
            most["loader ms"] / most["batch"],
            most["ACT step ms"] / most["batch"],
            model["exchanged"],
            model["rows"],
        )
    return of_machine, works


def held_to(measured: Mapping[str, Any], of_machine: Machine, works: Mapping[int, Work]) -> list[dict[str, Any]]:
    """Every measured step beside what the model says of it."""
    rows = []
    for row in measured["steps"]:
        predicted = works[row["seq_len"]].step_ms(of_machine, row["processes"], row["batch"])
        rows.append(
            {
                "processes": row["processes"],
                "tokens": row["seq_len"],
                "sequences of each": row["batch"],
                "measured ms": row["ms"],
                "predicted ms": predicted,
                "off by": f"{100 * (predicted / row['ms'] - 1):+.1f} %",
                "ACT step ms": row["ACT step ms"],
                "loader ms": row["loader ms"],
            }
        )
    return rows


def wide_work(arguments: argparse.Namespace, of_published: Work, flops: float, seq_len: int) -> tuple[Work, int]:
    """A training step of a wide model under FSDP, at the measured rate of operations, and its number of weights."""
    config = preset_config(arguments.kernels, Shape(1, seq_len), [*arguments.overrides, *_WIDE])
    with FakeTensorMode():  # sizes alone
        model = architecture_of(config.arch).model(
            config.arch, DataSizes(seq_len, 12, 1), torch.Generator().manual_seed(0)
        )
    weights, factor = _dense_bytes(model) // 4, model.train_step_flops() / flops
    # Weights are gathered in 2 bytes and gradients scattered in 4, each half of what a sum of as many bytes moves.
    return replace(
        of_published,
        sequence_ms=of_published.sequence_ms * factor,
        spread_ms=of_published.spread_ms * factor,
        evaluation_ms=of_published.evaluation_ms * factor,
        exchanged=3.0 * weights,
        rows=4.0 * config.arch.puzzle_emb_ndim,
    ), weights


def of_run(run: Run, work: Work, of_machine: Machine, act_steps: int) -> list[dict[str, Any]]:
    """Hours and GPU-hours of a run by the number of GPUs."""
    rows = []
    for scaled in strong(work, of_machine, run.batch, _SCALES):
        training = run.steps * scaled.ms / 3.6e6
        one_pass = work.evaluation_step_ms(run.evaluated / scaled.gpus) * act_steps
        hours = training + run.evaluations * one_pass / 3.6e6
        rows.append(
            {
                "GPUs": scaled.gpus,
                "sequences of each": scaled.batch,
                "step ms": scaled.ms,
                "hours": hours,
                "of them evaluation": hours - training,
                "GPU-hours": hours * scaled.gpus,
            }
        )
    return rows


class Curve(NamedTuple):
    """Predictions by the number of GPUs, and what was measured of them."""

    title: str
    rows: list[Scaled]
    measured: dict[int, float]  # efficiency by the number of processes
    weights: int = 0  # of a model under FSDP


def _curves(shapes: Sequence[Shape], measured: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Curve]:
    of_machine, works = fit(measured, arguments)
    ms = {(row["processes"], row["seq_len"], row["batch"]): row["ms"] for row in measured["steps"]}
    for shape in shapes:
        batch, seq_len = shape.batch_size, shape.seq_len
        same_share = {
            count: ms[1, seq_len, batch] / ms[count, seq_len, batch]
            for count in _SCALES
            if (count, seq_len, batch) in ms
        }
        work = works[seq_len]
        title = f"{seq_len} tokens, {batch} sequences on each GPU"
        yield Curve(title, weak(work, of_machine, batch, _SCALES), same_share)
        title = f"{seq_len} tokens, {2 * batch} sequences on all GPUs"
        yield Curve(title, strong(work, of_machine, 2 * batch, _SCALES), {})
    seq_len = shapes[-1].seq_len
    flops = next(model["flops"] for model in measured["models"] if model["seq_len"] == seq_len)
    wide, weights = wide_work(arguments, works[seq_len], flops, seq_len)
    title = f"{weights / 1e6:,.0f} M weights under FSDP, {seq_len} tokens, {_WIDE_BATCH} sequences on each GPU"
    yield Curve(title, weak(wide, of_machine, _WIDE_BATCH, _SCALES), {}, weights)


def _table(curve: Curve) -> list[dict[str, Any]]:
    rows = []
    for scaled in curve.rows:
        memory = (_STATE_BYTES / scaled.gpus + _COPY_BYTES) * curve.weights / 2**30
        rows.append(
            {
                "GPUs": scaled.gpus,
                "sequences of each": scaled.batch,
                "ms": scaled.ms,
                "puzzles/s": scaled.sequences_per_s,
                "efficiency": scaled.efficiency,
                **({"GiB of weights": memory} if curve.weights else {}),
            }
        )
    return rows


def _report(measured: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """Write the tables, and the picture if one is asked for; returns the tables."""
    of_machine, works = fit(measured, arguments)
    shapes = [Shape.parse(shape) for shape in arguments.shapes.split(",")]
    if not all(shape.seq_len in works for shape in shapes):
        raise UserError(f"--shapes {arguments.shapes} has a length that was not measured: give those that were.")
    curves = list(_curves(shapes, measured, arguments))
    act_steps = preset_config(arguments.kernels, shapes[-1], arguments.overrides).arch.halt_max_steps
    of_arc = works[shapes[-1].seq_len]
    sections = [
        (
            "Measured, and what the model says of it",
            "Fitted to one process and to exchanges alone; the rows of several processes test it.",
            held_to(measured, of_machine, works),
        ),
        (
            "Fitted",
            ", ".join(f"{name} {value:.4g}" for name, value in asdict(of_machine).items()) + ".",
            [{"tokens": seq_len, **asdict(work)} for seq_len, work in works.items()],
        ),
        *(
            (
                curve.title,
                f"GPUs up to which each doubling gives 1.5 times the rate or more: {pays_until(curve.rows)}.",
                _table(curve),
            )
            for curve in curves
        ),
        (
            f"The whole {ARC_1.name} run",
            f"{ARC_1.steps:,} steps of {ARC_1.batch} sequences of {shapes[-1].seq_len} tokens, {ARC_1.evaluations} "
            f"evaluations of {ARC_1.evaluated:,} puzzles in {act_steps} ACT steps.",
            of_run(ARC_1, of_arc, of_machine, act_steps),
        ),
    ]
    text = "\n\n".join(f"## {title}\n\n{words}\n\n{markdown(rows)}" for title, words, rows in sections)
    about = {
        **measured["about"],
        "command": machine(torch.device("cpu"))["command"],  # this one, where another one measured
        "network": f"{of_machine.network_bytes_per_ms / 1e6:g} GB/s for each GPU",
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in about.items())
    file = arguments.output_dir / f"{about['date']}-scaling"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(f"{file.name}.md").write_text(f"# scaling\n\n{lines}\n\n{text}\n")
    predicted = {title: rows for title, _, rows in sections}
    content = {"about": about, "measured": measured, "machine": asdict(of_machine), "predicted": predicted}
    file.with_name(f"{file.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if arguments.picture:
        _draw(curves, about, arguments.picture)
    return text


def _draw(curves: Sequence[Curve], about: Mapping[str, str], picture: Path) -> None:
    """Efficiency by the number of GPUs: lines are predictions, dots are measured."""
    figure, ((axes,),) = new_picture(size=(7, 4))
    for curve, color in zip(curves, itertools.cycle(PALETTE), strict=False):
        gpus = [row.gpus for row in curve.rows]
        axes.plot(gpus, [100 * row.efficiency for row in curve.rows], color=color, label=curve.title)
        axes.plot(list(curve.measured), [100 * efficiency for efficiency in curve.measured.values()], "o", color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_SCALES, [str(count) for count in _SCALES])
    axes.set_ylim(0, 105)
    axes.set_xlabel(f"GPUs; {about['device']}, {about['network']} between hosts; dots are measured", fontsize=8)
    axes.set_ylabel("of the rate of as many GPUs by themselves (%)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, picture)


if __name__ == "__main__":
    run_command(main)
