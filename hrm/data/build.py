"""Make a missing data pack with the builder that its config names."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from hrm.config import CONFIG_DIR, PROJECT_DIR, DataConfig
from hrm.errors import UserError


def ensure_pack(data: DataConfig, data_path: str) -> None:
    """Build the pack at `data_path` if it is missing and is the one that `data` describes.

    Raises:
        UserError: the pack is missing and cannot be built; the sentence gives the command that makes one.
    """
    if Path(data_path).exists():
        return
    if data_path != data.path:
        names = sorted(file.stem for file in (CONFIG_DIR / "data").glob("*.yaml"))
        raise UserError(
            f"data_path={data_path} does not exist: choose a pack by name, data={' or '.join(names)}, or build one "
            f"there, e.g. `python {data.build} --output-dir {data_path}`."
        )
    try:
        script, *arguments = shlex.split(data.build)
    except ValueError as error:
        raise UserError(f"data.build={data.build!r} names no builder: give a script and its arguments.") from error
    command = f"python {data.build} --output-dir {data_path}"
    if not (PROJECT_DIR / script).is_file():
        raise UserError(f"{data_path} does not exist; `{command}` makes it, but {script} is not part of this version.")
    print(f"{data_path} does not exist, so: {command}", flush=True)
    builder = [sys.executable, str(PROJECT_DIR / script), *arguments, "--output-dir", data_path]
    if subprocess.run(builder, check=False).returncode:
        raise UserError(
            f"{data_path} could not be built: see the builder's message above, or run `{command}` yourself."
        )
