"""Load `hrm serve`: puzzles a second and waiting times, with slots refilled, static batches, and one puzzle at a time.

hrm data sudoku --generate 3x3 --givens 30 --test-size 2000 --output-dir data/easy
python -m benchmarks.serve data/easy --checkpoint sudoku_small --picture serve.svg

Each of the services is a process of its own, asked over HTTP. First a number of clients ask for every board, each as
soon as it has its last answer: `saturated`, with the answers held against those of `predict`, and the rate against the
same work offline: the same slots, refilled from a pool of all boards. Then requests of one board arrive at random, at
shares of the rate of the first service, whether or not others are answered (an open loop with Poisson arrivals); a
request's time counts from when it was due. More than --in-flight at a time are left out.

python -m benchmarks.serve data/easy --checkpoint sudoku_small --abuse 1000

sends rounds of requests that are malformed, too long, too slow or given up, to a service that is at work all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clients import Clients, Load, ask, request_of, saturate
from benchmarks.common import machine, make_parser, picture_file, run_command, write_results
from hrm.config import ServeConfig
from hrm.data.pack import open_pack
from hrm.errors import UserError
from hrm.evaluation.early_halting import EarlyHalting
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.inference.predictor import as_batch, sequences_at_once
from hrm.service.command import results_of, run
from hrm.service.engine import Engine
from hrm.tasks.form import Puzzle

_SECONDS_TO_ANSWER = 600.0  # what waits is timed, not refused
_MOST_BYTES = 1 << 16  # of a request, where services are abused
_SECONDS_TO_ARRIVE = 2.0  # of a request, there


class _StaticBatches(Engine):
    """Answers as many puzzles as it has slots, and takes the next ones when all of them have halted.

    Those that have halted are not computed any more on a CPU, and each is answered as soon as it has halted: static
    batches at their best.
    """

    def __init__(self, model: TrainedModel, slots: int | None = None) -> None:
        super().__init__(model, slots)
        self._slots.reads_later = False  # else puzzles of the next batch were put in line beside this one

    def _fill(self) -> None:
        if not self._jobs:
            super()._fill()


SERVICES: dict[str, Callable[[TrainedModel, int | None], Engine]] = {
    "refilled": Engine,
    "static batches": _StaticBatches,
    "one at a time": lambda model, _: Engine(model, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_path", help="a pack whose test split holds the puzzles")
    parser.add_argument("--checkpoint", default="sudoku", help="as for hrm serve")
    parser.add_argument("--slots", type=int, help="of the services that have several; default: what suits the device")
    parser.add_argument("--services", default=",".join(SERVICES), help=f"several of: {', '.join(SERVICES)}")
    parser.add_argument("--results", default="none", help="where they record answers; several, as for hrm serve")
    parser.add_argument("--boards", type=int, default=2000, help="requests of the saturated service")
    parser.add_argument("--clients", type=int, default=64, help="that ask in parallel there, for a puzzle each")
    parser.add_argument("--inputs", default="1", help="puzzles of a request, of fewer clients; several")
    parser.add_argument("--processes", type=int, default=1, help="of these clients")
    parser.add_argument("--shares", default="0.25,0.5,0.75,0.9,1.1", help="of its rate, at which requests arrive")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals at each rate")
    parser.add_argument("--in-flight", type=int, default=512, help="requests at a time at most")
    parser.add_argument("--seed", type=int, default=0, help="of the times of arrival")
    parser.add_argument("--abuse", type=int, metavar="N", help="send N requests of no use instead, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of them")
    parser.add_argument("--picture", type=picture_file, help="draw times and rates to this .svg or .png")
    arguments = parser.parse_args(argv)
    names = arguments.services.split(",")
    if unknown := [name for name in names if name not in SERVICES]:
        parser.error(f"--services {','.join(unknown)}: there are {', '.join(SERVICES)}")

    tokens = first_puzzles(arguments.data_path, arguments.boards)
    model = from_pretrained(arguments.checkpoint, device=arguments.device)
    about = machine(model.device) | {
        "model": f"{arguments.checkpoint}, {model.dtype}",
        "load": f"from the same machine, of {os.cpu_count()} cores, {os.getloadavg()[0]:.2g} busy before",
    }
    model.predict(tokens[: sequences_at_once(model.device)], tokens=True)  # what is compiled and recorded
    began = time.perf_counter()
    expected = model.predict(tokens, tokens=True)
    rate = len(tokens) / (time.perf_counter() - began)
    about["predict"] = f"{rate:.4g} puzzles/s, {expected.steps.mean():.3g} ACT steps a puzzle"
    rows: list[dict[str, Any]] = []
    if arguments.abuse:
        del model
        rows = _abused(arguments, tokens, expected.texts)
        print(write_results("serve-abuse", about, rows, arguments.output_dir))
        return
    # On a CPU only slots in use are computed, so `predict` loses nothing where its chunks end.
    offline = rate if model.device.type == "cpu" else _offline(model, tokens, arguments.slots)
    about["offline"] = f"{offline:.4g} puzzles/s"
    print(about, flush=True)
    del model
    rates: list[float] = []
    for name, results in itertools.product(names, arguments.results.split(",")):
        config = ServeConfig(arguments.checkpoint, results=results, seconds_per_request=_SECONDS_TO_ANSWER)
        with _service(name, arguments, config) as (address, process):
            kind = {"slots": name, "results": results.partition(":")[0]}
            for inputs in map(int, arguments.inputs.split(",")):
                clients = max(1, arguments.clients // inputs)
                load = _measured(process.pid, partial(saturate, address, tokens, clients, inputs, arguments.processes))
                found = load.answered / load.seconds
                rates = rates or [float(share) * found for share in arguments.shares.split(",") if share]
                differ = sum(text != expected.texts[number] for number, text in load.texts.items())
                row = {**kind, "asked/s": "saturated", "puzzles a request": inputs, **load.row()}
                rows.append(row | {"of offline": found / offline, "unlike predict": differ})
                print(rows[-1], flush=True)
            for rate in rates:
                load = _measured(process.pid, partial(asyncio.run, _arrive(address, tokens, rate, arguments)))
                rows.append({**kind, "asked/s": rate, "puzzles a request": 1, **load.row()})
                print(rows[-1], flush=True)
    print(write_results("serve", about, rows, arguments.output_dir))
    if arguments.picture:
        _draw(rows, about, arguments.picture)


def first_puzzles(data_path: str, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first puzzles [N, S] of a pack's test split."""
    pack = open_pack(data_path, "test")
    inputs = np.concatenate([each.inputs for each in pack.sets.values()])
    if len(inputs) < count:
        raise UserError(f"{data_path} has {len(inputs)} puzzles to test with, and --boards asks for {count}.")
    return inputs[:count].astype(np.int64)


