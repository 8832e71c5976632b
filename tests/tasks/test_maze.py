"""Mazes: search, checker, random mazes and the pack builder, checked against slow plain Python."""

import csv
import gzip
import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from hrm.data.builders import maze as builder
from hrm.data.builders import maze_puzzles as generator
from hrm.data.pack import Pack, open_pack, read_provenance
from hrm.errors import UserError
from hrm.tasks import maze
from hrm.tasks.maze import FREE, GOAL, PATH, START, WALL, Mazes

ROOT = Path(__file__).resolve().parents[2]


def neighbours(cell: int, side: int) -> Iterator[int]:
    """Cells up, left, right and down of a cell, by definition."""
    row, column = divmod(cell, side)
    for r, c in ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)):
        if 0 <= r < side and 0 <= c < side:
            yield r * side + c


def distances(passable: Sequence[bool], source: int) -> dict[int, int]:
    """Moves to every cell that can be reached, by breadth-first search."""
    side = round(len(passable) ** 0.5)
    reached = {source: 0}
    queue = deque([source])
    while queue:
        cell = queue.popleft()
        for near in neighbours(cell, side):
            if passable[near] and near not in reached:
                reached[near] = reached[cell] + 1
                queue.append(near)
    return reached


def all_shortest_paths(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The cells between start and goal of every shortest path, in order of the cells it goes through."""
    tokens = list(tokens)
    side, goal = round(len(tokens) ** 0.5), tokens.index(GOAL)
    left = distances([token != WALL for token in tokens], goal)

    def extend(path: tuple[int, ...], cell: int) -> Iterator[tuple[int, ...]]:
        if left[cell] == 1:
            yield path
        for near in neighbours(cell, side):
            if left[cell] > 1 and left.get(near) == left[cell] - 1:
                yield from extend((*path, near), near)

    start = tokens.index(START)
    return sorted(extend((), start)) if start in left else []


def some_mazes(count: int, side: int, seed: int, walls: float = 0.35) -> Mazes:
    """Random cells, with a start and a goal anywhere, joined or not."""
    rng = np.random.default_rng(seed)
    mazes = np.where(rng.random((count, side * side)) < walls, WALL, FREE).astype(np.uint8)
    for tokens in mazes:
        tokens[rng.choice(side * side, 2, replace=False)] = START, GOAL
    return mazes.reshape(count, side, side)


def marked(tokens: Sequence[int], path: Sequence[int]) -> list[int]:
    return [PATH if cell in path else token for cell, token in enumerate(tokens)]


# Text and symmetries.


def test_text() -> None:
    tokens = maze.parse_maze("#S oG #  ")
    assert tokens.tolist() == [1, 3, 2, 5, 4, 2, 1, 2, 2]
    with pytest.raises(UserError, match=r"Character 3 of the maze is 'x'; write one of '# SGo'"):
        maze.parse_maze("#Sx ")
    for text in ("", "S", "S G"):
        with pytest.raises(UserError, match=f"No maze has {len(text)} cells; mazes are square"):
            maze.parse_maze(text)


def test_dihedral_variants_are_those_of_the_published_packs() -> None:
    mazes = some_mazes(3, 4, 0)
    for grid, images in zip(mazes, maze.dihedral_variants(mazes), strict=True):
        expected = [
            grid,
            np.rot90(grid),
            np.rot90(grid, 2),
            np.rot90(grid, 3),
            np.fliplr(grid),
            np.flipud(grid),
            grid.T,
        ]
        np.testing.assert_array_equal(images, [*expected, np.fliplr(np.rot90(grid))])
        assert len(set(map(bytes, images))) == 8


# Search and answers.


@pytest.mark.parametrize(("count", "side"), [(1, 2), (64, 5), (130, 9), (70, 20)])
def test_path_lengths(count: int, side: int) -> None:
    mazes = some_mazes(count, side, side)
    goals = [mazes == GOAL, (mazes == GOAL) | ((np.indices(mazes.shape).sum(0) % 7 == 0) & (mazes == FREE))]
    for targets in goals:
        expected = []
        for tokens, wanted in zip(mazes.reshape(count, -1).tolist(), targets.reshape(count, -1), strict=True):
            reached = distances([token != WALL for token in tokens], tokens.index(START))
            expected.append(min((reached[cell] for cell in np.flatnonzero(wanted) if cell in reached), default=-1))
        np.testing.assert_array_equal(maze.path_lengths(mazes != WALL, mazes == START, targets), expected)
        assert count == 1 or -1 in expected


@pytest.mark.parametrize("side", [2, 4, 6])
def test_the_label_is_the_first_shortest_path(side: int) -> None:
    mazes = some_mazes(150, side, side, walls=0.25)
    paths = [all_shortest_paths(tokens) for tokens in mazes.reshape(150, -1).tolist()]
    joined = [index for index, found in enumerate(paths) if found]
    expected = [marked(mazes[index].ravel().tolist(), paths[index][0]) for index in joined]
    labels = generator.shortest_paths(mazes[joined])
    np.testing.assert_array_equal(labels.reshape(len(joined), -1), expected)
    assert max(map(len, paths)) > 1


def test_exactly_the_shortest_paths_are_right() -> None:
    """Every way to mark the free cells of a 3x3 maze."""
    right = 0
    for tokens in some_mazes(40, 3, 1, walls=0.2).reshape(40, 9).tolist():
        free = [cell for cell, token in enumerate(tokens) if token == FREE]
        paths = {frozenset(path) for path in all_shortest_paths(tokens)}
        choices = [{cell for bit, cell in enumerate(free) if mask >> bit & 1} for mask in range(1 << len(free))]
        answers = np.array([marked(tokens, choice) for choice in choices])
        found = maze.is_shortest_path(np.tile(tokens, (len(answers), 1)), answers)
        assert found.tolist() == [choice in paths for choice in choices]
        right += sum(found)
    assert right > 40


def test_wrong_answers() -> None:
    question = "S  # #  G"
    answers = {
        "Soo# #  G": False,  # ends before the goal
        "Soo# o  G": False,  # through a wall
        "Soo#  # G": False,  # a wall moved away
        "Soo#  ooG": False,
        "S o# o oG": False,
        "oSo# o  G": False,
        "Soo# #  o": False,
        "Soo   o G": False,
        "Soo     G": False,
    }
    open_question, open_answers = (
        "S     # G",
        {"Soo  o# G": True, "So  oo# G": True, "So  o # G": False, "Soooo # G": False},
    )
    for text, expected in ((question, answers), (open_question, open_answers)):
        questions = np.stack([maze.parse_maze(text)] * len(expected))
        found = maze.is_shortest_path(questions, np.stack([maze.parse_maze(answer) for answer in expected]))
        assert found.tolist() == list(expected.values())
    next_to_it = maze.parse_maze("SG##")[None]
    assert maze.is_shortest_path(next_to_it, next_to_it).all()


def test_answers_of_any_tokens() -> None:
    """What a model may say, and the padding of its batch."""
    rng = np.random.default_rng(2)
    questions = some_mazes(50, 5, 2).reshape(50, -1).astype(np.int32)
    questions[-3:] = maze.PAD_TOKEN
    assert not maze.is_shortest_path(questions, rng.integers(0, 6, questions.shape)).any()
    assert not maze.is_shortest_path(questions, np.full_like(questions, maze.PAD_TOKEN)).any()
    assert maze.is_maze(questions).tolist() == [True] * 47 + [False] * 3
    two_starts = np.array([[START, START, GOAL, FREE]])
    assert not maze.is_shortest_path(two_starts, two_starts).any()
    with pytest.raises(UserError, match="No maze has 24 cells"):
        maze.is_shortest_path(questions[:, 1:], questions[:, 1:])


# Random mazes.


@pytest.mark.parametrize(("side", "min_length", "count"), [(5, 10, 200), (12, 24, 100), (30, 110, 30)])
def test_random_mazes(side: int, min_length: int, count: int) -> None:
    mazes, share = generator.random_mazes(count, side, min_length, np.random.default_rng(side))
    assert mazes.shape == (count, side, side)
    assert 0.001 < share < 0.5
    labels = generator.shortest_paths(mazes)
    assert maze.is_shortest_path(mazes.reshape(count, -1), labels.reshape(count, -1)).all()
    for tokens, label in zip(mazes.reshape(count, -1).tolist(), labels.reshape(count, -1).tolist(), strict=True):
        reached = distances([token != WALL for token in tokens], tokens.index(START))
        moves = reached[tokens.index(GOAL)]
        assert moves == max(reached.values()) >= min_length
        on_path = distances([token in (START, PATH, GOAL) for token in label], label.index(START))
        assert on_path[label.index(GOAL)] == moves == label.count(PATH) + 1
        assert [FREE if token == PATH else token for token in label] == tokens
    assert 0.25 < np.mean(mazes == WALL) < 0.5
    images = maze.dihedral_variants(mazes).reshape(count, 8, -1)
    assert len({min(map(bytes, row)) for row in images}) == count


def test_random_mazes_repeat() -> None:
    again = [generator.random_mazes(20, 8, 16, np.random.default_rng(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_no_more_mazes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_DRAWN_CELLS", 1 << 12)
    monkeypatch.setattr(generator, "PATIENCE", 1 << 12)
    # Of one shape and its images, the snake around two walls: a path of 6 moves needs 7 of 9 cells.
    with pytest.raises(UserError, match=r"Only [1-9] of 99 mazes of 3x3 cells with shortest paths of 6 or more were"):
        generator.random_mazes(99, 3, 6, np.random.default_rng(0))


# Building packs.


def run(output: Path, *arguments: object) -> tuple[Pack, Pack]:
    """The training and test split of a pack built by the command line."""
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 0
    return open_pack(output, "train"), open_pack(output, "test")


def write_csv(path: Path, mazes: Mazes, answers: Mazes) -> Path:
    lines = [
        ["".join(("?" + maze.CHARSET)[token] for token in tokens.ravel()) for tokens in pair]
        for pair in zip(mazes, answers, strict=True)
    ]
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as stream:
        csv.writer(stream).writerows(
            [["source", "question", "answer", "rating"], *(["made", *line, 1] for line in lines)]
        )
    return path


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Mazes, Mazes]:
    """train.csv of 6 mazes and test.csv.gz of 4, and those mazes with their answers."""
    mazes, _ = generator.random_mazes(10, 6, 8, np.random.default_rng(3))
    answers = generator.shortest_paths(mazes)
    write_csv(tmp_path / "train.csv", mazes[:6], answers[:6])
    write_csv(tmp_path / "test.csv.gz", mazes[6:], answers[6:])
    return mazes, answers


def test_generated_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = run(tmp_path / "pack", "--generate", "6x6", "--train-size", 30, "--test-size", 20, "--aug")
    assert "30 training mazes with 7 augmentations each and 20 test mazes" in capsys.readouterr().out
    for pack, groups, size in ((train, 30, 8), (test, 20, 1)):
        metadata, data = pack.metadata, pack.sets["all"]
        assert (metadata.pad_id, metadata.ignore_label_id, metadata.blank_identifier_id) == (0, 0, 0)
        assert (metadata.vocab_size, metadata.seq_len, metadata.num_puzzle_identifiers) == (6, 36, 1)
        assert (metadata.total_groups, metadata.mean_puzzle_examples, metadata.sets) == (groups, 1, ("all",))
        assert data.inputs.dtype == data.labels.dtype == np.uint8
        assert not data.puzzle_identifiers.any()
        assert data.group_indices.tolist() == list(range(0, groups * size + 1, size))
        assert maze.is_shortest_path(data.inputs, data.labels).all()
        assert ((data.labels == PATH).sum(1) + 1).min() >= 12
    groups = train.sets["all"].inputs.reshape(30, 8, 6, 6)
    np.testing.assert_array_equal(groups, maze.dihedral_variants(groups[:, 0]))
    answers = generator.shortest_paths(groups.reshape(-1, 6, 6))
    np.testing.assert_array_equal(train.sets["all"].labels, answers.reshape(240, 36))
    mapped = maze.dihedral_variants(answers.reshape(30, 8, 6, 6)[:, 0]).reshape(240, 36)
    assert (train.sets["all"].labels != mapped).any(1).mean() > 0.1, "no maze has two shortest paths"
    assert not set(map(bytes, train.sets["all"].inputs)) & set(map(bytes, test.sets["all"].inputs))
    assert json.loads((tmp_path / "pack" / "identifiers.json").read_text()) == ["<blank>"]


def test_equal_builds_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, "--generate", "5x5", "--train-size", 8, "--test-size", 4)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    provenance = read_provenance(tmp_path / "one")
    assert provenance["builder"] == "dataset/build_maze_dataset.py"
    assert provenance["arguments"] | {"generate": "5x5", "min_length": 10, "seed": 42} == provenance["arguments"]
    assert provenance["counts"]["train"] == {"groups": 8, "puzzles": 8, "examples": 8}


def test_csv_source(tmp_path: Path, sources: tuple[Mazes, Mazes], capsys: pytest.CaptureFixture[str]) -> None:
    train, test = run(tmp_path / "pack", "--source-dir", tmp_path)
    for index in range(2):
        read = [(pack.sets["all"].inputs, pack.sets["all"].labels)[index] for pack in (train, test)]
        np.testing.assert_array_equal(np.concatenate(read), sources[index].reshape(10, -1))
    assert read_provenance(tmp_path / "pack")["sha256"].keys() == {"train.csv", "test.csv.gz"}
    said = capsys.readouterr().out
    assert "shortest paths" not in said
    assert "images" not in said
    train, test = run(tmp_path / "pack", "--source-dir", tmp_path, "--subsample-size", 3)
    assert (train.metadata.total_groups, test.metadata.total_groups) == (3, 4)


def test_faults_of_a_source_are_told(
    tmp_path: Path, sources: tuple[Mazes, Mazes], capsys: pytest.CaptureFixture[str]
) -> None:
    mazes, answers = sources
    write_csv(tmp_path / "train.csv", mazes[:6], np.concatenate([mazes[:2], answers[2:6]]))
    image = maze.dihedral_variants(mazes[1:2])[0, 3:4]
    write_csv(tmp_path / "test.csv.gz", image, generator.shortest_paths(image))
    run(tmp_path / "pack", "--source-dir", tmp_path)
    said = capsys.readouterr().out
    assert "; 2 answers are not shortest paths; 1 test mazes are augmentations of training mazes" in said


def test_hub_source(tmp_path: Path, sources: tuple[Mazes, Mazes], monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "test.csv", sources[0][6:], sources[1][6:])
    asked = []

    def download(repo: str, filename: str, repo_type: str) -> str:
        asked.append((repo, filename, repo_type))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run(tmp_path / "pack")
    repo = "sapientinc/maze-30x30-hard-1k"
    assert asked == [(repo, "train.csv", "dataset"), (repo, "test.csv", "dataset")]
    assert read_provenance(tmp_path / "pack")["source"] == f"hub dataset {repo}"


def test_runs_as_script(tmp_path: Path) -> None:
    arguments = ["--generate", "4x4", "--train-size", "5", "--test-size", "5", "--output-dir", str(tmp_path / "pack")]
    command = [sys.executable, "dataset/build_maze_dataset.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


# What users are told.


def failure(capsys: pytest.CaptureFixture[str], output: Path, *arguments: object) -> str:
    """The sentence on stderr of a build that must fail and leave nothing behind."""
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert not output.exists()
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--generate 30", "--generate 30 is no size of a square maze; choose one from 3x3 to 64x64."),
        ("--generate 30x20", "--generate 30x20 is no size of a square maze"),
        ("--generate 65x65", "--generate 65x65 is no size of a square maze"),
        ("--generate 9x9 --source-dir d", "--source-dir and --generate exclude each other; give one of them."),
        ("--generate 9x9 --subsample-size 5", "--subsample-size does not apply to generated mazes; leave it out."),
        ("--min-length 5", "--min-length applies to generated mazes only; leave it out or add --generate."),
        ("--generate 9x9 --train-size 0", "--train-size 0 is too small; choose 1 or more."),
        ("--generate 9x9 --min-length 0", "--min-length 0 is too small; choose 1 or more."),
        ("--generate 9x9 --seed -1", "--seed -1 is too small; choose 0 or more."),
    ],
)
def test_bad_options(arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in failure(capsys, tmp_path / "pack", *arguments.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("m,S  G,Soo,1", "line 3, answer: No maze has 3 cells; mazes are square"),
        ("m,S  x,SooG,1", "line 3, question: Character 4 of the maze is 'x'"),
        ("m,S  S,SooG,1", "line 3: a question has one S, one G and no o; correct or remove the line."),
        ("m,So G,SooG,1", "line 3: a question has one S, one G and no o"),
        ("m,S       G,SooooooooG,1", "line 3, answer: No maze has 10 cells"),
        ("m,S       G,S       G,1", "line 3: the question has 9 cells and the answer 9, but the pack's mazes have 4;"),
        ("m,S  G", "line 3, answer: No maze has 0 cells"),
    ],
)
def test_malformed_lines(line: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "source,question,answer,rating\nm,S# G,S#oG,2\n"
    (tmp_path / "train.csv").write_text(good)
    (tmp_path / "test.csv").write_text(good + line + "\n")
    text = failure(capsys, tmp_path / "pack", "--source-dir", tmp_path)
    assert f"error: {tmp_path / 'test.csv'}, {sentence}" in text


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        return failure(capsys, tmp_path / "pack", "--source-dir", tmp_path)

    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    assert f"--source-dir {tmp_path} has neither train.csv nor train.csv.gz; put one there." in told()
    train.write_text("question,answer\nS# G,S#oG\n")
    test.write_text("question,solution\n")
    assert f"{test} has no column 'answer' (its first line names: question, solution); add it." in told()
    test.write_text("question,answer\n")
    assert f"{test} holds no maze; add lines to it." in told()
    test.write_text("question,answer\nS#######G,S#######G\n")
    assert f"{test} has mazes of 9 cells and {train} of 4; a pack holds mazes of one size." in told()
    test.write_bytes("question,answer\né".encode("latin-1"))
    assert f"{test} cannot be read as CSV (" in told()
