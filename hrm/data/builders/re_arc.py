"""Examples that re-ARC (Hodel 2024, arXiv 2404.07353) generated, or is to generate, for ARC-1's training tasks.

Its repository, github.com/michaelhodel/re-arc, has a generator for each of the 400 tasks, and ready examples of them in
`re_arc.zip`: `re_arc/tasks/<task>.json`, lists of pairs. Ready ones are read as data; a checkout's code is run only if
the checkout itself is given.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hrm.errors import UserError
from hrm.reading import parse_json, read_text
from hrm.tasks.arc import Pair, parse_grid

FORMS = (
    "a folder of <task>.json or tasks/<task>.json, the repository's re_arc.zip, or a checkout of it, whose generators "
    "are then run"
)

# Of a file in an archive, as it is unpacked: 1000 examples of the largest grids take 8 MB.
_MOST_UNPACKED = 1 << 28

# Run in a checkout. Its generators draw from Python's own generator, which it seeds.
_GENERATE = "import sys, main; main.generate_dataset(sys.argv[1], seed=int(sys.argv[2]), n_examples=int(sys.argv[3]))"


def read_re_arc(path: Path, names: Collection[str], count: int, seed: int) -> dict[str, list[Pair]]:
    """`count` generated pairs for each of the tasks `names` that re-ARC has, chosen by `seed`; all where it has fewer.

    Args:
        path: what `FORMS` lists.

    Raises:
        UserError: there are no such examples, or they are malformed; says where.
    """
    with _texts(path, count, seed) as texts:
        known = sorted(texts.keys() & set(names))
        if not known:
            raise UserError(
                f"--re-arc {path} has examples of {len(texts):,} tasks, but none of them is to be trained on: they are "
                "for the training tasks of ARC-1."
            )
        return {name: _chosen(texts[name], f"{path}, task {name}", name, count, seed) for name in known}


def _chosen(read: Callable[[], str], where: str, name: str, count: int, seed: int) -> list[Pair]:
    try:
        examples = parse_json(read())
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: a password
        raise UserError(f"{where} cannot be read as JSON ({error}); give a complete file.") from error
    if not isinstance(examples, list):
        raise UserError(f"{where} is no list of pairs; give re-ARC's examples.")
    rng = np.random.default_rng([seed, *name.encode()])
    rows = np.sort(rng.choice(len(examples), min(count, len(examples)), replace=False))
    return [_parse_pair(examples[row], f"{where}, example {row + 1}") for row in rows]


def _parse_pair(value: Any, where: str) -> Pair:
    try:
        return Pair(parse_grid(value["input"]), parse_grid(value["output"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} is no pair of input and output; give re-ARC's examples.") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@contextmanager
def _texts(path: Path, count: int, seed: int) -> Iterator[Mapping[str, Callable[[], str]]]:
    """What reads the text of a file of examples, by the name of its task."""
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                members = {PurePosixPath(member.filename): member for member in archive.infolist()}
                found = {
                    name.stem: partial(_unpacked, archive, member)
                    for name, member in members.items()
                    if name.suffix == ".json" and name.parent.name == "tasks"
                }
                yield _some(path, found)
        except zipfile.BadZipFile as error:
            raise UserError(f"--re-arc {path} is no archive ({error}); give {FORMS}.") from error
    elif (path / "generators.py").is_file():
        with tempfile.TemporaryDirectory(prefix="re-arc-") as folder:
            output = Path(folder) / "generated"
            _generate(path, output, count, seed)
            yield _in_folder(path, output)
    else:
        yield _in_folder(path, path)


def _in_folder(path: Path, folder: Path) -> Mapping[str, Callable[[], str]]:
    files = sorted((folder / "tasks").glob("*.json")) or sorted(folder.glob("*.json"))
    return _some(path, {file.stem: partial(read_text, file) for file in files})


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    with archive.open(member) as stream:
        content = stream.read(_MOST_UNPACKED + 1)
    if len(content) > _MOST_UNPACKED:
        raise ValueError(f"it has more than the {_MOST_UNPACKED:,} bytes that such a file may have")
    return content.decode("utf-8")


def _some(path: Path, found: Mapping[str, Callable[[], str]]) -> Mapping[str, Callable[[], str]]:
    if not found:
        raise UserError(f"--re-arc {path} holds no examples; give {FORMS}.")
    return found


def _generate(checkout: Path, output: Path, count: int, seed: int) -> None:
    """Run re-ARC's own entry point, which writes `count` examples of every task to `<output>/tasks`."""
    print(f"Running the generators of {checkout}: {count:,} examples of each task", file=sys.stderr)
    settings = {"PYTHONHASHSEED": "0", "MPLBACKEND": "agg"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | settings
    command = [sys.executable, "-c", _GENERATE, str(output.resolve()), str(seed), str(count)]
    status = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
    if status:
        raise UserError(
            f"The generators of {checkout} ended with status {status}: see their message above, which may name a "
            "package that they need, or give the repository's re_arc.zip instead."
        )
