"""What the builders share: the shell around them, and where their CSV files come from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from hrm.errors import UserError


def run_builder(build: Callable[[argparse.Namespace], str], parse: Callable[[], argparse.Namespace]) -> int:
    """Print what `build` says of the arguments that `parse` returns, or what is wrong; returns the exit status."""
    try:
        print(build(parse()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def local_file(folder: Path, split: str) -> Path:
    """`<folder>/<split>.csv` or `.csv.gz`; UserError if there is neither."""
    for path in (folder / f"{split}.csv", folder / f"{split}.csv.gz"):
        if path.is_file():
            return path
    raise UserError(f"--source-dir {folder} has neither {split}.csv nor {split}.csv.gz; put one there.")


def hub_file(repo: str, split: str) -> Path:
    """`<split>.csv` of a hub dataset, downloaded unless it is in the cache; UserError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, f"{split}.csv", repo_type="dataset"))
    except Exception as error:  # offline, no such repo, no access, a broken transfer: many types, one mend
        raise UserError(
            f"{split}.csv of the hub dataset {repo} cannot be downloaded ({type(error).__name__}); check the network "
            "and --source-repo, or build from local files with --source-dir or generated puzzles with --generate."
        ) from error
