"""Saved models and the hub, which is played by a folder: nothing here needs the network."""

import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard

import hrm
from hrm.inference.model import TrainedModel
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import tiny

FILES = {"config.json", "model.safetensors", "README.md", "task.json"}


@pytest.fixture
def model(tmp_path: Path) -> TrainedModel:
    names = ("<blank>", "one", "two")
    form = PuzzleForm("tokens", 4, 4, 3, symbols=("a", "${b}", 3), answers_cover_inputs=True, identifiers=names)
    return tiny(tmp_path / "run", form)


def test_a_saved_model_comes_back(model: TrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == FILES | {"identifiers.json"}
    back = hrm.from_pretrained(tmp_path / "saved", device="cpu")
    assert back.form == model.form
    puzzles = [{"input": ["a", "${b}", 3], "puzzle": name} for name in (None, "one", "two")]
    ours, theirs = model.predict(puzzles), back.predict(puzzles)
    assert (ours.answers == theirs.answers).all()
    assert (ours.q_halt == theirs.q_halt).all()
    assert (ours.steps == theirs.steps).all()
    assert np.unique(ours.q_halt).size == 3
    again = TrainedModel.from_pretrained(str(tmp_path / "saved"), device="cpu")  # the mixin's own way
    assert (again.predict(puzzles).answers == ours.answers).all()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_saved_files_have_the_modes_of_the_umask(mask: int, model: TrainedModel, tmp_path: Path) -> None:
    former = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(former)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()} == {0o666 & ~mask}


def test_what_is_saved_names_no_path_of_this_machine(model: TrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "README.md", "task.json"):
        assert str(tmp_path) not in (tmp_path / "saved" / name).read_text()
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["arch"]["hidden_size"] == 16
    assert config["task"]["seq_len"] == 4


def test_the_model_card(model: TrainedModel, tmp_path: Path) -> None:
    (model.checkpoint.folder / "metrics.jsonl").write_text(
        '{"step": 7, "train/exact_accuracy": 0.1, "all/exact_accuracy": 0.25, "all/count": 8}\n'
    )
    model.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.library_name == "hrm"
    assert "tokens" in card.data.tags
    assert 'hrm.from_pretrained("owner/name")' in card.text
    assert "all/exact_accuracy (test): 0.2500" in card.text
    assert "train/exact_accuracy" not in card.text


def test_push_and_pull(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    asked: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append((repo_id, options["private"]))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            shutil.copytree(folder_path, hub / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert model.push_to_hub("me/model", private=True) == "https://hub/me/model"
    assert asked == [("me/model", True)]
    assert {file.name for file in (hub / "me/model").iterdir()} == FILES | {"identifiers.json"}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        taken = tmp_path / "cache"
        taken.mkdir()
        for pattern in allow_patterns:
            for file in (hub / repo_id).glob(pattern):
                shutil.copy(file, taken)
        return str(taken)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    back = hrm.from_pretrained("me/model", device="cpu")
    assert back.form == model.form
    assert (back.predict(["a", 3]).q_halt == model.predict(["a", 3]).q_halt).all()
