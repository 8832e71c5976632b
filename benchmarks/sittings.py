"""Runs of a table that may take several sittings: written down as they end, and none begun that would end too late."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm.errors import UserError

Run = dict[str, Any]


class Sittings:
    """The runs in a file of JSON lines, and what time is left of this sitting."""

    def __init__(self, file: Path, asked: Mapping[str, Any], minutes: float | None) -> None:
        """Read the runs that are there.

        Args:
            file: made if it is missing, with its folder.
            asked: what all runs have in common; others in the file are not of this table.
            minutes: of this sitting; None: without end.
        """
        self.file, self.asked = file, dict(asked)
        file.parent.mkdir(parents=True, exist_ok=True)
        known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.runs: list[Run] = [run for run in known if run.items() >= self.asked.items()]
        self._ends_at = None if minutes is None else time.monotonic() + 60 * minutes

    def of(self, **which: Any) -> list[Run]:
        """The runs that are so."""
        return [run for run in self.runs if run.items() >= which.items()]

    def has_time_for(self, minutes: float) -> bool:
        """Whether a run of so many minutes would end in this sitting."""
        return self._ends_at is None or time.monotonic() + 60 * minutes <= self._ends_at

    def add(self, run: Mapping[str, Any]) -> None:
        """Write down a run that has ended."""
        self.runs.append({**run, **self.asked})
        with self.file.open("a") as lines:
            lines.write(json.dumps(self.runs[-1]) + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--seeds` and `--stop-after`."""
    parser.add_argument("--seeds", default="0,1,2", help="several")
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="begin no run that would end after so many")


def numbers_of(seeds: str) -> list[int]:
    """The seeds that `--seeds` names."""
    try:
        return sorted({int(seed) for seed in seeds.split(",")})
    except ValueError as error:
        raise UserError(f"--seeds {seeds} cannot be read: give whole numbers, such as 0,1,2.") from error
