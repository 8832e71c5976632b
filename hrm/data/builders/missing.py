"""Make a missing data pack with the builder that its config names."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

from hrm.config import DataConfig, neighbours
from hrm.config.data import build_command, builder_of
from hrm.config.paths import PROJECT_DIR
from hrm.data.builders import find_builders
from hrm.data.registry import read_registry
from hrm.errors import UserError, shortened
from hrm.remote.urls import is_url


def ensure_pack(data: DataConfig, data_path: str) -> None:
    """Build the pack at `data_path` if it is missing and is the one that `data` describes; URLs are fetched later.

    Raises:
        UserError: the pack is missing and cannot be built; the sentence gives the command that makes one.
    """
    # os.path, for pathlib raises errors about names that are too long.
    if is_url(data_path) or os.path.exists(data_path):
        return
    if data_path != data.path:
        raise UserError(f"data_path={shortened(data_path)} does not exist: {how_to_build(data_path)}")
    command = build_command(data.build, data_path)
    builder = _builder_argv(data.build)
    print(f"{data_path} does not exist, so: {command}", flush=True)
    if subprocess.run([sys.executable, *builder, "--output-dir", data_path], check=False).returncode:
        raise UserError(
            f"{data_path} could not be built: see the builder's message above, or run `{command}` yourself."
        )


def how_to_build(data_path: str, by_name: bool = True) -> str:
    """The end of a sentence about a pack that is missing: how to get one there, judged by the name of its folder.

    Args:
        by_name: whether the command line takes `data=NAME`.
    """
    known = read_registry()
    by_folder = {Path(entry.path).name: name for name, entry in known.items()}
    folder = Path(data_path).name
    close = [folder] if folder in by_folder else difflib.get_close_matches(folder, by_folder, n=1)
    if not close:  # its first word may still say what it holds, as in sudoku-mine
        close = [name for name in by_folder if re.split(r"\W", name)[0] == re.split(r"\W", folder)[0]][:1]
    if not close:
        names = " or ".join(known)
        choose = f"choose a pack by name, data={names}, or " if by_name else ""
        return f"{choose}build one there: `hrm data --help` lists the builders."
    name = by_folder[close[0]]
    command = f"`{build_command(known[name].build, data_path)}`"
    if close == [folder]:
        return f"build it by {command}" + (
            f", or name the pack, data={name}, which builds it first." if by_name else "."
        )
    choose = f"; or choose a pack by name, data={' or '.join(known)}" if by_name else ""
    return f"correct it, or build one there, e.g. {command}{choose}."


def _builder_argv(build: str) -> list[str]:
    """What Python is to run for the option `data.build`: a builder of this package, or a script."""
    try:
        name, *arguments = builder_of(build)
    except ValueError as error:
        raise UserError(f"data.build={build!r} names no builder: give its name and its arguments.") from error
    if name.endswith(".py"):
        for script in (Path(name), PROJECT_DIR / name):
            if script.is_file():
                return [str(script), *arguments]
        raise UserError(f"data.build={build!r} cannot be run: there is no script {name}.")
    if name not in find_builders():
        raise UserError(f"data.build={build!r} names no builder; {neighbours(name, find_builders())}")
    return ["-m", "hrm", "data", name, *arguments]
