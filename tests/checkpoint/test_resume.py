"""A run that stops, however it stops, goes on with the same bits; a training state that is not whole does no harm."""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hrm.checkpoint import saving
from hrm.checkpoint.finding import find_state
from hrm.checkpoint.save_points import Request, SavePoints
from hrm.checkpoint.saving import StateSaver
from hrm.checkpoint.states import StateMetadata
from hrm.checkpoint.weights import read_weights
from hrm.config import DataConfig, KernelsConfig, OptimConfig, ParallelConfig, PretrainConfig
from hrm.data.loader import TrainLoader
from hrm.data.pack import open_pack
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig
from hrm.reading import sha256_of
from hrm.training.loop import EXIT_PREEMPTED, pretrain
from hrm.training.resume import restore
from hrm.training.run_log import RunLog
from hrm.training.step import initial_state, make_train_step
from tests.helpers.entry_points import CPU, ROOT, TINY_MODEL, make_pack
from tests.helpers.ranks import PATIENCE, environment, meeting
from tests.helpers.training import without_clock

ALWAYS = 1e-9  # minutes: a training state after every step
NEVER = 1e9

ARCH = HRMConfig(
    hidden_size=32,
    num_heads=2,
    H_layers=1,
    L_layers=1,
    H_cycles=1,
    L_cycles=1,
    puzzle_emb_ndim=32,
    halt_max_steps=4,
    halt_exploration_prob=0.5,
    forward_dtype="float32",
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pack"
    make_pack(folder, train_size=24, test_size=6)
    return folder


@pytest.fixture
def config(tmp_path: Path, pack: Path) -> PretrainConfig:
    """Three passes of four steps, evaluated after each, with everything on that a state could forget."""
    return PretrainConfig(
        arch=ARCH,
        data_path=str(pack),
        data=DataConfig("pack", str(pack), "none"),
        checkpoint_path=str(tmp_path / "run"),
        global_batch_size=6,
        epochs=3,
        eval_interval=1,
        log_interval=3,
        lr=1e-2,
        lr_warmup_steps=4,
        lr_min_ratio=0.1,
        ema_decay=0.8,
        checkpoint_interval=NEVER,
        device="cpu",
        wandb="disabled",
    )


def contents(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def records(folder: Path) -> list[dict[str, float]]:
    """What was logged, without what the clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def states(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("state_")) for path in folder.glob("state_*"))


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal bits in all weights, in the last training state, and in what was logged."""
    assert records(folder) == records(expected)
    files = {file.relative_to(expected) for file in expected.glob("step_*")}
    assert files == {file.relative_to(folder) for file in folder.glob("step_*")}
    last = f"state_{states(expected)[-1]}"
    files |= {file.relative_to(expected) for file in (expected / last).glob("*.safetensors")}
    assert len(files) >= 3
    for name in files:
        theirs, ours = contents(expected / name), contents(folder / name)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name


def in_folder(config: PretrainConfig, folder: Path, **changes: Any) -> PretrainConfig:
    return replace(config, checkpoint_path=str(folder), **changes)


def stop_after(
    step: int, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM
) -> None:
    """Train until a signal comes while a step is counted."""
    advance, count = RunLog.advance, 0

    def counting(log: RunLog) -> None:
        nonlocal count
        advance(log)
        count += 1
        if count == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", counting)
        with pytest.raises(SystemExit) as stopped:
            pretrain(config)
    assert stopped.value.code == EXIT_PREEMPTED


@pytest.fixture
def stopped(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `config`'s run, stopped after step 6 with the states of steps 4, 5 and 6."""
    stop_after(6, replace(config, checkpoint_interval=ALWAYS, keep_checkpoints=3), monkeypatch)
    assert config.checkpoint_path is not None
    folder = Path(config.checkpoint_path)
    assert states(folder) == [4, 5, 6]
    return folder


# --- killed ----------------------------------------------------------------------------------------------------------


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts processes in milliseconds: PyTorch is imported once, in a process that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hrm.training.loop"])
    return context


def train_quietly(config: PretrainConfig) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.StringIO()
    pretrain(config)


def start(config: PretrainConfig) -> ForkServerProcess:
    process = fork_server().Process(target=train_quietly, args=(config,))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive(), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment(config: PretrainConfig, tmp_path: Path) -> None:
    """SIGKILL at 10 random moments, every other one while a training state is being written."""
    config = replace(config, epochs=21, eval_interval=3, checkpoint_interval=ALWAYS)  # 84 steps, 7 evaluations
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(in_folder(config, whole, checkpoint_interval=NEVER))

    rng, while_writing = random.Random(0), 0
    for kill in range(10):
        process = start(in_folder(config, killed, resume="auto"))
        # So far in the run, however fast it is: 48 steps are left at the last time, so that even a test
        # that waits for its core kills it before it ends.
        wait_for(lambda: killed.is_dir() and max(states(killed), default=0) >= 4 * kill, process)  # noqa: B023
        if kill % 2:
            wait_for(lambda: any(killed.glob(".state_*.tmp")), process)
        time.sleep(rng.uniform(0, 0.01 if kill % 2 else 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while_writing += any(killed.glob(".state_*.tmp"))
    process = start(in_folder(config, killed, resume="auto"))
    process.join()
    assert process.exitcode == 0
    assert while_writing
    assert_same_run(killed, whole)
    assert not list(killed.glob(".*"))


# --- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 6, 11])  # the first, one before an evaluation, and others
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": OptimConfig("adamw"), "ema_decay": None},
        {"arch": replace(ARCH, puzzle_emb_ndim=0, forward_dtype="bfloat16"), "eval_interval": None},
        {"num_workers": 1},
        {"optim": OptimConfig("muon"), "stagger": True, "augment_act_steps": True},
        {
            "arch": replace(ARCH, starts=3),
            "augment_entry": True,
            "accumulate": 2,
            "curriculum": [{"until": 3, "halt_max_steps": 2, "L_cycles": 1}],
        },
    ],
    ids=["adam_atan2", "adamw", "no puzzle table", "loader process", "muon", "three starts"],
)
def test_stopped_and_resumed(
    step: int, changes: dict[str, Any], config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (changes.get("num_workers") or changes.get("accumulate")) and step != 6:
        pytest.skip("slow, and no different")
    config = replace(config, **changes)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    pretrain(in_folder(config, whole))
    stop_after(step, replace(config, resume="auto"), monkeypatch)
    assert states(folder)[-1] == step
    pretrain(replace(config, resume="auto"))
    assert_same_run(folder, whole)


def test_activations_computed_again_change_nothing(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that keeps few of them, stopped and resumed, is the run that keeps them all."""
    config = replace(config, arch=replace(ARCH, gradient="last_cycle", L_cycles=2))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    pretrain(in_folder(config, whole))
    less = replace(config, kernels=KernelsConfig(recompute="block"))
    stop_after(6, less, monkeypatch)
    pretrain(replace(less, resume="auto"))
    assert_same_run(folder, whole)


def test_a_finished_run_stays_as_it_is(config: PretrainConfig, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", tmp_path / "before"
    pretrain(config)
    shutil.copytree(folder, before)
    pretrain(replace(config, resume="auto"))
    assert_same_run(folder, before)
    assert {path.name for path in folder.iterdir()} == {path.name for path in before.iterdir()}


def test_handlers_are_given_back(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal while the run saves changes nothing; after it, handlers are those from before, and the one of the
    signal that stopped the run gets it, once."""
    seen: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        advance = RunLog.advance

        def twice(log: RunLog) -> None:
            advance(log)
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(RunLog, "advance", twice)
        with pytest.raises(SystemExit):
            pretrain(config)
        assert seen == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, former)


@pytest.mark.slow
def test_the_same_command_again(pack: Path, tmp_path: Path) -> None:
    """From the shell: a preempted run has an exit status of its own, and the command that started it finishes it."""
    command = [sys.executable, "pretrain.py", *TINY_MODEL, *CPU, f"data_path={pack}", f"checkpoint_path={tmp_path}"]
    command += ["wandb=disabled", "global_batch_size=6", "epochs=100000", "eval_interval=null", "log_interval=1"]
    command += ["resume=auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_PREEMPTED
    (step,) = states(tmp_path)
    again = [*command, f"epochs={(step + 3) * 6 // 24 + 1}", "resume_changed=true"]
    finished = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert finished.returncode == 0, finished.stderr
    assert f"Going on from {tmp_path}/state_{step}, with epochs=" in finished.stdout
    steps = [record["step"] for record in records(tmp_path) if "train/lr" in record]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] > step


# --- ranks -----------------------------------------------------------------------------------------------------------


def join_as(rank: int, port: int, task: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.StringIO()
    os.environ |= environment(rank, 2, port)
    try:
        task(rank)
    except SystemExit as stop:
        os._exit(int(str(stop.code)))
    os._exit(0)  # what gloo's threads hold may abort a process while Python ends, now and then (PyTorch #179291)


def start_two_ranks(task: Callable[[int], None], port: int) -> list[ForkServerProcess]:
    ranks = [fork_server().Process(target=join_as, args=(rank, port, task)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def on_two_ranks(task: Callable[[int], None]) -> list[int | None]:
    """Exit statuses of two ranks."""
    store = meeting()
    ranks = start_two_ranks(task, store.port)
    for process in ranks:
        process.join(PATIENCE)
    return [process.exitcode for process in ranks]


class Train:
    """A run that one rank is told to stop, or none."""

    def __init__(self, config: PretrainConfig, stop_step: int | None = None, on_rank: int = 1) -> None:
        self.config = config
        self.stop_step = stop_step
        self.on_rank = on_rank

    def __call__(self, rank: int) -> None:
        if self.stop_step is None or rank != self.on_rank:
            pretrain(self.config)
        else:
            with pytest.MonkeyPatch.context() as patch:
                stop_after(self.stop_step, self.config, patch)
            raise SystemExit(EXIT_PREEMPTED)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_go_on_as_two(config: PretrainConfig, tmp_path: Path) -> None:
    """And a signal to one of them stops both, after the same step."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    config = replace(config, checkpoint_interval=ALWAYS)
    assert on_two_ranks(Train(in_folder(config, whole, checkpoint_interval=NEVER))) == [0, 0]
    assert on_two_ranks(Train(config, stop_step=6)) == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert 6 <= states(folder)[-1] <= 7
    assert len(list((folder / f"state_{states(folder)[-1]}").glob("*.safetensors"))) == 2
    assert on_two_ranks(Train(replace(config, resume="auto"))) == [0, 0]
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_is_killed(config: PretrainConfig, tmp_path: Path) -> None:
    """While a training state is written: the other ends too, and both go on from one that is whole."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    config = replace(config, epochs=12, eval_interval=3, dist_timeout=10.0)
    assert on_two_ranks(Train(in_folder(config, whole))) == [0, 0]
    config = replace(config, checkpoint_interval=ALWAYS, resume="auto")
    store = meeting()
    ranks = start_two_ranks(Train(config), store.port)
    wait_for(lambda: max(states(folder), default=0) >= 14, ranks[0])
    wait_for(lambda: any(folder.glob(".state_*.tmp")), ranks[0])
    ranks[1].kill()
    ranks[0].join(PATIENCE)
    assert ranks[0].exitcode == 1
    assert on_two_ranks(Train(config)) == [0, 0]
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("saved_on", [1, 2])
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor": 2}, {"pipeline": 2, "micro_batches": 2}, {"fsdp": True}],
    ids=["data", "tensor", "pipeline", "fsdp"],
)
def test_another_number_of_processes(
    saved_on: int, parallel: dict[str, Any], config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64 forward and backward, so that only the float32 sums over ranks differ; and without exploration, whose
    # streams belong to ranks. Adam-atan2 would not notice gradients of a wrong scale.
    arch = replace(ARCH, H_layers=2, L_layers=2, forward_dtype="float64", halt_exploration_prob=0.0)
    config = replace(config, arch=arch, optim=OptimConfig("adamw", eps=0.01), ema_decay=None)
    on_two = replace(config, parallel=ParallelConfig(**parallel))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    pretrain(in_folder(config, whole))
    if saved_on == 1:
        stop_after(6, config, monkeypatch)
        assert on_two_ranks(Train(replace(on_two, resume="auto"))) == [0, 0]
    else:
        assert on_two_ranks(Train(on_two, stop_step=6, on_rank=0)) == [EXIT_PREEMPTED, EXIT_PREEMPTED]
        pretrain(replace(config, resume="auto"))
    for expected, record in zip(records(whole), records(folder), strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    start, end = contents(whole / "step_4"), contents(whole / "step_12")
    for name, weight in contents(folder / "step_12").items():
        moved = (end[name] - start[name]).abs().max()
        assert (weight - end[name]).abs().max() <= 1e-4 * moved, name


def test_new_ranks_explore_differently(
    config: PretrainConfig, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = find_state("auto", stopped)
    assert saved is not None
    train_pack = open_pack(config.data_path, "train")
    draws = []
    for world in (World(0, 1, torch.device("cpu")), *(World(rank, 2, torch.device("cpu")) for rank in range(2))):
        state = initial_state(config, train_pack, World(0, 1, torch.device("cpu")))
        restore(saved, state, world, config, train_pack)
        draws.append(torch.rand(4, generator=state.model.model.exploration(world.device)))
    assert not any(torch.equal(draws[i], draws[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# --- damage ----------------------------------------------------------------------------------------------------------


def tensors_file(state: Path) -> Path:
    (file,) = state.glob("*.safetensors")
    return file


def flip(file: Path, position: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 1
    file.write_bytes(content)


def reseal(state: Path) -> None:
    """Make a training state's hashes fit its files."""
    files = sorted(file for file in state.iterdir() if file.name != "SHA256SUMS")
    sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
    (state / "SHA256SUMS").write_text(sums)


def edit_metadata(state: Path, drop: str | None = None, **changes: object) -> None:
    fields = json.loads((state / "state.json").read_text()) | changes
    fields.pop(drop, None)
    (state / "state.json").write_text(json.dumps(fields))
    reseal(state)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda state: os.truncate(tensors_file(state), 5000), r"\.safetensors is not what was saved"),
    "empty": (lambda state: os.truncate(tensors_file(state), 0), r"\.safetensors is not what was saved"),
    "a bit": (lambda state: flip(tensors_file(state), 0.7), r"\.safetensors is not what was saved"),
    "a bit of the header": (lambda state: flip(tensors_file(state), 0.01), r"\.safetensors is not what was saved"),
    "a bit of the metadata": (lambda state: flip(state / "state.json", 0.5), r"state\.json is not what was saved"),
    "a bit of the hashes": (lambda state: flip(state / "SHA256SUMS", 0.1), r"is not what was saved"),
    "no tensors": (lambda state: tensors_file(state).unlink(), r"lacks shard-00001-\S+\.safetensors"),
    "no metadata": (lambda state: (state / "state.json").unlink(), r"lacks state\.json"),
    "no hashes": (
        lambda state: (state / "SHA256SUMS").unlink(),
        r"no training state, as it has no readable SHA256SUMS",
    ),
    "binary hashes": (lambda state: (state / "SHA256SUMS").write_bytes(b"\xff\xfe"), r"no readable SHA256SUMS"),
    "another file": (lambda state: (state / "more").touch(), r"more is not what was saved"),
    "another program": (lambda state: edit_metadata(state, "format"), r"is no training state of this program"),
    "another version": (
        lambda state: edit_metadata(state, format=3),
        r"has format 3 .* version reads 1 and 2",
    ),
    "a field missing": (lambda state: edit_metadata(state, "progress"), r"is no training state of this program"),
    "other metadata": (lambda state: edit_metadata(state, who="?"), r"is no training state of this program"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_states_are_not_used(
    damage: str, config: PretrainConfig, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    pretrain(in_folder(config, whole))
    do, sentence = DAMAGE[damage]
    do(stopped / "state_6")
    with pytest.raises(UserError, match=sentence) as error:
        pretrain(replace(config, resume=str(stopped / "state_6")))
    assert str(stopped / "state_6") in str(error.value)
    assert "\n" not in str(error.value)

    capsys.readouterr()
    pretrain(replace(config, resume="auto"))
    said = capsys.readouterr().out
    assert f"Not usable: {error.value}" in said
    assert f"Going on from {stopped / 'state_5'}." in said
    assert_same_run(stopped, whole)
    assert (stopped / "earlier_1" / "state_6").is_dir()


def test_no_whole_state(config: PretrainConfig, stopped: Path) -> None:
    for step in states(stopped):
        flip(stopped / f"state_{step}" / "state.json", 0.5)
    with pytest.raises(UserError, match=r"no training state in .*run is whole: .*state_6/state\.json is not what"):
        pretrain(replace(config, resume="auto"))


def test_foreign_paths(config: PretrainConfig, stopped: Path, tmp_path: Path) -> None:
    pretrain(in_folder(replace(config, epochs=1), tmp_path / "other"))
    for path in ("nowhere", str(tmp_path), str(tmp_path / "other" / "step_4"), str(tmp_path / "other" / "state_5")):
        with pytest.raises(UserError, match=rf"resume={re.escape(path)} is no training state"):
            pretrain(replace(config, resume=path))
    with pytest.raises(UserError, match=r"resume=auto looks in the run folder: name it"):
        pretrain(replace(config, resume="auto", checkpoint_path=None))


def test_another_model(config: PretrainConfig, stopped: Path) -> None:
    wider = replace(config, arch=replace(ARCH, hidden_size=64), resume="auto", resume_changed=True)
    with pytest.raises(UserError, match=r"state_6 has .* for model\S+, which does not fit this model"):
        pretrain(wider)


# --- changed options -------------------------------------------------------------------------------------------------


def test_changes_that_matter_need_consent(
    config: PretrainConfig, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = replace(config, resume="auto", lr=3e-3, arch=replace(ARCH, halt_max_steps=3))
    sentence = (
        r"would go on with arch\.halt_max_steps=3 \(it had 4\) and lr=0\.003 \(it had 0\.01\): .*resume_changed=true"
    )
    with pytest.raises(UserError, match=sentence):
        pretrain(changed)
    pretrain(replace(changed, resume_changed=True))
    assert "with arch.halt_max_steps=3 (it had 4) and lr=0.003 (it had 0.01)." in capsys.readouterr().out
    rates = {record["step"]: record["train/lr"] for record in records(stopped) if "train/lr" in record}
    assert rates[4] == 1e-2
    assert rates[12] == pytest.approx(3e-3 * 0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"global_batch_size": 12}, r"global_batch_size=12 \(it had 6\)"),
        ({"eval_interval": 3}, r"eval_interval=3 \(it had 1\)"),
        ({"optim": OptimConfig("adamw")}, r"optim\.name=adamw \(it had adam_atan2\)"),
    ],
)
def test_changes_that_cannot_be(changes: dict[str, Any], named: str, config: PretrainConfig, stopped: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot go on with {named}"):
        pretrain(replace(config, resume="auto", resume_changed=True, **changes))


def test_another_pack(config: PretrainConfig, stopped: Path, tmp_path: Path) -> None:
    make_pack(tmp_path / "larger", train_size=30, test_size=6)
    with pytest.raises(UserError, match=r"cannot go on with pack\.total_groups=30 \(it had 24\)"):
        pretrain(replace(config, resume="auto", resume_changed=True, data_path=str(tmp_path / "larger")))


def test_changes_that_do_not_matter(config: PretrainConfig, stopped: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    pretrain(in_folder(config, whole))
    free = {"log_interval": 1, "num_workers": 1, "keep_checkpoints": 1, "project_name": "other", "stop_after": 3}
    pretrain(replace(config, resume="auto", checkpoint_every_eval=False, **free))
    assert all(torch.equal(x, contents(whole / "step_12")[name]) for name, x in contents(stopped / "step_12").items())


def test_a_state_from_before_an_option(config: PretrainConfig, stopped: Path) -> None:
    """What a state knows nothing of had its default, in groups too; another value changes the run."""
    had = json.loads((stopped / "state_6" / "state.json").read_text())["config"]
    had["arch"] = {name: value for name, value in had["arch"].items() if name not in ("q_continue", "gradient")}
    edit_metadata(stopped / "state_6", config={name: value for name, value in had.items() if name != "curriculum"})
    other = replace(config, resume="auto", arch=replace(config.arch, q_continue=False))
    with pytest.raises(UserError, match=r"arch\.q_continue=False \(it had True\)"):
        pretrain(other)
    pretrain(replace(config, resume="auto"))


def test_a_state_of_format_1(config: PretrainConfig, stopped: Path, tmp_path: Path) -> None:
    """It knew no identity of packs, so that any pack of these sizes will do."""
    pretrain(in_folder(config, tmp_path / "whole"))
    edit_metadata(stopped / "state_6", drop="pack_identity", format=1)
    pretrain(replace(config, resume="auto"))
    assert_same_run(stopped, tmp_path / "whole")


def test_a_state_can_be_branched_from(config: PretrainConfig, stopped: Path, tmp_path: Path) -> None:
    """Another run folder goes on from a state and leaves the run that it was of alone."""
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    pretrain(in_folder(config, whole))
    pretrain(in_folder(config, branch, resume=str(stopped / "state_5")))
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
    assert records(branch) == records(whole)
    assert all(torch.equal(x, contents(whole / "step_12")[name]) for name, x in contents(branch / "step_12").items())


def test_going_back_keeps_what_came_after(config: PretrainConfig, stopped: Path) -> None:
    pretrain(replace(config, checkpoint_path=None, resume=str(stopped / "state_5"), seed=0))
    weights = {f"step_6{average}{suffix}" for average in ("", "_ema") for suffix in ("", ".safetensors")}
    aside = {path.name for path in (stopped / "earlier_1").iterdir()}
    assert aside == {"state_6", "stopped.json", *weights}
    assert [record["step"] for record in records(stopped) if "train/lr" in record] == [1, 3, 4, 6, 8, 9, 12]


def test_what_changes_bits_is_said(config: PretrainConfig, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads((stopped / "state_6" / "state.json").read_text())
    edit_metadata(stopped / "state_6", made_by=fields["made_by"] | {"PyTorch": "1.0"})
    pretrain(replace(config, resume="auto"))
    assert f"PyTorch 1.0, now {torch.__version__}" in capsys.readouterr().out


# --- saving ----------------------------------------------------------------------------------------------------------


def test_states_are_kept(config: PretrainConfig, tmp_path: Path) -> None:
    """The newest two, and that of the best evaluation: with weights that stay as they are, the first."""
    pretrain(replace(config, epochs=5, lr=0.0, puzzle_emb_lr=0.0, keep_checkpoints=2))
    folder = tmp_path / "run"
    assert states(folder) == [4, 16, 20]
    saved = find_state(str(folder / "state_20"), folder)
    assert saved is not None
    assert saved.metadata.progress["best_step"] == 4
    assert saved.metadata.progress["evaluations_since_best"] == 3  # before the last


def test_hashes_are_those_of_sha256sum(stopped: Path) -> None:
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=stopped / "state_6")
    assert checked.returncode == 0


def metadata(step: int) -> StateMetadata:
    return StateMetadata(step, 1, {"best_step": None}, [], 0, 0, None, {}, {}, {})


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), saving.save

    def waiting(*arguments: Any, **options: Any) -> object:
        assert may_write.wait(PATIENCE)
        return write(*arguments, **options)

    monkeypatch.setattr(saving, "save", waiting)
    weight = torch.ones(3)
    with StateSaver(tmp_path, 2, World(0, 1, torch.device("cpu")), timeout=PATIENCE) as saver:
        saver.save(metadata(1), {"weight": weight}, {})
        weight.add_(1)  # the next step: what is written is what was
        assert states(tmp_path) == []
        threading.Timer(0.1, may_write.set).start()
        saver.save(metadata(2), {"weight": weight}, {})  # waits for the one before
        assert states(tmp_path)[0] == 1
        weight.add_(1)
    for step in (1, 2):
        assert contents(tensors_file(tmp_path / f"state_{step}"))["weight"].tolist() == [step] * 3


def test_failing_to_save_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    lines: list[str] = []
    with StateSaver(tmp_path, 1, World(0, 1, torch.device("cpu")), timeout=PATIENCE, say=lines.append) as saver:
        saver.save(metadata(1), {"weight": torch.ones(3)}, {})
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            saver.save(metadata(2), {"weight": torch.ones(3)}, {})
            saver.wait()
        assert len(lines) == 1
        assert re.search(r"state_2 could not be written \(No space left on device\)", lines[0])
        assert saver.failed == {"state_2": "No space left on device"}
        assert (saver.saved_step, states(tmp_path)) == (1, [1])
        assert not list(tmp_path.glob(".*"))  # others need the room
        saver.save(metadata(3), {"weight": torch.ones(3)}, {})
        saver.wait()
        assert (saver.saved_step, states(tmp_path)) == (3, [3])


def test_weights_beside_as_safetensors(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config)
    for name in ("step_12", "step_12_ema"):
        file = tmp_path / "run" / name
        plain, beside = read_weights(file), read_weights(file.with_name(f"{name}.safetensors"))
        assert plain.keys() == beside.keys()
        assert all(torch.equal(plain[key], beside[key]) for key in plain)
        with safe_open(file.with_name(f"{name}.safetensors"), "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_the_clock_asks_for_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("hrm.checkpoint.save_points.time.monotonic", lambda: now)
    with SavePoints(2, World(0, 1, torch.device("cpu")), timeout=PATIENCE) as save_points:
        asked = []
        for now in (100, 219, 220, 221, 339, 341, 342):  # noqa: B007
            asked.append(save_points.after_step())
    assert [request is Request.SAVE for request in asked] == [False, False, True, False, False, True, False]


# --- averages and early ends -----------------------------------------------------------------------------------------


def test_average_by_hand(config: PretrainConfig) -> None:
    train_pack = open_pack(config.data_path, "train")
    world = World(0, 1, torch.device("cpu"))
    state = initial_state(config, train_pack, world)
    step = make_train_step(config, world, state)
    batches: Iterator[Any] = TrainLoader(train_pack, 6, seed=0).iterate(0)
    expected = {name: weight.double() for name, weight in state.model.state_dict().items()}
    for batch in batches:
        step(batch)
        for name, weight in state.model.state_dict().items():
            expected[name] = 0.8 * expected[name] + 0.2 * weight.double()
    assert state.average is not None
    assert state.average.model.state_dict().keys() == expected.keys()
    for name, average in state.average.model.state_dict().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(state.average.model.model.inner.lm_head.weight, state.model.model.inner.lm_head.weight)


def test_average_is_evaluated(config: PretrainConfig, tmp_path: Path) -> None:
    """As the model that its file holds; and with a decay of 0 it is the model itself."""
    pretrain(replace(config, ema_decay=0.0))
    evaluations = [record for record in records(tmp_path / "run") if "train/lr" not in record]
    plain = [{k: x for k, x in record.items() if "ema/" not in k} for record in evaluations if "step" in record]
    plain, averaged = plain[::2], evaluations[1::2]
    assert [{k.removeprefix("ema/"): x for k, x in record.items()} for record in averaged] == plain
    ours, theirs = (contents(tmp_path / "run" / name) for name in ("step_12", "step_12_ema"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ends_when_evaluations_get_no_better(config: PretrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = replace(config, epochs=6, lr=0.0, puzzle_emb_lr=0.0, stop_after=2, checkpoint_every_eval=False)
    pretrain(config)
    assert max(record["step"] for record in records(folder)) == 12  # the first was best, and two more were not
    assert {file.name for file in folder.glob("step_*") if not file.suffix} == {"step_12", "step_12_ema"}


def test_ends_at_a_train_accuracy(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(replace(config, stop_at_train_accuracy=1.0))
    assert max(record["step"] for record in records(tmp_path / "run")) == 12
    seen = [record.get("train/exact_accuracy") for record in records(tmp_path / "run")]
    first = next(x for x in seen if x is not None)
    pretrain(replace(config, stop_at_train_accuracy=first))
    assert max(record["step"] for record in records(tmp_path / "run")) == 4
    assert f"Ended early: training's exact accuracy is {first:.4g}" in capsys.readouterr().out


# --- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("kernels", "optim"),
    [
        (KernelsConfig("triton", attention="triton"), "adam_atan2"),
        (KernelsConfig("triton", attention="triton", cuda_graphs=True), "adam_atan2"),
        (KernelsConfig("triton", attention="triton", cuda_graphs=True, fused_step=True), "adam_atan2"),
        (KernelsConfig("triton", attention="triton", cuda_graphs=True, fused_step=True), "muon"),
        (KernelsConfig("triton", attention="triton", cuda_graphs=True, recompute="block"), "adam_atan2"),
    ],
    ids=["eager", "graph", "fused step", "muon", "recompute"],
)
def test_resumed_on_the_gpu(
    kernels: KernelsConfig, optim: str, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that sum in a fixed order give the same bits there, recorded as a CUDA graph or not."""
    arch = replace(ARCH, hidden_size=128, forward_dtype="bfloat16")
    config = replace(config, arch=arch, kernels=kernels, optim=OptimConfig(optim), device="cuda", epochs=6)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    pretrain(in_folder(config, whole))
    stop_after(7, config, monkeypatch)
    pretrain(replace(config, resume="auto"))
    assert_same_run(folder, whole)
