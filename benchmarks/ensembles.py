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
from hrm.evaluation.ensemble import Rules, Symmetry, make_answering, vote
from hrm.evaluation.entry import Sizes, load_model
from hrm.evaluation.runner import Sums, judge, score
from hrm.evaluation.tasks import known_rules, symmetries
from hrm.kernels import describe
from hrm.models import ACTLossHead


class Member(NamedTuple):
    """What one checkpoint said to one image of every puzzle."""

    tokens: list[Tensor]  # [B, S] of each batch, turned back
    q_halt: list[Tensor]  # [B], logits
    sound: list[Tensor] | None  # [B] bool, whether the answers keep to the rules of the task, if these are known
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
    images, rules, meta = symmetries(pack, numbers[-1]), known_rules(pack), pack.metadata
    sizes = Sizes(arguments.batch_size, meta.seq_len, meta.vocab_size, meta.num_puzzle_identifiers)
    with join_world(arguments.device) as world:
        batches = [batch for _, batch, _ in EvalLoader(pack, arguments.batch_size)]
        said: list[list[Member]] = []
        for checkpoint in checkpoints:
            weights = read_weights(checkpoint.weights_file)
            model = load_model(checkpoint, weights, sizes, arguments.kernels, world, arguments.act_max_steps)
            said.append(answer(model, images, batches, world, rules))
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
    images: Sequence[Symmetry],
    batches: Sequence[Batch],
    world: World,
    rules: Rules | None,
) -> list[Member]:
    """A model's answers to each image of all puzzles, timed image by image."""
    on_device = [{name: field.to(world.device) for name, field in batch.items()} for batch in batches]
    voter = make_answering(model, world)
    members = []
    with model.weights_at_hand():
        if world.device.type != "cpu" or model.kernels.compile:
            for _ in range(2):  # compile, tune and record before the clock runs
                voter(on_device[0], images[0].to(world.device))
        for image in images:
            symmetry = image.to(world.device)
            started = _clock(world)
            tokens, q_halt = zip(*(voter(batch, symmetry) for batch in on_device), strict=True)
            seconds = _clock(world) - started
            sound = (
                [rules(batch["inputs"], said) for batch, said in zip(batches, tokens, strict=True)] if rules else None
            )
            members.append(Member(list(tokens), list(q_halt), sound, model.halt_max_steps, seconds))
    return members


def exact_accuracy(
    members: Sequence[Member], batches: Sequence[Batch], world: World, *, checked: bool = False
) -> float:
    """Share of the puzzles that the members' vote answers exactly right; `checked` against the rules, if asked."""
    sums = Sums(world)
    for index, batch in enumerate(batches):
        tokens = torch.stack([member.tokens[index] for member in members])
        q_halt = torch.stack([member.q_halt[index] for member in members])
        sound = torch.stack([member.sound[index] for member in members if member.sound]) if checked else None
        voted = vote(tokens, q_halt, sound)
        sums.add("all", score(judge(batch["labels"].to(world.device), voted)))
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
