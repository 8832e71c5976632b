"""Finding the training state to go on from, checking it, and reading it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from hrm.checkpoint.fetching import local_files
from hrm.checkpoint.states import (
    METADATA_FILE,
    READABLE_FORMATS,
    STATE_NAME,
    SUMS_FILE,
    SavedState,
    StateMetadata,
    states_in,
)
from hrm.config import PretrainConfig
from hrm.data.identity import PackIdentity
from hrm.data.pack import Pack
from hrm.errors import UserError, first_sentence, shortened
from hrm.models import arch_config
from hrm.reading import read_json, read_text, sha256_of
from hrm.remote.urls import Remote, is_url, last_part

AUTO = "auto"
_MOST_BYTES = 1 << 26  # of the metadata and of the sums


def local_state(resume: str) -> str:
    """What `resume` asks for, with a copy here of the training state behind a URL.

    Args:
        resume: as for `find_state`, or the URL of a training state, or of a run folder, for its last one.

    Raises:
        UserError: there is none behind the URL, or it cannot be had.
    """
    if not is_url(resume):
        return resume
    if not STATE_NAME.fullmatch(last_part(resume)):
        found = [match for name in Remote(resume).list() if (match := STATE_NAME.fullmatch(name))]
        if not found:
            raise UserError(f"resume={resume} holds no training state (a folder state_<n>): correct the URL.")
        resume = f"{resume.rstrip('/')}/{max(found, key=lambda match: int(match[1]))[0]}"
    return str(local_files(resume, (), lambda names: names))


def find_state(resume: str, run_folder: Path) -> SavedState | None:
    """The training state that `resume` asks for.

    Args:
        resume: `auto`, for the last good one in `run_folder` (None if there is none yet); or the path of a training
            state, or of a run folder, for its last good one.

    Raises:
        UserError: there is none at that path, or none that is whole.
    """
    folder = run_folder if resume == AUTO else Path(resume)
    if STATE_NAME.fullmatch(folder.name) and os.path.isdir(folder):
        return SavedState(folder, read_metadata(folder))
    states = states_in(folder)
    unusable: list[str] = []
    for step in sorted(states, reverse=True):
        try:
            return SavedState(states[step], read_metadata(states[step]), unusable)
        except UserError as error:
            unusable.append(str(error))
    if unusable:
        raise UserError(f"no training state in {folder} is whole: {unusable[0]}")
    if resume == AUTO:
        return None
    raise UserError(
        f"resume={shortened(resume)} is no training state (a folder state_<n>) and no run folder with one; weights "
        "alone do not say how a run goes on."
    )


def read_metadata(folder: Path) -> StateMetadata:
    """What a training state holds besides tensors, once all its files are found to be as they were saved.

    Raises:
        UserError: a file is missing, changed, or not of this program.
    """
    try:
        lines = read_text(folder / SUMS_FILE, _MOST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no training state, as it has no readable {SUMS_FILE}.") from error
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {file.name for file in folder.iterdir()} - {SUMS_FILE}
    for name in sorted(found | expected.keys()):
        if name not in found:
            raise UserError(f"{folder} lacks {name}, which its {SUMS_FILE} names: resume from another training state.")
        if (digest := _sha256(folder / name)) is None or expected.get(name) != digest:
            raise UserError(
                f"{folder / name} is not what was saved (its SHA-256 is not that in {SUMS_FILE}): resume from another "
                "training state."
            )
    try:
        content = read_json(folder / METADATA_FILE, _MOST_BYTES)
        if content["format"] not in READABLE_FORMATS:
            known = " and ".join(map(str, READABLE_FORMATS))
            raise UserError(
                f"{folder} has format {shortened(content['format'])} of training states, but this version reads "
                f"{known}: resume with the version that saved it."
            )
        metadata = StateMetadata(**content)
        for name, (kind, accepts) in _KINDS.items():
            if not accepts(value := getattr(metadata, name)):
                raise ValueError(f"{name} is {shortened(value)}, not {kind}")
        return metadata
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_sentence(error)
        raise UserError(
            f"{folder} is no training state of this program ({METADATA_FILE}: {shortened(reason)}): resume from "
            "another one."
        ) from error


def _sha256(file: Path) -> str | None:
    """Of a regular file; None for anything else."""
    try:
        return sha256_of(file)
    except OSError:
        return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# What the fields of a training state's metadata must be: what it is called, and the check.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("step", "num_ranks", "window_steps", "metrics_size"), ("a count", _is_count)),
    **dict.fromkeys(("progress", "config", "pack"), ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(("made_by", "pack_identity"), ("an object of strings", _is_texts)),
    "window_names": ("a list of strings", lambda value: isinstance(value, list) and _is_texts(dict(enumerate(value)))),
    "wandb_id": ("a string or null", lambda value: value is None or isinstance(value, str)),
}


def check_options(saved: SavedState, config: PretrainConfig, pack: Pack, identity: PackIdentity) -> list[str]:
    """Compare a training state's options and pack with those it is to go on with.

    Returns:
        What changed by consent, a few words each.

    Raises:
        UserError: an option that matters or the pack changed, and `config.resume_changed` does not consent, or cannot.
    """
    now = _comparable(asdict(config) | {"pack": asdict(pack.metadata)})
    # Options newer than the state had their defaults.
    defaults = _comparable(asdict(PretrainConfig(arch=type(config.arch)())))
    had = defaults | _comparable(saved.metadata.config | {"pack": saved.metadata.pack})
    changed = {name: f"{name}={now.get(name)} (it had {had.get(name)})" for name in sorted(now.keys() | had.keys())}
    changed = {name: text for name, text in changed.items() if not _is_free(name) and now.get(name) != had.get(name)}
    if fixed := [text for name, text in changed.items() if name in _FIXED or name.startswith("pack.")]:
        raise UserError(
            f"the run in {saved.folder} cannot go on with {' and '.join(fixed)}: give what it had, or start anew with "
            "resume=null."
        )
    was = saved.metadata.pack_identity
    for part, meaning in (("arrays", "puzzles"), ("identifiers", "puzzle identifiers")):
        if was and getattr(identity, part) != was.get(part):
            changed[part] = f"other {meaning} in the pack {pack.path}"
    if changed and not config.resume_changed:
        raise UserError(
            f"the run in {saved.folder} would go on with {' and '.join(changed.values())}: give what it had, or add "
            "resume_changed=true if this is meant."
        )
    return list(changed.values())


# These say where things go and how often, or when to end: the steps stay the same.
_FREE = (
    *("resume", "resume_changed", "checkpoint_interval", "keep_checkpoints", "checkpoint_every_eval"),
    *("checkpoint_path", "project_name", "run_name", "eval_save_outputs", "log_interval", "num_workers", "wandb"),
    *("stop_after", "stop_at_train_accuracy", "abort_after", "profile", "dist_timeout"),
    "dtype",  # what it comes to is in arch.forward_dtype
    *("init_from", "init_puzzle_emb", "eval_examples", "min_eval_interval", "data_paths_test"),
)
# The place among the batches, the carry and the moments mean nothing under others. (And so with the pack.)
_FIXED = ("global_batch_size", "eval_interval", "optim.name", "freeze")


def _is_free(name: str) -> bool:
    # How a pack is made (which one is read is data_path), and who computes what of the same steps.
    return name in _FREE or name.startswith(("data.", "parallel."))


def _comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their dotted names, by today's names and in today's form."""
    arch = arch_config(options["arch"]).effective_options()
    # Stages of the curriculum once had null for what they left as it was.
    stages = [
        {name: value for name, value in stage.items() if value is not None} for stage in options.get("curriculum", [])
    ]
    return _flat({**options, "arch": arch, "curriculum": stages})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, as JSON returns their values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a training state by their names, whole, on the host.

    Raises:
        UserError: its files do not hold them.
    """
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        reader = HuggingFaceStorageReader(str(folder))
        about: dict[str, Any] = reader.read_metadata().state_dict_metadata
        claimed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in about.values())
        if claimed > stored:
            raise UserError(f"its tensors claim {claimed:,} bytes, but {stored:,} are stored")
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in about.items()}
        load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # what reading raises over files of another kind shares no base class
        raise UserError(
            f"{folder} does not hold a training state's tensors ({first_sentence(error)}): resume from another one."
        ) from error
    return tensors
