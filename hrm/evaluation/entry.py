"""What `evaluate.py` does: find a checkpoint, run it over the test split or one puzzle, say how it did."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.batch import IGNORE_LABEL_ID
from hrm.checkpoint.run_folder import METRICS_FILE, make_folder
from hrm.checkpoint.weights import Checkpoint, find_checkpoint, load_weights, read_weights
from hrm.config import EnsembleConfig, EvaluateConfig, KernelsConfig, arch_config
from hrm.data.loader import EvalLoader
from hrm.data.pack import Pack, open_pack
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.boards import LEGEND, Board, draw_boards, render_text
from hrm.evaluation.early_halting import EarlyHalting, halting_metrics
from hrm.evaluation.ensemble import evaluate_ensemble, make_answering, sudoku_rules, sudoku_symmetries, vote
from hrm.evaluation.plots import draw_curves, pyplot
from hrm.evaluation.runner import Examiner, Pace, Sums, evaluate, parts, save_outputs
from hrm.evaluation.tasks import ReportWriter, known_rules, symmetries, task_examiners
from hrm.kernels import describe
from hrm.models import ACTLossHead, build_model
from hrm.tasks.sudoku import BoxShape, Grids, conflicts, decode_tokens, encode_tokens, parse_grid, solve


def evaluate_checkpoint(config: EvaluateConfig) -> None:
    """Run `evaluate.py` as `config` says.

    Raises:
        UserError: for a checkpoint, a pack or a puzzle that is missing, broken or does not fit the others.
    """
    _check_modes(config)
    with join_world(config.device) as world:
        checkpoint = find_checkpoint(config.checkpoint)
        if config.puzzle is not None:
            _solve_puzzle(config, checkpoint, config.puzzle, world)
        else:
            _evaluate_split(config, checkpoint, world)


def _evaluate_split(config: EvaluateConfig, checkpoint: Checkpoint, world: World) -> None:
    data_path = config.data_path or checkpoint.config.get("data_path")
    if not isinstance(data_path, str):
        raise UserError(f"{checkpoint.config_file} does not say which data it was trained on: add data_path=...")
    batch_size = config.global_batch_size or checkpoint.config.get("global_batch_size", 128)
    if type(batch_size) is not int:
        raise UserError(
            f"{checkpoint.config_file} has global_batch_size: {batch_size}; add global_batch_size=<number>."
        )
    pack = open_pack(data_path, "test")
    if config.show:  # whatever hinders the show is said now, not after minutes of evaluation
        _check_show(pack, world)
        pyplot()
    folder = _output_folder(config, checkpoint)
    make_folder(folder, "output_dir")
    if config.report:
        make_folder(Path(config.report), "report")
    pin_memory = world.device.type == "cuda"
    loader = EvalLoader(pack, batch_size, world.rank, world.size, config.num_workers, pin_memory)
    meta = pack.metadata
    sizes = Sizes(batch_size // world.size, meta.seq_len, meta.vocab_size, meta.num_puzzle_identifiers)

    def load(each: Checkpoint) -> ACTLossHead:
        return load_model(each, read_weights(each.weights_file), sizes, config.kernels, world, config.act_max_steps)

    model = load(checkpoint)
    if world.is_main:
        print(f"{checkpoint.weights_file} on {data_path}/test, kernels: {describe(model.kernels)}")
    if config.ensemble != EnsembleConfig():
        others = [find_checkpoint(name) for name in config.ensemble.checkpoints]
        more = [load(other) for other in others]
        _evaluate_ensemble(config, [model, *more], pack, loader, world, folder)
        return
    if config.act != "halt":
        _evaluate_full(config, checkpoint, model, pack, loader, world, folder)
    if config.act != "full":
        _evaluate_early(config, model, pack, loader, sizes.batch_size, world, folder)


def _check_modes(config: EvaluateConfig) -> None:
    """UserError for options that have no meaning together."""
    outputs = {"save_outputs": config.save_outputs, "show": config.show, "report": config.report}
    asked = [name for name, value in outputs.items() if value]
    if config.puzzle is not None and (asked or config.act != "full"):
        raise UserError(f"puzzle= does not go with {(asked or ['act'])[0]}=: leave one of them out.")
    if asked and config.act == "halt":
        raise UserError(f"{asked[0]}= needs every step of every puzzle: take act=full or act=both.")
    if config.ensemble != EnsembleConfig() and (asked or config.act != "full"):
        raise UserError(f"ensemble.* does not go with {(asked or ['act'])[0]}=: leave one of them out.")


def _evaluate_full(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    model: ACTLossHead,
    pack: Pack,
    loader: EvalLoader,
    world: World,
    folder: Path,
) -> None:
    """All ACT steps for every puzzle, and whatever is to be kept or shown of them."""
    examiners, pace = task_examiners(pack), Pace(world)
    report = ReportWriter(pack, examiners) if config.report else None
    shown = ("inputs", "labels", "logits") if config.show else ()
    recorder = report.recorder if report else None
    metrics, outputs = evaluate(model, loader, world, (*config.save_outputs, *shown), examiners, recorder, pace)
    _print_result(world, "all steps for every puzzle", metrics, pace, examiners, folder)
    if config.save_outputs:
        wanted = {name: outputs[name] for name in config.save_outputs}
        print(f"Saved {', '.join(wanted)} in {save_outputs(wanted, folder, checkpoint.step, world)}.")
    if config.show and world.is_main:
        _show(outputs, config.show, checkpoint, folder)
    if report and config.report and (file := report.write(Path(config.report), checkpoint.weights_file, world)):
        print(f"Wrote {file}, and GIFs beside it.")


def _evaluate_early(
    config: EvaluateConfig,
    model: ACTLossHead,
    pack: Pack,
    loader: EvalLoader,
    batch_size: int,
    world: World,
    folder: Path,
) -> None:
    """As many ACT steps for each puzzle as q_halt asks for."""
    examiners, pace, sums = task_examiners(pack), Pace(world), Sums(world)
    early = EarlyHalting(model, batch_size, world.device, config.act_margin)
    for set_name, puzzles, answers in early.answer(parts(loader, world), pace):
        sums.add(set_name, halting_metrics(puzzles, answers))
        for examiner in examiners:
            examiner(set_name, puzzles, answers)
    _print_result(world, "as many steps as q_halt asks for", sums.averages(), pace, examiners, folder)


def _evaluate_ensemble(
    config: EvaluateConfig,
    models: Sequence[ACTLossHead],
    pack: Pack,
    loader: EvalLoader,
    world: World,
    folder: Path,
) -> None:
    """The vote of several answers to every puzzle."""
    examiners, pace = task_examiners(pack), Pace(world)
    images = symmetries(pack, config.ensemble.augmentations)
    rules = known_rules(pack) if config.ensemble.check else None
    if config.ensemble.check and rules is None:
        raise UserError(f"ensemble.check=true needs a Sudoku or a maze pack, for {pack.path} holds neither.")
    metrics = evaluate_ensemble(models, images, parts(loader, world), world, examiners, pace, rules)
    voters = len(models) * len(images)
    what = f"vote of {voters} answers, checkpoints: {len(models)}, images of each puzzle: {len(images)}"
    if rules:
        what += ", rules checked"
    _print_result(world, what, metrics, pace, examiners, folder)


def _print_result(
    world: World,
    what: str,
    metrics: Mapping[str, Mapping[str, float]],
    pace: Pace,
    examiners: Sequence[Examiner],
    folder: Path,
) -> None:
    rate = pace.per_second()  # before the verdicts, which take their time too
    verdicts = [each.verdict(world, folder) for each in examiners]
    if world.is_main:
        print("\n".join([f"{what}, {rate:,.0f} puzzles/s:", _table(metrics), *filter(None, verdicts)]))


def _solve_puzzle(config: EvaluateConfig, checkpoint: Checkpoint, text: str, world: World) -> None:
    """Solve one Sudoku board and print it."""
    shape = BoxShape.from_cells(len("".join(text.split())))
    puzzle = parse_grid(text, shape)
    if (clash := conflicts(puzzle, shape)).any():
        cell = int(clash.argmax())
        row, column = divmod(cell, shape.side)
        raise UserError(
            f"the puzzle breaks the rules: the {puzzle[cell]} in row {row + 1}, column {column + 1} stands more than "
            "once in a row, column or box."
        )
    if config.kernels.backend == "auto":
        # Compiling anything would outlast one puzzle by far.
        config = replace(config, kernels=KernelsConfig("naive", attention="sdpa"))
    checkpoints = [checkpoint, *map(find_checkpoint, config.ensemble.checkpoints)]
    models = [_model_for_board(each, shape, config, world) for each in checkpoints]
    answer, asked = _answer_board(models, puzzle, shape, config.ensemble.augmentations, world)
    solution = solve(puzzle, shape)
    board = Board(puzzle, answer, solution if solution.all() else None)
    if world.is_main:
        several = f" It took {asked} of {len(models) * config.ensemble.augmentations} answers." if asked > 1 else ""
        print(f"{_rendered(board)}\n{LEGEND}\n{_verdict(board)}{several}")


def _model_for_board(checkpoint: Checkpoint, shape: BoxShape, config: EvaluateConfig, world: World) -> ACTLossHead:
    """The checkpoint's model for one board at a time."""
    # A lone puzzle brings no pack, so the sizes that a pack would give are read off the weights.
    weights = read_weights(checkpoint.weights_file)
    table = "model.inner.embed_tokens.embedding_weight"
    if table not in weights or weights[table].ndim != 2:
        raise UserError(f"{checkpoint.weights_file} has no table {table}: it is not an HRM's.")
    vocab_size = len(weights[table])
    if vocab_size != shape.vocab_size:
        raise UserError(
            f"a board of {shape.cells} cells has {shape.vocab_size} tokens, but {checkpoint.weights_file} was trained "
            f"on {vocab_size}: give a puzzle of the kind it was trained on."
        )
    num_identifiers = len(weights.get("model.inner.puzzle_emb.weights", [None]))
    sizes = Sizes(1, shape.cells, vocab_size, num_identifiers)
    return load_model(checkpoint, weights, sizes, config.kernels, world, config.act_max_steps)


