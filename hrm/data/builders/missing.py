"""Make a missing data pack with the builder that its config names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hrm.config import DataConfig, neighbours
from hrm.config.data import build_command, builder_of
from hrm.config.paths import PROJECT_DIR, choices_of
from hrm.data.builders import find_builders
from hrm.errors import UserError


def ensure_pack(data: DataConfig, data_path: str) -> None:
    """Build the pack at `data_path` if it is missing and is the one that `data` describes.

    Raises:
        UserError: the pack is missing and cannot be built; the sentence gives the command that makes one.
    """
    if Path(data_path).exists():
        return
    command = build_command(data.build, data_path)
    if data_path != data.path:
        raise UserError(
            f"data_path={data_path} does not exist: choose a pack by name, data={' or '.join(choices_of('data'))}, or "
            f"build one there, e.g. `{command}`."
        )
    builder = _builder_argv(data.build)
    print(f"{data_path} does not exist, so: {command}", flush=True)
    if subprocess.run([sys.executable, *builder, "--output-dir", data_path], check=False).returncode:
        raise UserError(
            f"{data_path} could not be built: see the builder's message above, or run `{command}` yourself."
        )


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
