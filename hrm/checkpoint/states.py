"""Training states: all that shapes the rest of a run, saved as `state_<n>` in its folder while training goes on.

A folder `state_<n>` holds what the run was after step n, and before the evaluation there, if that was one:

    *.safetensors  tensors, by torch.distributed.checkpoint; each rank writes a file, any number of ranks reads them
    state.json     the rest: `StateMetadata`
    SHA256SUMS     of these files, as `sha256sum --check` takes it

It gets its name when all of it is on the disk, and its files are checked before they are read. Nothing read from it is
executed. Ranks on several hosts need a run folder that all of them see. `hrm.checkpoint.saving` writes states,
`hrm.checkpoint.finding` finds, checks and reads them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hrm.config import PROJECT_DIR
from hrm.distributed.world import World
from hrm.version import __version__

FORMAT = 2  # 1 knew no identity of packs
READABLE_FORMATS = (1, FORMAT)
METADATA_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
STATE_NAME = re.compile(r"state_(\d+)")

# One process without a process group is no accident here.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class StateMetadata:
    """What a training state holds besides tensors."""

    step: int
    num_ranks: int
    progress: dict[str, Any]  # of the run among its batches and evaluations
    window_names: list[str]  # of the metrics in the window that was open
    window_steps: int
    metrics_size: int  # bytes of metrics.jsonl up to here
    wandb_id: str | None
    config: dict[str, Any]
    pack: dict[str, Any]  # metadata of the training split
    made_by: dict[str, str]  # see `environment_info`
    pack_identity: dict[str, str] = field(default_factory=dict)  # fields of `PackIdentity`; format 1 has none
    format: int = FORMAT


@dataclass(frozen=True)
class SavedState:
    """A training state on disk whose files were checked."""

    folder: Path
    metadata: StateMetadata
    unusable: list[str] = field(default_factory=list)  # why later ones were not taken, a sentence each

    def is_of(self, run_folder: Path) -> bool:
        """Whether it lies in that run folder."""
        return self.folder.parent.resolve() == run_folder.resolve()


def states_in(folder: Path) -> dict[int, Path]:
    """The training states of a run folder by their steps."""
    if not os.path.isdir(folder):  # pathlib raises errors about names that are too long
        return {}
    named = ((STATE_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in named if match}


def environment_info(kernels: str, world: World) -> dict[str, str]:
    """What the bits of a run depend on besides its options. To be called at its start, while the sources are as run.

    Args:
        kernels: `hrm.kernels.describe` of the model's.
    """
    code = hashlib.sha256()
    for file in sorted((PROJECT_DIR / "hrm").rglob("*.py")):
        code.update(file.read_bytes())
    return {
        "hrm": f"{__version__} with sources {code.hexdigest()[:12]}",
        "PyTorch": str(torch.__version__),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "kernels": kernels,
        "processes": str(world.processes),
    }
