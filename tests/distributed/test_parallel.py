"""Sharing the work out over processes changes no number: every way of it, against one process with the whole batch."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing import get_context

from hrm.config import DataConfig, KernelsConfig, OptimConfig, ParallelConfig, PretrainConfig, to_typed
from hrm.data.loader import TrainLoader
from hrm.data.pack import open_pack
from hrm.distributed.partition import SharedModel
from hrm.distributed.world import World, gather_on_main, join_world, share_from_main, sum_over_ranks
from hrm.errors import UserError
from hrm.models import build_model
from hrm.models.transformer import TransformerConfig
from hrm.models.trm import TRMConfig
from hrm.optim.clip import clip_gradients
from hrm.training.step import initial_state, make_train_step
from tests.helpers.ranks import PATIENCE, environment, meeting, on_rank, on_ranks, wait_for_all
from tests.helpers.training import ARCH, write_pack

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 5
MODEL = replace(
    ARCH,
    num_heads=4,
    H_layers=2,
    L_layers=2,
    L_cycles=1,
    forward_dtype="float64",
    halt_exploration_prob=0.0,
    halt_max_steps=3,
)
_COMMON = {
    name: getattr(MODEL, name)
    for name in ("hidden_size", "num_heads", "puzzle_emb_ndim", "pos_encodings", "forward_dtype", "halt_max_steps")
}
ONE_MODULE = TRMConfig(**_COMMON, puzzle_emb_len=0, H_cycles=2, L_cycles=2, halt_exploration_prob=0.0)
STARTS = replace(ONE_MODULE, starts=3)
LOOPED = TransformerConfig(**_COMMON, num_layers=2, halt_exploration_prob=0.0)
WHOLE_CYCLE = {"arch": replace(MODEL, gradient="last_cycle", L_cycles=2)}
CLIP = 0.05  # below every step's norm


@dataclass(frozen=True)
class Case:
    """A run that must train as one process does with `like`'s options."""

    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    like: dict[str, Any] = field(default_factory=dict)


def shares(processes: int, like: dict[str, Any] | None = None, **parallel: Any) -> Case:
    return Case(processes, {"parallel": ParallelConfig(**parallel), **(like or {})}, like or {})


def recomputes(processes: int, recompute: str, **parallel: Any) -> Case:
    options = {"parallel": ParallelConfig(**parallel), "kernels": KernelsConfig(recompute=recompute)}
    return Case(processes, options | WHOLE_CYCLE, WHOLE_CYCLE)


CASES = {
    "two passes": Case(options={"accumulate": 2}),
    "data 2": shares(2),
    "data 4": shares(4),
    "data 2, buckets": shares(2, bucket_mb=0.1),
    "data 2, one bucket": shares(2, bucket_mb=100),
    "data 2, buckets, two passes": Case(2, {"parallel": ParallelConfig(bucket_mb=0.1), "accumulate": 2}),
    "tensor 2": shares(2, tensor=2),
    "tensor 4": shares(4, tensor=4),
    "tensor 2, data 2": shares(4, tensor=2),
    "pipeline 2": shares(2, pipeline=2),
    "pipeline 2, uneven": shares(2, pipeline=2, micro_batches=3),
    "pipeline 2, data 2, buckets": shares(4, pipeline=2, micro_batches=2, bucket_mb=0.1),
    "pipeline 2, tensor 2": shares(4, pipeline=2, tensor=2, micro_batches=2),
    "fsdp 2": shares(2, fsdp=True),
    "fsdp 4, two passes": Case(4, {"parallel": ParallelConfig(fsdp=True), "accumulate": 2}),
    "fsdp 2, tensor 2": shares(4, fsdp=True, tensor=2),
    "data 2, clipped": shares(2, {"grad_clip": CLIP}),
    "tensor 2, data 2, clipped": shares(4, {"grad_clip": CLIP}, tensor=2),
    "pipeline 2, clipped": shares(2, {"grad_clip": CLIP}, pipeline=2),
    "fsdp 2, tensor 2, clipped": shares(4, {"grad_clip": CLIP}, fsdp=True, tensor=2),
    "TRM, tensor 2": shares(2, {"arch": ONE_MODULE}, tensor=2),
    "TRM, pipeline 2": shares(2, {"arch": ONE_MODULE}, pipeline=2),
    "TRM, fsdp 2": shares(2, {"arch": ONE_MODULE}, fsdp=True),
    "three starts, data 2, two passes": shares(2, {"arch": STARTS, "accumulate": 2}),
    "three starts, pipeline 2, tensor 2": shares(4, {"arch": STARTS}, pipeline=2, tensor=2),
    "looped transformer, pipeline 2, tensor 2": shares(4, {"arch": LOOPED}, pipeline=2, tensor=2),
    "recompute, data 2, buckets": recomputes(2, "module", bucket_mb=0.1),
    "recompute, fsdp 2": recomputes(2, "block", fsdp=True),
    "recompute, tensor 2": recomputes(2, "block", tensor=2),
    "recompute, pipeline 2, tensor 2": recomputes(4, "module", pipeline=2, tensor=2),
    "float32, tensor 2": shares(2, {"arch": replace(MODEL, forward_dtype="float32")}, tensor=2),
    "float32, fsdp 2": shares(2, {"arch": replace(MODEL, forward_dtype="float32")}, fsdp=True),
}


