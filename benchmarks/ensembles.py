"""Accuracy against the number of forward passes, by the way of picking one of several answers to a puzzle.

python -m benchmarks.ensembles checkpoints/one checkpoints/other --augmentations 1,2,4,8,16
python -m benchmarks.ensembles sudoku --paths 1,2,4,8 --noise steps:0.3,start:1 --together 2x4 --picture ensembles.svg

Answers come from augmentations of each puzzle, from paths with noise on the states, and from several checkpoints. Each
is computed once; the rows are parts of them, and their seconds what those parts took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import data_path_of, machine, make_parser, picture_file, run_command, write_results
from hrm.batch import Batch
from hrm.checkpoint.weights import find_checkpoint, read_weights
from hrm.config import EnsembleConfig
from hrm.config.evaluation import PICKS
from hrm.data.loader import EvalLoader
from hrm.data.pack import Pack, PackSet, open_pack
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.ensemble import ANY, picked_by_all, way_sums
from hrm.evaluation.loading import ModelSizes, load_model
from hrm.evaluation.metrics import compare
from hrm.evaluation.paths import Answers, Noise, make_member
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture
from hrm.evaluation.symmetries import DeviceSymmetry, symmetries_of
from hrm.kernels import describe
from hrm.models import ACTLossHead
from hrm.tasks import task_of
from hrm.tasks.base import PuzzleSize, Rules, Symmetry

Row = dict[str, Any]
NO_NOISE = "none"


class Mix(NamedTuple):
    """Where the answers of a row come from."""

    checkpoints: int
    augmentations: int
    noise: str  # of the paths, as --noise has it
    paths: int


class Timed(NamedTuple):
    """Answers to all puzzles, and how long they took."""

    answers: Answers
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="as evaluate.py takes them")
    parser.add_argument(
        "--augmentations", "--images", default="1,2,4,8,16", help="of each puzzle, itself included: several numbers"
    )
    parser.add_argument("--paths", default="1", help="to an answer, without augmentations: several numbers")
    parser.add_argument("--noise", default="steps:0.3", help="of the paths: when, and how much; several")
    parser.add_argument("--noise-on", default="hidden", help="which states get it, as ensemble.noise_on")
    parser.add_argument("--together", default="", help="augmentations x paths for each of them, such as 4x4; several")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--act-max-steps", type=int, help="ACT steps of each answer; default: training's")
    parser.add_argument("--puzzles", type=int, default=2000, help="of each test set, evenly spread over it")
    parser.add_argument("--data", help="a pack; default: the one that the first checkpoint was trained on")
    parser.add_argument("--kernels", default="auto", help="a preset of config/kernels/")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--picture", type=picture_file, help="draw it, as .svg or .png")
    arguments = parser.parse_args(argv)
    for name in ("puzzles", "act_max_steps"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} {given} is too small: give 1 or more.")
    noises = {name: _noise(name, arguments.noise_on, arguments.seed) for name in arguments.noise.split(",")}
    mixes = _mixes(arguments, [*noises])

    checkpoints = [find_checkpoint(name) for name in arguments.checkpoints]
    data_path = data_path_of(checkpoints[0], arguments.data)
    pack = spread_out(open_pack(data_path, "test"), arguments.puzzles)
    symmetries = symmetries_of(pack, max(mix.augmentations for mix in mixes))
    rules = task_of(pack).rules(PuzzleSize.of(pack))
    sizes = ModelSizes.of(pack.metadata, arguments.batch_size)
    with join_world(arguments.device) as world:
        batches = [batch for _, batch, _ in EvalLoader(pack, arguments.batch_size)]
        models = []
        for checkpoint in checkpoints:
            weights = read_weights(checkpoint.weights_file)
            models.append(load_model(checkpoint, weights, sizes, arguments.kernels, world, arguments.act_max_steps))
        answers = AllAnswers(models, symmetries, noises, batches, rules, world)
        labels = torch.cat([batch["labels"] for batch in batches]).to(world.device)
        rows = []
        for mix in mixes:
            rows.append(row_of(mix, answers.of(mix), labels, checked=rules is not None))
            print(rows[-1], flush=True)
        about = machine(world.device)
    about |= {
        "checkpoints": ", ".join(str(checkpoint.weights_file) for checkpoint in checkpoints),
        "puzzles": f"{sum(len(data.inputs) for data in pack.sets.values())} of {data_path}/test",
        "kernels": f"{describe(models[0].kernels)}, {arguments.batch_size} puzzles at a time",
        "ACT steps": "forward passes for each puzzle, of all answers together; those of first end when one path halts",
        ", ".join(PICKS): "share of the puzzles exactly right by this way of picking",
        ANY: "share of the puzzles to which one of the answers is right",
    }
    if rules:
        about["rules checked"] = "answers that break the rules do not count where others keep them"
    print(write_results("ensembles", about, rows, arguments.output_dir))
    if arguments.picture:
        draw(rows, arguments.picture)


def _mixes(arguments: argparse.Namespace, noises: Sequence[str]) -> list[Mix]:
    """The rows of the table that the command line asks for."""
    augmentations = _numbers("--augmentations", arguments.augmentations)
    mixes = [Mix(1, number, NO_NOISE, 1) for number in augmentations]
    if (all_of_them := len(arguments.checkpoints)) > 1:
        mixes += [Mix(all_of_them, number, NO_NOISE, 1) for number in sorted({1, augmentations[-1]})]
    several = [number for number in _numbers("--paths", arguments.paths) if number > 1]
    mixes += [Mix(1, 1, noise, number) for noise in noises for number in several]
    for pair in filter(None, arguments.together.split(",")):
        of_each, by, paths = pair.partition("x")
        if not by:
            raise UserError(f"--together {pair} cannot be read: write augmentations x paths, such as 4x4.")
        (count,), (num_paths,) = _numbers("--together", of_each), _numbers("--together", paths)
        mixes += [Mix(1, count, noise, num_paths) for noise in noises]
    return mixes


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError as error:
        raise UserError(f"{option} {text} cannot be read: give whole numbers.") from error
    if numbers[0] < 1:
        raise UserError(f"{option} {text} is too small: give 1 or more.")
    return numbers


def _noise(text: str, on: str, seed: int) -> Noise:
    at, _, std = text.partition(":")
    try:
        options = EnsembleConfig(paths=2, noise=float(std), noise_on=on, noise_at=at, seed=seed)
    except ValueError as error:
        raise UserError(f"--noise {text} cannot be read: write when and how much, such as steps:0.3.") from error
    noise = Noise.of(options)
    assert noise is not None
    return noise


class AllAnswers:
    """What the models answer, each computed when it is first asked for."""

    def __init__(
        self,
        models: Sequence[ACTLossHead],
        symmetries: Sequence[Symmetry],
        noises: Mapping[str, Noise],
        batches: Sequence[Batch],
        rules: Rules | None,
        world: World,
    ) -> None:
        self._models, self._rules, self._world = models, rules, world
        self._symmetries = [DeviceSymmetry.of(symmetry, world.device) for symmetry in symmetries]
        self._noises: dict[str, Noise | None] = {NO_NOISE: None, **noises}
        self._batches = [{name: field.to(world.device) for name, field in batch.items()} for batch in batches]
        self._known: dict[tuple[int, int, str, int], Timed] = {}

    def of(self, mix: Mix) -> Timed:
        """All of a row, stacked [K, N, ...]."""
        parts = [
            self._one(model, symmetry, mix.noise if path else NO_NOISE, path)
            for path, symmetry, model in product(range(mix.paths), range(mix.augmentations), range(mix.checkpoints))
        ]
        return Timed(Answers.stacked([part.answers for part in parts]), sum(part.seconds for part in parts))

    def _one(self, model: int, symmetry: int, noise: str, path: int) -> Timed:
        key = model, symmetry, noise, path
        if key not in self._known:
            self._known[key] = self._computed(
                self._models[model], self._symmetries[symmetry], self._noises[noise], path
            )
        return self._known[key]

    def _computed(self, model: ACTLossHead, symmetry: DeviceSymmetry, noise: Noise | None, path: int) -> Timed:
        member = make_member(model, self._world, noise)
        with model.weights_at_hand():
            if self._world.device.type != "cpu" or model.kernels.compile:
                for _ in range(2):  # compile, tune and record before the clock runs
                    member(self._batches[0], symmetry, path)
            started = self._clock()
            parts = [member(batch, symmetry, path) for batch in self._batches]
            seconds = self._clock() - started
        if self._rules:
            pairs = zip(parts, self._batches, strict=True)
            parts = [answers.checked(self._rules, batch["inputs"]) for answers, batch in pairs]
        return Timed(Answers(*(torch.cat(fields) for fields in zip(*parts, strict=True))), seconds)

    def _clock(self) -> float:
        """Seconds, once the device is done."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        return time.perf_counter()


