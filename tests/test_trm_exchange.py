"""TRM's own code and ours exchange packs and checkpoints, both ways, with equal metrics; its builders make our packs.

Skipped without its code: TRM_CHECKOUT names a checkout of github.com/SamsungSAILMontreal/TinyRecursiveModels. It needs
einops.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hrm.data.pack import open_pack
from hrm.tasks.arc import split_name
from tests.helpers.entry_points import ROOT, run_script
from tests.helpers.training import write_identified_pack

CHECKOUT = os.environ.get("TRM_CHECKOUT", "")
NAMES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")

pytestmark = pytest.mark.skipif(not Path(CHECKOUT, "puzzle_dataset.py").is_file(), reason="TRM_CHECKOUT is not set")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_identified_pack(tmp_path_factory.mktemp("exchange") / "pack", puzzles=5)


def run_there(helper: str, *arguments: object) -> str:
    """What a helper prints that runs TRM's code."""
    elsewhere = [path for path in sys.path if path and Path(path) != ROOT]  # our `dataset` would hide theirs
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([CHECKOUT, *elsewhere])}
    command = [sys.executable, "-P", str(ROOT / "tests/helpers" / helper), *map(str, arguments)]
    process = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def theirs(*arguments: object) -> dict[str, float]:
    """The metrics that TRM's code prints."""
    pytest.importorskip("einops")
    metrics: dict[str, float] = json.loads(run_there("trm_side.py", *arguments).splitlines()[-1])
    return metrics


def ours(*options: str) -> dict[str, float]:
    """The metrics that evaluate.py prints."""
    outcome = run_script("evaluate.py", "device=cpu", "kernels=naive", *options)
    assert outcome.status == 0, outcome.err
    return {name: float(value) for name, value in re.findall(r"all/(\S+) +([\d.]+)$", outcome.out, re.MULTILINE)}


def test_their_checkpoint_of_our_pack_evaluates_here_without_options(pack: Path, tmp_path: Path) -> None:
    there = theirs("train", pack, tmp_path / "run", 20)
    here = ours(f"checkpoint={tmp_path / 'run'}")
    assert {name: here[name] for name in NAMES} == pytest.approx({name: there[name] for name in NAMES}, abs=1e-4)
    assert 0 < here["accuracy"] < 1


def test_our_checkpoint_evaluates_there(pack: Path, tmp_path: Path) -> None:
    arch = "H_cycles=2 L_cycles=2 L_layers=2 hidden_size=32 num_heads=2 puzzle_emb_len=2 halt_max_steps=3"
    outcome = run_script(
        "pretrain.py",
        *("arch=trm", *(f"arch.{option}" for option in arch.split()), "arch.forward_dtype=float32"),
        *(f"data_paths=[{pack}]", "evaluators=[]", "+run_name=exchange", "ema=True", "lr=1e-3", "puzzle_emb_lr=0.1"),
        *(
            "lr_warmup_steps=1",
            "epochs=10",
            "eval_interval=5",
            "global_batch_size=6",
            f"checkpoint_path={tmp_path / 'run'}",
        ),
        *("device=cpu", "kernels=naive", "wandb=disabled"),
    )
    assert outcome.status == 0, outcome.err
    for name in ("step_20", "step_20_ema"):
        here = ours(f"checkpoint={tmp_path / 'run' / name}")
        there = theirs("evaluate", pack, tmp_path / "run" / name)
        assert {name: here[name] for name in NAMES} == pytest.approx({name: there[name] for name in NAMES}, abs=1e-4)


def test_training_goes_on_here_from_their_checkpoint(pack: Path, tmp_path: Path) -> None:
    """By the options that their code has for it, with a table of another size."""
    theirs("train", pack, tmp_path / "run", 4)
    other = write_identified_pack(tmp_path / "other", puzzles=3)
    arch = "H_cycles=2 L_cycles=2 hidden_size=32 num_heads=2 puzzle_emb_len=2 halt_max_steps=3"
    outcome = run_script(
        "pretrain.py",
        *("arch=trm", *(f"arch.{option}" for option in arch.split()), "arch.forward_dtype=float32"),
        *(f"data_paths=[{other}]", f"load_checkpoint={tmp_path / 'run' / 'step_4'}", "freeze_weights=True"),
        *("epochs=2", "eval_interval=1", "global_batch_size=6", f"checkpoint_path={tmp_path / 'tuned'}"),
        *("device=cpu", "kernels=naive", "wandb=disabled"),
    )
    assert outcome.status == 0, outcome.err
    assert "Puzzle table: 4 rows, each the mean of the 6 there." in outcome.out
    assert "All options of arch are as it had them." in outcome.out


Grids = tuple[tuple[tuple[int, ...], ...], ...]


