"""SIGKILL between any two things that a run writes: the run goes on to the bits of one that was never disturbed."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hrm.checkpoint import run_folder, saving
from hrm.checkpoint.lock import LOCK_FILE, RunLock
from hrm.config import DataConfig, PretrainConfig
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig
from hrm.training import loop
from hrm.training.loop import pretrain
from tests.helpers.entry_points import make_pack
from tests.helpers.ranks import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")]

ARCH = HRMConfig(
    hidden_size=16,
    num_heads=2,
    H_layers=1,
    L_layers=1,
    H_cycles=1,
    L_cycles=1,
    puzzle_emb_ndim=16,
    halt_max_steps=2,
    forward_dtype="float32",
)
REFUSED = 3  # exit status of a run that another one's lock kept out


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """16 passes of two steps, a training state after each step, weights after each pass."""
    pack = tmp_path_factory.mktemp("data") / "pack"
    make_pack(pack, train_size=12, test_size=4)
    return PretrainConfig(
        arch=ARCH,
        data_path=str(pack),
        data=DataConfig("pack", str(pack), "none"),
        global_batch_size=6,
        epochs=16,
        eval_interval=1,
        log_interval=1,
        lr=1e-2,
        lr_warmup_steps=2,
        resume="auto",
        checkpoint_interval=1e-9,
        device="cpu",
        wandb="disabled",
    )


@pytest.fixture(scope="module")
def whole(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(replace(config, checkpoint_path=str(folder)))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    left, expected = ({path.name for path in each.iterdir()} for each in (folder, whole))
    assert {name for name in left if not name.startswith("earlier_")} == expected  # these hold what came after a state
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(folder / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file.name
    state = max(whole.glob("state_*"), key=lambda path: int(path.name.removeprefix("state_")))
    for file in state.glob("*.safetensors"):
        ours, theirs = load_file(folder / state.name / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file.name


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- where a process dies: the owner and the name of what is called there, before or after it, and which call


Place = tuple[Any, str, str, int]
PLACES: dict[str, Place] = {
    "the lock is taken": (RunLock, "__enter__", "after", 1),
    "an earlier run is moved aside": (loop, "keep_earlier_run", "before", 1),
    "options are written": (loop, "save_config", "before", 1),
    "options are there": (loop, "save_config", "after", 1),
    "a state's tensors are written": (saving, "save", "before", 2),
    "its metadata are written": (saving, "save", "after", 2),
    "records are cut": (loop, "cut_records", "before", 1),
    "its files are synced": (saving, "sync", "before", 6),
    "it gets its name": (Path, "rename", "before", 2),
    "it has its name": (Path, "rename", "after", 2),
    "older ones are hidden": (Path, "rename", "after", 4),
    "older ones are removed": (saving.shutil, "rmtree", "before", 1),
    "weights are written": (run_folder, "sync", "before", 6),
    "weights get their name": (Path, "replace", "before", 4),
    "weights have their name": (Path, "replace", "after", 5),
    "the lock is given back": (RunLock, "__exit__", "before", 1),
}


@contextmanager
def dying_at(place: Place) -> Iterator[None]:
    owner, name, when, call = place
    original, count = getattr(owner, name), 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and when == "before":
            die()
        result = original(*arguments, **options)
        if count == call:
            die()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield


def train(config: PretrainConfig, place: str | None) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.StringIO()
    try:
        if place is None:
            pretrain(config)
        else:
            with dying_at(PLACES[place]):
                pretrain(config)
    except UserError as error:
        os._exit(REFUSED if "is held by process" in str(error) else 1)
    os._exit(0)


def start(config: PretrainConfig, place: str | None = None) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hrm.training.loop"])
    process = context.Process(target=train, args=(config, place))
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_each_place(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    """One process after the other in one folder; then one that lives."""
    folder = tmp_path / "run"
    config = replace(config, checkpoint_path=str(folder))
    for place in PLACES:
        process = start(config, place)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL, place
    process = start(config)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert_same_run(folder, whole)


def test_two_race_for_one_folder(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    """Again and again two start at once, and the one that got the folder is killed, until the run is through."""
    folder = tmp_path / "run"
    config = replace(config, checkpoint_path=str(folder))
    for kill in range(4):
        racers = [start(config) for _ in range(2)]
        wait_for(lambda: any(process.exitcode is not None for process in racers))  # noqa: B023
        (loser,) = (process for process in racers if process.exitcode == REFUSED)
        winner = racers[1 - racers.index(loser)]
        assert winner.is_alive() or winner.exitcode == 0
        if kill < 3:
            wait_for(lambda: any(folder.glob(f"state_{kill + 1}")) or not winner.is_alive())  # noqa: B023
            winner.kill()
        winner.join(PATIENCE)
        assert winner.exitcode in (0, -signal.SIGKILL)
        assert (folder / LOCK_FILE).exists() == (winner.exitcode != 0)
    assert winner.exitcode == 0
    assert_same_run(folder, whole)


def test_a_second_run_changes_nothing(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    """Neither one that would start anew, with another seed, nor one that would go on."""
    folder = tmp_path / "run"
    config = replace(config, checkpoint_path=str(folder))
    first = start(config)
    wait_for((folder / "state_1").exists)
    os.kill(first.pid or 0, signal.SIGSTOP)
    try:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for changes in ({"resume": None, "seed": 5}, {}):
            second = start(replace(config, **changes))  # type: ignore[arg-type]
            second.join(PATIENCE)
            assert second.exitcode == REFUSED
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    first.join(PATIENCE)
    assert first.exitcode == 0
    assert_same_run(folder, whole)