def _offline(model: TrainedModel, tokens: np.ndarray[Any, Any], slots: int | None) -> float:
    """Puzzles a second without a service: slots that are refilled from a pool of all."""
    puzzles = as_batch([Puzzle(each) for each in tokens])
    slots = min(slots or sequences_at_once(model.device), len(tokens))
    halting = EarlyHalting(model.model, slots, model.device, pool_size=len(tokens))
    halting.answer_pool({name: field[:slots] for name, field in puzzles.items()})  # what is compiled and recorded
    began = time.perf_counter()
    halting.answer_pool(puzzles)
    return len(tokens) / (time.perf_counter() - began)


# ---- the services


def _serve(name: str, arguments: argparse.Namespace, config: ServeConfig, ready: Connection) -> None:
    """Run a service, in a process of its own."""
    model = from_pretrained(arguments.checkpoint, device=arguments.device)
    results = results_of(config, model, arguments.checkpoint)
    engine = SERVICES[name](model, arguments.slots)
    engine.warm_up()
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    ready.send(listener.getsockname())
    run(engine, config, arguments.checkpoint, listener, results)


@contextmanager
def _service(
    name: str, arguments: argparse.Namespace, config: ServeConfig
) -> Iterator[tuple[tuple[str, int], multiprocessing.process.BaseProcess]]:
    """A service that listens: its address and its process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(name, arguments, config, there))
    process.start()
    there.close()
    try:
        address = here.recv()
    except EOFError as error:
        raise UserError(f"the service '{name}' ended before it listened; it says why above.") from error
    try:
        yield address, process
    finally:
        process.terminate()
        process.join()


# ---- load


def _measured(process: int | None, work: Callable[[], Load]) -> Load:
    """Do it, and note how long the processors work for the service meanwhile."""
    before = _cpu_seconds(process)
    load = work()
    load.cpu_seconds = _cpu_seconds(process) - before
    return load


async def _arrive(
    address: tuple[str, int], tokens: np.ndarray[Any, Any], rate: float, arguments: argparse.Namespace
) -> Load:
    """Puzzles that arrive at random, `rate` a second."""
    load, clients = Load(), Clients(address)
    generator = np.random.default_rng(arguments.seed)
    times = np.cumsum(generator.exponential(1 / rate, round(rate * arguments.seconds)))
    flying: set[asyncio.Task[None]] = set()
    began = time.perf_counter()
    for number, at in enumerate(times):
        due = began + float(at)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if len(flying) >= arguments.in_flight:
            load.left_out += 1
            continue
        puzzle = range(number % len(tokens), number % len(tokens) + 1)
        task = asyncio.create_task(ask(clients, tokens, puzzle, load, due))
        flying.add(task)
        task.add_done_callback(flying.discard)
    if flying:
        await asyncio.wait(flying)
    load.seconds = time.perf_counter() - began
    clients.close()
    return load


# ---- requests of no use


def _abused(arguments: argparse.Namespace, tokens: np.ndarray[Any, Any], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of what a service answered, and of the memory that it takes."""
    config = ServeConfig(
        arguments.checkpoint,
        results=arguments.results.split(",")[0],
        most_body_bytes=_MOST_BYTES,
        seconds_per_request=_SECONDS_TO_ARRIVE,
        most_inputs=8,
    )
    with _service("refilled", arguments, config) as (address, process):
        rows: list[dict[str, Any]] = []
        for round_ in range(arguments.rounds + 1):
            counts: Counter[str] = Counter()
            if round_:
                counts = asyncio.run(_abuse(address, tokens, arguments.abuse))
            load = saturate(address, tokens, 8)
            unlike = sum(text != texts[number] for number, text in load.texts.items())
            after = {"boards after it": len(load.texts), "unlike predict": unlike, "errors": sum(load.errors.values())}
            rows.append({"round": round_, "requests": sum(counts.values()), **after, "MB": _resident_mb(process.pid)})
            rows[-1]["ended in"] = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
            print(rows[-1], flush=True)
    return rows


