"""Nothing is lost: disks that fill up, signals, output that nobody reads, weights that are not finite, other packs."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hrm.checkpoint import run_folder
from hrm.checkpoint.run_folder import superseded_by_going_on
from hrm.config import DataConfig, PretrainConfig
from hrm.data.loader import TrainLoader
from hrm.errors import EXIT_INTERRUPTED, UserError
from hrm.models.hrm import HRMConfig
from hrm.training import run
from hrm.training.loop import EXIT_PREEMPTED, pretrain
from hrm.training.run_log import RunLog, cut_records
from tests.helpers.entry_points import CPU, ROOT, TINY_MODEL, make_pack, run_script
from tests.helpers.ranks import PATIENCE
from tests.helpers.training import ALONE

ALWAYS = 1e-9  # minutes: a training state after every step

ARCH = HRMConfig(
    hidden_size=32,
    num_heads=2,
    H_layers=1,
    L_layers=1,
    H_cycles=1,
    L_cycles=1,
    puzzle_emb_ndim=32,
    halt_max_steps=2,
    forward_dtype="float32",
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pack"
    make_pack(folder, train_size=24, test_size=6)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def config(folder: Path, pack: Path) -> PretrainConfig:
    """Three passes of four steps, evaluated after each."""
    return PretrainConfig(
        arch=ARCH,
        data_path=str(pack),
        data=DataConfig("pack", str(pack), "none"),
        checkpoint_path=str(folder),
        global_batch_size=6,
        epochs=3,
        eval_interval=1,
        log_interval=3,
        lr=1e-2,
        lr_warmup_steps=4,
        ema_decay=0.8,
        checkpoint_interval=1e9,
        device="cpu",
        wandb="disabled",
    )


def states(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("state_")) for path in folder.glob("state_*"))


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def assert_same_end(folder: Path, expected: Path) -> None:
    """Equal bits in the weights of all steps, and no others."""
    assert weights(folder) == weights(expected)
    for name in weights(expected):
        if name.endswith(".safetensors"):
            ours, theirs = load_file(folder / name), load_file(expected / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def at_step(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, after a step."""
    advance, count = RunLog.advance, 0

    def counting(log: RunLog) -> None:
        nonlocal count
        advance(log)
        count += 1
        if count == number:
            act()

    monkeypatch.setattr(RunLog, "advance", counting)


# --- signals ---------------------------------------------------------------------------------------------------------

