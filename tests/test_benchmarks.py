"""The benchmarks run, write what they measured, and the loss curves tell equal from different."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_points import make_pack

from benchmarks import evaluate, kernels, latency, loss_curves, plot, train_step
from benchmarks.common import BASELINE
from hrm.errors import UserError

TINY = ["arch=hrm_small", "arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=2", "device=cpu"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.json")
    content = json.loads(file.read_text())
    assert {"date", "device", "torch", "command"} <= content["about"].keys()
    rows: list[dict[str, Any]] = content["rows"]
    table = file.with_suffix(".md").read_text()
    assert all(f"| {row['kernels']} |" in table for row in rows)
    return rows


@pytest.mark.parametrize("benchmark", [train_step, evaluate, latency], ids=lambda module: module.__name__)
def test_presets_side_by_side(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.BASELINE", "naive")  # compiling takes longer than all the rest
    arguments = ["--presets", "naive,triton", "--shapes", "2x16,3x25", "--repeats", "2", "--device", "cpu"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    benchmark.main([*arguments, "--output-dir", str(tmp_path), *TINY])
    rows = rows_of(tmp_path)
    assert [(row["kernels"], row["batch"], row["S"]) for row in rows] == [
        ("naive", 2, 16),
        ("triton", 2, 16),
        ("naive", 3, 25),
        ("triton", 3, 25),
    ]
    for naive, triton in (rows[:2], rows[2:]):
        assert naive["ms"] > 0
        assert naive["x naive"] == 1
        assert "ms" not in triton
        assert "needs an NVIDIA GPU" in triton["cannot run"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"kernels": name, "S": 81, "batch": 8, "ms": ms, f"x {BASELINE}": 4 / ms}
        for name, ms in (("a", 2.0), ("b", 4.0))
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"about": {"device": "here", "torch": "2"}, "rows": [*rows, {"kernels": "c"}]}))
    plot.main([str(results), str(tmp_path / "picture.svg")])
    picture = (tmp_path / "picture.svg").read_text()
    assert all(label in picture for label in ("2 ms", "4 ms", "81 tokens, batch 8"))


def test_loss_curves_pass_what_is_equal_and_stop_at_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--presets", "naive", "--shape", "4x16", "--steps", "100", "--seeds", "2", "--device", "cpu"]
    arguments += ["--output-dir", str(tmp_path / "out"), "lr=1e-2", "lr_warmup_steps=1", *TINY]
    loss_curves.main(arguments)
    reference, same = rows_of(tmp_path / "out")
    assert same["distance"] == 0 < reference["distance"]
    assert same["within the spread"] == "yes"

    true_curve = loss_curves.loss_curve
    calls = []

    def off_at_last(*of: Any) -> torch.Tensor:
        calls.append(of)
        return true_curve(*of) * (1.5 if len(calls) == 3 else 1)

    monkeypatch.setattr(loss_curves, "loss_curve", off_at_last)
    with pytest.raises(SystemExit) as stopped:
        loss_curves.main(arguments)
    assert stopped.value.code == 1
    assert rows_of(tmp_path / "out")[1]["within the spread"] == "NO"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_loss_curves_of_all_presets(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack", box="3x3", train_size=500, test_size=5)
    loss_curves.main(["--data", str(tmp_path / "pack"), "--shape", "64x81", "--output-dir", str(tmp_path), "lr=1e-4"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_kernels_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU, not cpu"):
        kernels.main(["--output-dir", str(tmp_path)])
