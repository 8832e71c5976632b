"""Trained models in 8 bit beside the same in 16 and 32: size, time and exact accuracy, in one table.

python -m benchmarks.quantized --checkpoints sudoku_small,sudoku --data PACK --puzzles 1000

Each puzzle halts where the model says so; times are of an ACT step. On a CPU they are CPU time of one thread, which
other programs change little; on a GPU, time that passes. `--add FILE.json` continues an earlier table: new rows take
the place of those of the same model, device and precision.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, make_parser, run_command, write_results
from hrm.config.entry import DTYPES, QUANTIZE
from hrm.errors import UserError
from hrm.export.puzzles import find_puzzles
from hrm.export.quantize import measure
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.inference.predictor import sequences_at_once

_PRECISIONS = {"cpu": "float32,bfloat16,int8", "cuda": "bfloat16,int8,fp8"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoints", default="sudoku_small,sudoku", help="several, as for hrm predict")
    parser.add_argument("--data", help="a pack whose test split has the puzzles; default: generated Sudoku puzzles")
    parser.add_argument("--puzzles", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, help="puzzles at a time; default: what suits the device")
    parser.add_argument("--precisions", help=f"several of: {', '.join((*DTYPES[1:], *QUANTIZE[1:]))}")
    parser.add_argument("--add", type=Path, metavar="FILE", help="an earlier table's .json, whose rows stay")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = json.loads(arguments.add.read_text())["rows"] if arguments.add else []
    for checkpoint in arguments.checkpoints.split(","):
        plain = from_pretrained(checkpoint, device=arguments.device)
        device = plain.device
        puzzles = find_puzzles(plain, arguments.puzzles, arguments.data, seed=0)
        about = machine(device) | {"puzzles": puzzles.source}
        if device.type == "cpu":
            torch.set_num_threads(1)
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        batch_size = arguments.batch_size or sequences_at_once(device)
        expected = None
        for precision in (arguments.precisions or _PRECISIONS[device.type]).split(","):
            row: dict[str, Any] = {"model": checkpoint, "device": about["device"], "precision": precision}
            rows = [old for old in rows if {name: old[name] for name in row} != row] + [row]
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = _loaded(checkpoint, device, precision, Path(folder))
                except UserError as error:  # such as fp8 on an earlier GPU
                    row["computed"] = str(error)
                else:
                    found, answers = measure(model, puzzles, batch_size, clock=clock)
                    expected = answers if expected is None else expected
                    row |= {
                        "MB": (found.bytes or 0) / 1e6,
                        "ms, one puzzle": found.ms_alone,
                        f"ms a puzzle, {batch_size} at a time": found.ms_in_batch,
                        "puzzles": len(puzzles),
                        "ACT steps a puzzle": found.act_steps,
                        "exact, %": 100 * found.accuracy,
                        "answered as by the first, %": 100 * float((answers == expected).all(1).mean()),
                        "computed": found.computed,
                    }
            print(write_results("quantized", about, rows, arguments.output_dir), flush=True)


def _loaded(checkpoint: str, device: torch.device, precision: str, folder: Path) -> TrainedModel:
    """The model in a precision; in int8, from a file that holds it so."""
    if precision not in QUANTIZE:
        return from_pretrained(checkpoint, device=device, dtype=precision)
    model = from_pretrained(checkpoint, device=device, quantize=precision)
    if precision != "int8":
        return model
    model.save_pretrained(folder)
    return from_pretrained(folder, device=device, quantize=precision)


if __name__ == "__main__":
    run_command(main)