STOPS = {"SIGINT": EXIT_INTERRUPTED, "SIGTERM": EXIT_PREEMPTED, "SIGHUP": EXIT_PREEMPTED, "SIGUSR1": EXIT_PREEMPTED}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("times", [1, 3])
def test_signals_leave_the_same(
    name: str,
    times: int,
    config: PretrainConfig,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A state to go on from, and weights that evaluate.py takes, which go once the run that goes on has saved."""
    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        at_step(6, lambda: [signal.raise_signal(getattr(signal, name)) for _ in range(times)], patch)
        with pytest.raises(SystemExit) as stopped:
            pretrain(config)
    assert stopped.value.code == STOPS[name]
    assert states(folder)[-1] == 6
    assert {"step_6", "step_6.safetensors", "step_6_ema"} <= set(weights(folder))
    assert json.loads((folder / "stopped.json").read_text())["step"] == 6
    assert ("Stopped by Ctrl-C" if name == "SIGINT" else "Stopped by a signal") in capsys.readouterr().out
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={folder}")
    assert outcome.status == 0, outcome.err
    assert f"{folder}/step_6 on" in outcome.out
    pretrain(replace(config, resume="auto"))
    assert_same_end(folder, tmp_path / "whole")
    assert not (folder / "stopped.json").exists()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_signals_that_the_caller_ignores_stay_ignored(
    name: str, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup, or in the background of a script."""
    number = getattr(signal, name)
    former = signal.signal(number, signal.SIG_IGN)
    try:
        at_step(2, lambda: signal.raise_signal(number), monkeypatch)
        pretrain(replace(config, epochs=1))
    finally:
        signal.signal(number, former)


def test_an_evaluation_is_left_undone(
    config: PretrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    evaluate, calls = run.evaluate, 0

    def signalled(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", signalled)
        with pytest.raises(SystemExit) as stopped:
            pretrain(config)
    assert stopped.value.code == EXIT_PREEMPTED
    assert states(folder)[-1] == 8
    pretrain(replace(config, resume="auto"))
    assert_same_end(folder, tmp_path / "whole")


# --- saves that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Sets a limit to the size of files, as `ulimit -f` does."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def wait_for_first_weights(folder: Path) -> None:
    """The saver's thread may still be busy with what the first evaluation left when a later step is done."""
    end = time.monotonic() + PATIENCE
    while not (folder / "step_4_ema.safetensors").is_file():
        assert time.monotonic() < end
        time.sleep(0.01)


def no_limit(limited: Callable[[int], None]) -> None:
    limited(resource.RLIM_INFINITY)


def test_saves_that_fail_in_between(
    config: PretrainConfig,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limited: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said, tried again, and of no effect on what is learned."""
    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        at_step(6, lambda: (wait_for_first_weights(folder), limited(20_000)), patch)
        advance = RunLog.advance
        patch.setattr(RunLog, "advance", advance)
        evaluated, count = run.Run._use_evaluation, 0

        def make_room(self: run.Run, *arguments: Any, **options: Any) -> bool:
            nonlocal count
            count += 1
            if count == 3:  # the last
                no_limit(limited)
            return evaluated(self, *arguments, **options)

        patch.setattr(run.Run, "_use_evaluation", make_room)
        pretrain(config)
    said = capsys.readouterr().out
    assert re.search(r"state_8 could not be written \(File too large\): training goes on", said)
    assert re.search(r"step_8 could not be written \(File too large\)", said)
    assert weights(folder)[-2:] == ["step_4_ema", "step_4_ema.safetensors"]
    assert load_file(folder / "step_12.safetensors").keys() == load_file(folder / "step_4.safetensors").keys()
    ours, theirs = (load_file(each / "step_12.safetensors") for each in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("step", [2, 6])
def test_a_final_save_that_fails(
    step: int,
    config: PretrainConfig,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limited: Callable[[int], None],
) -> None:
    """A sentence and no traceback; resumed after room was made, the run ends with the undisturbed run's bits."""
    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    config = replace(config, resume="auto")

    def fill_the_disk() -> None:
        if step > 4:
            wait_for_first_weights(folder)
        limited(20_000)

    with monkeypatch.context() as patch:
        at_step(step, fill_the_disk, patch)
        with pytest.raises(UserError, match=r"step_12 could not be written \(File too large\), which was to be saved"):
            pretrain(config)
    no_limit(limited)
    assert states(folder) == ([] if step == 2 else [4])
    pretrain(config)
    assert_same_end(folder, tmp_path / "whole")
    assert not list(folder.glob(".*"))


def test_a_folder_that_is_gone(
    config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(6, lambda: (wait_for_first_weights(folder), folder.rename(folder.with_name("gone"))), monkeypatch)
    with pytest.raises(UserError, match=r"step_12 could not be written \(No such file or directory\)"):
        pretrain(config)
    assert "state_8 could not be written (the run folder is gone)" in capsys.readouterr().out
    assert not folder.exists()


def test_a_folder_that_comes_back(
    config: PretrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, away = 0, tmp_path / "away"

    def back(self: run.Run, metrics: object) -> None:
        nonlocal noted
        noted += 1
        if noted == 1:
            away.rename(folder)

    at_step(3, lambda: folder.rename(away), monkeypatch)
    monkeypatch.setattr(run.Run, "_note", back)
    pretrain(config)
    assert states(folder) == [8, 12]


def test_room_is_made_on_a_small_disk(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1.5 MB, of which another file takes most at first: then there is room for a state and weights, no more."""
    small = replace(config.arch, hidden_size=16, puzzle_emb_ndim=16)
    config = replace(config, arch=small, ema_decay=None, resume="auto")
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    pretrain(replace(config, checkpoint_path=str(whole)))
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounts a small disk, which takes root")
    try:
        once = sum(file.stat().st_size for file in whole.rglob("*") if "4" in str(file.relative_to(whole)))
        (disk / "other").write_bytes(bytes(1_500 * 1024 - int(1.4 * once)))
        config = replace(config, checkpoint_path=str(disk))
        with pytest.raises(UserError, match=r"step_12\S* could not be written \(No space left on device\)"):
            pretrain(config)
        assert states(disk) == [4]
        (disk / "other").unlink()
        pretrain(config)
        assert f"Going on from {disk / 'state_4'}." in capsys.readouterr().out
        assert_same_end(disk, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_metrics_wait_for_room(
    config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, limited: Callable[[int], None]
) -> None:
    """No record is lost or cut where the disk was full for a while."""
    config = replace(config, log_interval=1, eval_interval=None)
    at_step(3, lambda: limited((folder / "metrics.jsonl").stat().st_size + 20), monkeypatch)
    close = run.Run._close_window

    def counting(self: run.Run) -> None:
        if self.state.step == 9:
            no_limit(limited)
        close(self)

    monkeypatch.setattr(run.Run, "_close_window", counting)
    pretrain(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/lr" in line] == list(range(1, 13))


def test_leftovers_of_dead_runs_go(config: PretrainConfig, folder: Path) -> None:
    folder.mkdir()
    for name in (".step_3.tmp", ".step_3_ema.safetensors.tmp", ".all_config.yaml.tmp", ".tmpa1B2c3", ".lock.ab12.tmp"):
        (folder / name).touch()
    (folder / ".state_4.tmp").mkdir()
    (folder / ".mine").touch()
    (folder / ".tmp_of_mine").touch()
    pretrain(replace(config, epochs=1))
    assert {path.name for path in folder.glob(".*")} == {".mine", ".tmp_of_mine"}


@pytest.mark.parametrize(
    ("content", "size", "kept"),
    [
        (b'{"a": 1}\n{"b": 2}\n{"c', 21, b'{"a": 1}\n{"b": 2}\n'),  # written in part when the disk was full
        (b'{"a": 1}\n{"b": 2}\n', 9, b'{"a": 1}\n'),
        (b'{"a": 1}\n', 200, b'{"a": 1}\n'),  # the rest never found a place
        (b"", 200, b""),
    ],
)
def test_records_of_the_run_that_goes_on(content: bytes, size: int, kept: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    cut_records(tmp_path, size, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir, None])
def test_records_that_are_none(make: Callable[[Path], None] | None, tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    file = tmp_path / "earlier" / "metrics.jsonl"
    if make is None:
        file.touch()
        os.truncate(file, 1 << 42)
    else:
        make(file)
    cut_records(tmp_path / "earlier", 1 << 62, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_records_that_wait_are_counted(config: PretrainConfig, folder: Path, limited: Callable[[int], None]) -> None:
    """A state saved meanwhile goes on behind them, as they are written as soon as there is room."""
    folder.mkdir()
    with RunLog(config, folder, 10, ALONE) as log:
        log.record({"step": 1.0})
        size = log.size()
        limited(size + 5)
        log.record({"step": 2.0})
        assert (folder / "metrics.jsonl").stat().st_size == size + 5
        assert log.size() == 2 * size
        no_limit(limited)
    cut_records(folder, 2 * size, folder)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2]


def test_a_folder_without_room_for_records_is_a_sentence(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(config, tmp_path / "gone", 10, ALONE)


def test_pipes_and_links_of_an_earlier_run_hold_nobody_up(config: PretrainConfig, folder: Path) -> None:
    folder.mkdir()
    (folder / "earlier_1").symlink_to("nowhere")
    (folder / "metrics.jsonl").touch()
    os.mkfifo(folder / "stopped.json")
    assert superseded_by_going_on(folder, 3) == []
    pretrain(replace(config, epochs=1))
    assert {path.name for path in (folder / "earlier_2").iterdir()} == {"metrics.jsonl", "stopped.json"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_of_the_umask(mask: int, config: PretrainConfig, folder: Path) -> None:
    former = os.umask(mask)
    try:
        pretrain(replace(config, epochs=1))
    finally:
        os.umask(former)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_worker_loses_nothing(
    name: str, config: PretrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises in the main thread when a loader's worker dies, wherever that is."""
    import torch.multiprocessing as mp

    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    config = replace(config, num_workers=1)

    def kill() -> None:
        for child in mp.active_children():
            os.kill(child.pid or 0, signal.Signals[name])
        time.sleep(0.2)

    with monkeypatch.context() as patch:
        at_step(6, kill, patch)
        with pytest.raises(UserError, match=rf"^the process \d+, which loaded data, was ended by {name}"):
            pretrain(config)
    assert any(name.startswith(("step_6", "step_7", "step_8")) for name in weights(folder))
    pretrain(replace(config, resume="auto"))
    ours, theirs = (load_file(each / "step_12.safetensors") for each in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("failures", [1, 2])
def test_an_error_while_saving_on_error(
    failures: int,
    config: PretrainConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is tried once more, and the error that is told is the first."""

    def fail() -> None:
        raise ZeroDivisionError

    count, save_weights = 0, run.save_weights

    def failing(*arguments: Any) -> Path:
        nonlocal count
        count += 1
        if count <= failures:
            raise OSError(5, "Input/output error")
        return save_weights(*arguments)

    monkeypatch.setattr(run, "save_weights", failing)
    at_step(3, fail, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        pretrain(config)
    said = capsys.readouterr().out
    assert ("saving what there is failed too" in said) == (failures == 2)
    assert ("step_3" in weights(folder)) == (failures == 1)


def test_an_error_between_steps_leaves_a_state(
    config: PretrainConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(replace(config, checkpoint_path=str(tmp_path / "whole")))
    iterate = TrainLoader.iterate

    def breaking(self: TrainLoader, *arguments: int) -> Iterator[Any]:
        for number, batch in enumerate(iterate(self, *arguments)):
            if number == 3:
                raise OSError(5, "Input/output error")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "iterate", breaking)
        with pytest.raises(OSError, match="Input/output"):
            pretrain(config)
    assert states(folder) == [3]
    pretrain(replace(config, resume="auto"))
    assert_same_end(folder, tmp_path / "whole")


# --- not finite ------------------------------------------------------------------------------------------------------


def spoil_weights(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight becomes NaN between two steps."""
    made = run.make_train_step

    def make(config: PretrainConfig, world: Any, state: Any) -> Any:
        step = made(config, world, state)

        def spoilt(batch: Any) -> Any:
            if state.step == after:
                next(weight for name, weight in state.model.named_parameters() if "lm_head" in name).data.fill_(
                    math.nan
                )
            return step(batch)

        return spoilt

    monkeypatch.setattr(run, "make_train_step", make)


def spoil_losses(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm.models import ACTLossHead

    forward, calls = ACTLossHead.forward, 0

    def spoilt(self: ACTLossHead, **arguments: Any) -> Any:
        nonlocal calls
        calls += self.training
        carry, loss, *rest = forward(self, **arguments)
        return carry, loss * math.nan if calls in steps and self.training else loss, *rest

    monkeypatch.setattr(ACTLossHead, "forward", spoilt)


def assert_finite(folder: Path) -> None:
    files = [*folder.glob("step_*.safetensors"), *folder.glob("state_*/*.safetensors")]
    assert files
    for file in files:
        bad = [name for name, x in load_file(file).items() if "weights" in name and not x.float().isfinite().all()]
        assert not bad, file


@pytest.mark.parametrize("skip", [True, False])
def test_no_state_of_weights_that_are_not_finite(
    skip: bool, config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_weights(5, monkeypatch)
    config = replace(config, checkpoint_interval=ALWAYS, skip_nonfinite=skip, abort_after=4, keep_checkpoints=2)
    named = r"last good weights are in .*state_5:" if skip else r"weights are not finite after step 12, .*state_5:"
    with pytest.raises(UserError, match=named):
        pretrain(config)
    assert states(folder)[-1] == 5
    assert not [name for name in weights(folder) if int(name.split("_")[1].split(".")[0]) > 5]
    assert_finite(folder)


@pytest.mark.parametrize(("first", "named"), [(6, "state_5"), (2, "no training state was saved before; .*/step_")])
def test_abort_names_the_last_state_before_the_streak(
    first: int, named: str, config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are asked for at each step, or never before the streak."""
    spoil_losses(range(first, 99), monkeypatch)
    interval = ALWAYS if first > 2 else 1e9
    with pytest.raises(UserError, match=rf"not finite in 5 steps in a row .*{named}"):
        pretrain(replace(config, checkpoint_interval=interval, abort_after=5, log_interval=1))
    assert states(folder)[-1:] == ([5] if first > 2 else [])
    assert_finite(folder)


def test_states_come_again_after_a_streak(
    config: PretrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that was due at the pass's end, within the streak, is made when the window after it is read."""
    spoil_losses(range(4, 6), monkeypatch)
    pretrain(replace(config, log_interval=1, keep_checkpoints=9))
    assert states(folder) in ([7, 8, 12], [8, 12])
    assert capsys.readouterr().out.count("No training state is saved after step 4") == 1


# --- output ----------------------------------------------------------------------------------------------------------


def command(pack: Path, folder: Path) -> str:
    options = [*TINY_MODEL, *CPU, f"data_path={pack}", f"checkpoint_path={folder}", "wandb=disabled", "epochs=2"]
    return " ".join([sys.executable, "pretrain.py", *options, "global_batch_size=6", "eval_interval=1"])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="redirects as a POSIX shell does")
@pytest.mark.parametrize(
    "redirected",
    ["2>&1 | head -c 10 > /dev/null", "2> >(head -c 1 > /dev/null)", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&-"],
    ids=["closed pipe", "closed pipe of errors", "/dev/full", "closed", "closed but for errors"],
)
def test_output_that_cannot_be_written(redirected: str, pack: Path, folder: Path) -> None:
    script = f"set -o pipefail; {command(pack, folder)} {redirected}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0
    assert (folder / "step_8").is_file()
    assert (folder / "metrics.jsonl").read_text().startswith("{")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] for line in lines)


def test_signals_that_follow_change_no_status(pack: Path, folder: Path) -> None:
    """As long as there is something to save. After that, one that comes in Python's last moments may end it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(["bash", "-c", f"exec {command(pack, folder)}"], cwd=ROOT, env=environment)
    while not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text().count("\n"):
        assert process.poll() is None
        time.sleep(0.02)
    while process.poll() is None and not (folder / "stopped.json").is_file():
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.wait(PATIENCE) in (EXIT_PREEMPTED, 0)  # 0 if it came to its end before
    assert [path.name for path in folder.glob("state_*")]


@pytest.mark.parametrize("mode", ["", "sometimes", "\n", "dryrun "])
def test_odd_modes_of_wandb(
    mode: str, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    pretrain(replace(config, wandb="auto", epochs=1))
    assert "W&B: " in capsys.readouterr().out
    assert os.environ["WANDB_MODE"] == mode


# --- packs -----------------------------------------------------------------------------------------------------------


def stop_and_replace(config: PretrainConfig, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(6, lambda: signal.raise_signal(signal.SIGTERM), patch)
        with pytest.raises(SystemExit):
            pretrain(config)
    change()


def rebuild(pack: Path, seed: int) -> None:
    run_data = ["--generate", "2x2", "--train-size", "24", "--test-size", "6", "--output-dir", str(pack)]
    from hrm.data.builders import sudoku

    assert sudoku.main([*run_data, "--seed", str(seed)]) == 0


@pytest.mark.parametrize("change", ["puzzles", "test puzzles", "puzzle identifiers", "nothing", "provenance"])
def test_a_pack_that_was_replaced(
    change: str,
    config: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "pack"
    rebuild(own, 0)
    config = replace(config, data_path=str(own))

    def replaced() -> None:
        if change == "puzzles":
            rebuild(own, 7)
        elif change == "test puzzles":
            rebuild(tmp_path / "other", 7)
            shutil.rmtree(own / "test")
            shutil.copytree(tmp_path / "other" / "test", own / "test")
        elif change == "puzzle identifiers":
            (own / "identifiers.json").write_text('["<other>"]')
        elif change == "provenance":
            (own / "provenance.json").unlink()
        else:
            rebuild(own, 0)

    stop_and_replace(config, replaced, monkeypatch)
    config = replace(config, resume="auto")
    if change in ("nothing", "provenance"):
        pretrain(config)
        assert ("was built anew, and holds the same" in capsys.readouterr().out) == (change == "provenance")
        return
    named = "puzzle identifiers" if change == "puzzle identifiers" else "puzzles"
    with pytest.raises(UserError, match=rf"would go on with other {named} in the pack .*resume_changed=true"):
        pretrain(config)
    pretrain(replace(config, resume_changed=True))


def test_the_pack_in_use_is_recorded(config: PretrainConfig, folder: Path, pack: Path) -> None:
    """And not what `data=` tells of another."""
    other = DataConfig("arc_1", "data/arc-1", "dataset/build_arc_dataset.py", source="ARC-AGI-1")
    pretrain(replace(config, data=other, epochs=1))
    saved = yaml.safe_load((folder / run_folder.CONFIG_FILE).read_text())
    assert saved["data"] == dict.fromkeys(saved["data"], "") | {"name": "pack", "path": str(pack)}
    assert set(saved["pack_identity"]) == {"arrays", "identifiers", "provenance"}
    state = json.loads((folder / "state_4" / "state.json").read_text())
    assert state["pack_identity"] == saved["pack_identity"]


def test_large_arrays_are_hashed_once(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm import caching
    from hrm.data import identity
    from hrm.data.pack import open_pack

    own = tmp_path / "pack"
    shutil.copytree(pack, own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits = open_pack(own, "train"), open_pack(own, "test")
    plain = identity.pack_identity(*splits)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(caching, "_KEPT_FROM_BYTES", 1)
    before = {file: file.read_bytes() for file in own.rglob("*") if file.is_file()}
    assert identity.pack_identity(*splits) == plain
    with monkeypatch.context() as patch:
        hashed: list[Path] = []
        for module in (caching, identity):
            patch.setattr(module, "sha256_of", lambda file: hashed.append(file) or "0" * 64)
        again = identity.pack_identity(*splits)
        assert {file.name for file in hashed} == {"identifiers.json", "provenance.json"}
        assert again.arrays == plain.arrays
    assert {file: file.read_bytes() for file in own.rglob("*") if file.is_file()} == before
    labels = own / "train" / "all__labels.npy"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    about = labels.stat()
    labels.write_bytes(content)
    os.utime(labels, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert identity.pack_identity(*splits).arrays != plain.arrays