def make_config(pack: Path, **options: Any) -> PretrainConfig:
    # Adam-atan2 would not notice gradients of a wrong scale; AdamW with a large epsilon does.
    options = {"arch": MODEL, "optim": OptimConfig("adamw", eps=0.01), **options}
    return PretrainConfig(
        data_path=str(pack),
        data=DataConfig("latin_squares", str(pack), "none"),
        global_batch_size=8,
        epochs=4,
        eval_interval=None,
        lr=1e-2,
        lr_warmup_steps=2,
        device="cpu",
        **options,
    )


@dataclass(frozen=True)
class Result:
    """What a run left: the curve by metric, and the whole weights by name, before and after."""

    curve: dict[str, list[float]]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


def run(config: PretrainConfig, world: World) -> Result:
    pack = open_pack(config.data_path, "train")
    loader = TrainLoader(pack, config.global_batch_size, 0, world.rank, world.size, epochs_per_pass=config.epochs)
    state = initial_state(config, pack, world)
    initial = {name: x.clone() for name, x in state.shared.gather(state.model.state_dict()).items()}
    step = make_train_step(config, world, state)
    curve: dict[str, list[float]] = {}
    for batch in islice(loader.iterate(0), STEPS):
        for name, value in step(batch).items():
            total = value.double().clone()
            sum_over_ranks([total], world)
            curve.setdefault(name, []).append(total.item())
    own = state.model.state_dict()
    final = state.shared.gather(own)
    for name, part in state.shared.scatter(final).items():
        kept = own[name]
        assert torch.equal(part, kept.to_local() if isinstance(kept, DTensor) else kept), name
    return Result(curve, initial, final)


def run_cases(rank: int, port: int, pack: Path, folder: Path) -> None:
    for attempt, (name, case) in enumerate(CASES.items()):
        if case.processes > 1 and rank < case.processes:
            os.environ |= environment(rank, case.processes, port, attempt)
            config = make_config(pack, **case.options)
            with join_world("cpu", config.parallel, timeout=PATIENCE) as world:
                result = run(config, world)
                places = gather_on_main((world.rank, share_from_main(rank, world)), world)
            if rank == 0:
                assert places == [(place, 0) for place in range(world.size)]
                torch.save(vars(result), folder / name)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    write_pack(folder, train=20, test=6)
    return folder


