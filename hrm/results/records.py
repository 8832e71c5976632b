"""What is kept in a results store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from hrm.errors import UserError


class StoreError(UserError):
    """The database cannot be used as it is now: it is down or full, or may not be written.

    Args:
        problem: the sentence without the way out.
    """

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}: {way_out}.")
        self.problem = problem


class RecordError(UserError):
    """What was to be kept cannot be, though the database works."""


def new_id() -> str:
    """A name that nothing else has: 32 hexadecimal digits."""
    return uuid4().hex


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Answer:
    """What a service answered to one puzzle."""

    input: int  # of the request, by its number, that it answers
    input_hash: str  # SHA-256 of the puzzle as the model gets it
    answer: Any  # as JSON has it
    text: str  # the answer on one line
    q_halt: float  # the probability that it is right, as the model estimates it
    steps: int  # ACT steps, over all augmentations
    trajectory: Sequence[Mapping[str, Any]] | None = None  # after every ACT step, where it was asked for


@dataclass(frozen=True)
class AnsweredRequest:
    """A request to a service, and its answers in their order."""

    model: str  # what answered, by the service's name for it
    weights_hash: str  # SHA-256 of its weights file
    request_hash: str  # SHA-256 of the puzzles and options of the request
    options: Mapping[str, Any]  # as it was asked: ACT steps, augmentations ...
    ms: float  # from its arrival to its answer
    answers: Sequence[Answer]
    version: str  # of HRM
    key: str | None = None  # by which the client knows it
    id: str = field(default_factory=new_id)
    time: datetime = field(default_factory=now)  # of the answer


@dataclass(frozen=True)
class Artifact:
    """Something that an evaluation wrote."""

    kind: str  # report or predictions
    place: str  # a path or a URL
    hash: str  # SHA-256 of the file
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a pack."""

    checkpoint: str  # path of its weights file
    weights_hash: str  # SHA-256 of that file
    pack: str  # path of the pack
    pack_hash: str  # SHA-256 of its test split
    options: Mapping[str, Any]  # how it was evaluated
    metrics: Mapping[str, float]  # by the names they are printed under
    versions: Mapping[str, str]  # of HRM, PyTorch, Python ...
    artifacts: Sequence[Artifact] = ()
    id: str = field(default_factory=new_id)
    time: datetime = field(default_factory=now)


@dataclass(frozen=True)
class PublishedPack:
    """A pack that others may fetch."""

    name: str
    version: str
    licence: str
    augmentation: str
    hash: str  # SHA-256 of its content
    place: str  # a URL
    provenance: Mapping[str, Any]  # how it was built
    time: datetime = field(default_factory=now)
