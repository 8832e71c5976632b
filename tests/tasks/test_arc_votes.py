"""ARC scores, checked against predictors whose score is known and against a slow plain vote."""

import json
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hrm.data.builders import arc as builder
from hrm.data.pack import Pack, PackMetadata, PackSet, open_pack, write_split
from hrm.errors import UserError
from hrm.tasks import arc
from hrm.tasks.arc import Grid
from hrm.tasks.arc_votes import PASS_AT, ArcEvaluator, ArcScorer

NUM_AUG = 20
NUM_TASKS = 12

Batch = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
"""Arguments of `ArcScorer.add`."""


def make_task(rng: np.random.Generator, tests: int) -> dict[str, Any]:
    def grid() -> list[list[int]]:
        return rng.integers(10, size=rng.integers(2, 31, size=2)).tolist()

    def pairs(count: int) -> list[dict[str, Any]]:
        return [{"input": grid(), "output": grid()} for _ in range(count)]

    return {"train": pairs(2), "test": pairs(tests)}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Twelve tasks with one, two or three test inputs."""
    folder = tmp_path_factory.mktemp("arc")
    rng = np.random.default_rng(0)
    (folder / "raw/evaluation").mkdir(parents=True)
    for number in range(NUM_TASKS):
        task = make_task(rng, 1 + number % 3)
        (folder / f"raw/evaluation/task_{number:02}.json").write_text(json.dumps(task))
    arguments = ["--dataset-dirs", str(folder / "raw"), "--num-aug", str(NUM_AUG), "--workers", "1"]
    assert builder.main([*arguments, "--output-dir", str(folder / "pack")]) == 0
    return open_pack(folder / "pack", "test")


def rows_of(pack: Pack) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Identifiers, inputs and labels of all examples."""
    data = pack.sets["all"]
    return np.repeat(data.puzzle_identifiers, np.diff(data.puzzle_indices)), data.inputs, data.labels


def truths(pack: Pack) -> dict[str, Any]:
    tests: dict[str, Any] = json.loads((pack.path / "test_puzzles.json").read_text())
    return tests


def tokens_of(grid: Grid) -> NDArray[np.uint8]:
    return arc.encode(grid[None], np.zeros((1, 2), dtype=np.int64))[0]


def add(scorer: ArcScorer, rows: Batch, batches: Sequence[NDArray[np.int64]] | None = None) -> ArcScorer:
    for batch in batches or [np.arange(len(rows[0]))]:
        identifiers, inputs, predictions, q_halt = (field[batch] for field in rows)
        scorer.add(identifiers, inputs, predictions, q_halt)
    return scorer


def answering(pack: Pack, answer: Callable[[str, int, int], tuple[Grid, float]]) -> Batch:
    """Examples answered by `answer(task, test, number of the example) -> (grid before augmentation, q_halt)`."""
    names = json.loads((pack.path / "identifiers.json").read_text())
    identifiers, inputs, _ = rows_of(pack)
    predictions, q_halt = np.zeros_like(inputs), np.zeros(len(inputs), dtype=np.float32)
    data = pack.sets["all"]
    test_of = np.arange(len(inputs)) - np.repeat(data.puzzle_indices[:-1], np.diff(data.puzzle_indices))
    for row, identifier in enumerate(identifiers.tolist()):
        task, augmentation = arc.split_name(names[identifier])
        grid, q_halt[row] = answer(task, int(test_of[row]), row)
        predictions[row] = tokens_of(augmentation.apply(grid)) if grid.size else 0
    return identifiers, inputs, predictions, q_halt


def guesses(pack: Pack, seed: int) -> Batch:
    """Answers and confidences drawn from so few that there are votes, majorities and ties of every kind."""
    rng = np.random.default_rng(seed)
    solved = truths(pack)

    def answer(task: str, test: int, row: int) -> tuple[Grid, float]:
        truth = np.array(solved[task]["test"][test]["output"], dtype=np.uint8)
        choices = [truth, truth, np.zeros((0, 0), dtype=np.uint8)]
        choices += [np.full((1, 1 + number % 2), number, dtype=np.uint8) for number in range(8)]
        return choices[rng.integers(len(choices))], float(rng.choice([-2.0, 0.0, 0.5, 3.0]))

    return answering(pack, answer)


