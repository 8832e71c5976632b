"""The tasks: what tokens mean, in a file each, found by looking into this folder.

A pack names its task in its provenance. Packs of the published code and of TRM have none, nor have those of early
versions of this package: theirs is guessed in `guess_task`, and nowhere else.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from functools import cache

from hrm.data.pack import Pack, read_identifiers, read_provenance
from hrm.errors import UserError
from hrm.tasks.base import PuzzleSize, Task, Tokens
from hrm.tasks.form import IDENTIFIERS_FILE, PuzzleForm
from hrm.tasks.tokens import VOCABULARY_FILE, AnyTokens, read_vocabulary, shape_of

# Tasks that may be guessed by the sizes of their puzzles, the rarer size first: the published packs hold them.
_GUESSED = ("sudoku", "arc", "maze")
# The one that knows nothing about its tokens, but for the names that a pack gives them.
_ANY = "tokens"
_GUESS_ROWS = 64
_COVERED_ROWS = 100_000  # of a set, looked at to see whether answers have symbols just where inputs have


@cache
def all_tasks() -> dict[str, Task]:
    """The tasks by name: the `TASK` of every file of this folder that has one."""
    tasks = {}
    for module in pkgutil.iter_modules(__path__):
        task = getattr(importlib.import_module(f"{__name__}.{module.name}"), "TASK", None)
        if isinstance(task, Task):
            tasks[task.name] = task
    return tasks


def task_of(pack: Pack) -> Task:
    """The task of a pack: the one it names, else a guess.

    Raises:
        UserError: it names one that is not known, or whose puzzles have other sizes.
    """
    provenance = read_provenance(pack.path)
    name = provenance.get("task")
    if name is None:
        return guess_task(pack, provenance.get("builder"))
    file, size, tasks = pack.path / "provenance.json", PuzzleSize.of(pack), all_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(str(name), tasks, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(tasks))}."
        raise UserError(f"{file} says task {name!r}, which is not known; {hint}")
    if not tasks[name].fits(size):
        raise UserError(
            f"{file} says task {name!r}, but no puzzle of it has {size.seq_len} tokens in a vocabulary of "
            f"{size.vocab_size}: correct it, or build the pack again."
        )
    return tasks[name]


def guess_task(pack: Pack, builder: object = None) -> Task:
    """The task of a pack that does not name it: by its builder, its vocabulary file, its sizes and its puzzles.

    Args:
        builder: as in the provenance of packs of early versions, `dataset/build_<task>_dataset.py`.
    """
    tasks, size = all_tasks(), PuzzleSize.of(pack)
    if (pack.path / "vocabulary.json").is_file():
        return tasks[_ANY]
    built = re.fullmatch(r"dataset/build_(\w+)_dataset\.py", str(builder))
    if built and built[1] in _GUESSED and tasks[built[1]].fits(size):
        return tasks[built[1]]
    rows = next(iter(pack.sets.values())).inputs[:_GUESS_ROWS]
    fitting = [tasks[name] for name in _GUESSED if tasks[name].fits(size)]
    # A maze of 4x4 cells has the sizes of a 4x4 Sudoku.
    certain = [task for task in fitting if task.is_input(rows).all()]
    return next(iter([*certain, *fitting]), tasks[_ANY])


def form_of(pack: Pack) -> PuzzleForm:
    """How the puzzles of a pack are written, so that it can be known without the pack.

    Raises:
        UserError: as `task_of`; or a file of the pack is broken.
    """
    task, meta = task_of(pack), pack.metadata
    symbols, shape, covers = None, None, False
    if isinstance(task, AnyTokens):
        if (vocabulary := pack.path / VOCABULARY_FILE).is_file():
            symbols = read_vocabulary(vocabulary).symbols
            if len(symbols) + 1 != meta.vocab_size:
                symbols = None
        shape = shape_of(pack.path, meta.seq_len)
        rows = [(data.inputs[:_COVERED_ROWS], data.labels[:_COVERED_ROWS]) for data in pack.sets.values()]
        ignored = meta.ignore_label_id
        covers = ignored is not None and all(
            bool(((inputs != meta.pad_id) == (labels != ignored)).all()) for inputs, labels in rows
        )
    names: tuple[str, ...] = ()
    if meta.num_puzzle_identifiers > 1 and (pack.path / IDENTIFIERS_FILE).is_file():
        names = tuple(read_identifiers(pack.path, meta.num_puzzle_identifiers))
    return PuzzleForm(
        task.name,
        meta.seq_len,
        meta.vocab_size,
        meta.num_puzzle_identifiers,
        shape,
        symbols,
        task.template(pack.path),
        covers,
        names,
    )


def parse_puzzle(text: str, vocab_size: int, name: str | None = None) -> tuple[Task, Tokens]:
    """The task of a puzzle that a user typed, and its input [S].

    Args:
        text: as `Task.parse_input` takes it.
        vocab_size: of the model that is to answer it.
        name: of the task, if it is known; else those that may be guessed are tried.

    Raises:
        UserError: it is no input of the task, or of no task.
    """
    size = PuzzleSize(len("".join(text.split())), vocab_size)
    tasks = all_tasks()
    if name in tasks:
        return tasks[name], tasks[name].parse_input(text, size)
    parsed: list[tuple[Task, Tokens]] = []
    problems = []
    for task in (tasks[each] for each in _GUESSED):
        try:
            parsed.append((task, task.parse_input(text, size)))
        except UserError as problem:
            problems.append(problem)
    if not parsed:
        raise problems[0]
    # Where none fits the model, the caller has a better sentence for it.
    fitting = [(task, inputs) for task, inputs in parsed if task.fits(PuzzleSize(len(inputs), vocab_size))]
    return [*fitting, *parsed][0]
