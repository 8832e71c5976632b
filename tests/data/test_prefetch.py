"""Batches on their way to the device: all of them, in order, none too early and none overwritten while it is used."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hrm.batch import Batch
from hrm.data.loader import TrainLoader
from hrm.data.prefetch import on_device
from tests.helpers.entry_points import TINY_RUN, make_pack, train
from tests.helpers.training import no_waiting

NUM_BATCHES, SHAPE = 200, (64, 1024)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def numbered(count: int, read: list[int]) -> Iterator[Batch]:
    """Batches that hold their own number, noted in `read` when they are read; then one that fails."""
    for number in range(count):
        read.append(number)
        yield {
            "inputs": torch.full(SHAPE, number, dtype=torch.int32),
            "puzzle_identifiers": torch.arange(number, number + SHAPE[0], dtype=torch.int32),
        }
    raise OSError("the disk is gone")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device(request.param)


def test_as_read(device: torch.device) -> None:
    """In order, read only when asked for; what the loader raises comes where the batch would have come."""
    read: list[int] = []
    batches = on_device(numbered(5, read), device)
    assert read == []
    for number in range(5):
        batch = next(batches)
        assert read == list(range(number + 1))
        assert {field.device.type for field in batch.values()} == {device.type}
        assert (batch["inputs"] == number).all()
        assert batch["puzzle_identifiers"].tolist() == list(range(number, number + SHAPE[0]))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(on_device([], device)) == []


def test_waiting_for_the_loader_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the loop waits for a batch, nothing is lost on the way to the device."""
    iterate, pause, batch_size = TrainLoader.iterate, 0.1, 4

    def slowly(self: TrainLoader, pass_index: int, start_batch: int = 0) -> Iterator[Batch]:
        for batch in iterate(self, pass_index, start_batch):
            time.sleep(pause)
            yield batch

    monkeypatch.setattr(TrainLoader, "iterate", slowly)
    make_pack(tmp_path / "pack")
    train(*TINY_RUN, f"data_path={tmp_path / 'pack'}", f"checkpoint_path={tmp_path / 'run'}", "log_interval=2")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    windows = [record for record in map(json.loads, lines) if "data_wait" in record]
    ends = [record["step"] for record in windows]
    assert ends == [1, 2, 3, 4, 6]
    for record, steps in zip(windows, [end - start for start, end in itertools.pairwise([0, *ends])], strict=True):
        seconds = steps * batch_size / record["puzzles_per_second"]
        assert steps * pause <= record["data_wait"] * seconds * 1.001


# --- on a GPU ---


def pinned() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randint(1000, SHAPE, dtype=torch.int32, generator=generator) for _ in range(NUM_BATCHES))
    return [{"inputs": inputs.pin_memory(), "labels": (-inputs).pin_memory()} for inputs in numbers]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_busy_device() -> None:
    """The host runs far ahead of the steps that use its batches, and waits for nothing; none is spoilt."""
    device, batches, used = torch.device("cuda"), pinned(), []
    for number, batch in enumerate(on_device(batches, device)):
        with no_waiting() if number > 2 else nullcontext():
            torch.cuda._sleep(1_000_000)  # cycles, longer than a copy
            used.append({name: field.clone() for name, field in batch.items()})
    assert len(used) == NUM_BATCHES
    for ours, expected in zip(used, batches, strict=True):
        assert all(torch.equal(ours[name].cpu(), expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_asking_waits_for_nothing() -> None:
    """Also between the batches: reading, copying and handing over make no host wait."""
    batches = on_device(pinned(), torch.device("cuda"))
    for _ in range(3):
        next(batches)
    with no_waiting():
        torch.cuda._sleep(1_000_000)
        assert len(list(batches)) == NUM_BATCHES - 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_copies_beside_the_step_before() -> None:
    """A batch is there, for a third stream to see, while the computing stream has long to go."""
    device, on_host = torch.device("cuda"), pinned()
    batches = on_device(on_host, device)
    for _ in range(4):
        next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    step_before = torch.cuda.Event()
    step_before.record()
    batch = next(batches)
    time.sleep(0.1)
    with torch.cuda.stream(torch.cuda.Stream()):
        seen = batch["inputs"].cpu()
    assert not step_before.query()
    assert torch.equal(seen, on_host[4]["inputs"])
    torch.cuda.synchronize()
