"""Run the rows of operations, in a process apart."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import benchmarks.ops.rows
from benchmarks.ops.row import Bar, Row
from benchmarks.ops.timing import Timer

OPERATIONS = sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.rows.__path__))

Line = dict[str, Any]  # of the table, by its columns


def lines_of(names: Sequence[str], device: str, limit: float, file: Path) -> Iterator[Line]:
    """The lines of operations, as they are measured.

    One process measures all; after it failed or was stopped, another one goes on with the next operation, and a line
    has the reason.

    Args:
        device: as `join_world` takes it.
        limit: seconds that one operation may take.
        file: gets the lines as JSON, each at once, so that a run that is killed leaves what it has.
    """
    left = list(names)
    file.write_text("")
    with file.open() as lines:
        while left:
            command = [sys.executable, "-m", "benchmarks.ops", "--device", device, "--only", ",".join(left)]
            # Compiled rivals are single kernels: workers that compile would take longer to start than to work.
            environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            process = subprocess.Popen([*command, "--append-to", str(file)], env=environment)
            try:
                reason = yield from _follow(process, lines, left, limit)
            finally:
                process.kill()
                process.wait()
            if left:
                yield {"operation": left.pop(0), "error": reason}


def _follow(
    process: subprocess.Popen[bytes], lines: TextIO, left: list[str], limit: float
) -> Generator[Line, None, str]:
    """Yield what a process writes until it ends, and return why it did; `left` loses what it is through with."""
    ends_at = time.monotonic() + limit
    while True:
        ended = process.poll() is not None
        for text in _whole_lines(lines):
            line: Line = json.loads(text)
            if line.get("end"):
                left.remove(line["operation"])
                ends_at = time.monotonic() + limit
            else:
                yield line
        if ended:
            return f"its process ended with status {process.returncode}"
        if time.monotonic() > ends_at:
            return f"took longer than {limit:g} s (--limit)"
        time.sleep(0.1)


def _whole_lines(file: TextIO) -> Iterator[str]:
    """What was added to a file that another process writes, but for a line that it is in the middle of."""
    begin = file.tell()
    while (text := file.readline()).endswith("\n"):
        yield text
        begin = file.tell()
    file.seek(begin)


def append_lines(names: Sequence[str], device: torch.device, file: Path) -> None:
    """Measure the rows of operations; append each to `file` at once, as a line of JSON, and print it."""
    timer = Timer(device)
    with file.open("a", buffering=1) as lines:
        for name in names:
            rows = importlib.import_module(f"{benchmarks.ops.rows.__name__}.{name}").rows
            for row in rows(device.type != "cuda"):
                line: Line = {"operation": name, "pass": row.direction, "shape": row.shape}
                began = time.monotonic()
                try:
                    with timer.stream():
                        line |= _measure(row, timer)
                except Exception as error:  # one row that fails is one row
                    traceback.print_exc()
                    line["error"] = _in_one_line(error)
                line["seconds"] = round(time.monotonic() - began, 1)
                print(line, flush=True)
                lines.write(json.dumps(line) + "\n")
                _release(device)
            lines.write(json.dumps({"operation": name, "end": True}) + "\n")


def _measure(row: Row, timer: Timer) -> Line:
    work = row.work(timer.device)
    measure = timer.called_us if row.from_python else timer.us
    us = measure(work.ours)
    times, missing = {}, {}
    for name, make in work.rivals.items():
        try:
            times[name] = measure(make())
        except Exception as error:  # not installed, or does not take the shape
            missing[name] = _in_one_line(error)
    copy_us = timer.copy_us(row.bytes) if row.bytes else 0.0
    flops_us = 1e6 * row.flops / timer.matmul_flops if row.flops else 0.0
    line: Line = {"us": us}
    if row.bytes:
        line["TB/s"] = row.bytes / us / 1e6
    if row.flops:
        line["TFLOP/s"] = row.flops / us / 1e6
    if copy_us or flops_us:
        line["of bound"] = max(copy_us, flops_us) / us
        line["limit"] = "memory" if copy_us >= flops_us else "matmul"
    if times:
        fastest = min(times, key=lambda name: times[name])
        line |= {"fastest rival": fastest, "times as fast": times[fastest] / us}
    line |= {"bar": str(row.bar)} | _reached(row.bar, us, copy_us, times)
    line |= {"rivals": times} | ({"missing": missing} if missing else {})
    return line


def _reached(bar: Bar, us: float, copy_us: float, times: Mapping[str, float]) -> Line:
    """How much of a bar is reached, in times of it: the least of its parts. Nothing where no rival of it could run."""
    parts = []
    if bar.of_copy is not None:
        parts.append(copy_us / us / bar.of_copy)
    if bar.times_rival is not None:
        against = [time for name, time in times.items() if not bar.rivals or name in bar.rivals]
        if not against:
            return {}
        parts.append(min(against) / us / bar.times_rival)
    return {"of bar": min(parts), "met": "yes" if min(parts) >= 1 else "no"} if parts else {}


def _in_one_line(error: Exception) -> str:
    """Its type and the last line of its text, which Triton and compilers put the cause in."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[-1][:200]}".replace("|", "/")


def _release(device: torch.device) -> None:
    """Free what a row held. Raises where it left the device in no state to go on with: another process can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
