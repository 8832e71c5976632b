"""Checkpoints behind URLs, which a folder plays."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hrm
from hrm.checkpoint.finding import local_state
from hrm.checkpoint.weights import find_checkpoint
from hrm.errors import UserError
from hrm.inference.model import TrainedModel
from hrm.remote.urls import Remote, UnreachableError
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import tiny

FORM = PuzzleForm("tokens", 4, 4, 3, symbols=("a", "b", 3), answers_cover_inputs=True, identifiers=("_", "one", "two"))
PUZZLES = [{"input": ["a", "b", 3], "puzzle": name} for name in (None, "one", "two")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return tiny(tmp_path_factory.mktemp("model") / "run", FORM)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(model: TrainedModel, tmp_path: Path) -> Path:
    """A run folder behind a URL, with more in it than a model."""
    folder = shutil.copytree(model.checkpoint.folder, tmp_path / "team/run")
    weights = model.checkpoint.weights_file
    for name in ("step_1", "step_2", "step_2.safetensors", "step_9_ema.safetensors"):
        shutil.copy(weights.with_suffix(".safetensors" if name.endswith("safetensors") else ""), folder / name)
    (folder / "state_2").mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def fetched_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    chunks = Remote.chunks

    def noted(self: Remote, name: str) -> Iterator[bytes]:
        names.append(name)
        return chunks(self, name)

    monkeypatch.setattr(Remote, "chunks", noted)
    return names


def test_of_a_run_folder_the_last_weights_are_fetched_once(
    model: TrainedModel, run: Path, fetched_files: list[str]
) -> None:
    last = max(int(file.name[5:]) for file in run.glob("step_*") if file.name[5:].isdecimal())
    back = hrm.from_pretrained(f"file://{run}", device="cpu")
    assert sorted(fetched_files) == sorted(["all_config.yaml", "identifiers.json", f"step_{last}", "task.json"])
    assert back.form == FORM
    assert back.checkpoint.step == last
    assert (back.predict(PUZZLES).q_halt == model.predict(PUZZLES).q_halt).all()
    assert find_checkpoint(f"file://{run}/") == back.checkpoint
    assert len(fetched_files) == 4


@pytest.mark.parametrize("name", ["step_1", "step_2.safetensors"])
def test_a_file_comes_with_what_belongs_to_it(name: str, run: Path, fetched_files: list[str]) -> None:
    checkpoint = find_checkpoint(f"file://{run}/{name}")
    assert checkpoint.weights_file.name == name
    assert checkpoint.weights_file.read_bytes() == (run / name).read_bytes()
    assert sorted(fetched_files) == sorted(["all_config.yaml", "identifiers.json", name, "task.json"])
    assert find_checkpoint(f"file://{run}/{name}") == checkpoint
    assert len(fetched_files) == 4


def test_a_saved_model(model: TrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    for url in (f"file://{tmp_path}/saved", f"file://{tmp_path}/saved/model.safetensors"):
        back = hrm.from_pretrained(url, device="cpu")
        assert back.form == FORM
        assert (back.predict(PUZZLES).q_halt == model.predict(PUZZLES).q_halt).all()


def test_what_changes_there_is_fetched_again(run: Path, fetched_files: list[str]) -> None:
    url = f"file://{run}"
    before = find_checkpoint(url).weights_file
    shutil.copy(run / "step_2", run / "step_777")
    assert find_checkpoint(url).step == 777
    config = run / "all_config.yaml"
    config.write_text(config.read_text().replace("data_path: data/none", "data_path: data/some"))  # of the same size
    assert find_checkpoint(url).config["data_path"] == "data/some"
    assert before.is_file()  # for processes that read it


def test_a_damaged_copy_is_fetched_anew(run: Path, fetched_files: list[str]) -> None:
    weights = find_checkpoint(f"file://{run}").weights_file
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"!")
    fetched_files.clear()
    assert find_checkpoint(f"file://{run}").weights_file.read_bytes() == content
    assert fetched_files == [weights.name]


def test_without_network_the_copy_serves(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(self: Remote, *_: Any) -> Any:
        raise UnreachableError(f"{self} cannot be read (no network): try again.")

    url, file = f"file://{run}", f"file://{run}/step_1"
    had = find_checkpoint(url), find_checkpoint(file)
    monkeypatch.setattr(Remote, "is_folder", no_network)
    assert (find_checkpoint(url), find_checkpoint(file)) == had
    assert capsys.readouterr().err.count("The copy in the cache is used") == 2
    with pytest.raises(UserError, match="no network"):
        find_checkpoint(f"file://{run}/step_2")


def test_what_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "team/empty").mkdir()
    with pytest.raises(UserError, match=r"team/empty holds no file of a checkpoint"):
        find_checkpoint(f"file://{tmp_path}/team/empty")
    with pytest.raises(UserError, match=r"team/nothing does not exist"):
        find_checkpoint(f"file://{tmp_path}/team/nothing")
    (run / "all_config.yaml").unlink()
    with pytest.raises(UserError, match=r"all_config\.yaml is missing"):
        find_checkpoint(f"file://{run}")
    with pytest.raises(UserError, match="holds no training state"):
        local_state(f"file://{tmp_path}/team/empty")


def test_links_and_folders_are_not_followed_as_names(run: Path, fetched_files: list[str]) -> None:
    for name in ("step_3", "task.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    assert find_checkpoint(f"file://{run}").weights_file.name != "step_3"
    assert "task.json" not in fetched_files