def row_of(mix: Mix, timed: Timed, labels: Tensor, *, checked: bool) -> Row:
    """A line of the table: how many puzzles each way of picking gets exactly right."""
    answers = timed.answers
    unchecked = answers._replace(keeps=torch.ones_like(answers.keeps), halted_keeps=torch.ones_like(answers.keeps))
    count = compare(labels, answers.tokens[0]).counted.sum()
    sums = way_sums(unchecked, picked_by_all(unchecked), labels)
    found = {name: float(value / count) for name, value in sums.items()}
    row: Row = {**mix._asdict(), "answers": len(answers.tokens), "ACT steps": found["vote/act_steps"]}
    row |= {way: found[f"{way}/exact_accuracy"] for way in (*PICKS, ANY)}
    row["ACT steps, first"] = found["first/act_steps"]
    if checked:
        of_checked = way_sums(answers, picked_by_all(answers), labels)
        row["vote, rules checked"] = float(of_checked["vote/exact_accuracy"] / count)
    return row | {"seconds": timed.seconds}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy over ACT steps: a panel for each source of answers, a line for each way of picking."""
    rows = [row for row in rows if row["checkpoints"] == 1]
    sources = {"augmentations": [row for row in rows if row["noise"] == NO_NOISE]}
    for noise in dict.fromkeys(row["noise"] for row in rows if row["noise"] != NO_NOISE):
        of_noise = [row for row in rows if row["noise"] == noise and row["augmentations"] == 1]
        sources[f"paths, noise {noise}"] = [rows[0], *of_noise]
    sources = {name: of_source for name, of_source in sources.items() if len(of_source) > 1} or sources
    figure, panels = new_picture(1, len(sources), size=(4 * len(sources), 3.6), sharey=True)
    for panel, (name, of_source) in zip(panels[0], sources.items(), strict=True):
        for way, color in zip((*PICKS, ANY), PALETTE, strict=False):
            steps = [row["ACT steps, first" if way == "first" else "ACT steps"] for row in of_source]
            style = {"color": color, "linestyle": ":" if way == ANY else "-", "marker": "o", "markersize": 3}
            panel.plot(steps, [100 * row[way] for row in of_source], label=way, **style)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(title=name, xlabel="ACT steps for each puzzle")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("puzzles exactly right (%)")
    panels[0][-1].legend(frameon=False, fontsize=8)
    save_picture(figure, file)


def spread_out(pack: Pack, count: int) -> Pack:
    """The pack with at most `count` examples of each set, at even distances."""
    return replace(pack, sets={name: _pick(data, count) for name, data in pack.sets.items()})


def _pick(data: PackSet, count: int) -> PackSet:
    rows = np.linspace(0, len(data.inputs) - 1, min(count, len(data.inputs))).astype(np.int64)
    puzzles = np.searchsorted(data.puzzle_indices, rows, side="right") - 1
    offsets = np.arange(len(rows) + 1)  # each a puzzle and a group of its own
    return PackSet(data.inputs[rows], data.labels[rows], data.puzzle_identifiers[puzzles], offsets, offsets)


if __name__ == "__main__":
    run_command(main)
