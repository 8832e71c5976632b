"""What a training step costs on n GPUs over hosts: a model of few numbers, each fitted to measurements of its own.

    step = max(compute(b), loader(b)) + exchange(n, bytes) + stragglers(n)

- compute(b) = launches + b sequences, a line through steps of one process at several batches;
- exchange = latency log2(n) + 2 (n - 1) / n bytes / bus, a ring's traffic (Thakur et al. 2005) at the rate of the
  slowest link, fitted to all-reduces of two sizes; between hosts the bus is at most what a host's network cards carry;
- stragglers: of n processes, each a normal distribution's spread off, all wait for the slowest (Blom 1958);
- loader: batches are made ahead, so it only counts where it takes longer than a step.

Steps of several processes are not fitted to: they are what the model is held to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


class AllReduce(NamedTuple):
    """A measured one."""

    processes: int
    size: int  # bytes
    ms: float


@dataclass(frozen=True)
class Machine:
    """What was measured of one kind of machine, and what is assumed of the network between several."""

    latency_ms: float  # of an exchange, each time that the processes double
    bytes_per_ms: float  # of the bus within a host
    network_bytes_per_ms: float  # of one GPU's share of its host's network cards
    network_latency_ms: float  # each time that the hosts double
    gpus_on_host: int

    def all_reduce_ms(self, processes: int, size: float) -> float:
        """Of so many bytes over so many processes, one for a GPU."""
        if processes == 1 or not size:
            return 0.0
        hosts = math.ceil(processes / self.gpus_on_host)
        on_host = min(processes, self.gpus_on_host)
        latency = self.latency_ms * math.log2(on_host)
        bus = self.bytes_per_ms
        if hosts > 1:
            latency += self.network_latency_ms * math.log2(hosts)
            bus = min(bus, self.network_bytes_per_ms * on_host)
        return latency + _ring(processes) * size / bus


@dataclass(frozen=True)
class Work:
    """A training step of some model at one length of puzzles."""

    launch_ms: float  # whatever the batch
    sequence_ms: float  # more for each sequence
    spread_ms: float  # standard deviation of a step
    loader_ms: float  # for each sequence, on the host
    evaluation_ms: float  # of an ACT step, for each sequence
    exchanged: float  # bytes that are summed over the processes, whatever the batch
    rows: float = 0.0  # bytes that each sequence hands to all processes: its row of the puzzle table

    def step_ms(self, machine: Machine, processes: int, batch: float) -> float:
        """Of `batch` sequences on each of the processes."""
        compute = self.launch_ms + self.sequence_ms * batch
        exchange = machine.all_reduce_ms(processes, self.exchanged)
        # Handed to all, not summed: half of what a sum moves.
        exchange += machine.all_reduce_ms(processes, self.rows * batch * processes / 2)
        return max(compute, self.loader_ms * batch) + exchange + self.spread_ms * slowest_of(processes)

    def evaluation_step_ms(self, batch: float) -> float:
        """Of an ACT step of `batch` sequences on each process, none of which waits for others."""
        return self.evaluation_ms * batch


def slowest_of(count: int) -> float:
    """The expected largest of so many draws from the normal distribution of mean 0 and deviation 1 (Blom 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def fit_compute(ms_by_batch: Mapping[int, float]) -> tuple[float, float]:
    """Launches and milliseconds a sequence: the line through steps at several batches, neither below 0."""
    if len(ms_by_batch) == 1:
        ((batch, ms),) = ms_by_batch.items()
        return 0.0, ms / batch
    batches, times = (np.array(list(column), float) for column in (ms_by_batch.keys(), ms_by_batch.values()))
    launch, sequence = _least_squares(np.stack([np.ones_like(batches), batches], 1), times)
    return launch, sequence


def fit_exchange(measured: Sequence[AllReduce]) -> tuple[float, float]:
    """Milliseconds of latency a doubling, and bytes a millisecond of the bus."""
    columns = [(math.log2(each.processes), _ring(each.processes) * each.size) for each in measured]
    latency, per_byte = _least_squares(np.array(columns, float), np.array([each.ms for each in measured], float))
    return latency, 1 / per_byte if per_byte > 0 else math.inf


def _ring(processes: int) -> float:
    """How many times its size a sum moves over each link of a ring."""
    return 2 * (processes - 1) / processes


def _least_squares(columns: Any, values: Any) -> tuple[float, float]:
    """Coefficients of two columns, neither below 0, with the errors in proportion to the values."""
    weighted = columns / values[:, None]
    both = np.linalg.lstsq(weighted, np.ones_like(values), rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = []
    for index in range(2):
        column = weighted[:, index]
        factor = float(column.sum() / (column @ column))
        alone.append((float(((column * factor - 1) ** 2).sum()), index, factor))
    _, index, factor = min(alone)
    return (factor, 0.0) if index == 0 else (0.0, factor)


class Scaled(NamedTuple):
    """A prediction for so many GPUs."""

    gpus: int
    batch: float  # sequences on each
    ms: float
    sequences_per_s: float
    efficiency: float  # of the rate of as many GPUs by themselves


def weak(work: Work, machine: Machine, batch: int, gpus: Sequence[int]) -> list[Scaled]:
    """The same batch on every GPU."""
    return [_scaled(work, machine, batch, batch, count) for count in gpus]


def strong(work: Work, machine: Machine, batch: int, gpus: Sequence[int]) -> list[Scaled]:
    """The same batch on all GPUs together, of those numbers that divide it."""
    return [_scaled(work, machine, batch / count, batch, count) for count in gpus if batch % count == 0]


def _scaled(work: Work, machine: Machine, share: float, alone: int, gpus: int) -> Scaled:
    ms = work.step_ms(machine, gpus, share)
    rate, one = share * gpus / ms, alone / work.step_ms(machine, 1, alone)
    return Scaled(gpus, share, ms, 1000 * rate, rate / (gpus * one))


def pays_until(rows: Sequence[Scaled], gain: float = 1.5) -> int:
    """The most GPUs of `rows`, each twice the one before, to which doubling made the rate `gain` times higher."""
    for fewer, more in itertools.pairwise(rows):
        if more.sequences_per_s < gain * fewer.sequences_per_s:
            return fewer.gpus
    return rows[-1].gpus
