"""What the benchmarks share: work to time, a way to time it, and tables that say on what they were made."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from hrm.batch import Batch
from hrm.config import HRMConfig
from hrm.data.loader import TrainLoader
from hrm.data.pack import Pack, PackMetadata, PackSet, open_pack, write_split


@dataclass(frozen=True)
class Shape:
    """A size of problem: sequences in a batch, tokens of a sequence."""

    batch_size: int
    seq_len: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shape written as `384x81`, batch size first."""
        batch_size, seq_len = text.split("x")
        return cls(int(batch_size), int(seq_len))


def median_ms(work: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> float:
    """Median milliseconds of `work`, by device events on CUDA, by the clock elsewhere."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)))
        else:
            started = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def block_flops(arch: HRMConfig, num_tokens: int) -> float:
    """Floating-point operations of one token's way through one block, among `num_tokens`."""
    width = arch.hidden_size
    return 2 * (4 * width**2 + 3 * width * arch.inner_size) + 4 * num_tokens * width


def act_step_blocks(arch: HRMConfig) -> int:
    """Blocks that one ACT step's cycles run forward."""
    return arch.H_cycles * (arch.L_cycles * arch.L_layers + arch.H_layers)


def matmul_tflops(device: torch.device) -> float:
    """Rate of a large bf16 matmul on random numbers, 8192 wide on CUDA: the ceiling that shares are given of."""
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * width**3 / median_ms(lambda: a @ b, device, 5, 20) / 1e9


def batches(data_path: str | None, shape: Shape, scratch: Path) -> tuple[Pack, Iterator[Batch]]:
    """A pack of the sequence length of `shape` and training batches from it.

    `data_path` serves where its sequence length fits; else a pack of random maze-like tokens is made in `scratch`.
    """
    pack = open_pack(data_path, "train") if data_path else None
    if pack is None or pack.metadata.seq_len != shape.seq_len:
        pack = _random_pack(scratch / f"random-{shape.seq_len}", shape.seq_len)
    epochs = 1 + 1000 * shape.batch_size // pack.metadata.total_groups
    loader = TrainLoader(pack, shape.batch_size, 0, epochs_per_pass=epochs, pin_memory=torch.cuda.is_available())
    return pack, loader.iterate(0)


def _random_pack(path: Path, seq_len: int, count: int = 1000, vocab_size: int = 6) -> Pack:
    if not path.exists():
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, vocab_size, (2, count, seq_len), dtype=np.uint8)
        offsets = np.arange(count + 1)
        examples = PackSet(tokens[0], tokens[1], np.zeros(count, np.int32), offsets, offsets)
        write_split(
            path / "train", PackMetadata(0, 0, 0, vocab_size, seq_len, 1, count, 1.0, ("all",)), {"all": examples}
        )
    return open_pack(path, "train")


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions, as every result names them."""
    on_cuda = device.type == "cuda"
    script, arguments = Path(sys.argv[0]), list(sys.argv[1:])
    if "--output-dir" in arguments:  # where a result lay first tells nobody anything
        where = arguments.index("--output-dir")
        del arguments[where : where + 2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "none",
        "python": platform.python_version(),
        "command": " ".join(["python -m", f"{script.parent.name}.{script.stem}", *arguments]),
    }


def write_results(name: str, about: Mapping[str, str], rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write `<folder>/<date>-<name>.{md,json}`; returns the table in Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    table = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{about['date']}-{name}"
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    (folder / f"{stem}.md").write_text(f"# {name}\n\n{facts}\n\n{table}\n")
    (folder / f"{stem}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return table


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
