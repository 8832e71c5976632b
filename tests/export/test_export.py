"""`hrm export`: ONNX files that compute what the model does, for every architecture, and the gate before them."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hrm
from hrm.checkpoint.run_folder import save_config
from hrm.checkpoint.weights import save_weights
from hrm.config import ExportConfig, PretrainConfig
from hrm.config.compose import compose
from hrm.data.pack import write_examples, write_identifiers
from hrm.errors import UserError
from hrm.evaluation.latent import act_steps
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import as_batch
from hrm.models.hrm import HRMConfig
from hrm.models.recurrent import RecurrentConfig
from hrm.models.transformer import TransformerConfig
from hrm.models.trm import TRMConfig
from hrm.tasks.form import Puzzle, PuzzleForm

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from hrm.export import command, gate
from hrm.export.graphs import OPSET, export_solve, export_step
from hrm.export.puzzles import Puzzles, find_puzzles

FORM = PuzzleForm("sudoku", seq_len=16, vocab_size=6)  # 4x4 boards
SIZE: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "expansion": 1.0, "halt_max_steps": 3}
TWO_MODULES = HRMConfig(**SIZE, H_layers=1, L_layers=1, H_cycles=1, L_cycles=1)
ARCHITECTURES: dict[str, RecurrentConfig] = {
    "trm-mixer": TRMConfig(**SIZE, L_layers=1, H_cycles=1, L_cycles=1, mlp_t=True, pos_encodings="none"),
    "trm-attention": TRMConfig(**SIZE, L_layers=1, H_cycles=1, L_cycles=1, register_tokens=1),
    "transformer": TransformerConfig(**SIZE, num_layers=1, pos_encodings="rope_2d+learned"),
}


def run_folder(folder: Path, options: RecurrentConfig, seed: int = 1) -> Path:
    """A run folder with random weights."""
    save_config(PretrainConfig(arch=options, data_path="data/none"), folder)
    model = hrm.build_model(options, batch_size=1, seq_len=16, vocab_size=6, num_puzzle_identifiers=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # answers that depend on the puzzle, and values of halting that differ
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=generator)
        model.model.inner.puzzle_emb.weights.normal_(generator=generator)
    save_weights(model.state_dict(), folder, "step_7")
    FORM.save(folder)
    return folder


def loaded(folder: Path) -> TrainedModel:
    return hrm.from_pretrained(folder, device="cpu", dtype="float32")


def boards(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random tokens: what untrained models answer to them differs more than their answers to puzzles."""
    return np.random.default_rng(3).integers(1, 6, (count, 16))


def answers_of(model: TrainedModel, inputs: np.ndarray[Any, Any], steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    batch = as_batch([Puzzle(tokens) for tokens in inputs])
    outputs = [outputs for _, (_, outputs) in zip(range(steps), act_steps(model.model, batch), strict=False)]
    answers: np.ndarray[Any, np.dtype[np.int64]] = outputs[-1]["logits"].argmax(-1).numpy()
    return answers


def pack_of_answers(folder: Path, model: TrainedModel, count: int = 12) -> Path:
    """A pack whose labels are what a model answers, so that it is right on all of it."""
    inputs = boards(count)
    labels = answers_of(model, inputs, SIZE["halt_max_steps"])
    for split in ("train", "test"):
        write_examples(folder / split, inputs.astype(np.uint8), labels.astype(np.uint8), vocab_size=6)
    write_identifiers(folder, ["<blank>"])
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES[name]))
    export_step(model, tmp_path)
    export_solve(model, tmp_path, 3)
    inputs = boards(5)
    puzzles = Puzzles(inputs, answers_of(model, inputs, 3), np.zeros(5, dtype=np.int64), "random tokens")
    found = gate.compare(model, tmp_path, 3, puzzles, batch_size=3)  # batches of 3, 2 and, alone, 1
    assert found.step_difference < 1e-4
    assert found.state_difference < 1e-4
    assert found.solve_difference < 1e-3
    assert found.accuracy == (1.0, 1.0)
    assert found.same_answers == 1.0


