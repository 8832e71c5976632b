"""The training step and the run around it: what it learns, repeats, spreads over ranks, logs and leaves behind."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hrm.batch import Batch
from hrm.checkpoint.weights import read_weights
from hrm.config import DataConfig, KernelsConfig, OptimConfig, PretrainConfig
from hrm.data.pack import open_pack
from hrm.errors import EXIT_INTERRUPTED, UserError
from hrm.optim import AdamATan2, SparseSignSGD
from hrm.training import run
from hrm.training.loop import pretrain
from hrm.training.metrics import MetricWindow
from hrm.training.run_log import RunLog
from hrm.training.step import initial_state, make_train_step
from hrm.training.throughput import peak_tflops
from tests.helpers.entry_points import make_pack
from tests.helpers.ranks import environment, on_ranks
from tests.helpers.training import ALONE, ARCH, CLOCKED, records, start, without_clock, write_pack


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """Two passes of five steps over 20 puzzles, then 6 to test on; a test replaces what it is about."""
    pack = tmp_path / "pack"
    write_pack(pack, train=20, test=6)
    return PretrainConfig(
        arch=ARCH,
        data_path=str(pack),
        data=DataConfig("latin_squares", str(pack), "none"),
        checkpoint_path=str(tmp_path / "run"),
        global_batch_size=4,
        epochs=2,
        eval_interval=1,
        log_interval=3,
        lr=1e-2,
        lr_warmup_steps=4,
        device="cpu",
        wandb="disabled",
    )


def weights(folder: Path | str | None, step: int) -> dict[str, Tensor]:
    assert folder is not None
    loaded: dict[str, Tensor] = torch.load(Path(folder) / f"step_{step}", weights_only=True)
    return loaded


# --- learning ---


def test_overfits_a_handful_of_puzzles(config: PretrainConfig, tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", train=6, test=6)
    # Down to a rate of 0: a last step as large as the others may undo, by chance, what the ones before it did.
    config = replace(config, global_batch_size=6, epochs=200, eval_interval=None, lr=3e-3, lr_min_ratio=0.0)
    pretrain(replace(config, log_interval=50))
    first, *_, last_training, evaluation = records(tmp_path / "run")
    assert evaluation["all/exact_accuracy"] == evaluation["all/accuracy"] == 1
    assert last_training["train/lm_loss"] < 0.1 * first["train/lm_loss"]


# --- repeating ---


def test_seed_decides_every_bit(config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(config, arch=replace(ARCH, halt_exploration_prob=0.5))
    global_state = torch.get_rng_state()
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        torch.manual_seed(len(name))
        pretrain(replace(config, seed=seed, checkpoint_path=str(tmp_path / name)))
    torch.set_rng_state(global_state)
    one, same, other = (weights(tmp_path / name, 10) for name in ("one", "same", "other"))
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_the_global_generators_alone(config: PretrainConfig) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    pretrain(replace(config, arch=replace(ARCH, halt_exploration_prob=0.5)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]  # noqa: NPY002


# --- ranks ---


def train_on_rank(rank: int, port: int, config: PretrainConfig) -> None:
    os.environ |= environment(rank, 2, port)
    pretrain(config)


@pytest.mark.multiprocess
def test_two_ranks_train_as_one(config: PretrainConfig, tmp_path: Path) -> None:
    # In float64 forward and backward, so that only the float32 sums over ranks differ. Adam-atan2 would not notice
    # gradients of a wrong scale; AdamW with a large epsilon does.
    arch = replace(ARCH, forward_dtype="float64", halt_exploration_prob=0.0, halt_max_steps=3)
    config = replace(config, arch=arch, optim=OptimConfig("adamw", eps=0.01), log_interval=1)
    alone, together = (replace(config, checkpoint_path=str(tmp_path / name)) for name in ("alone", "two"))
    pretrain(alone)
    on_ranks(2, train_on_rank, together)

    start_state, _ = start(alone)
    initial = {f"_orig_mod.{name}": weight for name, weight in start_state.model.state_dict().items()}
    for step in (5, 10):
        one, two = weights(tmp_path / "alone", step), weights(tmp_path / "two", step)
        for name, weight in one.items():
            moved = (weight - initial[name]).abs().max()
            assert (weight - two[name]).abs().max() <= 1e-4 * moved, name
    for expected, record in zip(records(tmp_path / "alone"), records(tmp_path / "two"), strict=True):
        assert without_clock(record) == pytest.approx(without_clock(expected), rel=1e-5)


# --- one step ---


def test_initial_state(config: PretrainConfig) -> None:
    config = replace(config, beta1=0.8, beta2=0.9, weight_decay=0.3, puzzle_emb_lr=0.5, puzzle_emb_weight_decay=0.7)
    state, _ = start(config)
    assert state.total_steps == 10  # 2 epochs of 20 groups of 1 example, by 4
    (dense, dense_lr), (sparse, sparse_lr) = state.optimizers
    assert isinstance(dense, AdamATan2)
    assert isinstance(sparse, SparseSignSGD)
    assert (dense_lr, sparse_lr) == (config.lr, 0.5)
    assert dense.param_groups[0]["betas"] == (0.8, 0.9)
    assert dense.param_groups[0]["weight_decay"] == 0.3
    assert sparse.param_groups[0]["weight_decay"] == 0.7
    assert {id(param) for param in dense.param_groups[0]["params"]} == set(map(id, state.model.parameters()))
    without_puzzles, _ = start(replace(config, arch=replace(ARCH, puzzle_emb_ndim=0)))
    assert [type(optimizer) for optimizer, _ in without_puzzles.optimizers] == [AdamATan2]
    with pytest.raises(UserError, match=r"2 epochs of .* are 40 examples, fewer than .*global_batch_size=41"):
        initial_state(replace(config, global_batch_size=41), open_pack(config.data_path, "train"), ALONE)


def test_adamw(config: PretrainConfig) -> None:
    config = replace(config, optim=OptimConfig(name="adamw", eps=1e-6), beta1=0.8, weight_decay=0.3)
    state, batches = start(config)
    dense, _ = state.optimizers[0]
    assert isinstance(dense, torch.optim.AdamW)
    group = dense.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.3)
    before = [param.detach().clone() for param in state.model.parameters()]
    make_train_step(config, ALONE, state)(next(batches))
    assert not any(torch.equal(param, old) for param, old in zip(state.model.parameters(), before, strict=True))


@pytest.mark.parametrize("optim", [OptimConfig("adam_atan2"), OptimConfig("adamw", eps=0.01)])
def test_step_by_hand(config: PretrainConfig, optim: OptimConfig) -> None:
    """A step divides the loss by the global batch and gives either optimizer its own rate on the schedule."""
    config = replace(config, optim=optim)
    (state, batches), (by_hand, _) = start(config), start(config)
    step, model, carry = make_train_step(config, ALONE, state), by_hand.model, None
    (dense, _), (sparse, _) = by_hand.optimizers
    for number in range(1, 7):
        batch = next(batches)
        metrics = step(batch)

        carry, loss, expected, *_ = model(carry=carry or model.initial_carry(batch), batch=batch)
        (loss / 4).backward()
        for optimizer, rate in ((dense, config.lr), (sparse, config.puzzle_emb_lr)):
            optimizer.param_groups[0]["lr"] = rate * min(number / 4, 1)
            optimizer.step()
            optimizer.zero_grad()
        assert state.step == number
        expected |= sums(skipped=0, gave_up=0)
        assert {name: value.item() for name, value in metrics.items()} == {
            name: value.item() for name, value in expected.items()
        }
        ours, theirs = state.model.state_dict(), model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_staggered_start(config: PretrainConfig) -> None:
    """Each step then sees the first ACT step of some sequences and the last of others."""
    for stagger in (False, True):
        options = replace(config, arch=replace(ARCH, halt_max_steps=4), stagger=stagger)
        state, batches = start(options)
        step = make_train_step(options, ALONE, state)
        counts = [step(next(batches))["count"].item() for _ in range(4)]
        assert counts == ([1, 1, 1, 1] if stagger else [0, 0, 0, 4])


def test_curriculum(config: PretrainConfig, tmp_path: Path) -> None:
    """Its steps are those of a shallower architecture; what comes after, and evaluation, are as deep as ever."""
    shallow = replace(config, arch=replace(ARCH, H_cycles=1, L_cycles=1), checkpoint_path=str(tmp_path / "shallow"))
    config = replace(
        config, curriculum=[{"until": 3, "H_cycles": 1, "L_cycles": 1}, {"until": 5, "H_cycles": 1}], epochs=1
    )
    depths = [(arch.H_cycles, arch.L_cycles) for arch in map(config.arch_at, (1, 3, 4, 5, 6))]
    assert depths == [(1, 1), (1, 1), (1, 2), (1, 2), (2, 2)]
    config = replace(config, curriculum=[{"until": 5, "H_cycles": 1, "L_cycles": 1}], epochs=2)
    for each in (config, shallow):
        pretrain(each)
    one, other = weights(config.checkpoint_path, 5), weights(shallow.checkpoint_path, 5)
    assert all(torch.equal(one[name], other[name]) for name in other)
    one, other = weights(config.checkpoint_path, 10), weights(shallow.checkpoint_path, 10)
    assert not any(torch.equal(one[name], other[name]) for name in other if "level" in name)
    for_steps = {record["step"]: record for record in records(config.checkpoint_path) if "all/lm_loss" in record}
    loss = for_steps[5]["all/lm_loss"]
    assert loss != next(r["all/lm_loss"] for r in records(shallow.checkpoint_path) if "all/lm_loss" in r)


def test_halting_sooner_at_first(config: PretrainConfig) -> None:
    """Sequences halt as the stage says, then as the architecture does; evaluation never halts them sooner."""
    stage = {"until": 4, "halt_max_steps": 2}
    config = replace(config, arch=replace(ARCH, halt_max_steps=4), curriculum=[stage], stagger=True)
    assert [config.arch_at(step).max_steps_in_training for step in (1, 4, 5)] == [2, 2, 4]
    assert config.arch_at(1) == replace(config.arch, train_max_steps=2)
    state, batches = start(config)
    step = make_train_step(config, ALONE, state)
    halted, taken = [], []
    for _ in range(8):
        metrics = step(next(batches))
        halted.append(metrics["count"].item())
        taken.append(metrics["steps"].item())
    assert halted == [2, 2, 2, 2, 0, 0, 2, 2]
    assert taken == [4, 4, 4, 4, 0, 0, 8, 8]
    assert state.model.eval().halt_max_steps == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("starts", [1, 3])
def test_cuda_graphs_change_nothing(starts: int, config: PretrainConfig, tmp_path: Path) -> None:
    # float64 hides the order in which atomic sums came out. The test split is long enough for a replay.
    make_pack(tmp_path / "sudoku", train_size=20, test_size=18)
    config = replace(config, data_path=str(tmp_path / "sudoku"), augment_act_steps=True)
    arch = replace(ARCH, forward_dtype="float64", halt_exploration_prob=0.5, halt_max_steps=4, starts=starts)
    shallow = {"H_cycles": 1, "L_cycles": 1}
    stages = [{"until": 3, "halt_max_steps": 2, **shallow}, {"until": 6, **shallow}]
    config = replace(config, arch=arch, device="cuda", log_interval=1, eval_save_outputs=["logits"])
    config = replace(config, curriculum=stages)  # a record for each stage
    eager, graphed = tmp_path / "eager", tmp_path / "graphed"
    for folder in (eager, graphed):
        kernels = KernelsConfig(cuda_graphs=folder == graphed)
        pretrain(replace(config, kernels=kernels, checkpoint_path=str(folder)))
    for expected, record in zip(records(eager), records(graphed), strict=True):
        assert without_clock(record) == pytest.approx(without_clock(expected), rel=1e-5)
    for file in ("step_10", "step_10_all_preds.0"):
        one, other = (torch.load(folder / file, weights_only=True, map_location="cpu") for folder in (eager, graphed))
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


# --- metrics ---


def sums(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 2080", None),
        ("Some Other L40", None),
    ],
)
def test_peak_of_a_gpu(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("hrm.training.metrics.time.perf_counter", lambda: now)
    window = MetricWindow(ALONE, global_batch_size=8)
    window._peak_tflops = 50.0  # as of a GPU that is known
    window.add(sums(count=1, accuracy=0.0, lm_loss=1.0), 5e12)
    now = 12.0
    window.close(step=1, lr=0.5)
    (record,) = window.finished(wait=True)
    assert record["tflops"] == pytest.approx(20)
    assert record["mfu"] == pytest.approx(0.4)


def test_metric_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("hrm.training.metrics.time.perf_counter", lambda: now)
    window = MetricWindow(ALONE, global_batch_size=8)
    losses = {"lm_loss": 4.0, "q_halt_loss": 2.0}
    window.add(sums(count=3, accuracy=1.5, steps=9, **losses), 5e11)
    window.add(sums(count=0, accuracy=0.0, steps=0, lm_loss=8.0, q_halt_loss=1.0), 5e11)
    window.add(sums(count=1, accuracy=1.0, steps=2, lm_loss=12.0, q_halt_loss=0.0), 5e11)
    now = 14.0
    window.close(step=3, lr=0.5)
    window.add(sums(count=0, accuracy=0.0, steps=0, lm_loss=2.0, q_halt_loss=4.0), 5e11)
    now = 15.0
    window.close(step=4, lr=0.25)
    window.close(step=4, lr=0.25)  # nothing since
    now = 20.0
    window.restart_clock()
    window.add(sums(count=8, accuracy=4.0, steps=32, lm_loss=16.0, q_halt_loss=0.0), 5e11)
    now = 22.0
    window.close(step=5, lr=0.125)
    assert window.finished(wait=True) == [
        {
            "step": 3,
            "train/lr": 0.5,
            "puzzles_per_second": 3 * 8 / 4,
            "tflops": 3.0,
            "data_wait": 0.0,
            "train/lm_loss": 1.0,  # by 3 steps of 8 sequences
            "train/q_halt_loss": 0.125,
            "train/accuracy": 0.625,  # by the 4 that halted
            "train/steps": 2.75,
        },
        # Where none halted there is nothing to say of those that did.
        {
            "step": 4,
            "train/lr": 0.25,
            "puzzles_per_second": 8,
            "tflops": 4.0,
            "data_wait": 0.0,
            "train/lm_loss": 0.25,
            "train/q_halt_loss": 0.5,
        },
        {
            "step": 5,
            "train/lr": 0.125,
            "puzzles_per_second": 4,
            "tflops": 2.0,
            "data_wait": 0.0,
            "train/lm_loss": 2.0,
            "train/q_halt_loss": 0.0,
            "train/accuracy": 0.5,
            "train/steps": 4.0,
        },
    ]
    assert window.finished(wait=True) == []


def test_waiting_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds of loading in each four; what was waited for before a window is not in it."""
    now = 0.0
    monkeypatch.setattr("hrm.training.metrics.time.perf_counter", lambda: now)

    def slow_batches() -> Iterator[Batch]:
        nonlocal now
        for number in range(4):
            now += 3
            yield {"inputs": torch.tensor([number])}

    window, seen = MetricWindow(ALONE, global_batch_size=1), []
    for batch in window.timed(slow_batches()):
        seen.append(batch["inputs"].item())
        if seen == [0]:
            window.restart_clock()
        now += 1
        window.add(sums(count=0, lm_loss=1.0))
        if seen[-1]:
            window.close(step=len(seen), lr=1.0)
    assert seen == [0, 1, 2, 3]
    # The first window has the computing of two steps in it, but the loading of one.
    assert [record["data_wait"] for record in window.finished(wait=True)] == [3 / 5, 3 / 4, 3 / 4]


