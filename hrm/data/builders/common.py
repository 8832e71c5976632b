"""What the scripts here share: the shell around them, checks of their options, and where CSV files come from."""

from __future__ import annotations

import argparse
import csv
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeAlias

from numpy.typing import NDArray

from hrm.data.pack import SPLITS
from hrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, printable_lines
from hrm.output import output_that_counts
from hrm.reading import open_lines
from hrm.unforeseen import EXIT_UNFORESEEN, tell, unforeseen

# What `bytes` takes: rows of arrays, and bytes themselves. Python 3.12 has a name for it.
Buffer: TypeAlias = NDArray[Any] | bytes


MOST_SOURCE = 256
"""Characters of a source's name."""


def run_command(work: Callable[[argparse.Namespace], str], parse: Callable[[], argparse.Namespace]) -> int:
    """Print what `work` returns for the arguments that `parse` returns, or what is wrong; returns the exit status.

    Signals to end it let `work` remove what it had begun.
    """
    signals = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    unset = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in unset:
        signal.signal(number, _end)
    try:
        arguments = parse()
        with output_that_counts():
            print(printable_lines(work(arguments)))
    except UserError as error:
        tell(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        tell("stopped by Ctrl-C; nothing was written.")
        return EXIT_INTERRUPTED
    except Exception as error:
        tell(unforeseen(error))
        return EXIT_UNFORESEEN
    finally:
        for number in unset:
            if signal.getsignal(number) is _end:  # none came, and what runs next in this process has its own way to end
                signal.signal(number, signal.SIG_DFL)
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one does not break the tidying
    sys.exit(128 + number)


def option(name: str) -> str:
    """An argument's name as it is typed."""
    return "--" + name.replace("_", "-")


def check_at_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """UserError for a number below what `least` has for it; arguments that are None pass."""
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise UserError(f"{option(name)} {value} is too small; choose {bound} or more.")


def fill_in(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Give arguments that are None their defaults."""
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def as_flags(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """A command line in which options may be written name=value, as elsewhere, as argparse reads it."""
    known = {name for action in parser._actions for name in action.option_strings}
    names = [option(argument.partition("=")[0]) if "=" in argument else "" for argument in argv]
    return [f"--{argument}" if name in known else argument for name, argument in zip(names, argv, strict=True)]


def recorded(arguments: argparse.Namespace, *, but: Sequence[str] = ("output_dir",)) -> dict[str, Any]:
    """The arguments as a pack keeps them. Where it lies is no part of how it was made, so that two copies are equal
    byte for byte.
    """
    return {name: value for name, value in vars(arguments).items() if name not in but}


def is_generated(
    arguments: argparse.Namespace, what: str, of_files: Sequence[str], of_generated: Sequence[str], default_repo: str
) -> bool:
    """Whether `--generate` is the one source among it, `--source-dir` and `--source-repo`, the last by default.

    Args:
        what: the pack consists of, in errors.
        of_files, of_generated: arguments that apply only to what is read, or generated.

    Raises:
        UserError: there are several sources, or an argument that does not apply to the one.
    """
    sources = [name for name in ("source_repo", "source_dir", "generate") if getattr(arguments, name) is not None]
    if len(sources) > 1:
        raise UserError(f"{option(sources[0])} and {option(sources[1])} exclude each other; give one of them.")
    generating = sources == ["generate"]
    for name in of_files if generating else of_generated:
        if getattr(arguments, name) is not None:
            where = f"does not apply to generated {what}" if generating else f"applies to generated {what} only"
            remedy = "leave it out" if generating else "leave it out or add --generate"
            raise UserError(f"{option(name)} {where}; {remedy}.")
    if not sources:
        arguments.source_repo = default_repo
    return generating


def source_files(arguments: argparse.Namespace) -> tuple[dict[str, Path], str]:
    """The CSV files that `--source-dir` or `--source-repo` name, by split, and where they are from in words."""
    if arguments.source_dir is not None:
        return {split: local_file(arguments.source_dir, split) for split in SPLITS}, f"folder {arguments.source_dir}"
    files = {split: hub_file(arguments.source_repo, split) for split in SPLITS}
    return files, f"hub dataset {arguments.source_repo}"


@contextmanager
def csv_lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a CSV file (gzipped if its name ends so), for `csv.reader`.

    Raises:
        UserError: the file, or what the body reads of it, is torn or not CSV.
    """
    try:
        with open_lines(path) as lines:
            yield lines
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); give a complete UTF-8 file.") from error


def source_name(text: str, path: Path, line: int) -> str:
    """Where a puzzle is from, as a CSV file says in a line; one string for all that are equal.

    Raises:
        UserError: it is longer than a name, which the pack's text of fixed width would pay for in every row.
    """
    if len(text) > MOST_SOURCE:
        raise UserError(
            f"{path}, line {line}: its source has {len(text):,} characters; give a name of at most {MOST_SOURCE}."
        )
    return sys.intern(text)


def count_repeats(items: Iterable[Buffer]) -> int:
    """How many of the items, such as the rows of an array, are equal to an earlier one."""
    keys = [bytes(item) for item in items]
    return len(keys) - len(set(keys))


def count_known(items: Iterable[Buffer], others: Iterable[Buffer]) -> int:
    """How many of the items are among the others, such as the rows of another array of the same type."""
    known = set(map(bytes, others))
    return sum(bytes(item) in known for item in items)


def remarks(counts: Mapping[str, int]) -> str:
    """What a reader of results should know of a pack, for the end of a summary: what there is of, and how many."""
    return "".join(f"; {count:,} {what}" for what, count in counts.items() if count)


def local_file(folder: Path, split: str) -> Path:
    """`<folder>/<split>.csv` or `.csv.gz`; UserError if there is neither."""
    for path in (folder / f"{split}.csv", folder / f"{split}.csv.gz"):
        if path.is_file():
            return path
    raise UserError(f"--source-dir {folder} has neither {split}.csv nor {split}.csv.gz; put one there.")


def hub_file(repo: str, split: str) -> Path:
    """`<split>.csv` of a hub dataset, downloaded unless it is in the cache; UserError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, f"{split}.csv", repo_type="dataset"))
    except Exception as error:  # offline, no such repo, no access, a broken transfer: many types, one remedy
        raise UserError(
            f"{split}.csv of the hub dataset {repo} cannot be downloaded ({type(error).__name__}); check the network "
            "and --source-repo, or build from local files with --source-dir or generated puzzles with --generate."
        ) from error
