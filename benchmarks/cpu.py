"""Time training and evaluation on a CPU, ours beside the published code, on a machine alone and on one that is shared.

python -m benchmarks.cpu --published HRM        HRM: a checkout of the published code; without it, ours alone

Each way has a process of its own, and they take steps in turn, so that whatever else the machine does meets all alike.
Times are medians. `busy` is the number of other programs that compute all the time. Instructions and threads are chosen
by the environment that PyTorch reads: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import published_side
from benchmarks.common import Shape, batches, machine, make_parser, preset_config, run_command, write_results
from benchmarks.published import Published, published_arch
from hrm.config import PretrainConfig
from hrm.data.pack import Pack
from hrm.distributed.world import World, join_world
from hrm.errors import UserError
from hrm.evaluation.runner import make_runner
from hrm.kernels import describe
from hrm.training.step import initial_state, make_train_step

BASELINE = "published"
_WORKS = ("train", "evaluate")
_ACT_STEPS = 4  # of an evaluation
# By the names of the command line: options of pretrain.py.
_MODELS = {
    "small": ["arch=hrm_small"],
    "medium": ["arch=hrm_v1", "arch.hidden_size=256", "arch.num_heads=4", "arch.H_layers=2", "arch.L_layers=2"],
    "published": ["arch=hrm_v1"],
}
_SIZES = "small@128x16,small@64x81,medium@64x81,published@16x81"
# GNU's OpenMP by itself, which the published code leaves as it is; 300000 is what it takes where nothing is said.
_UNTOUCHED = {"GOMP_SPINCOUNT": "300000"}
# What was compiled before is not looked for: `first s` is what compiling takes.
_NEW = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
_SPAWN = multiprocessing.get_context("spawn")


class Way(NamedTuple):
    """Something to be timed."""

    published: bool
    compile: bool = False
    kernels: str = "auto"  # of ours
    options: tuple[str, ...] = ()  # of pretrain.py, for ours
    environment: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


WAYS = {
    BASELINE: Way(published=True, environment=_UNTOUCHED | {"DISABLE_COMPILE": "1"}),
    "published, compiled": Way(published=True, compile=True, environment=_UNTOUCHED | _NEW),
    "ours": Way(published=False),
    "ours, all cores on every operation": Way(False, options=("kernels.by_core=false",)),
    "the same, waiting as OpenMP does": Way(False, options=("kernels.by_core=false",), environment=_UNTOUCHED),
    "ours, compiled": Way(False, kernels="compile", environment=_NEW),
}


class About(NamedTuple):
    """What a process works with."""

    kernels: str
    threads: int


class Times(NamedTuple):
    """What a piece of work took."""

    wall_ms: float
    cpu_ms: float  # of all cores together


@dataclass(frozen=True)
class Work:
    """What a process is to time."""

    way: Way
    checkout: Path | None
    shape: Shape
    overrides: list[str]
    scratch: Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--published", type=Path, metavar="HRM", help="a checkout of the published code")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--sizes", default=_SIZES, help=f"model@batch x tokens, several; models: {', '.join(_MODELS)}")
    parser.add_argument("--busy", default="0", help="numbers of other programs, e.g. 0,1")
    parser.add_argument("--threads", default="", help="numbers of threads, e.g. 2,1; default: PyTorch's")
    parser.add_argument("--repeats", type=int, default=3, help="of each work and way, at least")
    parser.add_argument("--seconds", type=float, default=10, help="of each work, for all ways together, at least")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py")
    arguments = parser.parse_intermixed_args(argv)

    ways = {name: _way(name) for name in arguments.ways.split(";")}
    if arguments.published is None:
        ways = {name: way for name, way in ways.items() if not way.published}
    else:
        arguments.published = Published(arguments.published.resolve()).checkout
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in arguments.sizes.split(","):
            model, _, shape = size.partition("@")
            for threads in filter(None, arguments.threads.split(",")) if arguments.threads else [""]:
                overrides = [*_MODELS[model], f"arch.halt_max_steps={_ACT_STEPS}", *arguments.overrides]
                works = {
                    name: Work(way, arguments.published, Shape.parse(shape), overrides, Path(scratch))
                    for name, way in ways.items()
                }
                for busy in map(int, arguments.busy.split(",")):
                    measured = _measure(works, threads, busy, arguments.repeats, arguments.seconds)
                    for row in measured:
                        rows.append({"model": model, "shape": shape, **row})
                        print(rows[-1], flush=True)
    about = machine(torch.device("cpu")) | {"processor": _processor(), "instructions": _instructions()}
    print(write_results("cpu", about, rows, arguments.output_dir))


def _way(name: str) -> Way:
    if name not in WAYS:
        raise UserError(f"--ways: {name} is not one; there are {', '.join(WAYS)}.")
    return WAYS[name]


class _Worker:
    """A process that works on request."""

    def __init__(self, name: str, work: Work, threads: str) -> None:
        self.name = name
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, work), daemon=True)
        with _environment(work.way.environment | ({"OMP_NUM_THREADS": threads} if threads else {})):
            self._process.start()
        theirs.close()
        self.about: About = self._receive()

    def time(self, what: str) -> Times:
        """Do that once."""
        self._connection.send(what)
        times: Times = self._receive()
        return times

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise UserError(f"The process of the way {self.name!r} ended: its last words are above.") from error


def _measure(works: dict[str, Work], threads: str, busy: int, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each kind of work and way."""
    rows = []
    with ExitStack() as stack:
        workers = []
        for name, work in works.items():
            workers.append(_Worker(name, work, threads))
            stack.callback(workers[-1].close)
        first = {(what, worker.name): worker.time(what) for what in _WORKS for worker in workers}
        for _ in range(busy):
            other = _SPAWN.Process(target=_compute_for_ever, daemon=True)
            other.start()
            stack.callback(other.terminate)
        for what in _WORKS:
            taken: dict[str, list[Times]] = {worker.name: [] for worker in workers}
            rounds, began = 0, time.monotonic()
            while rounds < repeats or time.monotonic() - began < seconds:
                rounds += 1
                for worker in workers:
                    taken[worker.name].append(worker.time(what))
            ms = {name: statistics.median(each.wall_ms for each in times) for name, times in taken.items()}
            rows += [
                {
                    "threads": worker.about.threads,
                    "busy": busy,
                    "work": what,
                    "way": worker.name,
                    "ms": ms[worker.name],
                    "CPU ms": statistics.median(each.cpu_ms for each in taken[worker.name]),
                    f"x {BASELINE}": ms[BASELINE] / ms[worker.name] if BASELINE in ms else None,
                    "repeats": rounds,
                    "first s": first[what, worker.name].wall_ms / 1000,
                    "kernels": worker.about.kernels,
                }
                for worker in workers
            ]
    return rows


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes started in the body have these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(requests: Connection, work: Work) -> None:
    """The process of a way: says what it is, and times each request until there is none."""
    with join_world("cpu") as world, suppress(EOFError):
        kinds, kernels = _prepare(work, world)
        requests.send(About(kernels, torch.get_num_threads()))
        while True:
            work_once = kinds[requests.recv()]
            wall, cpu = time.perf_counter(), time.process_time()
            work_once()
            requests.send(Times(1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)))


