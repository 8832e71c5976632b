"""Steps whose loss or gradients are not finite: they change nothing, are counted, and end the run if they go on."""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hrm.config import DataConfig, KernelsConfig, OptimConfig, ParallelConfig, PretrainConfig
from hrm.config.compose import run
from hrm.data.loader import TrainLoader
from hrm.data.pack import open_pack
from hrm.distributed.world import join_world
from hrm.errors import EXIT_USER_ERROR, UserError
from hrm.models import ACTLossHead
from hrm.models.layers import SparseEmbedding
from hrm.optim import Adam, AdamATan2, FusedAdamW, SparseSignSGD
from hrm.optim.nonfinite import find_nonfinite
from hrm.training import step as step_module
from hrm.training.guard import NonFiniteGuard
from hrm.training.loop import pretrain
from hrm.training.metrics import MetricWindow
from hrm.training.step import TrainState, initial_state, make_train_step
from tests.helpers.ranks import PATIENCE, environment, on_ranks
from tests.helpers.training import ALONE, ARCH, no_waiting, start, write_pack

BAD = (1, 3, 4)  # of STEPS; the first is where no optimizer has a state yet
STEPS = 8
MODEL = replace(ARCH, halt_exploration_prob=0.5, halt_max_steps=3)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    pack = tmp_path / "pack"
    write_pack(pack, train=20, test=6)
    return PretrainConfig(
        arch=MODEL,
        data_path=str(pack),
        data=DataConfig("latin_squares", str(pack), "none"),
        checkpoint_path=str(tmp_path / "run"),
        global_batch_size=4,
        epochs=2,
        log_interval=3,
        eval_interval=None,
        lr=1e-2,
        lr_warmup_steps=2,
        ema_decay=0.8,
        device="cpu",
        wandb="disabled",
    )


def spoil_losses(monkeypatch: pytest.MonkeyPatch, bad_calls: Sequence[int], factor: float = math.nan) -> None:
    """Multiply the loss of these calls of any model, counted from 1."""
    forward, calls = ACTLossHead.forward, 0

    def spoilt_forward(self: ACTLossHead, **arguments: Any) -> Any:
        nonlocal calls
        calls += self.training
        carry, loss, *rest = forward(self, **arguments)
        return carry, loss * factor if calls in bad_calls and self.training else loss, *rest

    monkeypatch.setattr(ACTLossHead, "forward", spoilt_forward)


def everything(state: TrainState) -> dict[str, Tensor]:
    """All bits that training may change, the carry's too."""
    assert state.carry is not None
    tensors = {f"carry.{number}": tensor for number, tensor in enumerate(state.carry.tensors())}
    tensors |= state.model.state_dict()
    if state.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.model.state_dict().items()}
    for number, values in state.optimizers[0][0].state_dict()["state"].items():
        tensors |= {f"{number}.{name}": torch.as_tensor(value).double() for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in names or ours if not torch.equal(ours[name], theirs[name])] == []