LOSSES = {"train/lm_loss", "train/q_halt_loss", "train/q_continue_loss"}
OF_HALTED = {"train/accuracy", "train/exact_accuracy", "train/q_halt_accuracy", "train/steps"}


def test_metrics_file(config: PretrainConfig, tmp_path: Path) -> None:
    pretrain(config)
    written = records(tmp_path / "run")
    training = [record for record in written if "train/lr" in record]
    evaluations = [record for record in written if "train/lr" not in record]
    # 17 tokens; 2 x 2 updates of L and 2 of H, twice, and backward through one of each. A block has 4 x 32 x 32 weights
    # in its attention and 3 x 32 x 256 in its MLP, and compares 17 tokens in 32 numbers, twice.
    projections, mlp, scores = 2 * 4 * 32 * 32, 2 * 3 * 32 * 256, 2 * 2 * 17 * 32  # of a token
    block = 17 * (projections + mlp + scores)
    first_token = 17 * projections // 2 + projections // 2 + mlp + scores  # which needs the others' keys and values
    flops_by_hand = (6 + 2 * 2) * block + 5 * block + first_token
    # After step 1, every third, and the last before an evaluation.
    assert [record["step"] for record in written] == [1, 3, 5, 5, 6, 9, 10, 10]
    assert [record["step"] for record in training] == [1, 3, 5, 6, 9, 10]
    for record in training:
        assert record["train/lr"] == pytest.approx(1e-2 * min(record["step"] / 4, 1))
        assert record["puzzles_per_second"] > 0
        assert 0 < record["data_wait"] < 1
        assert record["train/skipped"] == 0
        assert record["tflops"] / record["puzzles_per_second"] == pytest.approx(flops_by_hand / 1e12)
    common = {"step", "train/lr", "train/skipped"} | CLOCKED
    assert training[0].keys() == common | LOSSES  # no sequence halts at step 1: q's start equal
    assert training[1].keys() == common | LOSSES | OF_HALTED
    for record in evaluations:
        names = ("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")
        assert record.keys() == {"step"} | {f"all/{name}" for name in names}
        assert record["all/count"] == 6
        assert record["all/steps"] == 2
        assert 0 < record["all/accuracy"] < 1


