"""What `evaluate.py` does: find a checkpoint, run it over the test split or one puzzle, print how it did."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hrm.checkpoint.run_folder import make_folder
from hrm.checkpoint.weights import Checkpoint, find_checkpoint, read_weights
from hrm.config import EnsembleConfig, EvaluateConfig
from hrm.data.builders.missing import how_to_build
from hrm.data.loader import EvalLoader, deaths_of_workers_told
from hrm.data.pack import Pack, open_pack
from hrm.data.published import local_pack
from hrm.distributed.world import World, gather_on_main, join_world
from hrm.errors import UserError, printable, printable_lines, shortened
from hrm.evaluation.early_halting import EarlyHalting, halting_metrics
from hrm.evaluation.ensemble import evaluate_ensemble, ways_table
from hrm.evaluation.evaluators import evaluators_of, summaries
from hrm.evaluation.loading import ModelSizes, describe_model, load_model, other_identifiers, trained_pack
from hrm.evaluation.metrics import MetricSums, Throughput, metrics_table
from hrm.evaluation.recording import artifact, record, store_of
from hrm.evaluation.report.writer import ReportWriter
from hrm.evaluation.runner import evaluate, parts_of, save_outputs, show_predictions
from hrm.evaluation.show import ShownPuzzles
from hrm.evaluation.solve import solve_puzzle
from hrm.evaluation.symmetries import rules_of, symmetries_of
from hrm.models import ACTLossHead
from hrm.output import output_that_counts
from hrm.remote.urls import parts_of_url
from hrm.results.records import Artifact
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator
from hrm.unforeseen import traceback_folder

if TYPE_CHECKING:
    from hrm.results.store import Store

_ABOUT_TABLE = {
    "mean": "Every puzzle has the mean of the puzzle table's rows (puzzle_emb=mean).",
    "zero": "Every puzzle has a vector of zeros from the puzzle table (puzzle_emb=zero).",
}

_HOW_PICKED = {
    "vote": "vote",
    "q": "highest q_halt",
    "converged": "most converged",
    "first": "first to halt",
}


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, float]:
    """Run `evaluate.py` as `config` says.

    Returns:
        The metrics by the names they are printed under, and `puzzles_per_second`; with `act=both` those with early
        halting begin with `halt/`. Nothing for a single puzzle.

    Raises:
        UserError: for a checkpoint, a pack or a puzzle that is missing, broken or does not fit the others.
    """
    _check_modes(config)
    with output_that_counts(), join_world(config.device) as world:
        checkpoint = find_checkpoint(config.checkpoint)
        if config.puzzle is not None:
            solve_puzzle(config, checkpoint, config.puzzle, world)
            return {}
        with store_of(config, world) as store:
            return _evaluate_splits(config, checkpoint, world, store)


def _check_modes(config: EvaluateConfig) -> None:
    """UserError for options that have no meaning together."""
    outputs = {"save_outputs": config.save_outputs, "show": config.show, "report": config.report}
    asked = [name for name, value in outputs.items() if value]
    if config.puzzle is not None:
        if config.results is not None:
            raise UserError("puzzle= cannot be used with results=: leave one of them out.")
        if asked or config.act == "both":
            raise UserError(f"puzzle= cannot be used with {(asked or ['act'])[0]}=: leave one of them out.")
        return
    if asked and config.act == "halt":
        raise UserError(f"{asked[0]}= needs every step of every puzzle: take act=full or act=both.")
    if config.ensemble != EnsembleConfig() and (asked or config.act != "full"):
        raise UserError(f"ensemble.* cannot be used with {(asked or ['act'])[0]}=: leave one of them out.")


@dataclass(frozen=True)
class _Split:
    """A checkpoint's model, and the test split to evaluate it on."""

    config: EvaluateConfig
    checkpoint: Checkpoint
    model: ACTLossHead
    pack: Pack
    data_path: str  # the path or URL that stands for it
    loader: EvalLoader
    sizes: ModelSizes
    world: World
    folder: Path  # of what is saved
    shown: ShownPuzzles | None  # with show=
    written: list[Artifact] = field(default_factory=list)  # files, for results=

    def note(self, kind: str, file: Path) -> None:
        """Note that a file was written."""
        if self.config.results is not None:
            self.written.append(artifact(kind, file))


def _data_paths(config: EvaluateConfig, checkpoint: Checkpoint) -> list[str]:
    """The packs to evaluate: the one asked for, or those that the run evaluated. TRM's configs list them."""
    if config.data_path:
        return [config.data_path]
    for option in ("data_paths_test", "data_paths", "data_path"):
        value = checkpoint.config.get(option)
        listed = value if isinstance(value, list) else [value]
        paths = [path for path in listed if isinstance(path, str)]
        if paths and len(paths) == len(listed):
            return paths
    raise UserError(f"{checkpoint.config_file} does not say which data it was trained on: add data_path=...")


