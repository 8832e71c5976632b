"""A run's numbers: summed on the device over windows of steps, and read without waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.distributed.world import World, sum_over_ranks
from hrm.training.throughput import peak_tflops


@dataclass
class _Reading:
    """Sums of one window of steps on their way from the device to the host."""

    step: int
    num_steps: int
    lr: float
    data_wait: float
    sequence_flops: float
    sums: Tensor
    started: torch.cuda.Event | float
    ended: torch.cuda.Event | float

    def arrived(self) -> bool:
        return not isinstance(self.ended, torch.cuda.Event) or bool(self.ended.query())  # type: ignore[no-untyped-call]

    def seconds(self) -> float:
        if isinstance(self.ended, torch.cuda.Event):
            assert isinstance(self.started, torch.cuda.Event)
            self.ended.synchronize()
            return float(self.started.elapsed_time(self.ended)) / 1000
        assert isinstance(self.started, float)
        return self.ended - self.started


class OpenSums(NamedTuple):
    """What a window holds that is not closed yet."""

    names: list[str]
    num_steps: int
    sums: Tensor  # [names], on the device


class MetricWindow:
    """Averages metrics over windows of training steps.

    Sums stay on the device. Closing a window starts their copy to the host; `finished` returns the windows whose copy
    has arrived, usually while the next window is being computed, so that no step waits.

    Attributes:
        gave_up: whether a window that arrived tells of too many skipped steps in a row.
        last_skipped: steps skipped in the window that arrived last.
    """

    gave_up = False
    last_skipped = 0.0

    def __init__(self, world: World, global_batch_size: int) -> None:
        self._world = world
        self._global_batch_size = global_batch_size
        self._sequence_flops = 0.0
        peak = peak_tflops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
        self._peak_tflops = peak and peak * world.processes
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._num_steps = 0
        self._on_the_way: deque[_Reading] = deque()
        self.restart_clock()

    def open_sums(self) -> OpenSums | None:
        """This rank's sums of the window begun, to `reopen` it with; None if no step is in it."""
        return None if self._sums is None else OpenSums(self._names, self._num_steps, self._sums)

    def reopen(self, begun: OpenSums) -> None:
        """Go on with a window in which steps were added before."""
        self._names, self._num_steps, self._sums = begun.names, begun.num_steps, begun.sums

    def restart_clock(self) -> None:
        """Leave the time since the last window out of the next one's rate."""
        self._opened, self._waited = time.perf_counter(), 0.0
        self._started = self._mark(self._opened)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; how long each lets the loop wait goes into the window."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, metrics: dict[str, Tensor], sequence_flops: float = 0.0) -> None:
        """Add one step's sums (0-dimensional tensors on the device).

        Args:
            sequence_flops: floating-point operations that the step did for each sequence; a window's last one counts.
        """
        self._sequence_flops = sequence_flops
        names = sorted(metrics)
        if names != self._names:  # reopened, but begun under other options
            self._names, self._sums, self._num_steps = names, None, 0
        values = torch.stack([metrics[name].float() for name in self._names])
        self._sums = values if self._sums is None else self._sums + values
        self._num_steps += 1

    def close(self, step: int, lr: float) -> None:
        """End the window at `step`; every rank must call this at the same steps."""
        if self._sums is None:
            return
        sum_over_ranks([self._sums], self._world)
        if self._world.device.type == "cuda":
            host = torch.empty(self._sums.shape, pin_memory=True).copy_(self._sums, non_blocking=True)
        else:
            host = self._sums.cpu()
        now = time.perf_counter()
        data_wait, ended = self._waited / max(now - self._opened, 1e-9), self._mark(now)
        self._on_the_way.append(
            _Reading(step, self._num_steps, lr, data_wait, self._sequence_flops, host, self._started, ended)
        )
        self._sums, self._num_steps, self._started, self._opened, self._waited = None, 0, ended, now, 0.0

    def finished(self, *, wait: bool = False) -> list[dict[str, float]]:
        """Records of the windows that have arrived (with `wait`: all), oldest first.

        `train/<loss>` and `train/<share>` are per sequence of the global batch, the other `train/<metric>`s per halted
        sequence (left out where none halted), skipped steps left out; `train/skipped` counts these. With `step`,
        `train/lr`, `puzzles_per_second`, and `tflops`, operations of the blocks in 1e12 a second, over all ranks;
        `mfu`, the share they are of what the GPUs could do at best, where that is known; `data_wait`, the share of this
        rank's time in which its loop waited for a batch; on CUDA `memory_gib`, the most that tensors of this rank ever
        took.
        """
        records = []
        while self._on_the_way and (wait or self._on_the_way[0].arrived()):
            reading = self._on_the_way.popleft()
            seconds = reading.seconds()
            sums = dict(zip(self._names, reading.sums.tolist(), strict=True))
            count = sums.pop("count")
            rate = reading.num_steps * self._global_batch_size / max(seconds, 1e-9)
            record = {
                "step": reading.step,
                "train/lr": reading.lr,
                "puzzles_per_second": rate,
                "tflops": rate * reading.sequence_flops / 1e12,
                "data_wait": reading.data_wait,
            }
            if self._peak_tflops is not None:
                record["mfu"] = record["tflops"] / self._peak_tflops
            if self._world.device.type == "cuda":
                record["memory_gib"] = torch.cuda.max_memory_allocated(self._world.device) / 2**30
            sequences = reading.num_steps * self._global_batch_size
            if "skipped" in sums:
                skipped = sums.pop("skipped") / self._world.size  # all ranks skip alike, and each counts
                record["train/skipped"] = self.last_skipped = skipped
                sequences -= round(skipped) * self._global_batch_size
                self.gave_up |= sums.pop("gave_up") > 0
            for name, value in sums.items():
                divisor = sequences if name.endswith(("loss", "share")) else count
                if divisor:
                    record[f"train/{name}"] = value / divisor
            records.append(record)
        return records

    def _mark(self, now: float) -> torch.cuda.Event | float:
        if self._world.device.type != "cuda":
            return now
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