def arc_puzzles(folder: Path, split: str) -> dict[str, list[Grids]]:
    """By puzzle identifier, the pairs of grids of a puzzle, in order, before augmentation and translation."""
    data, names = open_pack(folder, split).sets["all"], json.loads((folder / "identifiers.json").read_text())
    puzzles = {}
    for puzzle, identifier in enumerate(data.puzzle_identifiers.tolist()):
        _, augmentation = split_name(names[identifier])
        pairs = []
        for row in range(*data.puzzle_indices[puzzle : puzzle + 2]):
            squares = [tokens[row].reshape(30, 30) for tokens in (data.inputs, data.labels)]
            grids = [square[(square > 1).any(1)][:, (square > 1).any(0)] - 2 for square in squares]
            pairs.append(tuple(tuple(map(tuple, augmentation.undo(grid.astype(np.uint8)).tolist())) for grid in grids))
        assert names[identifier] not in puzzles
        puzzles[names[identifier]] = pairs
    return puzzles


def test_arc_packs_of_both_builders_mean_the_same(tmp_path: Path) -> None:
    """The same tasks, pairs and numbers of augmentations in the same splits, from the same options."""
    rng = np.random.default_rng(0)
    for subset, count in {"training": 3, "evaluation": 2, "concept": 2}.items():
        tasks, solutions = {}, {}
        for number in range(count):
            name = f"{subset[:2]}{number:06x}"
            grids = rng.integers(10, size=(4, 2, 3, 5)).tolist()  # larger ones would have no place to move to
            pairs = [{"input": first, "output": second} for first, second in grids]
            tasks[name] = {"train": pairs[:3], "test": [{"input": pairs[3]["input"]}]}
            solutions[name] = [pairs[3]["output"]]
        (tmp_path / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(tasks))
        (tmp_path / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(solutions))
    options = {
        "input_file_prefix": str(tmp_path / "arc-agi"),
        "subsets": ["training", "evaluation", "concept"],
        "test_set_name": "evaluation",
        "num_aug": 7,
        "puzzle_identifiers_start": 3,
    }
    run_there("trm_builders.py", "dataset.build_arc_dataset", json.dumps(options | {"output_dir": str(tmp_path / "a")}))
    typed = [
        ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
        for name, value in options.items()
    ]
    command = [str(word) for words in typed for word in words]
    outcome = run_script("dataset/build_arc_dataset.py", *command, "--output-dir", str(tmp_path / "b"))
    assert outcome.status == 0, outcome.err
    packs = [tmp_path / name for name in "ab"]
    for split in ("train", "test"):
        one, other = (open_pack(folder, split) for folder in packs)
        assert one.metadata == other.metadata
        there, here = (arc_puzzles(folder, split) for folder in packs)
        originals = [name for name in there if "|||" not in name]
        assert set(originals) == {name for name in here if "|||" not in name}
        assert all(there[name] == here[name] for name in originals)
        for puzzles in (there, here):
            assert len(puzzles) == 8 * len(originals)
            assert all(pairs == puzzles[name.split("|||")[0]] for name, pairs in puzzles.items())
    test_puzzles = [json.loads((folder / "test_puzzles.json").read_text()) for folder in packs]
    assert test_puzzles[0] == test_puzzles[1]


@pytest.mark.parametrize("kind", ["sudoku", "maze"])
def test_sudoku_and_maze_packs_of_both_builders_are_equal(kind: str, tmp_path: Path) -> None:
    """Sudoku without augmentations, which are random; mazes with theirs, which are all."""
    if kind == "sudoku":
        answer = "".join(str((3 * row + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
        lines = [f"here,{answer[:cell]}.{answer[cell + 1 :]},{answer},{cell}" for cell in range(6)]
        options, typed = {"num_aug": 0}, ["--num-aug", "0"]
    else:
        lines = [
            f"here,{'#' * 8}S{' ' * width}G{'#' * (6 - width)},{'#' * 8}S{'o' * width}G{'#' * (6 - width)},{width}"
            for width in range(1, 3)
        ]
        options, typed = {"aug": True}, ["--aug"]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("source,question,answer,rating\n" + "\n".join(lines) + "\n")
    options |= {"source_repo": str(tmp_path), "output_dir": str(tmp_path / "a")}
    run_there("trm_builders.py", f"build_{kind}_dataset", json.dumps(options))
    command = [*typed, "--source-dir", str(tmp_path), "--output-dir", str(tmp_path / "b")]
    outcome = run_script(f"dataset/build_{kind}_dataset.py", *command)
    assert outcome.status == 0, outcome.err
    for split in ("train", "test"):
        one, other = (open_pack(tmp_path / name, split) for name in "ab")
        assert one.metadata == other.metadata
        for name, array in vars(one.sets["all"]).items():
            assert np.array_equal(array, vars(other.sets["all"])[name]), name