def test_the_truth_is_what_was_built(pack: Pack) -> None:
    scorer = ArcScorer(pack)
    found = {
        task: [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in pairs]
        for task, pairs in scorer.tests.items()
    }
    assert found == {task: parts["test"] for task, parts in truths(pack).items()}


def test_a_perfect_predictor(pack: Pack) -> None:
    identifiers, inputs, labels = rows_of(pack)
    scorer = add(ArcScorer(pack), (identifiers, inputs, labels, np.full(len(inputs), 2.0)))
    result = scorer.result()
    assert result.pass_at == dict.fromkeys(PASS_AT, 1.0)
    assert list(result.pass_at) == [1, 2, 5, 10, 100, 1000]
    for task, parts in truths(pack).items():
        for test, pair in enumerate(parts["test"]):
            assert result.submission[task][test] == {"attempt_1": pair["output"], "attempt_2": [[0]]}
            (only,) = scorer.ranking(task, test)
            assert only.grid.tolist() == pair["output"]
            assert only.votes == NUM_AUG + 1
            assert only.q_halt == pytest.approx(1 / (1 + np.exp(-2.0)), rel=1e-9)
    assert sorted(result.submission) == sorted(truths(pack))


def test_a_random_predictor(pack: Pack) -> None:
    rng = np.random.default_rng(1)
    identifiers, inputs, _ = rows_of(pack)
    predictions = rng.integers(arc.VOCAB_SIZE, size=inputs.shape)
    scorer = add(ArcScorer(pack), (identifiers, inputs, predictions, rng.normal(size=len(inputs))))
    assert scorer.result().pass_at == dict.fromkeys(PASS_AT, 0.0)


def test_nothing_answered(pack: Pack) -> None:
    result = ArcScorer(pack).result()
    assert result.pass_at == dict.fromkeys(PASS_AT, 0.0)
    assert all(
        test == {"attempt_1": [[0]], "attempt_2": [[0]]} for tests in result.submission.values() for test in tests
    )


def test_a_task_passes_with_all_of_its_test_inputs(pack: Pack) -> None:
    """The last test input of every task is answered wrongly: those with more than one fail although half is right."""
    solved = truths(pack)

    def answer(task: str, test: int, row: int) -> tuple[Grid, float]:
        outputs = solved[task]["test"]
        wrong = len(outputs) > 1 and test == len(outputs) - 1
        return np.array([[1]] if wrong else outputs[test]["output"], dtype=np.uint8), 0.0

    result = add(ArcScorer(pack), answering(pack, answer)).result()
    assert result.pass_at == dict.fromkeys(PASS_AT, 4 / NUM_TASKS)
    # TRM counts a half of the tasks with two test inputs and two thirds of those with three.
    assert result.share_at == pytest.approx(dict.fromkeys(PASS_AT, (4 + 4 / 2 + 4 * 2 / 3) / NUM_TASKS))


@pytest.mark.parametrize(
    ("truth_votes", "truth_q", "others_q", "first"),
    [
        (12, -5.0, 5.0, True),  # votes beat confidence
        (8, 5.0, -5.0, False),
        (10, 0.1, 0.0, True),  # confidence decides between equal votes
        (10, 0.0, 0.1, False),
    ],
)
def test_votes_come_before_confidence(
    truth_votes: int, truth_q: float, others_q: float, first: bool, pack: Pack
) -> None:
    """Two answers and, with equal votes, one vote for a third."""
    solved = truths(pack)
    asked: dict[tuple[str, int], int] = defaultdict(int)

    def answer(task: str, test: int, row: int) -> tuple[Grid, float]:
        asked[task, test] += 1
        if asked[task, test] <= truth_votes:
            return np.array(solved[task]["test"][test]["output"], dtype=np.uint8), truth_q
        third = truth_votes == 10 and asked[task, test] == NUM_AUG + 1
        return np.array([[7]] if third else [[3, 3]], dtype=np.uint8), 9.0 if third else others_q

    scorer = add(ArcScorer(pack), answering(pack, answer))
    result = scorer.result()
    assert result.pass_at[1] == float(first)
    assert result.pass_at[2] == 1.0
    for task, tests in result.submission.items():
        for test, attempts in enumerate(tests):
            both = [solved[task]["test"][test]["output"], [[3, 3]]]
            assert [attempts["attempt_1"], attempts["attempt_2"]] == (both if first else both[::-1])


