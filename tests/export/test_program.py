"""format=program: programs of torch.export, compiled, that run without this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrm.errors import UserError
from hrm.export.formats.program import FORMAT
from tests.helpers.exporting import HRM, answers_of, boards, export, loaded, pack_of_answers, run_folder, text_of

WITHOUT_HRM = "import sys\nsys.modules['hrm'] = None\n"  # to import it raises

needs_compiler = pytest.mark.skipif(
    FORMAT.why_not(torch.device("cpu")) is not None, reason="AOTInductor needs a C++ compiler"
)


def run_python(text: str, *arguments: str) -> list[str]:
    """Words that a program prints which cannot import this package."""
    command = [sys.executable, "-I", "-c", WITHOUT_HRM + text, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("parts", ["whole", "modules"])
def test_programs_compute_what_the_model_does(parts: str, tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path / "model", HRM))
    pack, out = pack_of_answers(tmp_path / "pack", model), tmp_path / "out"
    options = ("format=program", f"parts={parts}", "puzzles=10", "batch_size=4")  # batches of 4, 2 and, alone, 1
    export(f"checkpoint={tmp_path / 'model'}", f"output={out}", f"data_path={pack}", *options)
    report = json.loads((out / "export.json").read_text())
    way, first = ("solve", "step") if parts == "whole" else ("modules", "modules")
    assert list(report["solved"]) == [way]
    assert (report["solved"][way]["accuracy"], report["solved"][way]["same_answers"]) == (1.0, 1.0)
    assert report["solved"][way]["logits_difference"] < 1e-3
    assert max(report["first_steps"][first].values()) < 1e-4

    inputs, script = boards(2), out / "solve.py"
    answers = [text_of(answer) for answer in answers_of(model, inputs)]
    boards_as_text = [text_of(board) for board in inputs]
    assert run_python(f"import runpy\nrunpy.run_path({str(script)!r})", *boards_as_text) == answers
    # The programs that are not compiled say the same.
    plain = script.read_text().replace(
        'torch._inductor.aoti_load_package(str(FOLDER / f"{name}_compiled.pt2"))',
        'torch.export.load(FOLDER / f"{name}.pt2").module()',
    )
    assert "_compiled" not in plain
    script.write_text(plain)
    assert run_python(f"import runpy\nrunpy.run_path({str(script)!r})", *boards_as_text) == answers


def test_a_machine_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"format=program cannot be written here: .* there is no C\+\+ compiler: install one; or give"
    ):
        export("checkpoint=sudoku", "format=program", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