def _evaluate_splits(
    config: EvaluateConfig, checkpoint: Checkpoint, world: World, store: Store | None
) -> dict[str, float]:
    """One pack after the other; of several, what is saved and returned is in folders and under names of theirs."""
    paths = _data_paths(config, checkpoint)
    if len(paths) == 1:
        return _evaluate_split(config, checkpoint, paths[0], world, store)
    results: dict[str, float] = {}
    folder = _output_folder(config, checkpoint)
    for number, path in enumerate(paths):
        names = [Path(other).name for other in paths]
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]}-{number + 1}"
        own = replace(config, output_dir=str(folder / name), report=config.report and str(Path(config.report) / name))
        found = _evaluate_split(own, checkpoint, path, world, store)
        results |= {f"{name}/{metric}": value for metric, value in found.items()}
    return results


def _evaluate_split(
    config: EvaluateConfig, checkpoint: Checkpoint, data_path: str, world: World, store: Store | None
) -> dict[str, float]:
    batch_size = config.global_batch_size or checkpoint.config.get("global_batch_size", 128)
    if type(batch_size) is not int:
        raise UserError(
            f"{checkpoint.config_file} has global_batch_size: {batch_size}; add global_batch_size=<number>."
        )
    path = local_pack(data_path)
    if not os.path.exists(path):  # pathlib raises errors about names that are too long
        raise UserError(
            f"The data pack {shortened(data_path)} does not exist: give its path, data_path=, or "
            + how_to_build(data_path, by_name=False)
        )
    pack = open_pack(path, "test")
    batch_size = _bounded(batch_size, pack, world)
    shown = ShownPuzzles(pack, config.show, world) if config.show else None
    folder = _output_folder(config, checkpoint)
    make_folder(folder, "output_dir")
    if config.report:
        make_folder(Path(config.report), "report")
    pin_memory = world.device.type == "cuda"
    loader = EvalLoader(pack, batch_size, world.rank, world.size, config.num_workers, pin_memory)
    sizes = ModelSizes.of(pack.metadata, batch_size // world.size)
    model = _load(config, checkpoint, sizes, pack, data_path, world)
    split = _Split(config, checkpoint, model, pack, data_path, loader, sizes, world, folder, shown)
    with traceback_folder(folder), deaths_of_workers_told():
        if world.is_main:
            print(
                printable(
                    f"{checkpoint.weights_file} on {data_path}/test, kernels: {describe_model(model, checkpoint)}"
                )
            )
            if config.puzzle_emb != "trained":
                print(_ABOUT_TABLE[config.puzzle_emb])
            elif warning := other_identifiers(checkpoint, model, pack, data_path):
                print(printable(f"warning: {warning}"), file=sys.stderr)
        results = {}
        if config.ensemble != EnsembleConfig():
            results = _evaluate_ensemble(split)
        elif config.act != "halt":
            results = _evaluate_full(split)
        if config.act != "full":
            early, prefix = _evaluate_early(split), "halt/" if results else ""
            results |= {f"{prefix}{name}": value for name, value in early.items()}
        written = gather_on_main(split.written, world)
        if store is not None:
            kernels = describe_model(model, checkpoint)
            files = [file for of_rank in written for file in of_rank]
            entry = record(store, config, checkpoint, data_path, pack, results, files, kernels, world)
            print(printable(f"Recorded as {entry.id} in {store}."))
        return results


def _bounded(batch_size: int, pack: Pack, world: World) -> int:
    """A global batch size, or that of the whole split if it is less: the rest would be padding."""
    most = max(len(data.inputs) for data in pack.sets.values())
    return min(batch_size, -(-most // world.size) * world.size)


def _load(
    config: EvaluateConfig, checkpoint: Checkpoint, sizes: ModelSizes, pack: Pack, data_path: str, world: World
) -> ACTLossHead:
    weights, one_of_several = read_weights(checkpoint.weights_file), trained_pack(checkpoint, pack, data_path)
    return load_model(
        checkpoint,
        weights,
        sizes,
        config.kernels,
        world,
        config.act_max_steps,
        config.dtype,
        config.puzzle_emb,
        one_of_several and one_of_several.rows,
        config.quantize,
    )


def _evaluate_full(split: _Split) -> dict[str, float]:
    """All ACT steps for every puzzle, and whatever is to be kept or shown of them."""
    config, world = split.config, split.world
    evaluators, throughput = evaluators_of(split.pack), Throughput(world)
    report = ReportWriter(split.pack, evaluators) if config.report else None
    watching = [*evaluators, split.shown] if split.shown else evaluators
    recorder = report.recorder if report else None
    metrics, outputs = evaluate(split.model, split.loader, world, config.save_outputs, watching, recorder, throughput)
    result = _print_result(split, "all steps for every puzzle", metrics, throughput, evaluators)
    if config.save_outputs:
        file = save_outputs(outputs, split.folder, split.checkpoint.step, world)
        print(printable(f"Saved {', '.join(outputs)} in {file}."))
        split.note("predictions", file)
    if split.shown:
        split.shown.show(split.checkpoint, split.folder)
    if report and config.report and not any(values["count"] for values in metrics.values()):
        if world.is_main:
            print("No report is written, for it would compare answers with labels, and there are none.")
    elif (
        report
        and config.report
        and (page := report.write(Path(config.report), split.checkpoint.weights_file, world, split.model))
    ):
        print(printable(f"Wrote {page}, and GIFs beside it."))
        split.note("report", page)
    return result


def _evaluate_early(split: _Split) -> dict[str, float]:
    """As many ACT steps for each puzzle as q_halt asks for."""
    world = split.world
    evaluators, throughput, sums = evaluators_of(split.pack), Throughput(world), MetricSums(world)
    early = EarlyHalting(split.model, split.sizes.batch_size, world.device, split.config.act_margin)
    for set_name, puzzles, predictions in early.answer(parts_of(split.loader, world), throughput):
        sums.add(set_name, halting_metrics(puzzles, predictions))
        show_predictions(evaluators, set_name, puzzles, predictions.tokens, predictions.q_halt)
    return _print_result(split, "as many steps as q_halt asks for", sums.averages(), throughput, evaluators)


def _evaluate_ensemble(split: _Split) -> dict[str, float]:
    """Several answers to every puzzle, and one picked of them."""
    options, world = split.config.ensemble, split.world
    others = [find_checkpoint(name) for name in options.checkpoints]
    models = [
        split.model,
        *(_load(split.config, other, split.sizes, split.pack, split.data_path, world) for other in others),
    ]
    evaluators, throughput = evaluators_of(split.pack), Throughput(world)
    symmetries = symmetries_of(split.pack, options.augmentations)
    if world.is_main and len(symmetries) > 1 and not (task := task_of(split.pack)).one_answer:
        print(
            f"warning: puzzles of the task {task.name} have several right answers, so that right answers to "
            "augmentations of a puzzle differ from one another and from the label; paths (ensemble.paths) do not.",
            file=sys.stderr,
        )
    rules = rules_of(split.pack) if options.check else None
    parts = parts_of(split.loader, world)
    scores = evaluate_ensemble(models, symmetries, options, parts, world, evaluators, throughput, rules)
    answers = len(models) * len(symmetries) * options.paths
    what = f"{_HOW_PICKED[options.pick]} of {answers} answers, checkpoints: {len(models)}"
    what += f", augmentations of each puzzle: {len(symmetries)}"
    if options.paths > 1:
        what += f", paths: {options.paths}"
    if rules:
        what += ", rules checked"
    result = _print_result(split, what, scores.metrics, throughput, evaluators)
    for set_name, ways in scores.ways.items():
        if world.is_main and ways["count"]:
            print(f"Exactly right in {set_name}, by the way of picking, and ACT steps for each puzzle:")
            print(ways_table(ways))
        result |= {f"{set_name}/{name}": value for name, value in ways.items()}
    return result


def _print_result(
    split: _Split,
    what: str,
    metrics: Mapping[str, Mapping[str, float]],
    throughput: Throughput,
    evaluators: Sequence[Evaluator],
) -> dict[str, float]:
    """Print what was measured, and return it by the names it is printed under."""
    rate = throughput.per_second()  # before the summaries, which take their time too
    texts = summaries(evaluators, split.world, split.folder)
    if split.world.is_main:
        lines = [f"{what}, {rate:,.0f} puzzles/s:", metrics_table(metrics), *filter(None, texts)]
        print(printable_lines("\n".join(lines)))
    named = {f"{of_set}/{name}": value for of_set, values in metrics.items() for name, value in values.items()}
    return named | {"puzzles_per_second": rate}


def _output_folder(config: EvaluateConfig, checkpoint: Checkpoint) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    if Path(config.checkpoint).exists():
        return checkpoint.folder
    return Path("outputs").joinpath(*parts_of_url(config.checkpoint))  # its own folder is in a cache
