"""Where a run's numbers and lines go: `metrics.jsonl`, W&B, the progress bar and the terminal."""

from __future__ import annotations

import json
import netrc
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from tqdm import tqdm

from hrm.checkpoint.run_folder import METRICS_FILE, write_atomically
from hrm.config import PretrainConfig
from hrm.distributed.world import World


class RunLog:
    """Writes records to the run folder, to W&B and to the progress bar. Silent on all ranks but the first.

    Args:
        step: the one after which a resumed run goes on; its records follow those in the file.
        wandb_id: of the W&B run to go on with.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        total_steps: int,
        world: World,
        step: int = 0,
        wandb_id: str | None = None,
    ) -> None:
        self._is_main = world.is_main
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not world.is_main,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self._file = None
        self._wandb = None
        if world.is_main:
            self._file = (folder / METRICS_FILE).open("ab")
            self._wandb = _start_wandb(config, folder, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run, if there is one."""
        return None if self._wandb is None else self._wandb.id

    def size(self) -> int:
        """Bytes of records on the disk, all written so far."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._is_main:
            with suppress(BrokenPipeError):  # whoever read along has left: no reason to stop training
                tqdm.write(line)

    def record(self, record: dict[str, float]) -> None:
        """Keep one record; it has a `step`."""
        if self._file is None:
            return
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=int(record["step"]))
        if "train/lm_loss" in record:
            shown = {"loss": f"{record['train/lm_loss']:.3f}"}
            if "train/exact_accuracy" in record:
                shown |= {
                    "exact": f"{100 * record['train/exact_accuracy']:.1f}%",
                    "ACT steps": f"{record['train/steps']:.1f}",
                }
            self._bar.set_postfix(shown | {"puzzles/s": f"{record['puzzles_per_second']:,.0f}"}, refresh=False)


def cut_records(source: Path, size: int, folder: Path) -> None:
    """Put the first `size` bytes of the records of run folder `source` into `folder`, which may be the same."""
    file = source / METRICS_FILE
    write_atomically(folder / METRICS_FILE, file.read_bytes()[:size] if file.is_file() else b"")


def _start_wandb(config: PretrainConfig, folder: Path, wandb_id: str | None) -> Any:
    """A W&B run, or None with one line that says why."""
    mode = os.environ.get("WANDB_MODE", config.wandb) if config.wandb == "auto" else config.wandb
    if mode == "auto" and not _logged_in_to_wandb():
        tqdm.write("W&B: not logged in, so off (wandb login turns it on, wandb=offline keeps a local copy).")
        return None
    if mode == "disabled":
        return None
    import wandb  # imported here: slow, and not needed when off

    try:
        return wandb.init(
            project=config.project_name,
            name=config.run_name,
            config=asdict(config),
            dir=folder,
            id=wandb_id,
            resume="allow",
            mode="offline" if mode == "offline" else "online",
        )
    except wandb.errors.Error as error:
        tqdm.write(f"W&B: could not start ({error}), so off; metrics are in {METRICS_FILE} all the same.")
        return None


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
