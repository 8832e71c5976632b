"""A batch divided among cores: the same numbers as whole, whatever happens in one of the parts."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.config import KernelsConfig, kernels_config
from hrm.kernels import KernelRequest, cores, describe, resolve
from hrm.kernels.context import KernelContext
from hrm.kernels.schedule import Schedule, States, Update
from hrm.models import ACTLossHead
from hrm.openmp import share_cores
from tests.helpers.models import build, gradients, random_states, randomised

RandomBatch = Callable[..., Batch]
BATCH = 7  # no multiple of anything


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of tiny models are divided too."""
    monkeypatch.setattr(cores, "_LEAST_ROWS", 1)
    monkeypatch.setattr(cores, "_LEAST_PRODUCTS", 1)


def trained_step(model: ACTLossHead, batch: Batch) -> dict[str, Tensor]:
    """Two training steps' worth of forward passes and a backward pass: all that comes out."""
    carry = model.initial_carry(batch)
    for _ in range(2):
        carry, loss, _, outputs, _ = model(carry=carry, batch=batch, return_keys=["logits", "target_q_continue"])
    loss.backward()
    return {"loss": loss.detach(), **outputs, **carry.states, **gradients(model)}


@pytest.mark.parametrize(
    ("options", "recompute"),
    [
        ({}, "none"),
        ({}, "block"),
        ({"gradient": "all", "H_cycles": 3}, "module"),
        ({"mlp_t": True, "pos_encodings": "learned"}, "none"),
        ({"gate": "sigmoid_rms", "attention_norm": True}, "none"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_parts")
def test_by_core_changes_nothing(
    options: dict[str, Any],
    recompute: str,
    tiny_arch: dict[str, Any],
    random_batch: RandomBatch,
    threads: Callable[[int], None],
) -> None:
    """Forward and backward, of weights, embeddings and rows of the puzzle table."""
    arch, batch = tiny_arch | {"forward_dtype": "float64", "H_layers": 2} | options, random_batch(batch_size=BATCH)
    whole, divided = (
        randomised(build(arch, kernels={"by_core": by_core, "recompute": recompute})).double()
        for by_core in (False, True)
    )
    expected = trained_step(whole, batch)
    threads(2)
    found = trained_step(divided, batch)
    assert len(cores.parts_of(random_states(divided, batch)["z_H"])) == 4
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.usefixtures("small_parts")
def test_the_same_numbers_each_time(
    tiny_arch: dict[str, Any], random_batch: RandomBatch, threads: Callable[[int], None]
) -> None:
    """Which core takes which part is chance; what comes out is not."""
    threads(3)
    batch = random_batch(batch_size=BATCH)
    seen = [trained_step(randomised(build(tiny_arch)), batch) for _ in range(5)]
    assert all(torch.equal(again[name], seen[0][name]) for again in seen for name in seen[0])
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("small_parts")
def test_frozen_weights_get_no_gradient(
    tiny_arch: dict[str, Any], random_batch: RandomBatch, threads: Callable[[int], None]
) -> None:
    threads(2)
    model, batch = randomised(build(tiny_arch)), random_batch(batch_size=BATCH)
    stack = model.model.inner.stacks["H_level"]
    stack.requires_grad_(False)
    _, loss, *_ = model(carry=model.initial_carry(batch), batch=batch, return_keys=[])
    loss.backward()
    assert all(parameter.grad is None for parameter in stack.parameters())
    assert all(parameter.grad is not None for parameter in model.model.inner.stacks["L_level"].parameters())


def test_gradient_mode_is_that_of_the_caller(threads: Callable[[int], None]) -> None:
    """Modes are a thread's own, so helpers must be given them."""
    threads(2)
    both_began = threading.Event()
    seen = {}

    def work(part: slice) -> None:
        seen[part.start] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), threading.get_ident())
        if len(seen) == 2:
            both_began.set()
        both_began.wait(10)  # so that each thread gets one

    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        seen.clear()
        both_began.clear()
        with mode:
            expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            cores._each(work, [slice(0, 1), slice(1, 2)])
        assert [found[:2] for found in seen.values()] == [expected] * 2
        assert len({thread for *_, thread in seen.values()}) == 2


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_in_a_part_is_the_callers(bad: int, threads: Callable[[int], None]) -> None:
    threads(2)

    def work(part: slice) -> None:
        if part.start == bad:
            raise ValueError(f"part {bad}")

    with pytest.raises(ValueError, match=f"part {bad}"):
        cores._each(work, [slice(start, start + 1) for start in range(4)])
    assert torch.get_num_threads() == 2
    done: list[int] = []
    cores._each(lambda part: done.append(part.start), [slice(0, 1), slice(1, 2)])
    assert sorted(done) == [0, 1]


def test_several_callers(threads: Callable[[int], None]) -> None:
    """Programs that answer in threads of their own: each gets its result, and the number of threads stays."""
    threads(2)
    results: dict[int, list[int]] = {}

    def caller(number: int) -> None:
        torch.set_num_threads(2)
        done: list[int] = []
        cores._each(lambda part: done.append(number * 10 + part.start), [slice(i, i + 1) for i in range(5)])
        results[number] = sorted(done)

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert results == {number: [number * 10 + i for i in range(5)] for number in range(4)}
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_in_a_child_process() -> None:
    """Helpers do not live on in a fork: it gets its own."""
    code = """
import os, torch
from hrm.kernels import cores
torch.set_num_threads(2)
parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
cores._each(lambda part: None, parts)
if (child := os.fork()) == 0:
    done = []
    cores._each(lambda part: done.append(part.start), parts)
    os._exit(0 if sorted(done) == [0, 1, 2] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize(
    ("number", "shape", "sizes"),
    [
        (1, (100, 80, 512), [10] * 10),  # 0.94 MiB of gates and ups for a sequence in float32
        (1, (21, 80, 512), [11, 10]),
        (1, (10, 80, 512), [10]),
        (1, (2, 5000, 512), [1, 1]),
        (1, (128, 17, 128), [128]),
        (2, (16, 82, 512), [4] * 4),  # two for each core
        (2, (8, 82, 512), [4, 4]),  # one, for two would have too few tokens
        (2, (3, 82, 512), [3]),  # too few for two cores
        (2, (3, 900, 64), [2, 1]),
        (2, (64, 82, 128), [16] * 4),
        (2, (1, 900, 512), [1]),
        (2, (0, 80, 512), []),
        (4, (64, 82, 128), [8] * 8),
        (9, (64, 82, 128), [32, 32]),  # as with one: that many would wait for Python
    ],
)
def test_parts(number: int, shape: tuple[int, int, int], sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    parts = cores.parts_of(torch.empty(shape, device="meta"))
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(sizes))]


def test_a_schedule_divided_keeps_what_it_does_not_replace() -> None:
    found: list[int] = []

    def run(states: States, schedule: Schedule, modules: Any, context: KernelContext) -> dict[str, Tensor]:
        assert len({len(state) for state in states.values()}) == 1
        found.append(len(states["constant"]))
        return {name: state + (name == "one") for name, state in states.items()}

    states = {name: torch.zeros(5, 2, 3) for name in ("one", "constant")}
    schedule = [Update("one", ("constant",), "module")]
    new = cores.run_by_core(run, 2)(states, schedule, {}, KernelContext(None, 1, 1e-5))
    assert found == [2, 2, 1]
    assert new["constant"] is states["constant"]
    assert bool((new["one"] == 1).all())
    assert not states["one"].any()
    assert cores.run_by_core(run)(states, [], {}, KernelContext(None, 1, 1e-5)) == states


def test_where_it_is_the_choice() -> None:
    """On CPUs, for backends that cores can share, unless it is not wanted; the kernels line says it."""
    on_cpu = KernelRequest(torch.device("cpu"), torch.float32, 64)
    assert resolve(kernels_config("auto"), on_cpu).by_core
    assert "by_core" in describe(resolve(kernels_config("naive"), on_cpu))
    assert not resolve(KernelsConfig("naive", by_core=False), on_cpu).by_core
    assert not resolve(KernelsConfig("naive", compile=True), on_cpu).by_core
    assert not resolve(kernels_config("naive"), on_cpu._replace(device=torch.device("cuda"))).by_core


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_waiting_is_set_where_nobody_chose(given: dict[str, str], expected: dict[str, str]) -> None:
    share_cores(given)
    assert given == expected


def test_waiting_is_set_before_pytorch_is_loaded() -> None:
    code = "import sys, os, hrm; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT",)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1000", "False"], done.stderr
