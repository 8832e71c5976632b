"""Are gradients, losses and halting of a trained model by fast kernels as near to float32 as the definition's in bf16?

    python -m benchmarks.gradients checkpoints/run
    python -m benchmarks.gradients checkpoints/run --presets naive,auto,fp8 --steps 1,2,4,8,16 --published HRM

Every way takes the same training steps at weights that stay as they are, on real training batches and without
exploration. States go on from step to step as each way computes them, so that errors add up as in training. Which
sequences halt is what the definition in float32 decides, so that all go on with the same puzzles; other decisions are
counted. The published code runs as it is, eagerly and through torch.compile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    PUBLISHED,
    Shape,
    batches,
    data_path_of,
    machine,
    make_parser,
    markdown,
    presets_of,
    run_command,
    write_results,
)
from benchmarks.published import Published
from benchmarks.published_side import observe
from hrm.batch import Batch
from hrm.checkpoint.weights import find_checkpoint, load_weights, read_weights
from hrm.config.entry import DTYPES
from hrm.data.pack import Pack, open_pack
from hrm.distributed.world import join_world
from hrm.errors import UserError
from hrm.evaluation.loading import ModelSizes
from hrm.models import RecurrentConfig, arch_config, build_model

Steps = dict[int, dict[str, Any]]
"""By the number of a training step what `benchmarks.published_side.observe` keeps of it."""
Row = dict[str, Any]

_DEFINITION = "naive"
_LOSSES = ("loss", "lm_loss", "q_continue_loss")  # the last only of models that learn to continue


@dataclass(frozen=True)
class _Work:
    """The training steps that all take."""

    arch: RecurrentConfig  # without exploration
    weights: dict[str, Tensor]
    weights_file: Path
    pack: Pack
    sizes: ModelSizes
    batches: list[Batch]  # one for each step, from the first
    kept: list[int]  # the steps to compare, from 1 on
    device: torch.device

    def by(self, preset: str, halted: Sequence[Tensor] | None = None) -> tuple[Steps, list[Tensor]]:
        """The steps by kernels of ours; see `observe`."""
        return self._by(preset, self.arch, halted)

    def in_float32(self) -> tuple[Steps, list[Tensor]]:
        """The steps by the definition, with its own decisions on halting; see `observe`."""
        return self._by(_DEFINITION, replace(self.arch, forward_dtype="float32"), None)

    def _by(self, preset: str, arch: RecurrentConfig, halted: Sequence[Tensor] | None) -> tuple[Steps, list[Tensor]]:
        model = build_model(arch, **self.sizes._asdict(), kernels=preset, device=self.device)
        load_weights(model, self.weights, self.weights_file)
        return observe(model.train(), self.batches, self.kept, halted)

    def by_published(self, theirs: Published, halted: Sequence[Tensor], compiled: bool) -> Steps:
        """The steps by the published code."""
        path, device = self.pack.path, self.device
        return theirs.gradients(
            self.arch, path, self.weights, self.batches, halted, self.kept, device, compiled=compiled
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="as evaluate.py takes it")
    parser.add_argument("--data", help="a pack; default: the one that the checkpoint was trained on")
    parser.add_argument("--presets", default="naive,auto", help="several of config/kernels/")
    parser.add_argument("--steps", default="1,2,4,8,16", help="which training steps to compare; the last ends the run")
    parser.add_argument("--dtype", choices=DTYPES[1:], help="of all but float32; default: as in training")
    parser.add_argument("--batch-size", type=int, default=384)
    parser.add_argument("--published", type=Path, metavar="CHECKOUT", help="the published code's checkout too")
    arguments = parser.parse_args(argv)
    presets = presets_of(arguments.presets)
    theirs = Published(arguments.published) if arguments.published else None
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as scratch:
        work = _work(arguments, world.device, Path(scratch))
        reference, halted = work.in_float32()
        ways: dict[str, Callable[[], Steps]] = {
            preset: lambda preset=preset: work.by(preset, halted)[0]  # type: ignore[misc]
            for preset in presets
        }
        with ThreadPoolExecutor(2) as threads:  # of the published code's processes, which take long to compile
            if theirs:
                started: dict[str, Future[Steps]] = {
                    name: threads.submit(work.by_published, theirs, halted, compiled)
                    for name, compiled in _published_ways().items()
                }
                ways |= {name: partial(future.result) for name, future in started.items()}
            rows, groups = _compare(ways, reference)
        about = machine(world.device) | {
            "checkpoint": str(work.weights_file),
            "puzzles": f"{len(work.batches[0]['inputs'])} at a time of {work.pack.path}/train",
            "float32": f"{_DEFINITION} in it; what the other rows are compared with",
            "dtype": work.arch.forward_dtype,
            "loss, lm loss, q_continue loss": "of float32, a sequence; of others, by how many percent they differ",
            "logits, gradients": "norm of the difference / norm",
            "signs": "share of the gradients' elements whose sign is the same",
            "q": "root mean square of the differences of q_halt and q_continue, logits",
            "target": "mean difference of the target of q_continue, a probability",
            "halted, exact": "share of the sequences",
            "other answers": "share of the sequences whose answer is exact in one and not in the other",
            "other decisions": "share of the sequences that would halt where float32 goes on, or the other way round",
            f"x {_DEFINITION}, x {PUBLISHED}": "gradients / gradients of that row",
        }
    print(write_results("gradients", about, rows, arguments.output_dir, groups=groups))
    if groups:
        title = "Gradients by kind of parameter, norm of the difference / norm, median of the steps"
        print(f"\n{title}:\n\n{markdown(groups)}")


def _published_ways() -> dict[str, bool]:
    """By the name of a row, whether it is compiled."""
    return {f"{PUBLISHED}, eager": False, **({} if os.environ.get("DISABLE_COMPILE") else {PUBLISHED: True})}


def _work(arguments: argparse.Namespace, device: torch.device, scratch: Path) -> _Work:
    try:
        kept = [int(number) for number in arguments.steps.split(",")]
    except ValueError:
        raise UserError(f"--steps {arguments.steps} is no list of numbers: give some, such as 1,2,4.") from None
    if min(kept) < 1:
        raise UserError(f"--steps {arguments.steps} is too small: give 1 or more.")
    checkpoint = find_checkpoint(arguments.checkpoint)
    data_path = data_path_of(checkpoint, arguments.data)
    metadata = open_pack(data_path, "train").metadata
    pack, stream = batches(data_path, Shape(arguments.batch_size, metadata.seq_len), scratch, max(kept))
    sizes = ModelSizes.of(metadata, arguments.batch_size)
    arch = arch_config(checkpoint.config["arch"], sizes.of_data(), where=f"{checkpoint.config_file}: arch")
    return _Work(
        replace(arch, halt_exploration_prob=0.0, forward_dtype=arguments.dtype or arch.forward_dtype),
        read_weights(checkpoint.weights_file),
        checkpoint.weights_file,
        pack,
        sizes,
        [{name: field.to(device) for name, field in next(stream).items()} for _ in range(max(kept))],
        kept,
        device,
    )


def _compare(ways: Mapping[str, Callable[[], Steps]], reference: Steps) -> tuple[list[Row], list[Row]]:
    """Rows of every way at every step, and of every way's gradients by kind of parameter."""
    rows = [_reference_row(number, step) for number, step in reference.items()]
    print(*rows, sep="\n", flush=True)
    groups: list[Row] = []
    for name, way in ways.items():
        of_steps = []
        try:
            for number, step in way().items():
                rows.append({"kernels": name, "step": number, **differences(step, reference[number])})
                if "stand-ins" in step:
                    rows[-1]["stand-ins"] = " and ".join(step["stand-ins"])
                print(rows[-1], flush=True)
                of_steps.append(_by_group(step["gradients"], reference[number]["gradients"]))
        except UserError as error:
            rows.append({"kernels": name, "cannot run": str(error)})
            print(rows[-1], flush=True)
            continue
        medians = {group: statistics.median(errors[group] for errors in of_steps) for group in of_steps[0]}
        groups.append({"kernels": name, **medians})
        print(groups[-1], flush=True)
    for baseline in (_DEFINITION, PUBLISHED):
        theirs = {row["step"]: row["gradients"] for row in rows if row["kernels"] == baseline and "gradients" in row}
        for row in rows:
            if "gradients" in row and theirs.get(row["step"]):
                row[f"x {baseline}"] = row["gradients"] / theirs[row["step"]]
    return rows, groups


