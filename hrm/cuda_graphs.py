"""Work on a batch as one CUDA graph: launched whole, so that the pace of the host no longer matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from hrm.batch import Batch

Result = TypeVar("Result")


class GraphedWork(Generic[Result]):
    """Calls `work` eagerly a few times, then records it and from there on replays the record.

    A replay runs the same kernels on the same memory. So `work` must not depend on the host, batches must keep their
    shapes, and the tensors of a result are overwritten by the next call. The eager calls compile and tune kernels and
    let `work` make what it keeps; they run on the stream of the recording, as PyTorch asks for.

    Args:
        work: takes a batch on the device.
        generators: random generators on the device that `work` draws from.
    """

    def __init__(
        self,
        work: Callable[[Batch], Result],
        device: torch.device,
        *,
        eager_calls: int,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._work = work
        self._device = device
        self._eager_calls_left = eager_calls
        self._generators = generators
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._batch: Batch = {}
        self._recorded: tuple[torch.cuda.CUDAGraph, Result] | None = None

    def __call__(self, batch: Batch) -> Result:
        """Run the work on a batch, which may still be on the host."""
        for name, field in batch.items():
            if name not in self._batch:
                self._batch[name] = torch.empty_like(field, device=self._device)
            self._batch[name].copy_(field, non_blocking=True)
        if self._eager_calls_left:
            self._eager_calls_left -= 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._work(self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._recorded is None:
            self._recorded = self._record()
        graph, result = self._recorded
        graph.replay()
        return result

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # thread_local: the loader's thread that pins memory may go on meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._work(self._batch)
        return graph, result