async def _abuse(address: tuple[str, int], tokens: np.ndarray[Any, Any], count: int) -> Counter[str]:
    """How so many requests of no use end, by kind; 64 at a time."""
    puzzle = {"tokens": tokens[0].tolist()}
    many = json.dumps({"inputs": [puzzle] * 8, "act_max_steps": 64}).encode()
    kinds: dict[str, Callable[[], Awaitable[str]]] = {
        "no JSON": partial(_sent, address, request_of(b'{"inputs": [')),
        "no puzzle": partial(_sent, address, request_of(b'{"inputs": ["12", null]}')),
        "no number": partial(_sent, address, request_of(b'{"inputs": [[NaN, 1e999]]}')),
        "nested": partial(_sent, address, request_of(b"[" * 50_000)),
        "no HTTP": partial(_sent, address, b"\x16\x03\x01\x02\x00 hello\r\n\r\n"),
        "too many": partial(_sent, address, request_of(json.dumps({"inputs": [puzzle] * 9}).encode())),
        "too long": partial(_sent, address, request_of(b" " * (_MOST_BYTES + 1))),
        "declared too long": partial(_sent, address, request_of(b"", length=10**12)),
        "slow head": partial(_sent, address, b"POST /infer HTTP/1.1\r\nHost"),
        "slow body": partial(_sent, address, request_of(b'{"inputs"', length=1000)),
        "silent": partial(_sent, address, b""),
        "gone": partial(_sent, address, request_of(many), wait=False),
    }
    ends: Counter[str] = Counter()
    todo = itertools.islice(itertools.cycle(kinds.items()), count)

    async def client() -> None:
        for kind, send in todo:
            ends[f"{kind}: {await send()}"] += 1

    await asyncio.gather(*(client() for _ in range(64)))
    return ends


async def _sent(address: tuple[str, int], request: bytes, wait: bool = True) -> str:
    """The status that it ends with."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        if not wait:
            await asyncio.sleep(0.05)
            return "left"
        head = await reader.read(1 << 16)
        return head.split()[1].decode() if head else "closed"
    except OSError:
        return "closed"
    finally:
        writer.close()


def _resident_mb(process: int | None) -> float:
    """Memory of a process, where the system tells."""
    file = Path(f"/proc/{process}/status")
    if not file.exists():
        return math.nan
    (line,) = (line for line in file.read_text().splitlines() if line.startswith("VmRSS:"))
    return round(int(line.split()[1]) / 1024, 1)


def _cpu_seconds(process: int | None) -> float:
    """What a process has spent on processors, where the system tells."""
    file = Path(f"/proc/{process}/stat")
    if not file.exists():
        return math.nan
    user, system = file.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _draw(rows: Sequence[Mapping[str, Any]], about: Mapping[str, str], picture: Path) -> None:
    """Of each service: waiting times, and puzzles answered, by the rate of arrival."""
    figure, ((times, rates),) = new_picture(1, 2, size=(8, 3.2))
    open_loop = [row for row in rows if row["asked/s"] != "saturated"]
    services = dict.fromkeys((row["slots"], row["results"]) for row in rows)
    for (slots, results), color in zip(services, PALETTE, strict=False):
        name = slots if results == "none" else f"{slots}, results in {results}"
        of_service = [row for row in open_loop if (row["slots"], row["results"]) == (slots, results)]
        asked = [row["asked/s"] for row in of_service]
        times.plot(asked, [row["p50 ms"] for row in of_service], "--", color=color)
        times.plot(asked, [row["p99 ms"] for row in of_service], "o-", color=color, markersize=3, label=name)
        rates.plot(asked, [row["puzzles/s"] for row in of_service], "o-", color=color, markersize=3, label=name)
    times.set_yscale("log")
    times.set_ylabel("ms from when a request was due; p99, dashed p50", fontsize=8)
    rates.set_ylabel("puzzles answered a second", fontsize=8)
    times.legend(fontsize=7, frameon=False)
    for axes in (times, rates):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"puzzles asked for a second; {about['model']}, {about['device']}", fontsize=8)
    save_picture(figure, picture)


if __name__ == "__main__":
    run_command(main)
