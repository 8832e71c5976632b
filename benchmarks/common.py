"""What the benchmarks share: work to time, a way to time it, and tables that say on what they were made."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.published import Published
from hrm.batch import Batch
from hrm.checkpoint.weights import Checkpoint
from hrm.config import PretrainConfig
from hrm.config.checks import neighbours
from hrm.config.compose import compose
from hrm.config.paths import choices_of
from hrm.data.loader import TrainLoader
from hrm.data.pack import Pack, PackMetadata, PackSet, open_pack, write_split
from hrm.distributed.world import World, join_world
from hrm.errors import EXIT_USER_ERROR, UserError, printable
from hrm.evaluation.report.picture import require_matplotlib
from hrm.kernels.presets import AUTO, presets

# The published code's way: the plain model through torch.compile, with the best attention PyTorch has.
BASELINE = "compile"
PUBLISHED = "published"  # that code itself
PRESETS = ",".join(preset.name for preset in presets() if preset.name != AUTO)


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


@dataclass(frozen=True)
class Trial:
    """One preset at one shape, on real batches."""

    config: PretrainConfig
    shape: Shape
    world: World
    pack: Pack
    batches: Iterator[Batch]
    repeats: int
    matmul_tflops: float  # the device's rate, the ceiling that shares are given of

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence, its puzzle prefix included."""
        return int(self.config.arch.prefix_len) + self.shape.seq_len

    def rates(self, ms: float, sequence_flops: int) -> dict[str, float]:
        """Columns that follow from the time of a step that does so many operations for each sequence."""
        tokens = self.shape.batch_size * self.num_tokens
        tflops = self.shape.batch_size * sequence_flops / ms / 1e9
        return {
            "puzzles/s": 1000 * self.shape.batch_size / ms,
            "tokens/s": 1000 * tokens / ms,
            "TFLOP/s": tflops,
            "of matmul": tflops / self.matmul_tflops,
        }


def compare_presets(
    name: str,
    description: str,
    shapes: str,
    measure: Callable[[Trial], dict[str, Any]],
    published: str,
    argv: Sequence[str] | None,
) -> None:
    """The main function of a benchmark: `measure` every preset at every shape in one run, and write a table.

    Args:
        name: of the result files.
        description: the benchmark's docstring.
        shapes: the default ones.
        measure: returns a row, with the time in `ms`.
        published: the same work of the published code, one of `benchmarks.published.WORKS`.
    """
    parser = make_parser(description)
    parser.add_argument("--data", help="a pack of real puzzles; shapes of another length get random tokens")
    parser.add_argument("--presets", default=PRESETS)
    parser.add_argument("--shapes", default=shapes, help="batch size x sequence length, several")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--each", default="", help="an option and its values, e.g. kernels.recompute=none,block,module")
    parser.add_argument("--published", type=Path, metavar="CHECKOUT", help="time the published code's checkout too")
    parser.add_argument("overrides", nargs="*", help="options of pretrain.py, e.g. arch=hrm_small")
    arguments = parser.parse_intermixed_args(argv)
    theirs = Published(arguments.published) if arguments.published else None
    option, _, values = arguments.each.partition("=")
    presets = presets_of(arguments.presets)
    variants = [{option: value} for value in values.split(",")] if option else [{}]

    rows = []
    with join_world(arguments.device) as world, tempfile.TemporaryDirectory() as scratch:
        ceiling = matmul_tflops(world.device)
        for shape in map(Shape.parse, arguments.shapes.split(",")):
            measured: list[dict[str, Any]] = []
            for preset, variant in itertools.product(presets, variants):
                row = {"kernels": preset, "S": shape.seq_len, "batch": shape.batch_size, **variant}
                try:
                    chosen = [*arguments.overrides, *(f"{name}={value}" for name, value in variant.items())]
                    config = preset_config(preset, shape, chosen)
                    pack, stream = batches(arguments.data, shape, Path(scratch))
                    torch.compiler.reset()  # what other shapes compiled would count against the limit
                    reset_peak(world.device)
                    row |= measure(Trial(config, shape, world, pack, stream, arguments.repeats, ceiling))
                except UserError as error:
                    row["cannot run"] = str(error)
                measured.append(row)
                print(row, flush=True)
            if theirs:
                row = {"kernels": PUBLISHED, "S": shape.seq_len, "batch": shape.batch_size}
                try:
                    row |= _measure_published(theirs, published, shape, arguments, Path(scratch), world)
                except UserError as error:
                    row["cannot run"] = str(error)
                measured.append(row)
                print(row, flush=True)
            for baseline in (BASELINE, PUBLISHED):
                slow = next((row.get("ms") for row in measured if row["kernels"] == baseline), None)
                for row in measured:
                    if slow and "ms" in row:
                        row[f"x {baseline}"] = slow / row["ms"]
            rows += measured
    about = machine(world.device) | {"bf16 matmul ceiling": f"{ceiling:.0f} TFLOP/s"}
    print(write_results(name, about, rows, arguments.output_dir))


