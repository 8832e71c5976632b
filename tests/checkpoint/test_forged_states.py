"""Training states that somebody else made: their sums are right, but what they hold is not what this program saves."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrm.checkpoint.finding import find_state, read_metadata
from hrm.checkpoint.saving import StateSaver
from hrm.errors import UserError
from hrm.reading import sha256_of
from tests.helpers.entry_points import TINY_RUN, make_pack, run_script, train
from tests.helpers.training import ALONE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pack` and `run`, which has training states after steps 3 and 6."""
    root = tmp_path_factory.mktemp("forged")
    make_pack(root / "pack")
    train(*TINY_RUN, f"data_path={root / 'pack'}", f"checkpoint_path={root / 'run'}")
    return root


@pytest.fixture
def state(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "run/state_3", tmp_path / "run/state_3"))


def sum_up(state: Path) -> None:
    files = sorted(file for file in state.iterdir() if file.name != "SHA256SUMS" and file.is_file())
    (state / "SHA256SUMS").write_text("".join(f"{sha256_of(file)}  {file.name}\n" for file in files))


def forge(state: Path, **fields: Any) -> None:
    file = state / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    sum_up(state)


def resumed(run: Path, state: Path) -> str:
    """The sentence that resuming from a state ends in."""
    options = [*TINY_RUN, f"data_path={run / 'pack'}", f"checkpoint_path={state.parent}", f"resume={state}"]
    outcome = run_script("pretrain.py", *options)
    assert outcome.status == 2, outcome.err
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_what_was_not_forged_goes_on(run: Path, state: Path) -> None:
    forge(state)
    options = [*TINY_RUN, f"data_path={run / 'pack'}", f"checkpoint_path={state.parent}", f"resume={state}"]
    assert run_script("pretrain.py", *options).status == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"step": "abc"},
        {"step": -1},
        {"step": 10**400},
        {"num_ranks": None},
        {"progress": []},
        {"config": "x"},
        {"pack": 3},
        {"made_by": {"hrm": 1}},
        {"window_names": "abc"},
        {"window_names": [1]},
        {"wandb_id": 3},
        {"metrics_size": 1.5},
        {"more": 1},
        {"format": []},
    ],
    ids=str,
)
def test_metadata_of_another_kind(fields: dict[str, Any], state: Path) -> None:
    forge(state, **fields)
    with pytest.raises(UserError, match=r"state_3 (is no training state of this program|has format)") as told:
        read_metadata(state)
    assert len(str(told.value)) < 600


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "3", '{"format": 2}', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_metadata_that_is_none(content: str | bytes, state: Path) -> None:
    (state / "state.json").write_bytes(content.encode() if isinstance(content, str) else content)
    sum_up(state)
    with pytest.raises(UserError, match="is no training state of this program"):
        read_metadata(state)


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "more"])
def test_a_pipe_among_the_files_is_not_waited_for(name: str, state: Path) -> None:
    (state / name).unlink(missing_ok=True)
    os.mkfifo(state / name)
    with pytest.raises(UserError, match="state_3"):
        find_state(str(state), state.parent)


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "more.safetensors"])
def test_a_hole_of_terabytes_is_not_read(name: str, state: Path) -> None:
    (state / name).touch()
    sum_up(state)
    os.truncate(state / name, 1 << 42)
    started = time.perf_counter()
    with pytest.raises(UserError, match="state_3"):
        find_state(str(state), state.parent)
    assert time.perf_counter() - started < 10


def test_a_link_to_a_state_is_discarded_as_a_link(run: Path, tmp_path: Path) -> None:
    saver = StateSaver(tmp_path, 1, ALONE, 1.0)
    for step, name in enumerate(("state_3", "state_6")):
        (tmp_path / f"state_{step}").symlink_to(run / "run" / name)
    saver._discard_all_but(None)
    assert [path.name for path in tmp_path.iterdir()] == ["state_1"]
    assert (run / "run/state_3/state.json").is_file()


@pytest.mark.parametrize("path", ["x" * 300, "run/" + "y" * 300, "state_" + "1" * 300, "a\0b"])
def test_impossible_paths_hold_no_state(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no training state") as told:
        find_state(path, tmp_path)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize(
    "progress",
    [{"pass": 1}, {"pass_index": "x"}, {"batches": -1}, {"best_step": 2.5}, {"train_accuracy": "high"}],
    ids=str,
)
def test_progress_of_another_kind(progress: dict[str, Any], run: Path, state: Path) -> None:
    forge(state, progress=progress)
    assert "state_3 has" in resumed(run, state)


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def first_matrix(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in header.values() if len(entry.get("shape", ())) == 2)
    return entry


@pytest.mark.parametrize(
    "change",
    {
        "noise": lambda file: file.write_bytes(os.urandom(1000)),
        "empty": lambda file: file.write_bytes(b""),
        "a header of exabytes": lambda file: file.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "a tensor of terabytes": edit_header(lambda header: first_matrix(header).update(shape=[10**6, 10**6])),
        "a negative shape": edit_header(lambda header: first_matrix(header).update(shape=[-1, -1])),
        "an unknown type": edit_header(lambda header: first_matrix(header).update(dtype="Z99")),
        "a tensor less": edit_header(lambda header: header.pop(next(name for name in header if name[0] != "_"))),
    }.values(),
)
def test_tensors_of_another_kind(change: Callable[[Path], object], run: Path, state: Path) -> None:
    for file in state.glob("*.safetensors"):
        change(file)
    sum_up(state)
    assert "state_3 " in resumed(run, state)
