"""Run the rows of operations, each operation in a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import benchmarks.ops.rows
from benchmarks.ops.row import Bar, Row
from benchmarks.ops.timing import Timer

OPERATIONS = sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.rows.__path__))

Line = dict[str, Any]  # of the table, by its columns


def lines_of(name: str, device: str, limit: float) -> list[Line]:
    """The lines of one operation, and one more with the reason if its process did not come to the end.

    Args:
        device: as `join_world` takes it.
        limit: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        file.touch()
        command = [sys.executable, "-m", "benchmarks.ops", "--only", name, "--device", device, "--append-to", str(file)]
        reason = None
        try:
            status = subprocess.run(command, timeout=limit, check=False).returncode
            reason = f"its process ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            reason = f"took longer than {limit:g} s (--limit)"
        lines: list[Line] = [json.loads(line) for line in file.read_text().splitlines()]
    return lines if reason is None else [*lines, {"operation": name, "error": reason}]


def append_lines(names: Sequence[str], device: torch.device, file: Path) -> None:
    """Measure the rows of operations and append each to `file` at once, as a line of JSON; print it too."""
    timer = Timer(device)
    for name in names:
        rows = importlib.import_module(f"{benchmarks.ops.rows.__name__}.{name}").rows
        for row in rows(device.type != "cuda"):
            line: Line = {"operation": name, "pass": row.direction, "shape": row.shape}
            try:
                with timer.stream():
                    line |= _measure(row, timer)
            except Exception as error:  # one row that fails is one row
                traceback.print_exc()
                line["error"] = _in_one_line(error)
            print(line, flush=True)
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            _release(device)


def _measure(row: Row, timer: Timer) -> Line:
    work = row.work(timer.device)
    us = timer.us(work.ours)
    times, missing = {}, {}
    for name, make in work.rivals.items():
        try:
            times[name] = timer.us(make())
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
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
