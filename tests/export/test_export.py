"""`hrm export`: the folder, the report and the gate before it, in all formats alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm import cli
from hrm.config import ExportConfig
from hrm.config.compose import compose
from hrm.errors import UserError
from hrm.export import command
from hrm.export.format import Format
from hrm.export.formats import format_names, load_format
from hrm.export.graphs import Graph
from hrm.export.puzzles import find_puzzles
from hrm.inference.model import TrainedModel
from hrm.tasks.form import PuzzleForm
from tests.helpers.exporting import ACT_STEPS, ARCHITECTURES, HRM, export, loaded, pack_of_answers, run_folder
from tests.helpers.inference import untrained

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_the_report_says_what_was_compared(folder: Path) -> None:
    report = json.loads((folder / "out" / "export.json").read_text())
    assert report["passed"] is True
    assert (report["puzzles"], report["act_steps"], report["format"]) == (10, ACT_STEPS, "onnx")
    assert report["bytes"]["solve.onnx"] == (folder / "out" / "solve.onnx").stat().st_size
    assert set(report["versions"]) == {"hrm", "torch", "onnx", "onnxscript", "onnxruntime"}
    solve = report["solved"]["solve"]
    assert (report["pytorch"]["accuracy"], solve["accuracy"], solve["same_answers"]) == (1.0, 1.0, 1.0)
    assert solve["logits_difference"] < 1e-3
    assert list(report["solved"]) == ["solve", "modules"]
    for way in report["first_steps"].values():
        assert way["logits"] < 1e-4
        assert way["states"] < 1e-4
    assert all(way["ms_alone"] > 0 for way in (report["pytorch"], solve))
    text = (folder / "out" / "export.txt").read_text()
    assert "gate=0.01: passed." in text
    assert "100.00%" in text


def test_a_gate_that_fails_keeps_the_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of one model are taken for those of another, to whose puzzles its answers are wrong."""
    other = run_folder(tmp_path / "other", HRM, seed=2)
    pack = pack_of_answers(tmp_path / "pack", loaded(other))
    out = tmp_path / "out"

    def copied(chosen: Format, graph: Graph, model: TrainedModel, out: Path, max_batch_size: int) -> None:
        shutil.copy(folder / "out" / f"{graph.name}.onnx", out)

    monkeypatch.setattr(type(load_format("onnx")), "write", copied)
    for _ in range(2):  # an export that failed is replaced by the next one
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", f"checkpoint={other}", f"output={out}", f"data_path={pack}", "parts=all"])
        assert "PyTorch's on 100.0%, further apart than gate=0.01 allows: do not use" in capsys.readouterr().err
        report = json.loads((out / "export.json").read_text())
        assert report["passed"] is False
        assert all(way["accuracy"] < 0.5 for way in report["solved"].values())
        assert "gate=0.01: FAILED." in (out / "export.txt").read_text()
        assert (out / "solve.onnx").is_file()


def test_an_export_that_ends_early_does_not_look_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(load_format("onnx")), "write", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        export(f"checkpoint={folder / 'model'}", f"output={tmp_path / 'out'}")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["export.json"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["passed"] is None


@pytest.mark.parametrize("name", ["notes.txt", "models/notes.txt"])
def test_folders_with_other_files_are_left_alone(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no export wrote there, and is not overwritten"):
        export(f"checkpoint={folder / 'model'}", f"output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "solve.onnx").is_file()


def test_a_report_names_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A report of unknown origin lets no file be removed that is not below it."""
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    report = tmp_path / "out" / "export.json"
    report.write_text(report.read_text().replace('"export.txt"', '"export.txt", "../precious"'))
    assert {file.parent for file in command._earlier_export(tmp_path / "out")} == {tmp_path / "out"}


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


def test_generated_mazes_come_with_a_shortest_path(tmp_path: Path) -> None:
    from hrm.tasks.maze import is_shortest_path

    model = loaded(untrained(tmp_path / "mazes", PuzzleForm("maze", seq_len=64, vocab_size=6)))
    puzzles = find_puzzles(model, 5, None, seed=0)
    assert len(puzzles) == 5
    assert is_shortest_path(puzzles.inputs, puzzles.labels).all()


def test_other_tasks_need_a_pack(tmp_path: Path) -> None:
    run_folder(tmp_path, HRM)
    PuzzleForm("tokens", seq_len=16, vocab_size=6).save(tmp_path)
    with pytest.raises(UserError, match="give a pack of the task tokens, by data_path"):
        find_puzzles(loaded(tmp_path), 20, None, seed=0)


def test_packs_of_other_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pack", tmp_path / "pack")
    file = tmp_path / "pack" / "test" / "dataset.json"
    metadata = json.loads(file.read_text())
    for name in ("inputs", "labels"):
        array = tmp_path / "pack" / "test" / f"all__{name}.npy"
        np.save(array, np.load(array)[:, :9])
    file.write_text(json.dumps(metadata | {"seq_len": 9}))
    with pytest.raises(UserError, match=r"has seq_len=9, but the model was trained with 16: give a pack of its kind"):
        find_puzzles(loaded(folder / "model"), 5, str(tmp_path / "pack"), seed=0)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("gate=2", "gate=2"),
        ("puzzles=0", "puzzles=0"),
        ("parts=half", "parts=half is not a choice"),
        ("device=tpu", "device=tpu is not a choice"),
        ("max_batch_size=1", "max_batch_size=1 is too small"),
    ],
)
def test_options_that_are_of_no_use(option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(ExportConfig, "export", ["checkpoint=c", "output=o", option])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["format=onnxx"], "format=onnxx is not a choice; did you mean onnx?"),
        (["device=cuda"], "device=cuda is not for format=onnx: drop it, or give cpu."),
    ],
)
def test_mistakes_end_in_a_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "checkpoint=sudoku", f"output={tmp_path / 'out'}", *options])
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file: give a folder"):
        export("checkpoint=sudoku", f"output={tmp_path / 'out'}")


def test_modules_of_a_model_without_levels(tmp_path: Path) -> None:
    run_folder(tmp_path / "model", ARCHITECTURES["transformer"])
    with pytest.raises(UserError, match="give parts=whole"):
        export(f"checkpoint={tmp_path / 'model'}", f"output={tmp_path / 'out'}", "parts=all", "puzzles=2")
    assert not (tmp_path / "out").exists()


def test_formats_are_those_that_the_options_name() -> None:
    from hrm.config.meanings import meanings

    assert format_names() == ["onnx", "program", "tensorrt", "triton"]
    assert all(f"{name}:" in meanings(ExportConfig)["format"] for name in format_names())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.config.extras.find_spec", lambda name: None)
    sentence = r"format=onnx needs onnx, onnxscript, onnxruntime: pip install 'hrm-torch\[export\]'"
    with pytest.raises(UserError, match=sentence):
        export("checkpoint=sudoku", "output=out")