def mask_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip as on CUDA, without the host."""

    def masking(abort_after: int | None, device: torch.device, *, masks: bool) -> NonFiniteGuard:
        return NonFiniteGuard(abort_after, device, masks=True)

    monkeypatch.setattr(step_module, "NonFiniteGuard", masking)


CASES: dict[str, dict[str, Any]] = {
    "Adam-atan2": {},
    "accumulated": {"accumulate": 2},
    "clipped": {"grad_clip": 0.05},
    "AdamW": {"optim": OptimConfig("adamw", eps=0.01)},
}


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("case", CASES)
def test_as_if_the_bad_steps_had_not_updated(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, case: str, on_device: bool, factor: float
) -> None:
    """Beside a run that leaves out the updates of these steps but goes on with its carry and its schedule."""
    config = replace(config, **CASES[case])
    if on_device and case == "AdamW":
        pytest.skip("masks its writes on CUDA only, where it is PyTorch's fused one")
    left_out, batches = start(replace(config, skip_nonfinite=False))
    step, expected = make_train_step(replace(config, skip_nonfinite=False), ALONE, left_out), []
    apply = step_module._apply_gradients
    for number, batch in zip(range(1, STEPS + 1), batches, strict=False):
        with monkeypatch.context() as patch:
            patch.setattr(step_module, "_apply_gradients", (lambda _: None) if number in BAD else apply)
            step(batch)
        expected.append(everything(left_out))

    if on_device:
        mask_on_any_device(monkeypatch)
    bad_passes = [(number - 1) * config.accumulate + 1 for number in BAD]
    spoil_losses(monkeypatch, bad_passes, factor)
    state, batches = start(config)
    step = make_train_step(config, ALONE, state)
    for number, batch in zip(range(1, STEPS + 1), batches, strict=False):
        metrics = step(batch)
        assert metrics["skipped"] == (number in BAD)
        assert (metrics["lm_loss"] > 0) == (number not in BAD)
        actual = everything(state)
        if on_device and number == 1:  # moments and counts of 0 where there were none yet
            new = actual.keys() - expected[0].keys()
            assert new
            assert not any(actual.pop(name).any() for name in new)
        assert_equal(actual, expected[number - 1])


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_the_guard_changes_no_bit_of_good_steps(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    if on_device:
        mask_on_any_device(monkeypatch)
    finals = []
    for guarded in (False, True):
        chosen = replace(config, skip_nonfinite=guarded, epochs=20)
        state, batches = start(chosen)
        step = make_train_step(chosen, ALONE, state)
        for _, batch in zip(range(40), batches, strict=False):
            step(batch)
        finals.append(everything(state))
    one, other = finals
    assert_equal(one, other)


def test_spoilt_sequences_start_afresh(config: PretrainConfig) -> None:
    """One sequence's state is spoilt: its place is taken over and the others go on; then training learns."""
    config = replace(config, epochs=60, lr=1e-3)  # over seeds and CPUs, the loss falls to between a quarter and 0.43
    (state, batches), (healthy, _) = start(config), start(config)
    step, healthy_step = make_train_step(config, ALONE, state), make_train_step(config, ALONE, healthy)
    first, second, third = (next(batches) for _ in range(3))
    for either in (step, healthy_step):
        either(first)
    assert state.carry is not None
    state.carry.halted[:] = False
    healthy.carry.halted[:] = False  # type: ignore[union-attr]
    state.carry.states["z_L"][2, 5] = math.nan  # somewhere in the middle of the sequence
    before = everything(state)
    assert step(second)["skipped"] == 1
    healthy_step(second)
    assert_equal(everything(state), before, [name for name in before if not name.startswith("carry.")])
    after, well = state.carry, healthy.carry
    assert after is not None
    assert well is not None
    assert bool(after.halted[2])
    others = [0, 1, 3]
    for ours, theirs in zip(after.tensors(), well.tensors(), strict=True):
        assert torch.equal(ours[others], theirs[others])
    assert step(third)["skipped"] == 0
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.carry.tensors())
    assert torch.equal(state.carry.current_data["inputs"][2], third["inputs"][2])
    losses = [step(batch) for batch in batches]
    assert all(metrics["skipped"] == 0 for metrics in losses)
    early, late = (sum(float(metrics["lm_loss"]) for metrics in part) for part in (losses[:50], losses[-50:]))
    assert late < 0.8 * early


# --- what is found ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_find_nonfinite(value: float, where: int) -> None:
    tensors = [torch.full((1000, 3), 3e38), torch.tensor(-2.0, dtype=torch.float64), torch.empty(0), torch.zeros(7)]
    assert find_nonfinite(tensors).item() == 0  # however large
    tensors.pop(2)
    tensors[where].view(-1)[-1] = value
    assert find_nonfinite(tensors).item() == 1