def _prepare(work: Work, world: World) -> tuple[dict[str, Callable[[], object]], str]:
    """What does each kind of work once, and what computes it in a few words."""
    pack, stream = batches(None, work.shape, work.scratch)
    config = preset_config(work.way.kernels, work.shape, [*work.overrides, *work.way.options])
    config.arch.forward_dtype = "float32"
    if work.way.published:
        return _prepare_published(work, config, pack), "torch.compile" if work.way.compile else "eager"
    state = initial_state(config, pack, world)
    step, run = make_train_step(config, world, state), make_runner(state.model, world)

    def evaluate() -> None:
        state.model.eval()
        run(next(stream))
        state.model.train()

    return {"train": lambda: step(next(stream)), "evaluate": evaluate}, describe(state.model.kernels)


def _prepare_published(work: Work, config: PretrainConfig, pack: Pack) -> dict[str, Callable[[], object]]:
    assert work.checkout is not None
    published_side.stand_in_for_what_is_missing()
    request = {
        "arch": published_arch(config.arch),
        "pack": str(pack.path),
        "batch_size": work.shape.batch_size,
        "device": "cpu",
    }
    peer = published_side.Published(work.checkout, request)
    step, evaluation = peer.step(), peer.evaluation()

    def in_mode(training: bool, times: Iterator[float]) -> Callable[[], object]:
        def once() -> None:
            peer.state.model.train(training)
            next(times)

        return once

    return {"train": in_mode(True, step), "evaluate": in_mode(False, evaluation)}


def _compute_for_ever() -> None:
    while True:
        pass


def _processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = "unknown"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def _instructions() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    run_command(main)