def plain_rankings(pack: Pack, rows: Batch) -> dict[tuple[str, int], list[tuple[int, float, str]]]:
    """By task and test: (votes, mean confidence, grid) of all answers, ranked as the published notebook does it."""
    names = json.loads((pack.path / "identifiers.json").read_text())
    solved = truths(pack)
    answers: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for identifier, asked, predicted, q_halt in zip(*rows, strict=True):
        task, augmentation = arc.split_name(names[identifier])
        question, grid = (augmentation.undo(arc.decode(row[None])[0]).tolist() for row in (asked, predicted))
        test = [pair["input"] for pair in solved[task]["test"]].index(question)
        answers[task, test][repr(grid)].append(1 / (1 + np.exp(-float(q_halt))))
    return {
        key: sorted(
            [(len(votes), round(float(np.mean(votes)), 12), grid) for grid, votes in tallies.items()],
            key=lambda answer: answer[:2],
            reverse=True,  # which leaves those that tie in the order in which they came
        )
        for key, tallies in answers.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_against_a_plain_vote(seed: int, pack: Pack) -> None:
    rows = guesses(pack, seed)
    scorer = add(ArcScorer(pack), rows)
    passed = dict.fromkeys(PASS_AT, 0)
    plain = plain_rankings(pack, rows)
    for task, parts in truths(pack).items():
        places = []
        for test, pair in enumerate(parts["test"]):
            ranking = scorer.ranking(task, test)
            found = [(answer.votes, round(answer.q_halt, 9), repr(answer.grid.tolist())) for answer in ranking]
            expected = [(votes, round(mean, 9), grid) for votes, mean, grid in plain[task, test]]
            assert found == expected
            standing = [(votes, mean) for votes, mean, _ in found]
            assert standing == sorted(standing, reverse=True)
            order = [grid for _, _, grid in found]
            truth = repr(pair["output"])
            places.append(order.index(truth) if truth in order else 10**9)
        for k in PASS_AT:
            passed[k] += max(places) < k
    assert scorer.result().pass_at == {k: count / NUM_TASKS for k, count in passed.items()}
    assert 0 < passed[2] < passed[10]  # else this tested little


@pytest.mark.parametrize("ties", [True, False])
def test_order_and_ranks_make_no_difference(ties: bool, pack: Pack) -> None:
    """To the last bit: one pass, batches in another order, and ranks that score their parts and merge."""
    rows = guesses(pack, 7)
    rows = (*rows[:3], np.random.default_rng(8).normal(size=len(rows[3])).astype(np.float32) * (not ties))
    whole = add(ArcScorer(pack), rows)
    order = np.random.default_rng(9).permutation(len(rows[0]))
    shuffled = add(ArcScorer(pack), rows, np.array_split(order, 7))
    ranks = [add(ArcScorer(pack), rows, [part]) for part in np.array_split(order, 3)]
    for other in ranks[1:]:
        ranks[0].merge(pickle.loads(pickle.dumps(other.votes)))
    for scorer in (shuffled, ranks[0]):
        assert scorer.votes == whole.votes
        assert scorer.result() == whole.result()
        for task, pairs in whole.tests.items():
            for test in range(len(pairs)):
                again = [(a.grid.tolist(), a.votes, a.q_halt) for a in scorer.ranking(task, test)]
                assert again == [(a.grid.tolist(), a.votes, a.q_halt) for a in whole.ranking(task, test)]


def test_what_shows_no_grid_is_an_answer_but_not_submitted(pack: Pack) -> None:
    """Most predictions begin with padding, and one for each test input does not."""
    identifiers, inputs, _ = rows_of(pack)
    predictions = np.zeros_like(inputs)
    names = json.loads((pack.path / "identifiers.json").read_text())
    originals = [arc.split_name(names[identifier])[0] == names[identifier] for identifier in identifiers.tolist()]
    predictions[originals] = tokens_of(np.array([[4, 2]], dtype=np.uint8))
    scorer = add(ArcScorer(pack), (identifiers, inputs, predictions, np.zeros(len(inputs))))
    for task, tests in scorer.result().submission.items():
        for test, attempts in enumerate(tests):
            assert attempts == {"attempt_1": [[4, 2]], "attempt_2": [[0]]}
            ranking = scorer.ranking(task, test)
            assert [(answer.grid.shape, answer.votes) for answer in ranking] == [((0, 0), NUM_AUG), ((1, 2), 1)]


def test_padding_and_extreme_confidence(pack: Pack) -> None:
    """Rows of the blank identifier are no votes, and no confidence overflows."""
    identifiers, inputs, labels = rows_of(pack)
    padded = (
        np.concatenate([identifiers, [0, 0]]),
        np.concatenate([inputs, np.zeros((2, arc.SEQ_LEN))]).astype(np.int32),
        np.concatenate([labels, np.full((2, arc.SEQ_LEN), 5)]).astype(np.int64),
        np.where(np.arange(len(inputs) + 2) % 2, 1e4, -1e4),
    )
    with np.errstate(all="raise"):
        scorer = add(ArcScorer(pack), padded)
    assert sum(votes for tallies in scorer.votes.values() for votes, *_ in tallies.values()) == len(inputs)
    assert scorer.result().pass_at[1] == 1.0


def renamed(pack: Pack, folder: Path, rename: Callable[[str], str]) -> Pack:
    """The same pack under other identifiers."""
    shutil.copytree(pack.path, folder)
    names = json.loads((folder / "identifiers.json").read_text())
    (folder / "identifiers.json").write_text(json.dumps([rename(name) for name in names]))
    return open_pack(folder, "test")


def test_packs_with_the_names_of_trm_score_alike(pack: Pack, tmp_path: Path) -> None:
    theirs = renamed(pack, tmp_path / "trm", lambda name: re.sub(r"_t(\d)_(\d{10})$", r"|||t\1|||\2", name))
    assert "|||t" in (tmp_path / "trm/identifiers.json").read_text()
    rows = guesses(pack, 4)
    ours, scored = add(ArcScorer(pack), rows), add(ArcScorer(theirs), rows)
    assert len(scored.tests) == NUM_TASKS
    assert scored.votes == ours.votes
    assert scored.result() == ours.result()


@pytest.mark.parametrize("spelling", [r"|||t\1||\2", r"|||t9|||\2", r"_t9_\2", r"_t\1_\g<2>0"])
def test_names_that_cannot_be_read_are_no_tasks(spelling: str, pack: Pack, tmp_path: Path) -> None:
    odd = renamed(pack, tmp_path / "odd", lambda name: re.sub(r"_t(\d)_(\d{10})$", spelling, name))
    with pytest.raises(UserError, match=r"odd/identifiers.json: .* looks like the name of an augmentation"):
        ArcScorer(odd)


# Hidden outputs.


def hiding(pack: Pack, folder: Path, hidden: Callable[[str, int], bool]) -> Pack:
    """The same pack without the outputs of those test inputs, by task and number."""
    shutil.copytree(pack.path, folder)
    names = json.loads((folder / "identifiers.json").read_text())
    data = pack.sets["all"]
    labels = data.labels.copy()
    for puzzle, identifier in enumerate(data.puzzle_identifiers.tolist()):
        first, end = data.puzzle_indices[puzzle : puzzle + 2].tolist()
        for row in range(first, end):
            if hidden(arc.split_name(names[identifier])[0], row - first):
                labels[row] = arc.PAD_TOKEN
    np.save(folder / "test/all__labels.npy", labels)
    return open_pack(folder, "test")


def test_only_known_outputs_are_scored_and_all_inputs_answered(pack: Pack, tmp_path: Path) -> None:
    """Hidden are the outputs of every second task, and of all others those of the last of three test inputs."""
    hidden = hiding(pack, tmp_path / "pack", lambda task, test: int(task[-2:]) % 2 == 1 or test == 2)
    rows = guesses(pack, 3)
    whole, partly = add(ArcScorer(pack), rows), add(ArcScorer(hidden), rows)
    assert partly.result().submission == whole.result().submission
    known = {task: parts["test"][:2] for task, parts in truths(pack).items() if int(task[-2:]) % 2 == 0}
    assert partly.result().scored == (len(known), sum(map(len, known.values())))
    for k in PASS_AT:
        right = [
            [
                pair["output"] in [a.grid.tolist() for a in whole.ranking(task, test)[:k]]
                for test, pair in enumerate(tests)
            ]
            for task, tests in known.items()
        ]
        assert partly.result().pass_at[k] == np.mean([all(tests) for tests in right])
        assert partly.result().share_at[k] == pytest.approx(np.mean([np.mean(tests) for tests in right]))
    assert 0 < partly.result().pass_at[1] < partly.result().pass_at[10]  # else this tested little

    evaluator = ArcEvaluator(hidden)
    asked = sum(map(len, whole.tests.values()))
    text = evaluator.summary([evaluator.state()], tmp_path)
    assert f"The outputs of 10 of {asked} test inputs are known, in 6 of 12 tasks; only these are scored." in text
    assert f"first two answers to all {asked} test inputs" in text


def test_an_empty_answer_to_a_hidden_output_is_not_right(pack: Pack, tmp_path: Path) -> None:
    hidden = hiding(pack, tmp_path / "pack", lambda task, test: True)
    identifiers, inputs, _ = rows_of(pack)
    scorer = add(ArcScorer(hidden), (identifiers, inputs, np.zeros_like(inputs), np.zeros(len(inputs))))
    result = scorer.result()
    assert (result.scored, result.pass_at, result.share_at) == ((0, 0), {}, {})
    assert {task: len(tests) for task, tests in result.submission.items()} == {
        task: len(parts["test"]) for task, parts in truths(pack).items()
    }
    evaluator = ArcEvaluator(hidden)
    text = evaluator.summary([evaluator.state()], tmp_path)
    assert text == f"  Saved the first two answers to all 24 test inputs in {tmp_path / 'submission.json'}."
    assert json.loads((tmp_path / "submission.json").read_text()).keys() == truths(pack).keys()


# Bad input.


def test_other_packs(pack: Pack, tmp_path: Path) -> None:
    rows, steps = np.zeros((2, 81), dtype=np.uint8), np.arange(3)
    sudoku = PackMetadata(0, 0, 0, 11, 81, 1, 2, 1.0, ("all",))
    write_split(tmp_path / "test", sudoku, {"all": PackSet(rows, rows, np.zeros(2, dtype=np.int32), steps, steps)})
    with pytest.raises(UserError, match="is no ARC pack: it has 81 cells and 11 tokens, not 900 and 12"):
        ArcScorer(open_pack(tmp_path, "test"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read"), ("[", "cannot be read"), ("{}", "is no list of"), ('["<blank>"]', "is no list of")],
)
def test_bad_identifiers(content: str | None, sentence: str, pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(pack.path / "test")
    if content is not None:
        (tmp_path / "identifiers.json").write_text(content)
    with pytest.raises(UserError, match=f"identifiers.json {sentence}"):
        ArcScorer(open_pack(tmp_path, "test"))


def test_foreign_inputs(pack: Pack) -> None:
    identifiers, _, labels = rows_of(pack)
    with pytest.raises(UserError, match="but it is none of task_00's: the file belongs to another pack"):
        ArcScorer(pack).add(identifiers[:1], labels[:1], labels[:1], np.zeros(1))
