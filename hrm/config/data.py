"""Options of a named data pack: the group `data`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class DataConfig:
    """A named data pack: where it lies, which builder makes it, and what it is made of."""

    name: str = MISSING
    path: str = MISSING
    build: str = MISSING  # builder and its arguments, as typed after `python`; --output-dir PATH is added
    source: str = ""  # what the builder reads, or that it generates
    version: str = ""  # of the source, or the seed
    licence: str = ""  # of the source
    augmentation: str = ""  # of a training puzzle
    shape: str = ""  # of a puzzle, and the number of tokens
