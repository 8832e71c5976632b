"""Batches from a pack: endless random draws for training, every example once for evaluation.

The order of batches is planned in the main process from a seed; worker processes only gather the rows that the plan
names. So the stream is the same for any number of workers, and the ranks of a distributed run, which all draw the same
plan, take their slices of the same global batch without talking to each other.
"""

import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.data.pack import IntArray, Pack, PackSet
from hrm.errors import UserError

_workers: set[BaseProcess] = set()  # of the iterators under way


class TrainLoader:
    """Random training batches, in passes of `epochs_per_pass` epochs.

    An epoch visits every group once in random order, and at each visit takes one random puzzle of the group and its
    examples, in random order, until the global batch is full. A puzzle that overfills the batch is cut to what fits,
    and the next batch starts with the next group. Batches run on from one epoch of a pass into the next; the last,
    short one is dropped. Sets come one after the other.

    Raises:
        UserError: the batch does not divide over the ranks, a pass may be too short to fill one, or `seed` is negative.
    """

    def __init__(
        self,
        pack: Pack,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epochs_per_pass: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        local = _local_batch_size(global_batch_size, world_size)
        if seed < 0:
            raise UserError(f"seed={seed} is negative; choose 0 or more.")
        fewest = epochs_per_pass * max(_fewest_examples(data) for data in pack.sets.values())
        if fewest < global_batch_size:
            raise UserError(
                f"{pack.path / pack.split} may give only {fewest} examples in a pass of {epochs_per_pass} epochs, "
                f"fewer than global_batch_size={global_batch_size}; lower global_batch_size or raise eval_interval."
            )
        self._pack = pack
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._mine = slice(rank * local, (rank + 1) * local)
        self._epochs_per_pass = epochs_per_pass
        self._rows = _Rows(pack, local)
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def iterate(self, pass_index: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of pass `pass_index` from number `start_batch` on.

        They depend on the seed and on `pass_index` only: earlier passes need not have been run.
        """
        plan = islice(self._plan(pass_index), start_batch, None)
        return _load(self._rows, plan, self._num_workers, self._pin_memory)

    def _plan(self, pass_index: int) -> "Iterator[_Slice]":
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(pass_index,)))
        for name, data in self._pack.sets.items():
            for batch in _global_batches(data, self._global_batch_size, self._epochs_per_pass, rng):
                examples, puzzles = batch[:, self._mine]
                yield _Slice(name, examples, puzzles)


class EvalLoader:
    """Every example of every set once, in order, or so many of each set, the same in every pass.

    Iterating gives `(set name, batch of this rank, real examples in the global batch)`. The last global batch of a set
    is filled up with blank puzzles, whose labels are all ignored, so that the ranks' batches are always of one size.

    Raises:
        UserError: the batch does not divide over the ranks.
    """

    def __init__(
        self,
        pack: Pack,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """`examples`: of each set, at most, drawn by `seed`; None: all."""
        self._pack = pack
        self._global_batch_size = global_batch_size
        self._examples = {name: _chosen(len(data.inputs), examples, seed) for name, data in pack.sets.items()}
        self._local_batch_size = _local_batch_size(global_batch_size, world_size)
        self._rank = rank
        self._rows = _Rows(pack, self._local_batch_size)
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Number of batches."""
        return sum(-(-len(chosen) // self._global_batch_size) for chosen in self._examples.values())

    def __iter__(self) -> Iterator[tuple[str, Batch, int]]:
        batches = _load(self._rows, self._plan(), self._num_workers, self._pin_memory)
        for name, chosen in self._examples.items():
            for start in range(0, len(chosen), self._global_batch_size):
                yield name, next(batches), min(self._global_batch_size, len(chosen) - start)

    def _plan(self) -> "Iterator[_Slice]":
        for name, chosen in self._examples.items():
            for start in range(0, len(chosen), self._global_batch_size):
                first = start + self._rank * self._local_batch_size
                examples = chosen[first : min(first + self._local_batch_size, start + self._global_batch_size)]
                puzzles = np.searchsorted(self._pack.sets[name].puzzle_indices, examples, side="right") - 1
                yield _Slice(name, examples, puzzles)


def _chosen(count: int, examples: int | None, seed: int) -> IntArray:
    """Which of `count` examples are evaluated, in order."""
    if examples is None or examples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, examples, replace=False))


class _Slice(NamedTuple):
    """What one rank reads for one batch."""

    set_name: str
    examples: IntArray  # [n], n at most the local batch size
    puzzles: IntArray  # [n], the puzzle of each example


class _Rows(Dataset[Batch]):
    """Gathers the rows of a slice, filled up with blank puzzles to `batch_size`."""

    def __init__(self, pack: Pack, batch_size: int) -> None:
        self._pack = pack
        self._batch_size = batch_size

    def __getitem__(self, part: _Slice) -> Batch:
        metadata, data = self._pack.metadata, self._pack.sets[part.set_name]
        shape, used = (self._batch_size, metadata.seq_len), len(part.examples)
        inputs = np.full(shape, metadata.pad_id, np.int32)
        labels = np.full(shape, IGNORE_LABEL_ID, np.int32)
        identifiers = np.full(self._batch_size, metadata.blank_identifier_id, np.int32)
        inputs[:used] = data.inputs[part.examples]
        labels[:used] = data.labels[part.examples]
        identifiers[:used] = data.puzzle_identifiers[part.puzzles]
        if metadata.ignore_label_id is not None:
            labels[labels == metadata.ignore_label_id] = IGNORE_LABEL_ID
        return {
            "inputs": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "puzzle_identifiers": torch.from_numpy(identifiers),
        }


def _load(rows: _Rows, plan: Iterable[_Slice], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    # A DataLoader draws a seed for its workers. From a generator of its own: the global one is the model's, and how
    # often batches are loaded must not change what the model draws.
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=plan,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    _workers.difference_update([worker for worker in _workers if worker.exitcode is not None])
    _workers.update(set(multiprocessing.active_children()) - others)
    return batches


@contextmanager
def deaths_of_workers_told() -> Iterator[None]:
    """A context that tells an error which came of the death of a worker process as what it is.

    PyTorch raises wherever the main thread is when it learns of the death, and the connections to the worker break.

    Raises:
        UserError: a worker has ended; names it, and says how it ended.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        for _ in range(len(_workers) + 1):  # for at each death PyTorch may raise in here, too
            with suppress(RuntimeError):
                if (ended := _ended_worker()) is None:
                    break
                raise UserError(f"{_how_it_ended(*ended)}.") from error
        raise


def _ended_worker() -> tuple[int | None, int] | None:
    """The process and the exit status of a worker that failed; None if none did. Its connections break a moment before
    the system tells its end."""
    patience = time.monotonic() + 1
    while _workers and time.monotonic() < patience:
        if ended := {worker.exitcode: worker.pid for worker in _workers if worker.exitcode}:
            # After the death of one, PyTorch ends others by SIGTERM.
            status = next((status for status in ended if status != -signal.SIGTERM), -signal.SIGTERM)
            return ended[status], status
        time.sleep(0.02)
    return None


def _how_it_ended(pid: int | None, status: int) -> str:
    if status > 0:
        return f"the process {pid}, which loaded data, ended with status {status}: look at its output above"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = " (the system does so where memory runs out)" if name == "SIGKILL" else ""
    return (
        f"the process {pid}, which loaded data, was ended by {name}{why}: start again, with a lower num_workers if it "
        "happens twice"
    )


def _local_batch_size(global_batch_size: int, world_size: int) -> int:
    if global_batch_size < 1:
        raise UserError(f"global_batch_size={global_batch_size} is not positive; choose 1 or more.")
    if global_batch_size % world_size:
        near = max(global_batch_size // world_size, 1) * world_size
        raise UserError(
            f"global_batch_size={global_batch_size} does not divide over {world_size} processes; "
            f"choose a multiple of {world_size}, such as {near}."
        )
    return global_batch_size // world_size


def _fewest_examples(data: PackSet) -> int:
    """The least an epoch can draw: of every group its smallest puzzle."""
    return int(np.minimum.reduceat(np.diff(data.puzzle_indices), data.group_indices[:-1]).sum())


def _global_batches(
    data: PackSet, batch_size: int, epochs: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Full batches [2, batch_size] of (example, its puzzle)."""
    pieces: list[npt.NDArray[np.int64]] = []
    missing = batch_size
    for _ in range(epochs):
        draws, ends = _draw_epoch(data, rng)
        start = 0
        while start + missing <= ends[-1]:
            stop = start + missing
            yield np.concatenate([*pieces, draws[:, start:stop]], axis=1)
            pieces, missing = [], batch_size
            start = ends[np.searchsorted(ends, stop)]  # past the rest of a puzzle that was cut
        pieces.append(draws[:, start:])
        missing -= draws.shape[1] - start


def _draw_epoch(data: PackSet, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """One visit to every group: (example, its puzzle) [2, n], and where in n each visit ends [groups]."""
    groups = rng.permutation(len(data.group_indices) - 1)
    puzzles = rng.integers(data.group_indices[groups], data.group_indices[groups + 1])
    starts = data.puzzle_indices[puzzles]
    sizes = data.puzzle_indices[puzzles + 1] - starts
    ends = np.cumsum(sizes)
    if ends[-1] == len(groups):  # one example each: nothing to shuffle within a visit
        return np.stack([starts, puzzles]), ends
    visits = np.repeat(np.arange(len(groups)), sizes)
    examples = np.arange(ends[-1]) + (starts - (ends - sizes))[visits]
    shuffled = np.lexsort((rng.random(len(visits)), visits))
    return np.stack([examples[shuffled], puzzles[visits]]), ends
