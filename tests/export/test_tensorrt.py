"""format=tensorrt: what is missing is said in a sentence. Engines themselves need a GPU, and are not tested."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hrm.errors import UserError
from hrm.export.formats.tensorrt import FORMAT
from hrm.export.graphs import whole_graphs
from tests.helpers.exporting import ACT_STEPS, HRM, export, loaded, run_folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=tensorrt needs an NVIDIA GPU"):
        export("checkpoint=sudoku", "format=tensorrt", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hrm.export.formats.tensorrt.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Torch-TensorRT is not installed: pip install torch-tensorrt"):
        export("checkpoint=sudoku", "format=tensorrt", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_the_package_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_tensorrt.py").write_text("raise OSError('libnvinfer.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"cannot be imported \(libnvinfer\.so: cannot open shared object file\)"):
        export("checkpoint=sudoku", "format=tensorrt", f"output={tmp_path / 'out'}")


def test_a_graph_that_it_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed over: a step with its range of batches, which a compiler that refuses ends in a sentence."""
    asked: dict[str, Any] = {}

    def compile(program: torch.export.ExportedProgram, *, arg_inputs: list[Any], **options: Any) -> None:
        asked.update(program=program, inputs=arg_inputs, **options)
        raise RuntimeError("Unsupported operator: aten.rsqrt. More lines follow.")

    library = ModuleType("torch_tensorrt")
    library.Input, library.dynamo = lambda **fields: fields, SimpleNamespace(compile=compile)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library)
    model = loaded(run_folder(tmp_path, HRM))
    (step,) = whole_graphs(model, ACT_STEPS, solve=FORMAT.has_solve)
    with pytest.raises(UserError, match=r"cannot write step of .*step_7 \(Unsupported operator: aten\.rsqrt\)"):
        FORMAT.write(step, model, tmp_path, max_batch_size=8)
    assert not (tmp_path / "step_tensorrt.pt2").exists()
    assert isinstance(asked["program"], torch.export.ExportedProgram)
    shapes = [tuple(each[f"{name}_shape"] for name in ("min", "opt", "max")) for each in asked["inputs"]]
    assert shapes[0] == ((1, 16), (8, 16), (8, 16))
    assert shapes[2] == ((1,), (8,), (8,))
    assert [each["dtype"] for each in asked["inputs"]] == [torch.int64, torch.int64, torch.bool] + [torch.float32] * 2
    assert asked["disable_tf32"] is True
