"""Options of a named data pack: the group `data`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class DataConfig:
    """A named data pack: where it lies, which builder makes it, and what it is made of."""

    name: str = MISSING  # what `data=` takes
    path: str = MISSING  # the folder of the pack
    build: str = MISSING  # builder and its arguments, as typed after `hrm data`, or a script; --output-dir is added
    source: str = ""  # what the builder reads, or that it generates puzzles
    version: str = ""  # version of the source, or the seed
    licence: str = ""  # licence of the source
    augmentation: str = ""  # how each training puzzle is augmented
    shape: str = ""  # size of a puzzle, and the number of tokens


def builder_of(build: str) -> list[str]:
    """The words of the option `data.build`: a builder or a script (`.py`), and its arguments.

    The published scripts are the builders of the same name: `dataset/build_sudoku_dataset.py` is `sudoku`.

    Raises:
        ValueError: there are none, or a quote has no end.
    """
    script, *arguments = shlex.split(build)
    published = re.fullmatch(r"(?:\./)?dataset/build_(\w+)_dataset\.py", script)
    return [published[1] if published else script, *arguments]


def build_command(build: str, output_dir: str) -> str:
    """The command line that builds a pack in `output_dir`, to be shown."""
    script = build.split(maxsplit=1)[0] if build.split() else ""
    return f"{'python' if script.endswith('.py') else 'hrm data'} {build} --output-dir {output_dir}"
