"""Batches on the device before the step that takes them begins there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import cycle

import torch

from hrm.batch import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on `device`; on CUDA each is copied there on a stream of its own.

    The host asks for a batch as soon as it has launched the step before, long before the device has computed that. So
    the copy of a batch in pinned memory runs beside this step, though no batch is read before it is asked for, and the
    host waits for nothing. Two places on the device are filled in turn: a batch, all of which have one shape, holds
    until the next but one is asked for.
    """
    if device.type != "cuda":
        for batch in batches:
            yield {name: field.to(device) for name, field in batch.items()}
        return
    computing = torch.cuda.current_stream(device)
    copying: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    places: list[tuple[Batch, torch.cuda.Event]] = [({}, torch.cuda.Event()) for _ in range(2)]  # type: ignore[no-untyped-call]
    for batch, (place, is_free) in zip(batches, cycle(places), strict=False):
        if not place:  # memory of the computing stream: what was computed there before may still use it
            place |= {name: torch.empty_like(field, device=device) for name, field in batch.items()}
            is_free.record(computing)
        copying.wait_event(is_free)
        with torch.cuda.stream(copying):
            for name, field in batch.items():
                place[name].copy_(field, non_blocking=True)
        computing.wait_stream(copying)
        yield place
        is_free.record(computing)
