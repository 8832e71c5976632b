"""format=onnx: files that compute what the model does, for every architecture, and a program that uses them."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hrm.export.formats.onnx import FORMAT, OPSET
from hrm.export.graphs import module_graphs, whole_graphs
from hrm.export.readme import program, readme
from tests.helpers.exporting import (
    ACT_STEPS,
    ARCHITECTURES,
    answers_of,
    boards,
    export,
    loaded,
    pack_of_answers,
    run_folder,
    text_of,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trm-attention", "transformer"])  # the others are exported by other tests
def test_files_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path / "model", ARCHITECTURES[name]))
    pack = pack_of_answers(tmp_path / "pack", model)
    out = tmp_path / "out"
    export(f"checkpoint={tmp_path / 'model'}", f"output={out}", f"data_path={pack}", "puzzles=5", "batch_size=3")
    report = json.loads((out / "export.json").read_text())
    solve, steps = report["solved"]["solve"], report["first_steps"]["step"]
    assert (solve["accuracy"], solve["same_answers"]) == (1.0, 1.0)
    assert solve["logits_difference"] < 1e-3
    assert max(steps.values()) < 1e-4


def test_a_solve_is_a_loop_with_the_weights_once(folder: Path) -> None:
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


def test_modules_hold_their_weights_alone(folder: Path) -> None:
    """A block is a matrix of attention's inputs, one of its outputs, and two of the MLP; each file has its own."""
    numbers = {
        name: sum(math.prod(each.dims) for each in onnx.load(folder / "out" / f"{name}.onnx").graph.initializer)
        for name in ("L", "H", "heads", "step")
    }
    assert abs(numbers["L"] - numbers["H"]) < 100
    assert numbers["L"] + numbers["H"] < numbers["step"]
    assert numbers["heads"] < 200


@pytest.mark.parametrize("graphs", ["solve", "step", "modules"])
def test_the_program_runs_without_torch_and_hrm(graphs: str, folder: Path, tmp_path: Path) -> None:
    model = loaded(folder / "model")
    apart = graphs == "modules"
    chosen = list(module_graphs(model) if apart else whole_graphs(model, ACT_STEPS, solve=graphs == "solve"))
    text = program(model, FORMAT, chosen, ACT_STEPS)
    script = shutil.copytree(folder / "out", tmp_path / "out") / "solve.py"
    script.write_text(text)
    blocked = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'hrm', 'onnx', 'onnxscript')))\n"  # these raise
    run_it = f"{blocked}import runpy\nsys.argv = ['solve.py', *sys.argv[1:]]\nrunpy.run_path({str(script)!r})"
    inputs = boards(2)
    one, two = map(text_of, inputs)
    arguments, lines = ([one, two], "") if apart else ([], f"{one}\n{two}\n")
    run = subprocess.run(
        [sys.executable, "-I", "-c", run_it, *arguments], input=lines, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [text_of(answer) for answer in answers_of(model, inputs)]
    page = readme(model, "onnx", FORMAT, chosen, 64, text_of(inputs[0]))
    assert f'python solve.py "{one}"' in page
    assert all(f"`{graph.name}.onnx`" in page for graph in chosen)