@pytest.mark.parametrize("where", ["loss", "dense", "rows"])
def test_each_place_is_looked_at(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    state, batches = start(config)
    if where == "loss":
        act_loss = state.model.act_loss

        def spoilt(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = act_loss(*arguments)
            return loss + torch.tensor(math.inf), metrics  # which leaves all gradients finite

        monkeypatch.setattr(state.model, "act_loss", spoilt)
    elif where == "dense":
        weight = state.model.model.inner.q_head.weight
        third = torch.arange(weight.shape[1]) == 3
        weight.register_hook(lambda grad: torch.where(third, math.nan, grad))  # type: ignore[no-untyped-call]
    else:
        gradients = SparseSignSGD.gradients
        monkeypatch.setattr(SparseSignSGD, "gradients", lambda self: [grad + math.inf for grad in gradients(self)])
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    assert make_train_step(config, ALONE, state)(next(batches))["skipped"] == 1
    assert all(torch.equal(before[name], weight) for name, weight in state.model.state_dict().items())


def adam(params: Sequence[nn.Parameter], kind: str) -> Adam:
    if kind == "fused AdamW":
        return FusedAdamW(params, 0.1, weight_decay=0.3, copy_dtype=torch.float16)
    fused = kind == "fused"
    copy_dtype = torch.float16 if fused else None
    return AdamATan2(params, 0.1, weight_decay=0.3, capturable=True, fused=fused, copy_dtype=copy_dtype)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", ["plain", "fused", "fused AdamW"])
def test_optimizers_mask(kind: str) -> None:
    """With the flag set nothing moves, from the first step on; unset, it changes no bit."""
    if fused := kind != "plain":
        pytest.importorskip("triton", reason="Triton is not installed")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    params = [nn.Parameter(draw(3000)), nn.Parameter(draw(40, 65)), nn.Parameter(draw(16, 16))]
    table = SparseEmbedding(9, 32).to(DEVICE)
    table.weights.copy_(draw(9, 32))
    bare_params, bare_table = deepcopy(params), deepcopy(table)
    masked = adam(params, kind), SparseSignSGD(table, 0.1, 0.7, fused=fused)
    bare = adam(bare_params, kind), SparseSignSGD(bare_table, 0.1, 0.7, fused=fused)

    def step(
        optimizers: tuple[Adam, SparseSignSGD], rows: SparseEmbedding, grads: Sequence[Tensor], found: float | None
    ) -> None:
        for param, grad in zip(optimizers[0].param_groups[0]["params"], grads, strict=False):
            param.grad = grad.clone()
        ids = torch.tensor([1, 4, 1, 7], device=DEVICE)
        torch.autograd.backward(rows(ids, torch.float32), grads[-1].clone())
        for optimizer in optimizers:
            optimizer.found_inf = None if found is None else torch.tensor(found, device=DEVICE)
            optimizer.step()
            optimizer.zero_grad()

    for number in range(1, 7):
        grads = [draw(*param.shape) for param in params] + [draw(4, 32)]
        if number in (1, 4):
            spoilt = [torch.where(grad > 1, math.nan, torch.where(grad < -1, math.inf, grad)) for grad in grads]
            step(masked, table, spoilt, 1.0)
        else:
            step(masked, table, grads, 0.0)
            step(bare, bare_table, grads, None)
        pairs = [*zip(params, bare_params, strict=True), (table.weights, bare_table.weights)]
        assert all(torch.equal(one, other) for one, other in pairs)
        for one, other in zip(params, bare_params, strict=True):
            ours, theirs = masked[0].state[one], bare[0].state[other]
            if number > 1:
                assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
            if fused:
                assert torch.equal(one.copy_in_compute_dtype.values, one.half())  # type: ignore[attr-defined]


# --- the run around ---


def records(folder: Path) -> list[dict[str, float]]:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)  # no JSON

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_skipped_steps_are_logged(config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows end at steps 1, 3, 6, 9 and 10; losses are averaged over the steps that counted."""
    taken: list[float] = []
    add = MetricWindow.add

    def noting(self: MetricWindow, metrics: dict[str, Tensor], sequence_flops: float) -> None:
        taken.append(float(metrics["lm_loss"]))
        add(self, metrics, sequence_flops)

    monkeypatch.setattr(MetricWindow, "add", noting)
    spoil_losses(monkeypatch, [2, 4, 5, 6, 10])
    pretrain(config)
    training = [record for record in records(tmp_path / "run") if "train/lr" in record]
    assert [(record["step"], record["train/skipped"]) for record in training] == [
        (1, 0),
        (3, 1),
        (6, 3),
        (9, 0),
        (10, 1),
    ]
    assert training[1]["train/lm_loss"] == pytest.approx(taken[2] / 4)
    assert training[3]["train/lm_loss"] == pytest.approx(sum(taken[6:9]) / 12)
    for record in (training[2], training[4]):
        assert not any(name.endswith("loss") for name in record)


@pytest.mark.parametrize(("abort_after", "ends"), [(4, True), (5, False), (None, False)])
def test_abort_after(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abort_after: int | None, ends: bool
) -> None:
    """Four in a row, and then two more."""
    spoil_losses(monkeypatch, [2, 3, 4, 5, 7, 8])
    config = replace(config, abort_after=abort_after)
    if not ends:
        pretrain(config)
        return
    folder = tmp_path / "run"
    sentence = r"not finite in 4 steps in a row \(abort_after\).*last good weights are in .*run/(step_\d+): lower lr"
    with pytest.raises(UserError, match=sentence) as error:
        pretrain(config)
    named = next(path for path in folder.iterdir() if f"{path}:" in str(error.value))
    weights = torch.load(named, weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert records(folder)[-1]["step"] <= 9


def test_abort_names_the_training_state(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_losses(monkeypatch, [6, 7, 8, 9, 10])
    with pytest.raises(UserError, match=r"last good weights are in .*run/state_5:"):
        pretrain(replace(config, eval_interval=1, abort_after=3))
    assert (tmp_path / "run" / "state_5" / "state.json").is_file()


def test_exit_status(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the entry point, with the model's losses spoilt from the start."""
    spoil_losses(monkeypatch, range(100), math.inf)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "kernels=naive", "abort_after=2"])
    with pytest.raises(SystemExit) as stop:
        run(PretrainConfig, "pretrain", lambda asked: pretrain(replace(config, abort_after=asked.abort_after)), "test")
    assert stop.value.code == EXIT_USER_ERROR
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: loss or gradients were not finite in 2 steps in a row")


