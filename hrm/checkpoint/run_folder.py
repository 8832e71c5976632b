"""The run folder: its names, its options, what an earlier run left there, and files that are never there in part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from hrm.config import PretrainConfig
from hrm.errors import UserError

CONFIG_FILE = "all_config.yaml"
METRICS_FILE = "metrics.jsonl"
_NAME_OF_STEP = re.compile(r"(?:step|state)_(\d+)")


def make_folder(folder: Path, option: str) -> None:
    """Create a folder that `option` named, or raise a UserError that says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}={folder} cannot be made a folder ({error.strerror}): give another path.") from error


def keep_earlier_run(folder: Path, after: int | None = None) -> None:
    """Move what an earlier run left in a run folder into `earlier_<n>` there.

    Args:
        after: move only what belongs to steps after this one, as a run that goes on from it will make them anew.
    """
    # Training states first: cut off here, the next start finds none that it would take for the new run's.
    found = [path for pattern in ("state_*", "step_*") for path in folder.glob(pattern)]
    steps = {path: int(named[1]) for path in found if (named := _NAME_OF_STEP.match(path.name))}
    left = [path for path, step in steps.items() if after is None or step > after]
    if after is None:
        left += [file for name in (METRICS_FILE, CONFIG_FILE) if (file := folder / name).is_file()]
    if left:
        number = 1
        while (aside := folder / f"earlier_{number}").exists():
            number += 1
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)


def save_config(config: PretrainConfig, folder: Path) -> None:
    """Write `all_config.yaml`, creating the run folder."""
    make_folder(folder, "checkpoint_path")
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(asdict(config))).encode())


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file; a crash midway leaves it as it was."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to beside `file`, which takes its place once its bytes are on the disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    yield temporary
    sync(temporary)
    temporary.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
