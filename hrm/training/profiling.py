"""A trace of a few training steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from hrm.checkpoint.run_folder import make_folder
from hrm.distributed.world import World
from hrm.errors import first_sentence

# Steps before the trace: by then kernels are compiled, tuned and recorded, and the loader has caught up.
_SKIPPED, _WARM_UP, _TRACED = 10, 2, 5


@contextmanager
def step_trace(folder: str | None, world: World, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Trace the run's steps 13 to 17 into `rank_<r>.json` in a folder; nothing, where that is None.

    Args:
        say: announces the trace, or that the run was too short for one.

    Yields:
        What to call after each step.
    """
    if folder is None:
        yield lambda: None
        return
    make_folder(Path(folder), "profile")
    file = Path(folder) / f"rank_{dist.get_rank() if world.processes > 1 else 0}.json"
    is_written = False

    def write(profiled: profile) -> None:
        nonlocal is_written
        is_written = True
        try:
            profiled.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # no reason to stop training
            say(f"{file} could not be written ({first_sentence(error)}).")
            return
        say(f"A trace of up to {_TRACED} steps is in {file} (profile={folder}).")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    when = schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_TRACED, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as profiled:
        yield profiled.step
    if not is_written:
        say(f"No trace (profile={folder}): the run ended before step {_SKIPPED + _WARM_UP + 1}.")
