"""What tests of benchmarks share."""

import json
from pathlib import Path
from typing import Any

TINY = ["arch=hrm_small", "arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=2", "device=cpu"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.json")
    content = json.loads(file.read_text())
    assert {"date", "device", "torch", "command"} <= content["about"].keys()
    rows: list[dict[str, Any]] = content["rows"]
    table = file.with_suffix(".md").read_text()
    assert all(f"| {row['kernels']} |" in table for row in rows)
    return rows
