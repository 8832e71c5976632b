"""format=onnx: files that compute what the model does, for every architecture, and a program that uses them."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hrm.export import gate
from hrm.export.formats.onnx import FORMAT, OPSET, Onnx
from hrm.export.graphs import Graph, module_graphs, whole_graphs
from hrm.export.puzzles import Puzzles
from hrm.export.readme import program, readme
from hrm.inference.model import TrainedModel
from tests.helpers.exporting import (
    ACT_STEPS,
    ARCHITECTURES,
    HRM,
    TRM,
    answers_of,
    boards,
    loaded,
    run_folder,
    text_of,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def compared(model: TrainedModel, graphs: list[Graph], folder: Path) -> gate.Comparison:
    """Written, and compared on 5 boards."""
    for graph in graphs:
        FORMAT.write(graph, model, folder, 64)
    runs = {graph.name: FORMAT.open(graph, folder, model.device) for graph in graphs}
    inputs = boards(5)
    puzzles = Puzzles(inputs, answers_of(model, inputs), np.zeros(5, dtype=np.int64), "random tokens")
    found = gate.compare(model, runs, ACT_STEPS, puzzles, batch_size=3)  # batches of 3, 2 and, alone, 1
    for way in found.solved.values():
        assert (way.accuracy, way.same_answers) == (1.0, 1.0)
        assert way.logits_difference < 1e-3
    for apart in found.first_steps.values():
        assert apart.logits < 1e-4
        assert apart.states < 1e-4
    return found


@pytest.mark.parametrize("name", ["trm-attention", "transformer"])
def test_files_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES[name]))
    found = compared(model, list(whole_graphs(model, ACT_STEPS, solve=True)), tmp_path)
    assert list(found.solved) == ["solve"]
    assert list(found.first_steps) == ["step"]


def test_modules_compute_what_the_model_does(tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, TRM))
    found = compared(model, list(module_graphs(model)), tmp_path)
    assert list(found.solved) == ["modules"]
    assert list(found.first_steps) == ["modules"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `model` of HRM, and all its graphs as files."""
    folder = tmp_path_factory.mktemp("onnx")
    model = loaded(run_folder(folder / "model", HRM))
    compared(model, [*whole_graphs(model, ACT_STEPS, solve=True), *module_graphs(model)], folder)
    return folder


def test_a_solve_is_a_loop_with_the_weights_once(folder: Path) -> None:
    solve, step = (onnx.load(folder / file) for file in ("solve.onnx", "step.onnx"))
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


def test_modules_hold_their_weights_alone(folder: Path) -> None:
    """A block is a matrix of attention's inputs, one of its outputs, and two of the MLP; each file has its own."""
    numbers = {
        name: sum(math.prod(each.dims) for each in onnx.load(folder / f"{name}.onnx").graph.initializer)
        for name in ("L", "H", "heads", "step")
    }
    assert abs(numbers["L"] - numbers["H"]) < 100
    assert numbers["L"] + numbers["H"] < numbers["step"]
    assert numbers["heads"] < 200


@pytest.mark.parametrize("graphs", ["solve", "step", "modules"])
def test_the_program_runs_without_torch_and_hrm(graphs: str, folder: Path, tmp_path: Path) -> None:
    model = loaded(folder / "model")
    chosen = {
        "solve": lambda: list(whole_graphs(model, ACT_STEPS, solve=True)),
        "step": lambda: list(whole_graphs(model, ACT_STEPS, solve=False)),
        "modules": lambda: list(module_graphs(model)),
    }[graphs]()
    text = program(model, FORMAT, chosen, ACT_STEPS)
    (folder / "solve.py").write_text(text)
    blocked = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'hrm', 'onnx', 'onnxscript')))\n"  # these raise
    run_it = (
        f"{blocked}import runpy\nsys.argv = ['solve.py', *sys.argv[1:]]\nrunpy.run_path({str(folder / 'solve.py')!r})"
    )
    inputs = boards(2)
    one, two = map(text_of, inputs)
    given = {"arguments": ([one, two], ""), "lines": ([], f"{one}\n{two}\n")}[
        "lines" if graphs == "solve" else "arguments"
    ]
    run = subprocess.run(
        [sys.executable, "-I", "-c", run_it, *given[0]], input=given[1], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [text_of(answer) for answer in answers_of(model, inputs)]
    page = readme(model, "onnx", FORMAT, chosen, 64, text_of(inputs[0]))
    assert f'python solve.py "{one}"' in page
    assert all(f"`{graph.name}.onnx`" in page for graph in chosen)


def test_large_models_have_their_weights_in_a_second_file() -> None:
    assert Onnx().files("solve") == ("solve.onnx", "solve.onnx.data")