def exported(arguments: Sequence[str]) -> None:
    command.export(compose(ExportConfig, "export", arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hrm export` wrote, in `out`, of the run `model`, compared on `pack`."""
    folder = tmp_path_factory.mktemp("exported")
    pack = pack_of_answers(folder / "pack", loaded(run_folder(folder / "model", TWO_MODULES)))
    exported([f"checkpoint={folder / 'model'}", f"output={folder / 'out'}", f"data_path={pack}", "puzzles=10"])
    return folder


def test_the_report_says_what_was_compared(folder: Path) -> None:
    report = json.loads((folder / "out" / "export.json").read_text())
    assert report["passed"] is True
    assert report["accuracy"] == {"pytorch": 1.0, "onnxruntime": 1.0}
    assert (report["puzzles"], report["act_steps"], report["opset"]) == (10, 3, OPSET)
    assert report["bytes"]["solve.onnx"] == (folder / "out" / "solve.onnx").stat().st_size
    assert set(report["versions"]) == {"hrm", "torch", "onnx", "onnxscript", "onnxruntime"}
    assert report["step_difference"] < 1e-4
    assert report["solve_difference"] < 1e-3
    assert all(ms > 0 for ms in report["ms_alone"].values())


def test_a_solve_is_a_loop_with_the_weights_once(folder: Path) -> None:
    import onnx

    solve, step = (onnx.load(folder / "out" / file) for file in ("solve.onnx", "step.onnx"))
    assert solve.opset_import[0].version == OPSET
    onnx.checker.check_model(solve)
    loops = [node for node in solve.graph.node if node.op_type == "Loop"]
    assert len(loops) == 1
    weights = [sum(math.prod(each.dims) for each in file.graph.initializer) for file in (solve, step)]
    assert abs(weights[0] - weights[1]) < 100  # constants
    body = loops[0].attribute[0].g
    assert not body.initializer
    assert [node.op_type for node in body.node].count("MatMul") < [node.op_type for node in step.graph.node].count(
        "MatMul"
    )


def test_the_program_in_the_readme_runs_without_torch_and_hrm(folder: Path) -> None:
    page = (folder / "out" / "README.md").read_text()
    match = re.search(r"```python\n(.*?)```", page, re.S)
    assert match is not None
    assert len([line for line in match[1].splitlines() if line]) <= 15
    blocked = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'hrm', 'onnx', 'onnxscript')))\n"  # these raise
    inputs = boards(1)
    puzzle = "".join("?.1234"[token] for token in inputs[0])
    run = subprocess.run(
        [sys.executable, "-I", "-c", blocked + match[1], puzzle], cwd=folder / "out", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    answer = answers_of(loaded(folder / "model"), inputs, 3)[0]
    assert run.stdout.strip() == "".join("?.1234"[token] for token in answer)
    example = re.search(r'python solve.py "(.*)"', page)
    assert example is not None
    assert len(example[1]) == 16


def test_a_gate_that_fails_keeps_the_report(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of one model are taken for those of another, to whose puzzles its answers are wrong."""
    other = run_folder(tmp_path / "other", TWO_MODULES, seed=2)
    pack = pack_of_answers(tmp_path / "pack", loaded(other))

    def copied(name: str) -> Path:
        return Path(shutil.copy(folder / "out" / name, tmp_path / "out"))

    monkeypatch.setattr(command, "export_step", lambda model, out: copied("step.onnx"))
    monkeypatch.setattr(command, "export_solve", lambda model, out, steps: copied("solve.onnx"))
    arguments = [f"checkpoint={other}", f"output={tmp_path / 'out'}", f"data_path={pack}"]
    for _ in range(2):  # an export that failed is replaced by the next one
        with pytest.raises(UserError, match=r"PyTorch's on 100\.0%, further apart than gate=0\.01"):
            exported(arguments)
        report = json.loads((tmp_path / "out" / "export.json").read_text())
        assert report["passed"] is False
        assert report["accuracy"]["onnxruntime"] < 0.5


def test_folders_with_other_files_are_left_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no export"):
        exported([f"checkpoint={folder / 'model'}", f"output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "solve.onnx").is_file()


def test_generated_puzzles_have_one_solution_and_no_spare_given(folder: Path) -> None:
    from hrm.tasks.sudoku import BoxShape, decode_tokens
    from hrm.tasks.sudoku_solver import count_solutions, solve

    puzzles = find_puzzles(loaded(folder / "model"), 20, None, seed=5)
    box = BoxShape.from_cells(16)
    given = decode_tokens(puzzles.inputs)
    assert (solve(given, box) == decode_tokens(puzzles.labels)).all()
    for board in given:
        for cell in np.flatnonzero(board):
            without = board.copy()
            without[cell] = 0
            assert count_solutions(without[None], box)[0] > 1


def test_other_tasks_need_a_pack(tmp_path: Path) -> None:
    form = PuzzleForm("tokens", seq_len=16, vocab_size=6)
    run_folder(tmp_path, TWO_MODULES)
    form.save(tmp_path)
    with pytest.raises(UserError, match="give a pack of the task tokens, by data_path"):
        find_puzzles(loaded(tmp_path), 20, None, seed=0)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("format=tensorrt", "format=tensorrt is not a choice"), ("gate=2", "gate=2"), ("puzzles=0", "puzzles=0")],
)
def test_options_that_are_of_no_use(option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(ExportConfig, "export", ["checkpoint=c", "output=o", option])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm.cli import export

    monkeypatch.setattr("hrm.config.extras.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"hrm export needs onnx, onnxscript, onnxruntime: pip install 'hrm-torch\[export\]'"
    ):
        export._export(ExportConfig(checkpoint="sudoku", output="out"))
