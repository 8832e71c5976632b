"""Microseconds of a call, and the rates that the device reaches at copying and at multiplying."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
_BUDGET_S = 0.1  # of calls that are timed for one number
_REPEATS = range(10, 101)


class Timer:
    """Times calls on one device, all in one stream of it, and remembers what copies took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copies: dict[int, float] = {}
        # A backward runs in the stream of its forward: only there can a graph take it in.
        with self.stream():
            self._cache = torch.zeros(_FLUSH_BYTES // 4, device=device, dtype=torch.int32) if self._stream else None

    def stream(self) -> AbstractContextManager[object]:
        """What is timed is made and called within this."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def us(self, call: Callable[[], object], *, graph: bool = True) -> float:
        """Median microseconds of a call, its inputs not in the cache.

        On CUDA by the device's events, with `graph` from a graph, so that the host's part counts for nobody; by the
        clock elsewhere.
        """
        with self.stream():
            return self._host_us(call) if self._stream is None else self._device_us(call, graph)

    def called_us(self, call: Callable[[], object]) -> float:
        """Median microseconds of a call among several from Python, one after the other: the host's part counts."""
        with self.stream():
            calls, times = 10 if self._stream else 1, []
            for _ in range(1 + (20 if self._stream else 1)):
                self._wait()
                started = time.perf_counter()
                for _ in range(calls):
                    call()
                self._wait()
                times.append(1e6 * (time.perf_counter() - started) / calls)
            return statistics.median(times[1:])  # the first compiles

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    @functools.cached_property
    def matmul_flops(self) -> float:
        """Operations a second of a large bf16 matmul."""
        width = 8192 if self.device.type == "cuda" else 256
        with self.stream():
            a, b = (torch.randn(width, width, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            return 1e6 * 2 * width**3 / self.us(lambda: a @ b)

    @functools.cached_property
    def copied(self) -> float:
        """Bytes a second, read and written together, of a large copy."""
        size = 2**31 if self.device.type == "cuda" else 2**22
        return 1e6 * size / self.copy_us(size)

    def copy_us(self, num_bytes: int) -> float:
        """Microseconds of a copy that reads and writes so many bytes together: the fastest of three ways.

        A recorded copy is not always a kernel, and was seen to reach two thirds of the rate of one.
        """
        if num_bytes not in self._copies:
            with self.stream():
                source = torch.ones(max(1, num_bytes // 8), device=self.device)
                target = torch.empty_like(source)

                def copy() -> Tensor:
                    return target.copy_(source)

                def kernel() -> Tensor:
                    return torch.neg(source, out=target)

                self._copies[num_bytes] = min(self.us(copy, graph=False), self.us(copy), self.us(kernel))
        return self._copies[num_bytes]

    def _device_us(self, call: Callable[[], object], recorded: bool) -> float:
        assert self._stream is not None
        assert self._cache is not None
        for _ in range(3):  # compiles, chooses configurations, grows workspaces
            call()
        self._stream.synchronize()
        launch = call
        if recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                call()
            launch = graph.replay
        times: list[float] = []
        ends_at = time.perf_counter() + _BUDGET_S
        while len(times) < _REPEATS.start or (len(times) < _REPEATS.stop and time.perf_counter() < ends_at):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.amax(self._cache)  # reads: dirty lines would have to be written back within the time
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(1000 * float(begin.elapsed_time(end)))
        return statistics.median(times)

    def _host_us(self, call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - started))
        return statistics.median(times)
