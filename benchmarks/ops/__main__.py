"""Time the operations of `hrm.kernels.ops` beside their rivals, and tell which bars they reach.

python -m benchmarks.ops
python -m benchmarks.ops --only softmax --out /tmp/softmax --plot /tmp/softmax.svg

A row that fails or an operation that hangs costs no others, and files are written after every row. `of bound` is the
larger of two times over the time taken: that of a device copy of as many bytes, and that of as many operations at the
rate of a large bf16 matmul, measured in the same process; `limit` says which of them. Times are medians of calls
from CUDA graphs, by the device's events, with inputs that are not in its cache; rows that say so are called from
Python, one after the other, by the clock. On a CPU the script is tried out at toy size, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, markdown, picture_file, run_command, write_table
from benchmarks.ops.running import OPERATIONS, Line, append_lines, lines_of
from benchmarks.ops.timing import Timer
from hrm.distributed.world import join_world
from hrm.evaluation.report.picture import new_picture, save_picture


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(OPERATIONS)}, with commas between")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.md, FILE.json and FILE.jsonl")
    parser.add_argument("--plot", type=picture_file, metavar="FILE", help="draw a picture, .svg or .png")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one operation (default: 180)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--append-to", type=Path, help=argparse.SUPPRESS)  # in the process that measures
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else OPERATIONS
    if unknown := sorted(set(names) - set(OPERATIONS)):
        parser.error(f"--only: there is no operation {unknown[0]}; there are {', '.join(OPERATIONS)}.")
    with join_world(arguments.device) as world:
        if arguments.append_to is not None:
            append_lines(names, world.device, arguments.append_to)
            return
        about = machine(world.device) | _ceilings(world.device)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as scratch, _stopped_by_sigterm():
        out = arguments.out or Path(scratch) / "ops"
        out.parent.mkdir(parents=True, exist_ok=True)
        for line in lines_of(names, arguments.device, arguments.limit, out.with_name(f"{out.name}.jsonl")):
            lines.append(line)
            write_table(out, "ops", about, [_cells(line) for line in lines], lines=lines)
    if arguments.plot is not None:
        draw(about, lines, arguments.plot)
    print(markdown([_cells(line) for line in lines]))
    with_bar = [line for line in lines if "met" in line]
    print(f"{sum(line['met'] == 'yes' for line in with_bar)} of {len(with_bar)} rows reach their bars.")
    for line in lines:
        if "error" in line:
            print(f"failed: {_label(line)}: {line['error']}")
        elif "met" not in line and line["bar"]:
            print(f"no rival of its bar could run: {_label(line)}: {_listed(line.get('missing', {}))}")
        elif line.get("met") == "no":
            print(f"below its bar: {_label(line)}: {line['of bar']:.2f} of {line['bar']}; limit: {line.get('limit')}")


def draw(about: dict[str, str], lines: Sequence[Line], picture: Path) -> None:
    """One bar for each row: how much of its bar it reaches, its microseconds written at its end."""
    measured = [line for line in lines if "of bar" in line]
    figure, ((axes,),) = new_picture(size=(7, 1 + 0.22 * len(measured)))
    shares = [line["of bar"] for line in measured]
    axes.barh(range(len(measured)), shares, color=["#1f6feb" if share >= 1 else "#9aa0a6" for share in shares])
    for index, line in enumerate(measured):
        axes.text(shares[index], index, f" {line['us']:.3g} us", va="center", fontsize=6)
    axes.set_yticks(range(len(measured)), [_label(line) for line in measured], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlim(0, 1.2 * max(shares, default=1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed, in times of the bar; {about['device']}, PyTorch {about['torch']}", fontsize=8)
    save_picture(figure, picture)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends the one that measures as well."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ceilings(device: torch.device) -> dict[str, str]:
    timer = Timer(device)
    about = {
        "device copy": f"{timer.copied / 1e12:.2f} TB/s",
        "bf16 matmul": f"{timer.matmul_flops / 1e12:.0f} TFLOP/s",
    }
    del timer
    if device.type == "cuda":  # what follows needs the memory, in processes of its own
        torch.cuda.empty_cache()
    return about


_COLUMNS = (
    *("operation", "pass", "shape", "us", "TB/s", "TFLOP/s", "of bound", "limit"),
    *("fastest rival", "times as fast", "bar", "of bar", "met", "seconds"),
)


def _cells(line: Line) -> dict[str, Any]:
    """A line as a row of the table, whose columns come in this order; rivals' microseconds in one."""
    cells = {column: line.get(column) for column in _COLUMNS}
    cells["rivals, us"] = ", ".join(f"{name} {us:,.4g}" for name, us in line.get("rivals", {}).items())
    cells["error"] = line.get("error") or _listed(line.get("missing", {}))
    return cells


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _label(line: Line) -> str:
    return " ".join(str(line[key]) for key in ("operation", "pass", "shape") if key in line)


if __name__ == "__main__":
    run_command(main)