def _answer_board(
    models: Sequence[ACTLossHead], puzzle: Grids, shape: BoxShape, images: int, world: World
) -> tuple[Grids, int]:
    """The first answer that keeps to the rules, image by image and model by model, else the vote of all; and how many
    answers were asked for."""
    keeps_rules, answers, q_halts = sudoku_rules(shape), [], []
    batch = {
        "inputs": torch.from_numpy(encode_tokens(puzzle)).int().unsqueeze(0).to(world.device),
        "labels": torch.full((1, shape.cells), IGNORE_LABEL_ID, dtype=torch.int32, device=world.device),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32, device=world.device),
    }
    voters = [make_answering(model, world) for model in models]
    for symmetry, voter in product(sudoku_symmetries(shape, images), voters):
        tokens, q_halt = voter(batch, symmetry.to(world.device))
        answers.append(tokens)
        q_halts.append(q_halt)
        if keeps_rules(batch["inputs"], tokens).item():
            break
    else:
        tokens = vote(torch.stack(answers), torch.stack(q_halts))
    return decode_tokens(tokens[0].cpu().numpy()), len(answers)


def _output_folder(config: EvaluateConfig, checkpoint: Checkpoint) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    from_hub = not Path(config.checkpoint).exists()  # then its folder is the hub's cache
    return Path("outputs") / config.checkpoint if from_hub else checkpoint.folder