def test_impossible_abort_after() -> None:
    with pytest.raises(UserError, match=r"abort_after=0 is too small"):
        PretrainConfig(arch=MODEL, abort_after=0)


def test_trace(config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(replace(config, epochs=4, profile=str(tmp_path / "trace")))
    trace = json.loads((tmp_path / "trace" / "rank_0.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {f"ProfilerStep#{number}" for number in range(12, 17)} <= names
    assert "aten::linear" in names or "aten::mm" in names
    assert f"is in {tmp_path / 'trace' / 'rank_0.json'}" in capsys.readouterr().out
    pretrain(replace(config, profile=str(tmp_path / "none")))
    assert "No trace" in capsys.readouterr().out


# --- ranks ---

SHARED: dict[str, Callable[[], ParallelConfig]] = {
    "data": ParallelConfig,
    "buckets": lambda: ParallelConfig(bucket_mb=0.1),
    "tensor": lambda: ParallelConfig(tensor=2),
    "fsdp": lambda: ParallelConfig(fsdp=True),
    "pipeline": lambda: ParallelConfig(pipeline=2, micro_batches=2),
}
WIDE = replace(MODEL, halt_exploration_prob=0.0)


def train_shared(rank: int, port: int, config: PretrainConfig, folder: Path) -> None:
    for attempt, (name, parallel) in enumerate(SHARED.items()):
        os.environ |= environment(rank, 2, port, attempt)
        shared = replace(config, parallel=parallel())
        with join_world("cpu", shared.parallel, timeout=PATIENCE) as world:
            pack = open_pack(shared.data_path, "train")
            loader = TrainLoader(pack, shared.global_batch_size, 0, world.rank, world.size, epochs_per_pass=2)
            state = initial_state(shared, pack, world)
            step, told = make_train_step(shared, world, state), []
            act_loss = state.model.act_loss
            for number, batch in enumerate(loader.iterate(0), 1):
                with suppress(StopIteration), pytest.MonkeyPatch.context() as patch:
                    if number in BAD and rank == 1:
                        patch.setattr(state.model, "act_loss", spoilt(act_loss))
                    before = {key: weight.clone() for key, weight in state.shared.weights.items()}
                    told.append(float(step(batch)["skipped"]))
                    same = all(torch.equal(weight, before[key]) for key, weight in state.shared.weights.items())
                    assert same == (number in BAD), (name, number)
                    assert all(torch.isfinite(weight).all() for weight in state.shared.weights.values())
            (folder / f"{name}.{rank}").write_text(json.dumps(told))


def spoilt(
    act_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    def loss_of_one_rank(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = act_loss(*arguments)
        return loss + torch.tensor(math.inf), metrics  # gradients stay finite: only the flag tells the other rank

    return loss_of_one_rank


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_skip_together(config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(config, arch=WIDE, ema_decay=None, lr_warmup_steps=0, kernels=KernelsConfig("naive"))
    config = replace(config, arch=replace(WIDE, H_layers=2, L_layers=2))
    on_ranks(2, train_shared, config, tmp_path)
    for name in SHARED:
        told = [json.loads((tmp_path / f"{name}.{rank}").read_text()) for rank in range(2)]
        assert told[0] == told[1] == [float(number in BAD) for number in range(1, len(told[0]) + 1)]
        assert len(told[0]) > max(BAD)


def give_up_on_rank(rank: int, port: int, config: PretrainConfig, folder: Path) -> None:
    os.environ |= environment(rank, 2, port)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            spoil_losses(patch, range(4, 100))
        with pytest.raises(UserError) as error:
            pretrain(config)
    (folder / f"sentence.{rank}").write_text(str(error.value))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_give_up_together(config: PretrainConfig, tmp_path: Path) -> None:
    config = replace(config, eval_interval=1, epochs=4, abort_after=4, dist_timeout=20.0)
    on_ranks(2, give_up_on_rank, config, tmp_path)
    sentences = [(tmp_path / f"sentence.{rank}").read_text() for rank in range(2)]
    assert sentences[0] == sentences[1]
    assert "not finite in 4 steps in a row" in sentences[0]
    assert "no training state was saved before" in sentences[0]  # that of step 5 would have been within the streak
    assert f"the last good weights are in {tmp_path / 'run' / 'step_10'}:" in sentences[0]


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("optim", ["adam_atan2", "adamw"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_skips_on_the_gpu(config: PretrainConfig, optim: str, graphs: bool, fused: bool) -> None:
    """A weight is spoilt for some steps, among them replays: nothing moves, and the host waits for nothing."""
    kernels = KernelsConfig(cuda_graphs=graphs, fused_step=fused)
    config = replace(config, device="cuda", kernels=kernels, optim=OptimConfig(optim), epochs=4, abort_after=2)
    pack = open_pack(config.data_path, "train")
    with join_world("cuda") as world:
        state = initial_state(config, pack, world)
        step = make_train_step(config, world, state)
        loader = TrainLoader(pack, 4, 0, epochs_per_pass=4, pin_memory=True)
        weight = state.model.model.inner.q_head.weight
        told = []
        for number, batch in enumerate(loader.iterate(0), 1):
            if is_bad := number in (2, 9, 10):
                kept = weight.detach()[0].clone()
                with torch.no_grad():
                    weight[0] = math.nan
            before = everything(state) if is_bad else {}
            with no_waiting() if number > 5 else nullcontext():
                metrics = step(batch)
            told.append((metrics["skipped"].item(), metrics["gave_up"].item()))
            if is_bad:
                after = everything(state)
                for name in after:
                    if not name.startswith("carry."):
                        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
                with torch.no_grad():
                    weight[0] = kept
        flags = [(float(number in (2, 9, 10)), float(number == 10)) for number in range(1, len(told) + 1)]
        assert told == flags
        assert len(told) > 12
        assert all(torch.isfinite(tensor).all() for tensor in state.model.state_dict().values())