def _measure_published(
    theirs: Published, work: str, shape: Shape, arguments: argparse.Namespace, scratch: Path, world: World
) -> dict[str, Any]:
    """The row of the published code, from the same pack."""
    config = preset_config("naive", shape, arguments.overrides)
    pack, _ = batches(arguments.data, shape, scratch)
    reset_peak(world.device)  # its process needs the memory
    answer = theirs.measure(work, config.arch, pack.path, shape.batch_size, world.device, repeats=arguments.repeats)
    steps = config.arch.halt_max_steps if work == "evaluation" else 1
    sequences = shape.batch_size / answer["ms"] / steps
    return {
        "ms": answer["ms"],
        "puzzles/s": 1000 * sequences,
        "tokens/s": 1000 * sequences * (shape.seq_len + config.arch.prefix_len),
        "GiB": answer["GiB"],
        **({"ms, slowest of 20": answer["slowest of 20"]} if work == "latency" else {}),
        "stand-ins": " and ".join(answer["stand-ins"]),
    }


def run_command(main: Callable[[], None]) -> None:
    """A benchmark as the shell starts it: a mistake in what was asked for ends in its sentence."""
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line of which a benchmark's device and the folder of its results can be chosen."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output-dir", "--out", type=Path, default=Path("benchmarks/results/tables"))
    return parser


def preset_config(preset: str, shape: Shape, overrides: Sequence[str]) -> PretrainConfig:
    """The options of pretrain.py under a kernel preset, for batches of `shape`."""
    # The published code takes every step as it comes.
    guard = ["skip_nonfinite=false"] if preset == BASELINE else []
    chosen = [*guard, *overrides, f"kernels={preset}", f"global_batch_size={shape.batch_size}"]
    return compose(PretrainConfig, "pretrain", chosen)


def by_main_alone(measure: Callable[[World], dict[str, Any]], world: World) -> dict[str, Any]:
    """What the main process measures alone while the others wait; empty on those."""
    group = dist.new_group([0]) if world.size > 1 else None
    alone = replace(world, size=1, group=group)
    try:
        return measure(alone) if world.is_main else {}
    finally:
        if world.size > 1:
            dist.barrier()


def cpu_peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors made by `work` take at once on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def reset_peak(device: torch.device) -> None:
    """Begin anew what `peak_gib` counts, without what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors took at once since `reset_peak`, on CUDA."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def median_ms(work: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> float:
    """Median milliseconds of `work`, by device events on CUDA, by the clock elsewhere."""
    return statistics.median(times_ms(work, device, warmup, repeats))


def times_ms(work: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of each call of `work` after some that do not count."""
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
    return times


def matmul_tflops(device: torch.device) -> float:
    """Rate of a large bf16 matmul on random numbers, 8192 wide on CUDA: the ceiling that shares are given of."""
    width = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * width**3 / median_ms(lambda: a @ b, device, 5, 20) / 1e9


