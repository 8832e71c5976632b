"""Answers to puzzles in bulk: slots refilled as sequences halt, several answers to each puzzle, every ACT step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice, product
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.config.checks import at_least, at_most, choice, positive
from hrm.config.evaluation import MOST_ANSWERS, NOISE_AT, PICKS
from hrm.errors import UserError
from hrm.evaluation.early_halting import EarlyHalting
from hrm.evaluation.latent import States, act_steps, initial_states, stacked
from hrm.evaluation.paths import Answers, Follower, Noise, make_follower
from hrm.evaluation.picking import pick, standing_in_vote
from hrm.kernels.choice import EIGHT_BIT
from hrm.models import ACTLossHead
from hrm.tasks.base import PuzzleSize, Task, Undo
from hrm.tasks.form import Puzzle, PuzzleForm

_SEQUENCES_ON_CPU = 16  # worked on at once: more would not stay in the cache
_SEQUENCES_ON_GPU = 256
_BATCHES_IN_CHUNK = 4  # slots run empty at the end of a chunk only
_MOST_KEPT = 16  # of what is recorded for one number of slots and some options
_BATCHES_KEPT = 4  # that this has slots for, all together

Work = TypeVar("Work")


@dataclass(frozen=True)
class PredictOptions:
    """How puzzles are answered; see `hrm.inference.model.TrainedModel.predict`."""

    act_max_steps: int | None = None
    augmentations: int = 1
    trajectory: bool = False
    latents: bool = False
    halt: bool = True
    batch_size: int | None = None
    halt_margin: float = 0.0  # a sequence halts where q_halt > q_continue + this
    paths: int = 1
    noise: Noise = field(default_factory=Noise)  # of all paths but the first
    pick: str = "vote"

    def __post_init__(self) -> None:
        for name in ("act_max_steps", "batch_size"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("augmentations", self.augmentations, 1)
        at_most("augmentations", self.augmentations, MOST_ANSWERS)
        at_least("paths", self.paths, 1)
        at_most("paths", self.paths, MOST_ANSWERS // self.augmentations)
        positive("noise", self.noise.std)
        choice("noise_at", self.noise.at, NOISE_AT)
        choice("pick", self.pick, PICKS)
        if self.every_step and self.pick != "vote":
            raise UserError(f"pick={self.pick} chooses among answers, of which there is one where every step is given.")
        for name in ("trajectory", "latents"):
            for several in ("augmentations", "paths"):
                if getattr(self, name) and getattr(self, several) > 1:
                    raise UserError(f"{name}=True cannot be combined with {several}: each of them has its own.")

    @property
    def every_step(self) -> bool:
        """Whether what is between the steps is asked for."""
        return self.trajectory or self.latents

    @property
    def by_paths(self) -> bool:
        """Whether each puzzle is answered path by path, all ACT steps of each."""
        return self.paths > 1 or self.pick != "vote"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers to N puzzles of S tokens."""

    answers: NDArray[np.int64]  # [N, S], the model's tokens
    q_halt: NDArray[np.float64]  # [N], the probability that the answer is right, as the model estimates it
    steps: NDArray[np.int64]  # [N], ACT steps spent, over all augmentations and paths
    texts: list[str]  # each answer on one line
    values: list[Any]  # each as JSON would have it: grids of digits, rows of a maze, lists of symbols
    index: NDArray[np.int64]  # [N], which input each puzzle is of: an ARC task may have several
    # After each ACT step, the last once it has halted: answers [N, T, S], and what q_halt was [N, T].
    trajectory: NDArray[np.int64] | None = None
    q_halts: NDArray[np.float64] | None = None
    # Each state by its name, [N, T + 1, P + S, D], at the start and after each ACT step, as `trajectory`; tokens of the
    # puzzle prefix, P of them, come before those of the input.
    latents: States | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several, of models of the same sizes, as one."""
        return cls(**{name: _joined([getattr(part, name) for part in parts]) for name in (f.name for f in fields(cls))})


def _joined(parts: Sequence[Any]) -> Any:
    """Lists, arrays or mappings of arrays, each as long as there are puzzles, as one; None where there are none."""
    first = parts[0]
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return None if first is None else np.concatenate(parts)


class _Rows(NamedTuple):
    """Answers to R sequences."""

    tokens: NDArray[np.int64]  # [R, S]
    q_halt: NDArray[np.float64]  # [R], logits
    steps: NDArray[np.int64]  # [R]
    trajectory: NDArray[np.int64] | None = None  # [R, T, S]
    q_halts: NDArray[np.float64] | None = None  # [R, T], logits
    latents: States | None = None  # [R, T + 1, P + S, D]


class Predictor:
    """Answers puzzles that are tokens already, by one model on one device. Not for several threads at once."""

    def __init__(self, model: ACTLossHead, task: Task, form: PuzzleForm, device: torch.device) -> None:
        """`model` is in evaluation mode."""
        self._model, self._task, self._form, self._device = model, task, form, device
        self._is_one_shape = is_one_shape(model, device)
        self._engines = _Kept[EarlyHalting](sequences_at_once(device))
        self._followers = _Kept[Follower](sequences_at_once(device))

    def chunk_size(self, options: PredictOptions) -> int:
        """Puzzles to hand to `answer` at once, for slots to be full and memory to be small."""
        size = self._batch_size(options)
        return max(_BATCHES_IN_CHUNK * size // options.augmentations, size if options.by_paths else 1)

    def with_batch_size(self, options: PredictOptions, puzzles: int) -> PredictOptions:
        """The options with a batch size that suits so many puzzles, where they name none and batches keep their size.

        It depends on this number alone, not on what was recorded before: a batch of another size may round otherwise.

        Args:
            puzzles: most that are handed to `answer` at once.
        """
        if options.batch_size or not self._is_one_shape:
            return options
        sequences = puzzles if options.by_paths else puzzles * options.augmentations
        compiled = self._model.kernels.compile or any(
            getattr(self._model.kernels, name) != "none" for name in EIGHT_BIT
        )
        return replace(options, batch_size=slots_for(sequences, sequences_at_once(self._device), compiled=compiled))

    def answers(
        self, chunks: Iterable[tuple[Sequence[Puzzle], Iterable[int]]], options: PredictOptions
    ) -> Iterator[Predictions]:
        """Answers chunk by chunk, all in as many slots as the first needs: none has more puzzles."""
        for number, (puzzles, index) in enumerate(chunks):
            if number == 0:
                options = self.with_batch_size(options, len(puzzles))
            yield self.answer(puzzles, index, options)

    def answer(self, puzzles: Sequence[Puzzle], index: Iterable[int], options: PredictOptions) -> Predictions:
        """Answers to some puzzles, in as many slots as they need.

        Args:
            index: which input each is of.
            options: with `with_batch_size`, where there are more puzzles than these: for each number of slots, work is
                recorded or compiled once.

        Raises:
            UserError: the task has fewer augmentations than asked for.
        """
        task, form = self._task, self._form
        options = self.with_batch_size(options, len(puzzles))
        if options.by_paths:
            rows = self._by_paths(puzzles, options)
        else:
            rows = self._voted(puzzles, options) if options.augmentations > 1 else self._rows(puzzles, options)
        pairs = list(zip(rows.tokens, puzzles, strict=True))
        return Predictions(
            rows.tokens,
            _sigmoid(rows.q_halt),
            rows.steps,
            [task.answer_text(answer, puzzle, form) for answer, puzzle in pairs],
            [task.answer_value(answer, puzzle, form) for answer, puzzle in pairs],
            np.fromiter(index, dtype=np.int64),
            rows.trajectory,
            None if rows.q_halts is None else _sigmoid(rows.q_halts),
            rows.latents,
        )

    def _batch_size(self, options: PredictOptions) -> int:
        return options.batch_size or sequences_at_once(self._device)

    def _max_steps(self, options: PredictOptions) -> int:
        return options.act_max_steps or self._model.halt_max_steps

    def _voted(self, puzzles: Sequence[Puzzle], options: PredictOptions) -> _Rows:
        """For each puzzle, the first of its augmentations' answers that keeps the rules, else the vote of all."""
        size = PuzzleSize(self._form.seq_len, self._form.vocab_size)
        rules = self._task.rules(size)
        waiting = [self._task.augmented(puzzle, options.augmentations, self._form) for puzzle in puzzles]
        given: list[list[tuple[NDArray[np.int64], float]]] = [[] for _ in puzzles]
        steps = np.zeros(len(puzzles), dtype=np.int64)
        chosen: dict[int, tuple[NDArray[np.int64], float]] = {}
        while open_ones := [number for number in range(len(puzzles)) if number not in chosen and waiting[number]]:
            asked: list[tuple[int, Puzzle, Undo]] = []
            for number in open_ones:
                most = self._asked_at_once(len(open_ones), options) if rules else len(waiting[number])
                asked += [(number, *each) for each in waiting[number][:most]]
                del waiting[number][:most]
            rows = self._rows([puzzle for _, puzzle, _ in asked], options)
            answers = [undo(answer).astype(np.int64) for (_, _, undo), answer in zip(asked, rows.tokens, strict=True)]
            inputs = np.stack([puzzles[number].tokens for number, _, _ in asked])
            keeps = rules.keeps(inputs, np.stack(answers)) if rules else np.zeros(len(asked), dtype=np.bool_)
            for row, (number, _, _) in enumerate(asked):
                answer = answers[row], float(rows.q_halt[row])
                given[number].append(answer)
                steps[number] += rows.steps[row]
                if keeps[row]:
                    chosen.setdefault(number, answer)
        voted = [chosen.get(number) or vote_of(given[number]) for number in range(len(puzzles))]
        return _Rows(np.stack([tokens for tokens, _ in voted]), np.array([q for _, q in voted]), steps)

    def _asked_at_once(self, puzzles: int, options: PredictOptions) -> int:
        """Augmentations of each to try at once: a CPU takes as long for two as for one and then another."""
        return 1 if self._device.type == "cpu" else max(1, self._batch_size(options) // puzzles)

    def _by_paths(self, puzzles: Sequence[Puzzle], options: PredictOptions) -> _Rows:
        """For each puzzle, the first of all paths' answers that keeps the rules, else what is picked of them."""
        rules = self._task.rules(PuzzleSize(self._form.seq_len, self._form.vocab_size))
        copies = [self._task.augmented(puzzle, options.augmentations, self._form) for puzzle in puzzles]
        given: list[list[Answers]] = [[] for _ in puzzles]  # each of one puzzle
        done: set[int] = set()
        for path, copy in product(range(options.paths), range(options.augmentations)):
            asked = [number for number in range(len(puzzles)) if number not in done and copy < len(copies[number])]
            for start in range(0, len(asked), self._batch_size(options)):
                numbers = asked[start : start + self._batch_size(options)]
                answers = self._followed([copies[number][copy][0] for number in numbers], path, options)
                for row, number in enumerate(numbers):
                    undo = copies[number][copy][1]
                    answer = Answers(*(values[row : row + 1] for values in answers))
                    answer = answer._replace(
                        tokens=_undone(answer.tokens, undo), halted_tokens=_undone(answer.halted_tokens, undo)
                    )
                    if rules:
                        answer = answer.checked(rules, torch.from_numpy(puzzles[number].tokens[None]))
                        done |= {number} if answer.keeps else set()
                    given[number].append(answer)
        chosen = []
        for number, answers_to in enumerate(given):
            if number in done:
                chosen.append((answers_to[-1].tokens[0], answers_to[-1].q_halt[0]))
            else:
                picked = pick(options.pick, Answers.stacked(answers_to))
                chosen.append((picked.tokens[0], picked.q_halt[0]))
        return _Rows(
            torch.stack([tokens for tokens, _ in chosen]).numpy().astype(np.int64),
            torch.stack([q_halt for _, q_halt in chosen]).double().numpy(),
            np.array([sum(int(answer.act_steps) for answer in answers_to) for answers_to in given], dtype=np.int64),
        )

    def _followed(self, puzzles: Sequence[Puzzle], path: int, options: PredictOptions) -> Answers:
        """A path's answers to at most a batch of puzzles, on the CPU."""
        noise, max_steps = options.noise, self._max_steps(options)
        size = self._batch_size(options) if self._is_one_shape else len(puzzles)
        follower = self._followers.get(
            size, (noise, max_steps), lambda: make_follower(self._model, self._device, noise, max_steps)
        )
        batch = {name: values.to(self._device) for name, values in as_batch(puzzles, size).items()}
        with self._model.weights_at_hand():
            answers = follower(batch, path)
        return Answers(*(values[: len(puzzles)].cpu() for values in answers))

    def _rows(self, puzzles: Sequence[Puzzle], options: PredictOptions) -> _Rows:
        size = self._batch_size(options)
        step = size if options.every_step else _BATCHES_IN_CHUNK * size
        answer = self._trajectories if options.every_step else self._halted
        parts = [answer(puzzles[start : start + step], options) for start in range(0, len(puzzles), step)]
        return _Rows(*map(_joined, zip(*parts, strict=True)))

    def _halted(self, puzzles: Sequence[Puzzle], options: PredictOptions) -> _Rows:
        """At most a pool of them, each as many ACT steps as it asks for."""
        size = self._batch_size(options)
        slots = size if self._is_one_shape else min(size, len(puzzles))
        margin, max_steps = options.halt_margin if options.halt else math.inf, self._max_steps(options)
        engine = self._engines.get(
            slots,
            (margin, max_steps),
            lambda: EarlyHalting(self._model, slots, self._device, margin, max_steps, _BATCHES_IN_CHUNK * slots),
        )
        tokens, q_halt, steps = engine.answer_pool(as_batch(puzzles))
        return _Rows(tokens.numpy().astype(np.int64), q_halt.double().numpy(), steps.numpy().astype(np.int64))

    @torch.no_grad()
    def _trajectories(self, puzzles: Sequence[Puzzle], options: PredictOptions) -> _Rows:
        """At most a batch of them, and what each would have answered before."""
        model, count = self._model, len(puzzles)
        size = self._batch_size(options) if self._is_one_shape else count
        batch = {name: field.to(self._device) for name, field in as_batch(puzzles, size).items()}
        answers: list[Tensor] = []
        q_halts: list[Tensor] = []
        kept = [initial_states(model, batch)] if options.latents else []
        halted = torch.zeros(size, dtype=torch.bool, device=self._device)
        steps = torch.zeros(size, dtype=torch.int64, device=self._device)
        max_steps = self._max_steps(options)
        with model.weights_at_hand():
            for states, outputs in islice(act_steps(model, batch), max_steps):
                q_halt, answer = outputs["q_halt_logits"].float(), outputs["logits"].argmax(-1)
                if answers:
                    answer = torch.where(halted[:, None], answers[-1], answer)
                    q_halt = torch.where(halted, q_halts[-1], q_halt)
                if kept:
                    kept.append({name: _where(halted, kept[-1][name], state) for name, state in states.items()})
                answers.append(answer)
                q_halts.append(q_halt)
                steps += ~halted
                if options.halt:
                    halted |= q_halt > outputs["q_continue_logits"] + options.halt_margin
                    if halted.all():
                        break
        missing = max_steps - len(answers)
        answers += answers[-1:] * missing
        q_halts += q_halts[-1:] * missing
        kept += kept[-1:] * missing
        trajectory = torch.stack(answers, 1)[:count].cpu().numpy()
        return _Rows(
            trajectory[:, -1],
            q_halts[-1][:count].double().cpu().numpy(),
            steps[:count].cpu().numpy(),
            trajectory,
            torch.stack(q_halts, 1)[:count].double().cpu().numpy(),
            {name: states[:count] for name, states in stacked(kept).items()} if kept else None,
        )


class _Kept(Generic[Work]):
    """What was made for a number of slots and some options: states and, on a GPU, recorded graphs.

    What was used longest ago goes where there is too much: all together have no more slots than a few batches.

    Args:
        batch_size: slots of a batch, if no one asks for more.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._kept: OrderedDict[tuple[int, Hashable], Work] = OrderedDict()

    def get(self, slots: int, options: Hashable, make: Callable[[], Work]) -> Work:
        """What is kept for these, or else made."""
        key = slots, options
        if key not in self._kept:
            most = _BATCHES_KEPT * max(self._batch_size, slots)
            while self._kept and (len(self._kept) >= _MOST_KEPT or slots + sum(each for each, _ in self._kept) > most):
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]


def sequences_at_once(device: torch.device) -> int:
    """How many to compute at a time at most, where nobody says."""
    return _SEQUENCES_ON_CPU if device.type == "cpu" else _SEQUENCES_ON_GPU


def slots_for(sequences: int, most: int, *, compiled: bool) -> int:
    """As many as sequences, rounded up to one of few numbers, for each of which work is recorded or compiled once.

    That is a power of 2, or of 16 where code is compiled for each number: that takes a minute, and PyTorch stops after
    some numbers.
    """
    slots = 1
    while slots < min(sequences, most):
        slots *= 16 if compiled else 2
    return min(slots, most)


def is_one_shape(model: ACTLossHead, device: torch.device) -> bool:
    """Whether batches keep their size: compiled code and recorded graphs are for one shape each."""
    return device.type != "cpu" or model.kernels.compile


def _where(halted: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """The states of sequences [B] that had halted before, and the new ones of the others."""
    return torch.where(halted.view(-1, *[1] * (now.ndim - 1)), before, now)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))


def _undone(tokens: Tensor, undo: Undo) -> Tensor:
    """An answer [1, S], mapped back."""
    return torch.from_numpy(undo(tokens[0].numpy())[None].astype(np.int32))


def as_batch(puzzles: Sequence[Puzzle], size: int | None = None) -> Batch:
    """Puzzles on the host, padded to a batch of `size`."""
    padded = [*puzzles, *[puzzles[-1]] * ((size or 0) - len(puzzles))]
    return {
        "inputs": torch.from_numpy(np.stack([puzzle.tokens for puzzle in padded]).astype(np.int32)),
        "puzzle_identifiers": torch.tensor([puzzle.identifier for puzzle in padded], dtype=torch.int32),
    }


def vote_of(answers: Sequence[tuple[NDArray[np.int64], float]]) -> tuple[NDArray[np.int64], float]:
    """The answer that most gave, and the mean q_halt, a logit, of those."""
    tokens = np.stack([answer for answer, _ in answers])
    q_halt = torch.tensor([q for _, q in answers], dtype=torch.float64)
    winner = tokens[standing_in_vote(torch.from_numpy(tokens)[:, None], q_halt[:, None]).argmax()]
    agreeing = q_halt[torch.from_numpy((tokens == winner).all(1))].sigmoid().mean()
    return winner, float(torch.logit(agreeing, eps=1e-12))