@pytest.fixture(scope="module")
def results(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases of several processes left, one file each; four processes serve for all."""
    folder = tmp_path_factory.mktemp("results")
    on_ranks(4, run_cases, pack, folder)
    return folder


@pytest.fixture(scope="module")
def alone(pack: Path) -> Callable[[dict[str, Any]], Result]:
    """The run of one process with some options."""
    known: dict[str, Result] = {}

    def reference(options: dict[str, Any]) -> Result:
        if str(options) not in known:
            known[str(options)] = run(make_config(pack, **options), ALONE)
        return known[str(options)]

    return reference


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CASES)
def test_trains_as_one(
    name: str, pack: Path, alone: Callable[[dict[str, Any]], Result], request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    one = alone(case.like)
    if case.processes == 1:
        other = run(make_config(pack, **case.options), ALONE)
    else:
        other = Result(**torch.load(request.getfixturevalue("results") / name, weights_only=True))
    assert other.final.keys() == one.final.keys()
    for weight, start in one.initial.items():
        assert torch.equal(other.initial[weight], start), weight
    # What float32 sums in another order may do: all of forward and backward is in float64 but where a case says so.
    tolerance = 1e-4 if case.like.get("arch", MODEL).forward_dtype == "float64" else 2e-3
    for weight, end in one.final.items():
        moved = (end - one.initial[weight]).abs().max()
        assert (other.final[weight] - end).abs().max() <= tolerance * moved, weight
    for metric, values in one.curve.items():
        assert other.curve[metric] == pytest.approx(values, rel=tolerance / 10), metric


def test_the_runs_compared_are_telling(alone: Callable[[dict[str, Any]], Result]) -> None:
    """Every weight learns, sequences halt and are replaced, and clipping does something."""
    one, clipped = alone({}), alone({"grad_clip": CLIP})
    fixed = {"model.inner.H_init", "model.inner.L_init"}
    assert {name for name in one.final if torch.equal(one.final[name], one.initial[name])} == fixed
    assert 0 < one.curve["count"][2] <= 8
    for name in one.final.keys() - fixed - {"model.inner.puzzle_emb.weights"}:
        moved = (one.final[name] - one.initial[name]).norm()
        assert (one.final[name] - clipped.final[name]).norm() > 0.05 * moved, name


def test_clipping_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for max_norm in (0.5, 100.0):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        ours = [param.grad.clone() for param in params if param.grad is not None]
        expected = torch.nn.utils.clip_grad_norm_(params, max_norm)
        torch.testing.assert_close(clip_gradients(ours[:1], ours[1:], [], max_norm), expected)
        for grad, param in zip(ours, params, strict=True):
            torch.testing.assert_close(grad, param.grad)


def test_a_part_is_of_all_heads_projections(pack: Path) -> None:
    """Process 1 of 2 holds the second half of the heads of q, of k and of v, and gate and up of the same neurons."""
    config = make_config(pack)
    model = initial_state(config, open_pack(config.data_path, "train"), ALONE).model
    block = model.model.inner.H_level.layers[0]
    qkv, gate_up = block.self_attn.qkv_proj.weight.detach(), block.mlp.gate_up_proj.weight.detach()
    o, down = block.self_attn.o_proj.weight.detach(), block.mlp.down_proj.weight.detach()
    world = replace(ALONE, tensor=replace(ALONE.tensor, rank=1, size=2))
    SharedModel(model, ParallelConfig(tensor=2), world)
    half, inner = 16, gate_up.shape[0] // 2
    expected = torch.cat([qkv[start + half : start + 2 * half] for start in (0, 32, 64)])
    assert torch.equal(block.self_attn.qkv_proj.weight, expected)
    assert torch.equal(block.self_attn.o_proj.weight, o[:, half:])
    expected = torch.cat([gate_up[inner // 2 : inner], gate_up[inner + inner // 2 :]])
    assert torch.equal(block.mlp.gate_up_proj.weight, expected)
    assert torch.equal(block.mlp.down_proj.weight, down[:, inner // 2 :])


# --- what cannot be ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tensor": 0}, r"parallel\.tensor=0 is too small"),
        ({"pipeline": 5}, r"parallel\.micro_batches=4 is too small: give at least 5"),
        ({"bucket_mb": -1.0}, r"parallel\.bucket_mb=-1\.0 is too small"),
        ({"fsdp": True, "pipeline": 2}, r"parallel\.fsdp=true cannot be combined with parallel\.pipeline"),
        (
            {"fsdp": True, "cuda_graphs": True},
            r"parallel\.cuda_graphs=true works under data and tensor parallelism only",
        ),
    ],
)
def test_impossible_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        to_typed(ParallelConfig, options, "parallel")


@pytest.mark.parametrize(
    ("arch", "kernels", "parallel", "sentence"),
    [
        ({"num_heads": 1}, {}, {"tensor": 2}, r"arch\.num_heads=1 does not divide over the 2 processes"),
        ({"H_layers": 3}, {}, {"pipeline": 2}, r"H_level\.layers=3 does not divide over the 2 processes"),
        ({}, {"compile": True}, {"tensor": 2}, r"parallel\.tensor=2 needs kernels\.backend=naive without"),
        ({"num_heads": 2}, {"backend": "triton"}, {"tensor": 2}, r"parallel\.tensor=2 needs .*, not triton"),
        ({}, {"fp8": "H"}, {"pipeline": 2}, r"kernels\.fp8=H cannot be used with parallel\.tensor or"),
        ({}, {"chunk": 2}, {"pipeline": 2}, r"kernels\.chunk cannot be used with parallel\.pipeline"),
    ],
)
def test_models_that_cannot_be_shared(
    arch: dict[str, Any], kernels: dict[str, Any], parallel: dict[str, Any], sentence: str
) -> None:
    config = replace(MODEL, forward_dtype="float32", **arch)
    model = build_model(
        config,
        batch_size=8,
        seq_len=16,
        vocab_size=5,
        num_puzzle_identifiers=3,
        kernels=KernelsConfig(**{"backend": "naive", **kernels}),
    )
    axes = {name: replace(ALONE.tensor, size=size) for name, size in parallel.items()}
    with pytest.raises(UserError, match=sentence):
        SharedModel(model, ParallelConfig(**parallel), replace(ALONE, **axes))


def test_batches_that_cannot_be_shared(pack: Path) -> None:
    train_pack = open_pack(pack, "train")
    with pytest.raises(UserError, match=r"accumulate=3 does not divide the 8 sequences of a rank's batch"):
        initial_state(make_config(pack, accumulate=3), train_pack, ALONE)
    config = make_config(pack, parallel=ParallelConfig(pipeline=2, micro_batches=9))
    with pytest.raises(UserError, match=r"parallel\.micro_batches=9 is more than the 8 sequences of a rank's pass"):
        initial_state(config, train_pack, replace(ALONE, pipeline=replace(ALONE.pipeline, size=2)))


def test_muon_needs_whole_matrices() -> None:
    model = build_model(
        MODEL, batch_size=8, seq_len=16, vocab_size=5, num_puzzle_identifiers=3, kernels=KernelsConfig("naive")
    )
    world = replace(ALONE, tensor=replace(ALONE.tensor, size=2))
    divided = SharedModel(model, ParallelConfig(tensor=2), world)
    with pytest.raises(UserError, match=r"optim=muon needs whole matrices, which parallel\.tensor, .* divide"):
        divided.hidden_matrices()


def test_one_process_cannot_share() -> None:
    with (
        pytest.raises(UserError, match=r"parallel\.tensor=2 .* does not divide the 1 process.*--nproc-per-node 2"),
        join_world("cpu", ParallelConfig(tensor=2)),
    ):
        pass


# --- ranks that stop answering ---


def wait_for_the_other(rank: int, port: int, what_happens: str, folder: Path) -> None:
    os.environ |= environment(rank, 2, port)
    wait_for_all(rank, 2, port)
    try:
        with join_world("cpu", timeout=3) as world:
            sum_over_ranks([torch.ones(3)], world)
            if rank == 1 and what_happens == "hangs":
                time.sleep(600)
            if rank == 1 and what_happens == "dies":
                os._exit(1)
            sum_over_ranks([torch.ones(3)], world)
    except UserError as error:
        (folder / f"{what_happens}.{rank}").write_text(str(error))


@pytest.fixture
def two_processes() -> Iterator[Callable[..., list[BaseProcess]]]:
    """Starts two processes, and ends what is left of them."""
    context = get_context("spawn")  # type: ignore[no-untyped-call]
    started: list[BaseProcess] = []

    def start(work: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
        for rank in range(2):
            started.append(context.Process(target=on_rank, args=(rank, work, *arguments)))
            started[-1].start()
        return started

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("what_happens", ["hangs", "dies"])
def test_a_rank_that_stops_answering_is_named(
    what_happens: str, tmp_path: Path, two_processes: Callable[..., list[BaseProcess]]
) -> None:
    store = meeting()
    first, _ = two_processes(wait_for_the_other, store.port, what_happens, tmp_path)
    first.join(timeout=PATIENCE)
    assert first.exitcode == 0
    assert "rank 1 of 2 hung or ended: no answer in dist_timeout=3 s" in (tmp_path / f"{what_happens}.0").read_text()


# --- GPUs ---


def run_on_gpus(rank: int, port: int, parallel: ParallelConfig, kernels: KernelsConfig, pack: Path, file: Path) -> None:
    os.environ |= environment(rank, 2, port)
    config = make_config(pack, parallel=parallel, kernels=kernels)
    with join_world("cuda", parallel, timeout=PATIENCE) as world:
        result = run(config, world)
        dist.barrier()
    if rank == 0:
        torch.save(
            {name: {key: x.cpu() for key, x in getattr(result, name).items()} for name in ("initial", "final")}, file
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(
    ("parallel", "graphed"),
    [
        ({"cuda_graphs": False}, True),
        ({"bucket_mb": 0.1, "cuda_graphs": False}, True),
        ({"tensor": 2}, False),
        ({"pipeline": 2}, False),
        ({"fsdp": True}, False),
        ({}, True),
        ({"bucket_mb": 0.1}, True),
        ({"tensor": 2}, True),
    ],
    ids=str,
)
def test_two_gpus_train_as_one_cpu(
    parallel: dict[str, Any], graphed: bool, pack: Path, tmp_path: Path, alone: Callable[[dict[str, Any]], Result]
) -> None:
    one, file = alone({}), tmp_path / "result"
    on_ranks(2, run_on_gpus, ParallelConfig(**parallel), KernelsConfig(cuda_graphs=graphed), pack, file)
    other = torch.load(file, weights_only=True)
    for weight, end in one.final.items():
        moved = (end - one.initial[weight]).abs().max()
        assert (other["final"][weight] - end).abs().max() <= 1e-4 * moved, weight