def batches(data_path: str | None, shape: Shape, scratch: Path, count: int = 1000) -> tuple[Pack, Iterator[Batch]]:
    """A pack of the sequence length of `shape` and at least `count` training batches from it.

    `data_path` serves where its sequence length fits; else a pack of random maze-like tokens is made in `scratch`.
    """
    pack = open_pack(data_path, "train") if data_path else None
    if pack is None or pack.metadata.seq_len != shape.seq_len:
        pack = _random_pack(scratch / f"random-{shape.seq_len}", shape.seq_len)
    epochs = 1 + count * shape.batch_size // pack.metadata.total_groups
    loader = TrainLoader(pack, shape.batch_size, 0, epochs_per_pass=epochs, pin_memory=torch.cuda.is_available())
    return pack, loader.iterate(0)


def presets_of(text: str) -> list[str]:
    """The kernel presets that `--presets` names.

    Raises:
        UserError: one of them is not there.
    """
    names, there = text.split(","), choices_of("kernels")
    if unknown := [name for name in names if name not in there]:
        raise UserError(f"--presets {unknown[0]} is not a choice; {neighbours(unknown[0], there)}")
    return names


def data_path_of(checkpoint: Checkpoint, given: str | None) -> str:
    """The path of the pack that --data gives, or else of the one that a checkpoint was trained on.

    Raises:
        UserError: neither is known.
    """
    data_path = given or checkpoint.config.get("data_path")
    if not isinstance(data_path, str):
        raise UserError(f"{checkpoint.config_file} does not say which data it was trained on: add --data.")
    return data_path


def over_all_sets(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Averages over the puzzles of all test sets, from those of each and its `count`."""
    counts = {name: of_set["count"] for name, of_set in metrics.items() if of_set["count"]}
    total = sum(counts.values())
    names = [name for name in metrics[next(iter(counts))] if name != "count"]
    return {name: sum(count * metrics[of][name] for of, count in counts.items()) / total for name in names}


def _random_pack(path: Path, seq_len: int, count: int = 1000, vocab_size: int = 6) -> Pack:
    if not path.exists():
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, vocab_size, (2, count, seq_len), dtype=np.uint8)
        offsets = np.arange(count + 1)
        examples = PackSet(tokens[0], tokens[1], np.zeros(count, np.int32), offsets, offsets)
        metadata = PackMetadata(0, 0, 0, vocab_size, seq_len, 1, count, 1.0, ("all",))
        for split in ("train", "test"):
            write_split(path / split, metadata, {"all": examples})
    return open_pack(path, "train")


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions, as every result names them."""
    on_cuda = device.type == "cuda"
    script, arguments = Path(sys.argv[0]), list(sys.argv[1:])
    module = f"benchmarks.{script.parent.name if script.stem == '__main__' else script.stem}"
    for option in {"--output-dir", "--out", "--picture"} & set(arguments):  # where results lay first tells nobody
        where = arguments.index(option)
        del arguments[where : where + 2]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "none",
        "python": platform.python_version(),
        "command": " ".join(["python -m", module, *arguments]),
    }


def picture_file(text: str) -> Path:
    """An argument that names a picture to draw; what would hinder it is said before the work that it is to show."""
    file = Path(text)
    if file.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} is neither a .png nor a .svg file")
    require_matplotlib()
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def write_results(
    name: str,
    about: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    **more: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> str:
    """Write `<folder>/<date>-<name>.{md,json}`, the JSON with fields `more`; returns the table in Markdown."""
    return write_table(folder / f"{about['date']}-{name}", name, about, rows, **more)


def write_table(
    file: Path,
    title: str,
    about: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    **more: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> str:
    """Write `<file>.{md,json}`, the JSON with fields `more`; returns the table in Markdown."""
    table = markdown(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = "\n".join(f"- {key}: {value}" for key, value in about.items())
    file.with_name(f"{file.name}.md").write_text(f"# {title}\n\n{listed}\n\n{table}\n")
    content = json.dumps({"about": about, "rows": rows, **more}, indent=1)
    file.with_name(f"{file.name}.json").write_text(content + "\n")
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for each key that a row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
