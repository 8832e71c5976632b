"""Accuracy against the number of forward passes: images of each puzzle and several checkpoints, put to the vote.

python -m benchmarks.ensembles checkpoints/one checkpoints/other --images 1,2,4,8,16

Every checkpoint answers every image once; the rows are votes of parts of these answers, and their seconds what those
parts took.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine, make_parser, write_results
from hrm.batch import Batch
from hrm.checkpoint.weights import find_checkpoint, read_weights
from hrm.data.loader import EvalLoader
from hrm.data.pack import Pack, PackSet, open_pack
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.ensemble import DeviceSymmetry, keep_rules, make_member, symmetries_of, vote
from hrm.evaluation.loading import ModelSizes, load_model
from hrm.evaluation.metrics import MetricSums, accuracy_sums, compare
from hrm.kernels import describe
from hrm.models import ACTLossHead
from hrm.tasks import task_of
from hrm.tasks.base import PuzzleSize, Rules, Symmetry


class Member(NamedTuple):
    """One checkpoint's answers under one symmetry of every puzzle."""

    tokens: list[Tensor]  # [B, S] of each batch, mapped back
    q_halt: list[Tensor]  # [B], logits
    valid: list[Tensor] | None  # [B] bool, whether the answers keep the rules of the task, if these are known
    act_steps: int  # for each puzzle
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="as evaluate.py takes them")
    parser.add_argument("--images", default="1,2,4,8,16", help="of each puzzle, itself included: several numbers")
    parser.add_argument("--act-max-steps", type=int, help="ACT steps of each answer; default: training's")
    parser.add_argument("--puzzles", type=int, default=2000, help="of each test set, evenly spread over it")
    parser.add_argument("--data", help="a pack; default: the one that the first checkpoint was trained on")
    parser.add_argument("--kernels", default="auto", help="a preset of config/kernels/")
    parser.add_argument("--batch-size", type=int, default=500)
    arguments = parser.parse_args(argv)
    numbers = sorted({int(number) for number in arguments.images.split(",")})
    for name, given in (
        ("images", numbers[0]),
        ("puzzles", arguments.puzzles),
        ("act-max-steps", arguments.act_max_steps),
    ):
        if given is not None and given < 1:
            raise UserError(f"--{name} {given} is too small: give 1 or more.")

    checkpoints = [find_checkpoint(name) for name in arguments.checkpoints]
    data_path = arguments.data or checkpoints[0].config.get("data_path")
    if not isinstance(data_path, str):
        raise UserError(f"{checkpoints[0].config_file} does not say which data it was trained on: add --data.")
    pack = spread_out(open_pack(data_path, "test"), arguments.puzzles)
    symmetries, rules = symmetries_of(pack, numbers[-1]), task_of(pack).rules(PuzzleSize.of(pack))
    meta = pack.metadata
    sizes = ModelSizes(arguments.batch_size, meta.seq_len, meta.vocab_size, meta.num_puzzle_identifiers)
    with join_world(arguments.device) as world:
        batches = [batch for _, batch, _ in EvalLoader(pack, arguments.batch_size)]
        said: list[list[Member]] = []
        for checkpoint in checkpoints:
            weights = read_weights(checkpoint.weights_file)
            model = load_model(checkpoint, weights, sizes, arguments.kernels, world, arguments.act_max_steps)
            said.append(answer(model, symmetries, batches, world, rules))
        subsets = [(1, number) for number in numbers]
        if len(said) > 1:
            subsets += [(len(said), number) for number in sorted({1, numbers[-1]})]
        rows = []
        for count, number in subsets:
            members = [member for of_model in said[:count] for member in of_model[:number]]
            row = {
                "checkpoints": count,
                "images": number,
                "ACT steps": sum(member.act_steps for member in members),
                "exact accuracy": exact_accuracy(members, batches, world),
            }
            if rules:
                row["and rules checked"] = exact_accuracy(members, batches, world, checked=True)
            rows.append(row | {"seconds": sum(member.seconds for member in members)})
        about = machine(world.device) | {
            "checkpoints": ", ".join(str(checkpoint.weights_file) for checkpoint in checkpoints),
            "puzzles": f"{sum(len(data.inputs) for data in pack.sets.values())} of {data_path}/test",
            "kernels": f"{describe(model.kernels)}, {arguments.batch_size} puzzles at a time",
            "ACT steps": "of all forward passes together, for each puzzle",
        }
        if rules:
            about["rules checked"] = "answers that break the rules do not count where others keep them"
    print(write_results("ensembles", about, rows, arguments.output_dir))


def answer(
    model: ACTLossHead,
    symmetries: Sequence[Symmetry],
    batches: Sequence[Batch],
    world: World,
    rules: Rules | None,
) -> list[Member]:
    """A model's answers under each symmetry of all puzzles, timed one by one."""
    on_device = [{name: field.to(world.device) for name, field in batch.items()} for batch in batches]
    member = make_member(model, world)
    mapped = [DeviceSymmetry.of(symmetry, world.device) for symmetry in symmetries]
    members = []
    with model.weights_at_hand():
        if world.device.type != "cpu" or model.kernels.compile:
            for _ in range(2):  # compile, tune and record before the clock runs
                member(on_device[0], mapped[0])
        for symmetry in mapped:
            started = _clock(world)
            tokens, q_halt = zip(*(member(batch, symmetry) for batch in on_device), strict=True)
            seconds = _clock(world) - started
            valid = None
            if rules:
                valid = [keep_rules(rules, batch["inputs"], said) for batch, said in zip(batches, tokens, strict=True)]
            members.append(Member(list(tokens), list(q_halt), valid, model.halt_max_steps, seconds))
    return members


def exact_accuracy(
    members: Sequence[Member], batches: Sequence[Batch], world: World, *, checked: bool = False
) -> float:
    """Share of the puzzles that the members' vote answers exactly right; `checked` against the rules, if asked."""
    sums = MetricSums(world)
    for index, batch in enumerate(batches):
        tokens = torch.stack([member.tokens[index] for member in members])
        q_halt = torch.stack([member.q_halt[index] for member in members])
        valid = torch.stack([member.valid[index] for member in members if member.valid]) if checked else None
        voted = vote(tokens, q_halt, valid)
        sums.add("all", accuracy_sums(compare(batch["labels"].to(world.device), voted)))
    return sums.averages()["all"]["exact_accuracy"]


def _clock(world: World) -> float:
    """Seconds, once the device is done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def spread_out(pack: Pack, count: int) -> Pack:
    """The pack with at most `count` examples of each set, at even distances."""
    return replace(pack, sets={name: _pick(data, count) for name, data in pack.sets.items()})


def _pick(data: PackSet, count: int) -> PackSet:
    rows = np.linspace(0, len(data.inputs) - 1, min(count, len(data.inputs))).astype(np.int64)
    puzzles = np.searchsorted(data.puzzle_indices, rows, side="right") - 1
    offsets = np.arange(len(rows) + 1)  # each a puzzle and a group of its own
    return PackSet(data.inputs[rows], data.labels[rows], data.puzzle_identifiers[puzzles], offsets, offsets)


if __name__ == "__main__":
    main()
