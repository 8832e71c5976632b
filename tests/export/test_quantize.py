"""`hrm quantize`: a model stored in int8 and compared with itself, and the gate before it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hrm
from hrm.cli import main
from hrm.config import QuantizeConfig
from hrm.config.compose import compose
from hrm.data.pack import write_examples, write_identifiers
from hrm.errors import UserError
from hrm.export import quantize as command
from hrm.export.puzzles import Puzzles
from hrm.inference.model import TrainedModel
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import untrained

FORM = PuzzleForm("sudoku", seq_len=16, vocab_size=6)  # 4x4 boards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"), FORM)


def pack_of(folder: Path, model: TrainedModel) -> str:
    """A pack whose labels are what a model answers, so that it is right on all of it."""
    inputs = np.random.default_rng(3).integers(1, 6, (12, 16))
    labels = model.predict(list(inputs), tokens=True).answers
    for split in ("train", "test"):
        write_examples(folder / split, inputs.astype(np.uint8), labels.astype(np.uint8), vocab_size=6)
    write_identifiers(folder, ["<blank>"])
    return f"data_path={folder}"


def test_the_model_is_stored_and_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = pack_of(tmp_path / "pack", hrm.from_pretrained(run, device="cpu"))
    arguments = ["quantize", f"checkpoint={run}", f"output={tmp_path / 'small'}", pack, "device=cpu", "gate=0.5"]
    for _ in range(2):  # the second replaces the first
        assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "small" / command.REPORT_FILE).read_text())
    assert report["passed"]
    assert report["puzzles"] == 12
    plain, stored = report["measured"]["as it is"], report["measured"]["int8"]
    assert plain["accuracy"] == 1.0
    assert stored["bytes"] == (tmp_path / "small/model.safetensors").stat().st_size < plain["bytes"]
    assert "int8 in all" in stored["computed"]
    assert f"The same answer to {report['same_answers']:.2%} of the puzzles." in printed
    again = hrm.from_pretrained(tmp_path / "small", device="cpu", quantize="int8")
    answers = again.predict(list(np.load(tmp_path / "pack/test/all__inputs.npy").astype(int)), tokens=True).answers
    right = (answers == np.load(tmp_path / "pack/test/all__labels.npy")).all(1).mean()
    assert right == stored["accuracy"] == report["same_answers"]


def test_the_gate(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that gets much worse: the command fails, and what it wrote stays."""
    model = hrm.from_pretrained(run, device="cpu")
    pack = pack_of(tmp_path / "pack", model)
    measure = command.measure

    def worse(model: TrainedModel, puzzles: Any, *others: Any, **more: Any) -> Any:
        if model.model.kernels.int8 == "all":
            others_right = np.where(np.arange(12)[:, None] < 3, puzzles.labels % 5 + 1, puzzles.labels)
            puzzles = Puzzles(puzzles.inputs, others_right, puzzles.identifiers, puzzles.source)
        return measure(model, puzzles, *others, **more)

    monkeypatch.setattr(command, "measure", worse)
    arguments = ["quantize", f"checkpoint={run}", f"output={tmp_path / 'small'}", pack, "device=cpu", "gate=0.2"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    report = json.loads((tmp_path / "small" / command.REPORT_FILE).read_text())
    assert report["passed"] is False
    accuracy = report["measured"]["int8"]["accuracy"]
    assert accuracy <= 0.75
    assert (
        f"in int8 the model is right on {accuracy:.1%} of 12 puzzles and as it is on 100.0%, which falls by more than "
        f"gate=0.2 allows: do not use {tmp_path / 'small'}, whose quantize.json has the figures."
    ) in said
    assert (tmp_path / "small/model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["quantize=fp8", "output=o"], "output= stores int8, which quantize=fp8 can compute with too: drop one."),
        (["quantize=fp8"], "quantize=fp8 cannot run: it needs an NVIDIA GPU"),
        (["quantize=none"], "quantize=none is not a choice; "),
        (["puzzles=0"], "puzzles=0 is too small"),
        (["output=full"], "output=full holds files that no hrm quantize wrote, and is not overwritten: give another "),
        (["output=full/notes.txt"], "output=full/notes.txt is a file: give a folder."),
    ],
)
def test_what_it_refuses(
    options: list[str], sentence: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(UserError) as raised:
        command.quantize(compose(QuantizeConfig, "quantize", [f"checkpoint={run}", "device=cpu", *options]))
    assert sentence in str(raised.value)
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


def test_predict_and_evaluate_take_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hrm.from_pretrained(run, device="cpu", quantize="int8")
    pack = pack_of(tmp_path / "pack", model)
    metrics = hrm.evaluate(
        {"checkpoint": str(run), "device": "cpu", "quantize": "int8", "act": "halt"}, data_path=pack[10:]
    )
    assert metrics["all/exact_accuracy"] == 1.0
    assert "int8 in all" in capsys.readouterr().out
    (tmp_path / "in.txt").write_text("1..2............\n")
    arguments = [f"input={tmp_path / 'in.txt'}", f"output={tmp_path / 'out.jsonl'}", "quantize=int8", "device=cpu"]
    assert main(["predict", f"checkpoint={run}", *arguments]) == 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    assert answer["q_halt"] == pytest.approx(model.predict("1..2............").q_halt[0], abs=1e-6)
