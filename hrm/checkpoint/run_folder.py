"""The run folder: its names, its options, what an earlier run left there, and files that are never there in part."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from hrm.config import PretrainConfig
from hrm.errors import UserError, shortened
from hrm.models.losses import LossConfig
from hrm.reading import read_json
from hrm.tasks.form import FORM_FILE, IDENTIFIERS_FILE

CONFIG_FILE = "all_config.yaml"
METRICS_FILE = "metrics.jsonl"
STOPPED_FILE = "stopped.json"
_PUBLISHED_OF_LOSS = ("name", "loss_type")
_NAME_OF_STEP = re.compile(r"(?:step|state)_(\d+)")
# What is being written has such a name until it is whole. Those without a name of ours are by safetensors.
_TEMPORARY = re.compile(r"\.(?:(?:state|step)_\w+(?:\.safetensors)?|[a-z_]+\.\w+|lock\.\w+)\.tmp|\.tmp\w{6}")


def make_folder(folder: Path, option: str) -> None:
    """Create a folder that `option` named, or raise a UserError that says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: it holds a NUL
        reason = shortened(getattr(error, "strerror", None) or str(error))
        raise UserError(
            f"{option}={shortened(folder)} cannot be made a folder ({reason}): give another path."
        ) from error


def cannot_write(folder: Path, error: OSError) -> UserError:
    """What to tell of a run folder that a run cannot begin in."""
    return UserError(
        f"the run folder {folder} cannot be written ({error.strerror or error}): put that right, or give another "
        "checkpoint_path."
    )


def keep_earlier_run(folder: Path, after: int | None = None) -> None:
    """Move what an earlier run left in a run folder into `earlier_<n>` there.

    Args:
        after: move only what belongs to steps after this one, as a run that goes on from it will make them anew.
    """
    # Training states first: cut off here, the next start finds none that it would take for the new run's.
    found = [path for pattern in ("state_*", "step_*") for path in folder.glob(pattern)]
    steps = {path: int(named[1]) for path in found if (named := _NAME_OF_STEP.match(path.name))}
    left = [path for path, step in steps.items() if after is None or step > after]
    names = [STOPPED_FILE] if after is None or _stopped_after(folder) > after else []
    names += [METRICS_FILE, CONFIG_FILE, FORM_FILE, IDENTIFIERS_FILE] if after is None else []
    left += [file for name in names if os.path.lexists(file := folder / name)]
    if left:
        number = 1
        while os.path.lexists(aside := folder / f"earlier_{number}"):
            number += 1
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that died were writing; to be called by the one that holds the folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_config(config: PretrainConfig, folder: Path, **more: object) -> None:
    """Write `all_config.yaml`, creating the run folder.

    Args:
        more: what else it is to hold, beside the options.
    """
    make_folder(folder, "checkpoint_path")
    options = asdict(config)
    # The published evaluate.py hands all of arch.loss to a loss that takes no options but the published ones.
    loss, unchanged = options["arch"]["loss"], asdict(LossConfig())
    options["arch"]["loss"] = {
        name: value for name, value in loss.items() if name in _PUBLISHED_OF_LOSS or value != unchanged[name]
    }
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(options | more)).encode())


def note_stop(folder: Path, step: int, reason: str) -> None:
    """Write down that a run was stopped, with weights of that step which the run that goes on will supersede."""
    write_atomically(folder / STOPPED_FILE, json.dumps({"step": step, "reason": reason}).encode() + b"\n")


def superseded_by_going_on(folder: Path, step: int) -> list[Path]:
    """What a run left only because it was stopped after `step`: of no use once the run that goes on has saved."""
    if _stopped_after(folder) != step:
        return []
    weights = [f"step_{step}{average}{suffix}" for average in ("", "_ema") for suffix in ("", ".safetensors")]
    return [folder / name for name in (STOPPED_FILE, *weights)]


def _stopped_after(folder: Path) -> int:
    """The step after which a run was stopped, as it wrote down; -1 where it did not."""
    try:
        step = read_json(folder / STOPPED_FILE, most=1 << 16)["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return -1
    return step if type(step) is int else -1


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file; a crash midway leaves it as it was."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to beside `file`, which takes its place once its bytes are on the disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask says; safetensors puts a private file in its place
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        sync(temporary)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
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