def test_first_record_is_of_the_first_step(config: PretrainConfig) -> None:
    """What is logged is what the model gives: per sequence, although summed over the batch."""
    pretrain(config)
    state, batches = start(replace(config, epochs=1))
    batch = next(batches)
    _, _, metrics, *_ = state.model(carry=state.model.initial_carry(batch), batch=batch)
    first = records(config.checkpoint_path)[0]
    for name in ("lm_loss", "q_halt_loss", "q_continue_loss"):
        assert first[f"train/{name}"] == pytest.approx(metrics[name].item() / 4, rel=1e-6)


# --- what a run leaves ---


@pytest.mark.parametrize(("every_eval", "steps"), [(True, [5, 10]), (False, [10])])
def test_weights_are_saved(config: PretrainConfig, tmp_path: Path, every_eval: bool, steps: Sequence[int]) -> None:
    pretrain(replace(config, checkpoint_every_eval=every_eval, eval_save_outputs=["logits", "inputs"]))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    outputs = {"step_5_all_preds.0", "step_10_all_preds.0"}
    kept = {f"step_{step}{suffix}" for step in steps for suffix in ("", ".safetensors")}
    assert files == {"all_config.yaml", "metrics.jsonl", "task.json", *outputs, *kept, "state_5", "state_10"}
    expected = {f"_orig_mod.{name}" for name in start(config)[0].model.state_dict()}
    assert weights(tmp_path / "run", 10).keys() == expected
    saved = torch.load(tmp_path / "run" / "step_10_all_preds.0", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {"logits": (6, 16, 5), "inputs": (6, 16)}


RUN_FOLDER = {"all_config.yaml", "metrics.jsonl", "task.json", "state_5", "state_10"}
RUN_FOLDER |= {"step_5", "step_5.safetensors", "step_10", "step_10.safetensors"}


def test_earlier_runs_are_kept_aside(config: PretrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def contents(where: Path) -> dict[str, bytes]:
        files = {str(file.relative_to(where)): file for file in where.rglob("*") if file.is_file()}
        return {name: file.read_bytes() for name, file in files.items() if not name.startswith("earlier_")}

    left = []
    for seed in (1, 2, 3):
        pretrain(replace(config, seed=seed))
        left.append(contents(folder))
    assert all({name.partition("/")[0] for name in files} == RUN_FOLDER for files in left)
    assert contents(folder / "earlier_1") == left[0]
    assert contents(folder / "earlier_2") == left[1]


def run_folder(config: PretrainConfig, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where a run went below `folder`, and the options it kept."""
    pretrain(config)
    (file,) = folder.rglob("all_config.yaml")
    kept = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(kept, dict)
    return file.parent.relative_to(folder), {str(name): value for name, value in kept.items()}


def test_names_left_open(config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(config, epochs=1, checkpoint_path=None)
    folder, kept = run_folder(config, tmp_path)
    assert folder.parts[:2] == ("checkpoints", "Pack-ACT-torch")
    assert folder.name.startswith("HierarchicalReasoningModel_ACTV1-")
    assert " " not in str(folder)
    assert kept["project_name"] == "Pack ACT-torch", "as published: what W&B shows"
    assert kept["run_name"].replace(" ", "-") == folder.name
    assert kept["checkpoint_path"] == str(folder)
    assert kept["arch"]["name"] == "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"


def test_a_run_in_a_folder_with_spaces_goes_on(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions named them."""
    monkeypatch.chdir(tmp_path)
    earlier = Path("checkpoints/Pack ACT-torch/first")
    pretrain(replace(config, epochs=1, checkpoint_path=str(earlier)))
    pretrain(replace(config, epochs=2, checkpoint_path=None, run_name="first", resume="auto", resume_changed=True))
    assert [path.parent for path in Path("checkpoints").rglob("all_config.yaml")] == [earlier]


def test_names_given(config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(config, epochs=1, checkpoint_path=None, project_name="Mine", run_name="first")
    assert run_folder(config, tmp_path)[0] == Path("checkpoints/Mine/first")


def test_what_was_learned_survives_a_stop(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(RunLog, "record", fail)
    with pytest.raises(BrokenPipeError):
        pretrain(config)
    left = list((tmp_path / "run").glob("step_*"))
    assert {file.name for file in left} == {"step_1", "step_1.safetensors"}
    state = initial_state(config, open_pack(config.data_path, "train"), ALONE)
    assert all(read_weights(file).keys() == state.model.state_dict().keys() for file in left)


def test_ctrl_c_twice_loses_nothing(config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the weights are being saved."""
    copy = run.on_host

    def interrupted_copy(tensors: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return copy(tensors)

    monkeypatch.setattr(RunLog, "advance", lambda log: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(run, "on_host", interrupted_copy)
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        pretrain(replace(config, ema_decay=0.9))
    assert stopped.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is former
    kept = {name: read_weights(tmp_path / "run" / name) for name in ("step_1", "step_1_ema")}
    assert any((kept["step_1"][name] != average).any() for name, average in kept["step_1_ema"].items())