def _check_show(pack: Pack, world: World) -> None:
    if world.size > 1:
        raise UserError("show= works in a single process: leave out torchrun.")
    sizes = (pack.metadata.seq_len, pack.metadata.vocab_size)
    if sizes not in {(shape.cells, shape.vocab_size) for shape in BoxShape.supported()}:
        raise UserError(
            f"show= draws Sudoku boards, but the puzzles of {pack.path} have {sizes[0]} cells and {sizes[1]} tokens: "
            "leave it out."
        )


class Sizes(NamedTuple):
    """What a model must know of its data, and the batch."""

    batch_size: int
    seq_len: int
    vocab_size: int
    num_puzzle_identifiers: int

    def of_data(self) -> dict[str, int]:
        return {name: size for name, size in self._asdict().items() if name != "batch_size"}


def load_model(
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    sizes: Sizes,
    kernels: KernelsConfig | str,
    world: World,
    act_max_steps: int | None = None,
) -> ACTLossHead:
    """The checkpoint's model in evaluation mode, with another last ACT step than in training if one is given."""
    arch = arch_config(checkpoint.config["arch"], sizes.of_data(), where=f"{checkpoint.config_file}: arch")
    if act_max_steps is not None:
        arch = replace(arch, halt_max_steps=act_max_steps)
    model = build_model(arch, **sizes._asdict(), kernels=kernels, device=world.device)
    load_weights(model, weights, checkpoint.weights_file)
    return model.eval()


def _table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics, a row each, under the names they are logged by."""
    rows = [(f"{set_name}/{name}", value) for set_name, values in metrics.items() for name, value in values.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:>10.{0 if name.endswith('/count') else 4}f}" for name, value in rows)


def _show(outputs: Mapping[str, Tensor], count: int, checkpoint: Checkpoint, folder: Path) -> None:
    """Print and draw test boards, wrong ones among them where there are any, and draw the training curves."""
    puzzles = decode_tokens(outputs["inputs"].numpy())
    solutions = decode_tokens(outputs["labels"].numpy())
    answers = _answers(outputs["logits"])
    order = np.argsort((answers == solutions).all(1), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]
    boards = [Board(puzzles[index], answers[index], solutions[index], f"test puzzle {index}") for index in spread]
    print("\n".join(f"{_rendered(board)}\n{_verdict(board)}\n" for board in boards) + LEGEND)
    draw_boards(boards, folder / "boards.png")
    drawn = ["boards.png"]
    if (metrics_file := checkpoint.folder / METRICS_FILE).is_file():
        draw_curves(metrics_file, folder / "curves.png")
        drawn.append("curves.png")
    print(f"Drew {' and '.join(drawn)} in {folder}.")


def _answers(logits: Tensor) -> Grids:
    """The boards that logits [B, S, V] stand for, [B, S]."""
    return decode_tokens(logits.argmax(-1).cpu().numpy())


def _rendered(board: Board) -> str:
    return render_text(board, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def _verdict(board: Board) -> str:
    if wrong := board.num_wrong():
        return f"{wrong} of {board.shape.cells} cells are wrong."
    return f"Solved: this is {'the only solution' if board.solution is not None else 'one of several solutions'}."
