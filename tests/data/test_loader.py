"""The loader: what an epoch draws, and that seed, ranks, workers and restarts never change it.

Packs here are written so that a batch tells what it holds: the four tokens of an input are the decimal digits of the
example's number, and every puzzle has an identifier of its own, its number plus one.
"""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.batch import Batch
from hrm.data.loader import EvalLoader, TrainLoader
from hrm.data.pack import Pack, PackMetadata, PackSet, open_pack, write_split
from hrm.errors import UserError

Groups = Sequence[Sequence[int]]  # examples of every puzzle of every group

SINGLE: Groups = [[1]] * 23
ARC_LIKE: Groups = [[3, 3, 2], [1], [4, 2], [2, 2, 2, 5], [3], [1, 2], [6, 1], [2]]

DIGITS = np.array([1000, 100, 10, 1])
PAD_ID, BLANK_ID, IGNORED = 9, 0, 7


def numbered_set(groups: Groups, first: int = 0) -> PackSet:
    sizes = [size for group in groups for size in group]
    tokens = ((np.arange(first, first + sum(sizes))[:, None] // DIGITS) % 10).astype(np.uint8)
    return PackSet(
        inputs=tokens,
        labels=tokens[:, ::-1],
        puzzle_identifiers=np.arange(1, len(sizes) + 1, dtype=np.int32),
        puzzle_indices=np.cumsum([0, *sizes], dtype=np.int32),
        group_indices=np.cumsum([0, *map(len, groups)], dtype=np.int32),
    )


def write_numbered(folder: Path, sets: dict[str, PackSet], ignore_label_id: int | None = IGNORED) -> Pack:
    puzzles = [len(data.puzzle_identifiers) for data in sets.values()]
    metadata = PackMetadata(
        pad_id=PAD_ID,
        ignore_label_id=ignore_label_id,
        blank_identifier_id=BLANK_ID,
        vocab_size=10,
        seq_len=4,
        num_puzzle_identifiers=max(puzzles) + 1,
        total_groups=sum(len(data.group_indices) - 1 for data in sets.values()),
        mean_puzzle_examples=sum(len(data.inputs) for data in sets.values()) / sum(puzzles),
        sets=tuple(sets),
    )
    write_split(folder / "train", metadata, sets)
    return open_pack(folder, "train")


def make_pack(folder: Path, groups: Groups) -> Pack:
    return write_numbered(folder, {"all": numbered_set(groups)})


@pytest.fixture(params=[SINGLE, ARC_LIKE], ids=["single", "arc-like"])
def pack(request: pytest.FixtureRequest, tmp_path: Path) -> Pack:
    return make_pack(tmp_path, request.param)


def examples_of(batch: Batch) -> list[int]:
    return (batch["inputs"].numpy() @ DIGITS).tolist()


def puzzles_of(batch: Batch) -> list[int]:
    return (batch["puzzle_identifiers"].numpy() - 1).tolist()


def assert_same_stream(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for field in one:
            assert torch.equal(one[field], other[field]), field


def stack_ranks(parts: Iterable[Batch]) -> Batch:
    parts = list(parts)
    return {field: torch.cat([part[field] for part in parts]) for field in parts[0]}


def visits_of(batches: Iterable[Batch], groups: Groups) -> list[int]:
    """The groups visited, in order, after checking that each visit takes what it should."""
    offsets = np.cumsum([0, *(size for group in groups for size in group)])
    group_of = [number for number, group in enumerate(groups) for _ in group]
    visited = []
    for batch in batches:
        examples, puzzles = examples_of(batch), puzzles_of(batch)
        at = 0
        while at < len(examples):
            puzzle = puzzles[at]
            low, high = offsets[puzzle], offsets[puzzle + 1]
            taken = examples[at : at + high - low]  # a slice of the batch, so cut where the batch ends
            assert puzzles[at : at + len(taken)] == [puzzle] * len(taken)
            assert all(low <= example < high for example in taken)
            assert len(set(taken)) == len(taken)
            visited.append(group_of[puzzle])
            at += len(taken)
    return visited


# --- what a training pass draws ---


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=12),
    batch_size=st.integers(1, 16),
    spare_epochs=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_visits_every_group_once(groups: Groups, batch_size: int, spare_epochs: int, seed: int) -> None:
    smallest = sum(min(group) for group in groups)
    epochs = -(-batch_size // smallest) + spare_epochs
    with tempfile.TemporaryDirectory() as folder:
        pack = make_pack(Path(folder), groups)
        batches = list(TrainLoader(pack, batch_size, seed, epochs_per_pass=epochs).iterate(0))
    assert all(len(batch["inputs"]) == batch_size for batch in batches)
    visited = visits_of(batches, groups)
    for start in range(0, len(visited), len(groups)):
        epoch = visited[start : start + len(groups)]
        assert len(set(epoch)) == len(epoch)
    # Only a remainder too short for one more batch is dropped.
    assert len(visited) <= epochs * len(groups)
    last_epoch = visited[len(visited) - len(visited) % len(groups) :]
    whole_epochs_left = epochs - -(-len(visited) // len(groups))
    rest_of_last = sum(min(group) for number, group in enumerate(groups) if number not in last_epoch)
    left = whole_epochs_left * smallest + (rest_of_last if last_epoch else 0)
    assert left < batch_size


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 1), (5, 1), (5, 3), (23, 2), (40, 2), (46, 2)])
def test_short_last_batch_is_dropped(tmp_path: Path, batch_size: int, epochs: int) -> None:
    loader = TrainLoader(make_pack(tmp_path, SINGLE), batch_size, seed=0, epochs_per_pass=epochs)
    assert len(list(loader.iterate(0))) == 23 * epochs // batch_size


def test_batches_run_on_over_epochs(tmp_path: Path) -> None:
    loader = TrainLoader(make_pack(tmp_path, SINGLE), 5, seed=0, epochs_per_pass=5)
    drawn = [example for batch in loader.iterate(0) for example in examples_of(batch)]
    for epoch in range(5):
        assert sorted(drawn[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert drawn[:23] != drawn[23:46]


def test_draws_are_uniform(tmp_path: Path) -> None:
    """Puzzle within group, example within a cut puzzle and order of groups; five standard deviations of slack."""
    epochs = 4000
    loader = TrainLoader(make_pack(tmp_path, [[4, 4, 4, 4], [1]]), 1, seed=3, epochs_per_pass=epochs)
    stream = list(loader.iterate(0))
    drawn = np.array([examples_of(batch)[0] for batch in stream])
    assert len(drawn) == 2 * epochs

    counts = np.bincount(drawn[drawn < 16], minlength=16)  # a batch of one cuts every puzzle of the first group
    expected = epochs / 16
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected * 15 / 16))
    first_of_epoch = np.count_nonzero(drawn[::2] < 16)
    assert abs(first_of_epoch - epochs / 2) < 5 * np.sqrt(epochs / 4)


def test_examples_of_a_puzzle_come_in_random_order(tmp_path: Path) -> None:
    loader = TrainLoader(make_pack(tmp_path, [[3]]), 3, seed=0, epochs_per_pass=600)
    orders = [tuple(examples_of(batch)) for batch in loader.iterate(0)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert all(abs(count - 100) < 5 * np.sqrt(100 * 5 / 6) for count in counts)


def test_sets_come_in_turn(tmp_path: Path) -> None:
    pack = write_numbered(tmp_path, {"one": numbered_set([[1]] * 7), "two": numbered_set([[2]] * 5, first=100)})
    batches = list(TrainLoader(pack, 3, seed=0).iterate(0))
    drawn = [examples_of(batch) for batch in batches]
    assert len(drawn) == 2 + 2  # one drops its seventh example; two cuts its second and fourth puzzle, drops its fifth
    assert all(example < 7 for examples in drawn[:2] for example in examples)
    assert all(100 <= example < 110 for examples in drawn[2:] for example in examples)


@pytest.mark.parametrize("ignore_label_id", [IGNORED, None])
def test_fields(tmp_path: Path, ignore_label_id: int | None) -> None:
    data = numbered_set([[1]] * 100)
    pack = write_numbered(tmp_path, {"all": data}, ignore_label_id)
    (batch,) = TrainLoader(pack, 100, seed=0).iterate(0)
    assert {field: (value.dtype, tuple(value.shape)) for field, value in batch.items()} == {
        "inputs": (torch.int32, (100, 4)),
        "labels": (torch.int32, (100, 4)),
        "puzzle_identifiers": (torch.int32, (100,)),
    }
    rows = examples_of(batch)
    expected = data.labels[rows].astype(int)
    assert np.any(expected == IGNORED)
    if ignore_label_id is not None:
        expected[expected == IGNORED] = -100
    np.testing.assert_array_equal(batch["labels"].numpy(), expected)
    np.testing.assert_array_equal(batch["inputs"].numpy(), data.inputs[rows])
    np.testing.assert_array_equal(puzzles_of(batch), rows)


# --- what must not change the stream ---


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_tile_the_global_batch(pack: Pack, world_size: int) -> None:
    whole = TrainLoader(pack, 8, seed=5, epochs_per_pass=4).iterate(1)
    parts = [
        TrainLoader(pack, 8, seed=5, rank=rank, world_size=world_size, epochs_per_pass=4).iterate(1)
        for rank in range(world_size)
    ]
    assert_same_stream(whole, map(stack_ranks, zip(*parts, strict=True)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # where there are fewer cores
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers(tmp_path: Path, num_workers: int) -> None:
    pack = make_pack(tmp_path, ARC_LIKE)
    alone = TrainLoader(pack, 4, seed=5, epochs_per_pass=3).iterate(0)
    helped = TrainLoader(pack, 4, seed=5, epochs_per_pass=3, num_workers=num_workers).iterate(0)
    assert_same_stream(alone, helped)
    alone_eval, helped_eval = EvalLoader(pack, 5), EvalLoader(pack, 5, num_workers=num_workers)
    assert [(name, count) for name, _, count in alone_eval] == [(name, count) for name, _, count in helped_eval]
    assert_same_stream((batch for _, batch, _ in alone_eval), (batch for _, batch, _ in helped_eval))


def test_seed_and_pass_decide_the_stream(pack: Pack) -> None:
    def stream(seed: int, pass_index: int) -> list[list[int]]:
        return [examples_of(batch) for batch in TrainLoader(pack, 8, seed, epochs_per_pass=4).iterate(pass_index)]

    streams = [stream(0, 0), stream(0, 1), stream(1, 0), stream(1, 1), stream(2**40, 0)]
    assert streams[0] == stream(0, 0)
    assert all(one != other for number, one in enumerate(streams) for other in streams[:number])


def test_a_pass_does_not_depend_on_earlier_ones(pack: Pack) -> None:
    running = TrainLoader(pack, 8, seed=5, epochs_per_pass=4)
    list(running.iterate(0))
    next(running.iterate(1))  # left half-way
    assert_same_stream(running.iterate(2), TrainLoader(pack, 8, seed=5, epochs_per_pass=4).iterate(2))


def test_start_batch_skips(pack: Pack) -> None:
    loader = TrainLoader(pack, 4, seed=5, epochs_per_pass=4)
    whole = list(loader.iterate(0))
    for start in (0, 1, len(whole) - 1):
        assert_same_stream(whole[start:], loader.iterate(0, start_batch=start))
    assert list(loader.iterate(0, start_batch=len(whole))) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_generators_are_left_alone(tmp_path: Path, num_workers: int) -> None:
    pack = make_pack(tmp_path, ARC_LIKE)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    next(TrainLoader(pack, 4, seed=0, num_workers=num_workers).iterate(0))
    next(iter(EvalLoader(pack, 4, num_workers=num_workers)))
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


# --- evaluation ---


@pytest.mark.parametrize("groups", [SINGLE, ARC_LIKE], ids=["single", "arc-like"])
@pytest.mark.parametrize("batch_size", [4, 12, 24, 64])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_covers_all_in_order(tmp_path: Path, groups: Groups, batch_size: int, world_size: int) -> None:
    pack = make_pack(tmp_path, groups)
    sizes = [size for group in groups for size in group]
    total = sum(sizes)
    puzzle_of = [puzzle for puzzle, size in enumerate(sizes) for _ in range(size)]

    ranks = [EvalLoader(pack, batch_size, rank, world_size) for rank in range(world_size)]
    examples, puzzles = [], []
    steps = list(zip(*ranks, strict=True))
    for step in steps:
        assert {len(batch["inputs"]) for _, batch, _ in step} == {batch_size // world_size}
        ((name, count),) = {(name, count) for name, _, count in step}
        assert name == "all"
        batch = stack_ranks(batch for _, batch, _ in step)
        examples += examples_of(batch)[:count]
        puzzles += puzzles_of(batch)[:count]
        assert torch.all(batch["inputs"][count:] == PAD_ID)
        assert torch.all(batch["labels"][count:] == -100)
        assert torch.all(batch["puzzle_identifiers"][count:] == BLANK_ID)
    assert examples == list(range(total))
    assert puzzles == puzzle_of
    assert len(steps) == len(ranks[0]) == -(-total // batch_size)


def test_evaluation_of_two_sets(tmp_path: Path) -> None:
    pack = write_numbered(tmp_path, {"one": numbered_set([[1]] * 7), "two": numbered_set([[2]] * 2, first=100)})
    seen = [(name, examples_of(batch)[:count], count) for name, batch, count in EvalLoader(pack, 4)]
    assert seen == [
        ("one", [0, 1, 2, 3], 4),
        ("one", [4, 5, 6], 3),
        ("two", [100, 101, 102, 103], 4),
    ]
    assert len(EvalLoader(pack, 4)) == 3


# --- what cannot work ---


@pytest.mark.parametrize("loader", [TrainLoader, EvalLoader])
def test_batch_must_divide_over_ranks(tmp_path: Path, loader: type[TrainLoader] | type[EvalLoader]) -> None:
    pack = make_pack(tmp_path, SINGLE)
    arguments = {"seed": 0} if loader is TrainLoader else {}
    for size in (0, -4):
        with pytest.raises(UserError, match=rf"^global_batch_size={size} is not positive; choose 1 or more\.$"):
            loader(pack, size, **arguments)
    for size, near in ((10, 8), (3, 4)):
        said = rf"^global_batch_size={size} does not divide over 4 processes; choose a multiple of 4, such as {near}\.$"
        with pytest.raises(UserError, match=said):
            loader(pack, size, rank=0, world_size=4, **arguments)


def test_pass_must_fill_a_batch(tmp_path: Path) -> None:
    single = make_pack(tmp_path / "single", SINGLE)
    said = (
        "may give only 46 examples in a pass of 2 epochs, fewer than global_batch_size=47; lower global_batch_size or"
    )
    with pytest.raises(UserError, match=said):
        TrainLoader(single, 47, seed=0, epochs_per_pass=2)
    # With puzzles of unlike size it is their smallest that count: no pass may come out empty by bad luck.
    several = make_pack(tmp_path / "several", [[5, 1], [2, 3]])
    with pytest.raises(UserError, match="may give only 3 examples in a pass of 1 epochs"):
        TrainLoader(several, 4, seed=0)
    assert all(next(TrainLoader(several, 3, seed=seed).iterate(0)) for seed in range(20))


def test_seed_must_not_be_negative(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^seed=-1 is negative; choose 0 or more\.$"):
        TrainLoader(make_pack(tmp_path, SINGLE), 4, seed=-1)