def differences(step: Mapping[str, Any], reference: Mapping[str, Any]) -> Row:
    """How far a step's results, as `observe` keeps them, are from those of another."""
    gradients, expected = (_joined(each["gradients"], reference["gradients"]) for each in (step, reference))
    q = torch.stack([step[name] - reference[name] for name in ("q_halt_logits", "q_continue_logits")])
    losses = {
        name.replace("_loss", " loss"): float(100 * (step[name] / reference[name] - 1))
        for name in _LOSSES
        if name in step
    }
    target = "target_q_continue"
    return {
        **losses,
        "logits": _relative(step["logits"], reference["logits"]),
        "q": float(q.square().mean().sqrt()),
        **({"target": float((step[target] - reference[target]).abs().mean())} if target in step else {}),
        "halted": _share(step["halted"]),
        "other decisions": _share(step["halted"] != reference["halted"]),
        "exact": _share(step["exact"]),
        "other answers": _share(step["exact"] != reference["exact"]),
        "gradients": _relative(gradients, expected),
        "norm / norm": float(gradients.norm() / expected.norm()),
        "signs": _share((gradients.sign() == expected.sign())[expected != 0]),
    }


def _reference_row(number: int, step: Mapping[str, Any]) -> Row:
    """The values that others are compared with."""
    count = len(step["halted"])
    losses = {name.replace("_loss", " loss"): float(step[name]) / count for name in _LOSSES if name in step}
    shares = {name: _share(step[name]) for name in ("halted", "exact")}
    return {"kernels": "float32", "step": number, **losses, **shares}


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _joined(gradients: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Tensor:
    """All gradients in one vector.

    Raises:
        UserError: there are others than `names`.
    """
    if gradients.keys() != names.keys():
        raise UserError(f"only one of the two has a gradient of {min(gradients.keys() ^ names.keys())}.")
    return torch.cat([gradients[name].flatten() for name in names])


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _by_group(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of the parameters of each kind: of the same matrix in all layers of a module."""
    names: dict[str, dict[str, Tensor]] = {}
    for name, gradient in expected.items():
        names.setdefault(_group_of(name), {})[name] = gradient
    return {
        group: _relative(_joined({name: gradients[name] for name in part}, part), _joined(part, part))
        for group, part in names.items()
    }


def _group_of(name: str) -> str:
    """`H_level qkv_proj` for `model.inner.H_level.layers.0.self_attn.qkv_proj.weight`, `lm_head` for its weight."""
    parts = name.removeprefix("model.inner.").split(".")
    return f"{parts[0]} {parts[-2]}" if len(parts) > 2 else parts[0]


if __name__ == "__main__":
    run_command(main)
