"""A puzzle whose states live on between requests, while the modules of a model update them one at a time.

Shapes: S input tokens, T tokens with the puzzle prefix, D hidden size.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hrm.errors import UserError
from hrm.inference.model import TrainedModel
from hrm.reading import parse_npz, sha256_of
from hrm.tasks.form import Puzzle

_MOST_HEADERS = 1 << 9  # bytes of an archive besides its numbers, for each array and at its end
_MOST_UPDATES = 1 << 53  # that are counted exactly


class Outputs(NamedTuple):
    """What the heads read off a session's states."""

    tokens: NDArray[np.int64]  # [S]
    q_halt: float  # logits
    q_continue: float


@dataclass(frozen=True, eq=False)
class Session:
    """A puzzle and what became of it."""

    puzzle: Puzzle
    states: Mapping[str, NDArray[Any]]  # by name, each [T, D]
    updates: Mapping[str, int]  # made so far, by level


def begun(model: TrainedModel, puzzle: Puzzle) -> Session:
    """A session before any update."""
    inner = model.model.model.inner
    states = {
        name: np.repeat(initial.to(_dtype(model)).cpu().numpy()[None], inner.num_tokens, 0)
        for name, initial in inner.initial_states.items()
    }
    return Session(puzzle, states, dict.fromkeys(inner.levels, 0))


def updated(
    model: TrainedModel, session: Session | Puzzle, level: str, count: int
) -> Generator[None, None, tuple[Session, Outputs]]:
    """Update a level so many times; yields after each. Updates in the order of an ACT step make one, to the bit.

    Args:
        session: for a puzzle, one begins.

    Returns:
        The session after it, and what the heads read.
    """
    inner = model.model.model.inner
    if isinstance(session, Puzzle):
        session = begun(model, session)
    batch = {
        "inputs": torch.from_numpy(session.puzzle.tokens.astype(np.int32))[None].to(model.device),
        "puzzle_identifiers": torch.tensor([session.puzzle.identifier], dtype=torch.int32, device=model.device),
    }
    states = {
        name: torch.tensor(state, dtype=inner.dtype, device=model.device)[None]
        for name, state in session.states.items()
    }
    prepared = inner.prepare(batch)
    for _ in range(count):
        states = inner.update(states, prepared, level)
        yield
    tokens = inner.logits(states)[0].argmax(-1).cpu().numpy()
    q_halt, q_continue = (float(q) for q in inner.q_values(states))
    after = {name: state[0].to(_dtype(model)).cpu().numpy() for name, state in states.items()}
    made = {**session.updates, level: session.updates[level] + count}
    return Session(session.puzzle, after, made), Outputs(tokens, q_halt, q_continue)


def _dtype(model: TrainedModel) -> torch.dtype:
    """What states are kept in: numpy has no bfloat16, and float32 holds all of its numbers."""
    return torch.promote_types(model.model.model.inner.dtype, torch.float32)


class SessionFormat:
    """Sessions of one model as bytes, and back: an archive of arrays, as `numpy.savez` writes and `numpy.load` reads.

    It holds every state by its name [T, D], `inputs` [S], `puzzle_identifier`, and `updates` by level, lowest first.

    Attributes:
        model_hash: of the model whose sessions they are; that of another, or in another precision, differs.
        most_bytes: of an archive.
    """

    def __init__(self, model: TrainedModel) -> None:
        inner, self._form = model.model.model.inner, model.form
        self._levels = list(inner.levels)
        made_of = [sha256_of(model.checkpoint.weights_file), repr(inner.config), repr(model.form.to_json())]
        self.model_hash = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
        shape = inner.num_tokens, inner.config.hidden_size
        state = np.dtype(str(_dtype(model)).removeprefix("torch."))
        self._arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            **dict.fromkeys(inner.initial_states, (state, shape)),
            "inputs": (np.dtype(np.int32), (model.form.seq_len,)),
            "puzzle_identifier": (np.dtype(np.int32), ()),
            "updates": (np.dtype(np.int64), (len(self._levels),)),
        }
        self._states = list(inner.initial_states)
        numbers = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._arrays.values())
        self.most_bytes = numbers + _MOST_HEADERS * (len(self._arrays) + 1)

    def pack(self, session: Session) -> bytes:
        """A session as an archive."""
        values: dict[str, Any] = {
            **session.states,
            "inputs": session.puzzle.tokens,
            "puzzle_identifier": session.puzzle.identifier,
            "updates": [session.updates[level] for level in self._levels],
        }
        arrays: dict[str, Any] = {name: np.asarray(values[name], dtype) for name, (dtype, _) in self._arrays.items()}
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def unpack(self, content: bytes) -> Session:
        """The session in an archive, which may come from anybody.

        Raises:
            ValueError: it is none.
        """
        if len(content) > self.most_bytes:
            raise ValueError(f"it has {len(content):,} bytes, and a session has at most {self.most_bytes:,}")
        arrays = parse_npz(content, self._arrays)
        identifier, updates = int(arrays["puzzle_identifier"]), arrays["updates"].tolist()
        try:
            puzzle = Puzzle(self._form.from_tokens(arrays["inputs"]), identifier)
        except UserError as error:
            raise ValueError(f"its puzzle is none: {error}") from error
        if not 0 <= identifier < self._form.num_puzzle_identifiers:
            raise ValueError(f"its puzzle_identifier is {identifier}")
        if not all(0 <= count < _MOST_UPDATES for count in updates):
            raise ValueError(f"its updates are {updates}")
        states = {name: arrays[name] for name in self._states}
        return Session(puzzle, states, dict(zip(self._levels, updates, strict=True)))
