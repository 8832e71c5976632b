"""Where a run's numbers and lines go: `metrics.jsonl`, W&B, the progress bar and the terminal."""

from __future__ import annotations

import json
import netrc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from tqdm import tqdm

from hrm.checkpoint.run_folder import METRICS_FILE, cannot_write, replacing
from hrm.config import PretrainConfig
from hrm.distributed.world import World
from hrm.errors import first_sentence, printable_lines
from hrm.output import UnbreakableStream, bar_interval
from hrm.reading import open_regular

_MOST_OF_A_RECORD = 1 << 20  # bytes

# What W&B takes in WANDB_MODE, by what it means here.
_WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


class RunLog:
    """Writes records to the run folder, to W&B and to the progress bar. Silent on all ranks but the first.

    What cannot be written ends nothing: records for `metrics.jsonl` wait for the next one, lines and the bar are
    dropped, and W&B is left alone from then on.

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
            mininterval=bar_interval(),
            file=UnbreakableStream(sys.stderr),
        )
        self._file = None
        self._waiting = b""  # for a place on the disk
        self._wandb = None
        if world.is_main:
            try:
                self._file = (folder / METRICS_FILE).open("ab", buffering=0)  # so that it is known what was written
            except OSError as error:
                self._bar.close()
                raise cannot_write(folder, error) from error
            self._wandb = _start_wandb(config, folder, wandb_id, self.say)

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run, if there is one."""
        return None if self._wandb is None else self._wandb.id

    def size(self) -> int:
        """Bytes of records up to now, those that wait for a place on the disk among them."""
        if self._file is None:
            return 0
        with suppress(OSError):
            os.fsync(self._file.fileno())
        return self._file.tell() + len(self._waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._write(b"")
            self._file.close()
        self._tell_wandb(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._is_main:
            tqdm.write(printable_lines(line), file=UnbreakableStream(sys.stdout))

    def record(self, record: dict[str, float]) -> None:
        """Keep one record; it has a `step`."""
        if self._file is None:
            return
        self._write(json.dumps(record).encode() + b"\n")
        self._tell_wandb(lambda run: run.log(record, step=int(record["step"])))
        if "train/lm_loss" in record:
            shown = {"loss": f"{record['train/lm_loss']:.3f}"}
            if "train/exact_accuracy" in record:
                shown |= {
                    "exact": f"{100 * record['train/exact_accuracy']:.1f}%",
                    "ACT steps": f"{record['train/steps']:.1f}",
                }
            self._bar.set_postfix(shown | {"puzzles/s": f"{record['puzzles_per_second']:,.0f}"}, refresh=False)

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        waited, self._waiting = bool(self._waiting), self._waiting + line
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not waited:
                self.say(f"{self._file.name} could not be written ({error.strerror}): its records wait for the next.")

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # of its network, its disk or its process, without a common base
            self._wandb = None
            self.say(f"W&B: off from here ({first_sentence(error)}); metrics are in {METRICS_FILE} all the same.")


def cut_records(source: Path, size: int, folder: Path) -> None:
    """Put the records in the first `size` bytes of those of run folder `source` into `folder`, which may be the same.

    A record that was written in part, as the disk was full, is left out.
    """
    with replacing(folder / METRICS_FILE) as temporary, temporary.open("wb") as kept:
        if not (file := source / METRICS_FILE).is_file():
            return
        with open_regular(file) as records:
            while (line := records.readline(_MOST_OF_A_RECORD)).endswith(b"\n") and records.tell() <= size:
                kept.write(line)


def _start_wandb(config: PretrainConfig, folder: Path, wandb_id: str | None, say: Callable[[str], None]) -> Any:
    """A W&B run, or None with one line that says why."""
    # An empty or unknown value must not come before W&B, which raises over it.
    asked = os.environ.pop("WANDB_MODE", None)
    try:
        mode = config.wandb
        if mode == "auto" and asked:
            if asked not in _WANDB_MODES:
                say(f"W&B: WANDB_MODE={asked!r} is none of {', '.join(_WANDB_MODES)}, so off.")
                return None
            mode = _WANDB_MODES[asked]
        if mode == "auto" and not _logged_in_to_wandb():
            say("W&B: not logged in, so off (wandb login turns it on, wandb=offline keeps a local copy).")
            return None
        if mode == "disabled":
            return None
        import wandb  # imported here: slow, and not needed when off

        return wandb.init(
            project=config.project_name,
            name=config.run_name,
            config=asdict(config),
            dir=folder,
            id=wandb_id,
            resume="allow",
            mode="offline" if mode == "offline" else "online",
        )
    except Exception as error:  # of its network, its settings or its process, without a common base
        say(f"W&B: could not start ({first_sentence(error)}), so off; metrics are in {METRICS_FILE} all the same.")
        return None
    finally:
        if asked is not None:
            os.environ["WANDB_MODE"] = asked


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
