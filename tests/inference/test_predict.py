"""Models used from a program: what they take, what they answer, and how little memory it takes."""

import gc
import json
import math
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hrm
from hrm.batch import Batch
from hrm.config.evaluation import PICKS
from hrm.errors import UserError
from hrm.evaluation.early_halting import EarlyHalting
from hrm.evaluation.paths import Answers, Noise, make_follower
from hrm.evaluation.picking import pick
from hrm.inference import predictor as predictor_module
from hrm.inference.files import STANDARD, Count, predict_file
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import PredictOptions, slots_for
from hrm.tasks import all_tasks
from hrm.tasks.arc import Augmentation, encode
from hrm.tasks.base import PuzzleSize
from hrm.tasks.form import PuzzleForm, read_form
from tests.helpers.evaluation import load_model, raw_split, think_alone
from tests.helpers.inference import tiny, untrained, untrained_halting_apart

EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
EASY_SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
HARD_SOLVED = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


@pytest.fixture(scope="module")
def bundled() -> TrainedModel:
    return hrm.from_pretrained("sudoku_small", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def boards() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random tokens [20, 16] of 4x4 boards."""
    return np.random.default_rng(0).integers(1, 6, (20, 16))


def as_batch(boards: Any) -> Batch:
    inputs = torch.from_numpy(boards).int()
    zeros = torch.zeros(len(boards), dtype=torch.int32)
    return {"inputs": inputs, "labels": torch.zeros_like(inputs), "puzzle_identifiers": zeros}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, boards: Any) -> TrainedModel:
    """An untrained model of 4x4 boards, whose sequences halt at different steps."""
    folder = untrained_halting_apart(tmp_path_factory.mktemp("small"), PuzzleForm("sudoku", 16, 6), boards)
    return hrm.from_pretrained(folder, device="cpu")


# --- what is answered ---


def test_the_bundled_model_solves_a_hard_board(bundled: TrainedModel) -> None:
    out = bundled.predict(HARD, augmentations=16)
    assert out.texts == [HARD_SOLVED]
    assert (out.answers == np.array([[int(digit) + 1 for digit in HARD_SOLVED]])).all()
    assert out.answers.dtype == np.int64
    assert out.values == [[[int(digit) for digit in HARD_SOLVED[row : row + 9]] for row in range(0, 81, 9)]]
    assert 0.5 < out.q_halt[0] < 1
    assert 0 < out.steps[0] <= 16 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_recorded_step_finds_its_weights_in_the_next_call(boards: Any) -> None:
    model = hrm.from_pretrained("sudoku_small", device="cuda")
    first = model.predict(boards)
    # Memory that the call gave back is written over.
    filled = [torch.full((size,), math.nan, device="cuda") for size in (*range(1, 2**18, 997), *[2**22] * 8)]
    again = model.predict(boards)
    assert first.texts == again.texts
    assert (first.steps == again.steps).all()
    assert (first.steps < model.model.halt_max_steps).any()
    del filled


def test_a_board_may_be_written_in_any_way(bundled: TrainedModel) -> None:
    digits = [int(symbol) for symbol in EASY.replace(".", "0")]
    grid = np.array(digits).reshape(9, 9)
    ways = [EASY, digits, grid.tolist(), grid, torch.tensor(digits), torch.tensor(grid), {"input": EASY}]
    ways += [[EASY[row : row + 9] for row in range(0, 81, 9)], {"tokens": grid + 1}, EASY.replace(".", "0")]
    for way in ways:
        out = bundled.predict(way)
        assert out.texts == [EASY_SOLVED], way
    many = [
        [EASY, HARD],
        np.array([digits, digits]),
        np.stack([grid, grid]),
        [grid.tolist(), EASY],
        (b for b in [EASY]),
    ]
    assert [len(bundled.predict(each)) for each in many] == [2, 2, 2, 2, 1]
    assert bundled.predict(np.array(digits) + 1, tokens=True).texts == [EASY_SOLVED]
    assert bundled.predict(torch.tensor([digits, digits]) + 1, tokens=True).texts == 2 * [EASY_SOLVED]


def test_answers_are_those_of_the_model_alone(trained: Path) -> None:
    """All steps of each: as one board at a time, without what batches, halts and refills."""
    inputs, _ = raw_split(trained / "pack")
    alone, model = load_model(trained / "run"), hrm.from_pretrained(trained / "run", device="cpu", kernels="naive")
    assert read_form(trained / "run") == PuzzleForm("sudoku", 16, 6)
    out = model.predict(inputs, tokens=True, halt=False, batch_size=7)
    expected = [think_alone(alone, tokens) for tokens in inputs]
    assert (out.answers == np.stack([logits.argmax(-1) for logits, _ in expected])).all()
    assert np.abs(out.q_halt - [1 / (1 + math.exp(-q)) for _, q in expected]).max() < 0.02  # of bfloat16
    assert (out.steps == model.act_max_steps).all()
    assert out.index.tolist() == list(range(len(inputs)))


def test_sequences_halt_where_the_model_says(small: TrainedModel, boards: Any) -> None:
    """At the first step at which q_halt > q_continue, with the answer of that step."""
    model = small.model
    batch = {
        "inputs": torch.from_numpy(boards).int(),
        "puzzle_identifiers": torch.zeros(len(boards), dtype=torch.int32),
    }
    batch["labels"] = torch.zeros_like(batch["inputs"])
    answers, halts, carry = [], [], model.initial_carry(batch)
    with torch.no_grad():
        for _ in range(3):
            carry, _, _, outputs, _ = model(
                carry=carry, batch=batch, return_keys=["logits", "q_halt_logits", "q_continue_logits"]
            )
            answers.append(outputs["logits"].argmax(-1).numpy())
            halts.append((outputs["q_halt_logits"] > outputs["q_continue_logits"]).numpy())
    steps = [next((step for step in range(2) if halts[step][row]), 2) + 1 for row in range(len(boards))]
    assert len(set(steps)) == 3, "the weights give every case"
    for batch_size in (1, 3, 64, 10**9):
        out = small.predict(boards, tokens=True, batch_size=batch_size)
        assert out.steps.tolist() == steps
        assert all((out.answers[row] == answers[step - 1][row]).all() for row, step in enumerate(steps))
    shown = small.predict(boards, tokens=True, trajectory=True, batch_size=6)
    assert shown.trajectory is not None
    assert shown.steps.tolist() == steps
    for row, step in enumerate(steps):
        for at in range(3):
            assert (shown.trajectory[row, at] == answers[min(at, step - 1)][row]).all()
    assert (shown.trajectory[:, -1] == shown.answers).all()
    assert small.predict(boards, tokens=True, act_max_steps=1).steps.tolist() == [1] * len(boards)
    assert small.predict(boards, tokens=True, act_max_steps=5, halt=False).steps.tolist() == [5] * len(boards)


def test_augmentations_vote(small: TrainedModel, boards: Any) -> None:
    """Of answers that keep no rule, the most frequent; the steps are those of all."""
    task, size = all_tasks()["sudoku"], PuzzleSize(16, 6)
    symmetries = task.symmetries(size, 5)
    each = [small.predict(symmetry.apply(boards), tokens=True) for symmetry in symmetries]
    answers = np.stack([symmetry.undo(out.answers) for symmetry, out in zip(symmetries, each, strict=True)])
    out = small.predict(boards, tokens=True, augmentations=5, batch_size=3)
    rules = task.rules(size)
    assert rules is not None
    for row in range(len(boards)):
        assert not rules.keeps(np.repeat(boards[row : row + 1], 5, 0), answers[:, row]).any()
        counts = [sum((answers[one, row] == answers[other, row]).all() for other in range(5)) for one in range(5)]
        chosen = [one for one in range(5) if (answers[one, row] == out.answers[row]).all()]
        assert chosen
        assert counts[chosen[0]] == max(counts)
        assert out.steps[row] == sum(one.steps[row] for one in each)


def test_an_answer_that_keeps_the_rules_wins(trained: Path) -> None:
    inputs, labels = raw_split(trained / "pack")
    model = hrm.from_pretrained(trained / "run", device="cpu", kernels="naive")
    once, often = (model.predict(inputs, tokens=True, augmentations=count) for count in (1, 12))
    right = [(out.answers == labels).all(1) for out in (once, often)]
    assert (right[1] >= right[0]).all()
    assert right[1].sum() > right[0].sum()
    assert (often.steps[right[0]] == once.steps[right[0]]).all(), "the first is right: no other is asked for"


def test_paths_are_those_of_evaluation(small: TrainedModel, boards: Any) -> None:
    """Of answers that keep no rule, what is picked of all paths, and the first of them is the model as it is."""
    plain = small.predict(boards, tokens=True, halt=False)
    noise, batch = Noise(2.0, at="start", seed=3), {"inputs": torch.from_numpy(boards).int()}
    batch["puzzle_identifiers"] = torch.zeros(len(boards), dtype=torch.int32)
    follower = make_follower(small.model, torch.device("cpu"), noise)
    paths = [follower(batch, path) for path in range(4)]
    assert (paths[0].tokens.numpy() == plain.answers).all()
    assert any((path.tokens != paths[0].tokens).any() for path in paths[1:])
    for way in PICKS:
        options = {"paths": 4, "noise": 2.0, "noise_at": "start", "seed": 3, "pick": way, "batch_size": 3}
        out = small.predict(boards, tokens=True, **options)
        expected = pick(way, Answers.stacked(paths))
        assert (out.answers == expected.tokens.numpy()).all()
        assert out.q_halt == pytest.approx(expected.q_halt.sigmoid().numpy(), rel=1e-4)
        assert (out.steps == 4 * small.act_max_steps).all()


def test_paths_end_at_an_answer_that_keeps_the_rules(trained: Path) -> None:
    inputs, labels = raw_split(trained / "pack")
    model = hrm.from_pretrained(trained / "run", device="cpu", kernels="naive")
    once = model.predict(inputs, tokens=True, halt=False)
    often = model.predict(inputs, tokens=True, paths=3, augmentations=4, noise=1.0)
    right = [(out.answers == labels).all(1) for out in (once, often)]
    assert (right[1] >= right[0]).all()
    assert right[1].sum() > right[0].sum()
    assert (often.steps[right[0]] == once.steps[right[0]]).all(), "the first is right: no other is asked for"
    assert (often.steps[~right[1]] == 12 * model.act_max_steps).all()


# --- tasks ---


def test_mazes(tmp_path: Path) -> None:
    model = tiny(tmp_path, PuzzleForm("maze", 16, 6))
    maze = "S  ## ##   ## G "
    rows = [maze[row : row + 4] for row in range(0, 16, 4)]
    outs = [model.predict(way) for way in (maze, rows, [list(row) for row in rows], [maze], {"input": "\n".join(rows)})]
    assert all((out.answers == outs[0].answers).all() and len(out) == 1 for out in outs)
    assert len(outs[0].texts[0]) == 16
    assert "".join(outs[0].values[0]) == outs[0].texts[0]
    assert len(model.predict([maze, rows])) == 2
    with pytest.raises(UserError, match="input 1: A maze to solve has one S"):
        model.predict([maze, " " * 16])


def test_arc(tmp_path: Path) -> None:
    names = ("<blank>", "rule", Augmentation(3, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)).name("rule"), "other")
    model = tiny(tmp_path, PuzzleForm("arc", 900, 12, 4, identifiers=names), halt_max_steps=1)
    grid = [[1, 2, 0], [0, 0, 7]]
    by_name = model.predict({"input": grid, "puzzle": "rule"})
    tokens = encode(np.array([grid], dtype=np.uint8), np.zeros((1, 2), dtype=np.int64))
    raw = model.predict([{"tokens": tokens[0], "puzzle": 1}, {"tokens": tokens[0], "puzzle": 3}])
    assert (by_name.answers[0] == raw.answers[0]).all()
    assert (raw.answers[0] != raw.answers[1]).any(), "the identifier matters"
    assert by_name.texts[0] == "/".join("".join(map(str, row)) for row in by_name.values[0])
    task = {"train": [], "test": [{"input": grid}, {"input": [[5]]}], "puzzle": "rule"}
    out = model.predict([{"input": "120/007", "puzzle": "rule"}, task])
    assert out.index.tolist() == [0, 1, 1]
    assert (out.answers[0] == out.answers[1]).all()
    voted = model.predict({"input": grid, "puzzle": "rule"}, augmentations=16)
    assert voted.steps.tolist() == [2], "the task itself and its one augmentation"
    with pytest.raises(UserError, match="input 0: it does not name its task"):
        model.predict([grid])
    with pytest.raises(UserError, match="puzzle 'rul' is not one that the model was trained on, such as rule"):
        model.predict({"input": grid, "puzzle": "rul"})


def test_symbols_of_ones_own(tmp_path: Path) -> None:
    symbols = (1, 2.5, "go", "stop")
    model = tiny(tmp_path / "list", PuzzleForm("tokens", 4, 5, symbols=symbols, answers_cover_inputs=True))
    out = model.predict([["go", 1, 2.5], [1, "stop", "go", 1]])
    assert [len(value) for value in out.values] == [3, 4]
    known = {*symbols, None}
    assert all(symbol in known for value in out.values for symbol in value)
    assert [json.loads(text) for text in out.texts] == out.values
    assert (model.predict("go 1 2.5").answers == out.answers[:1]).all()
    assert (model.predict('["go", 1, 2.5]').answers == out.answers[:1]).all()
    assert (model.predict([1, "stop", "go", 1]).answers == out.answers[1:]).all()
    assert (model.predict({"tokens": [3, 1, 2, 0]}).answers == out.answers[:1]).all()
    for wrong, sentence in (
        (["go", "left"], 'cell 2 is "left", which is no symbol'),
        ([[1, 1, 1, 1, 1]], "has 5 symbols, but the model takes at most 4"),
        ([[]], "is not a list of at most 4 symbols"),
        ([[True]], "cell 1 is true"),
    ):
        with pytest.raises(UserError, match=sentence):
            model.predict([wrong] if isinstance(wrong[0], str) else wrong)
    grids = tiny(tmp_path / "grid", PuzzleForm("tokens", 6, 3, shape=(2, 3), symbols=("a", "b")))
    small_grid = grids.predict([["a", "b"], ["b", "b"]])
    assert len(small_grid) == 1
    assert (small_grid.answers == grids.predict({"tokens": [1, 2, 0, 2, 2, 0]}).answers).all()
    assert np.shape(small_grid.values) == (1, 2, 3)
    assert len(small_grid.texts[0]) == 6
    assert len(grids.predict([[["a"]], [["b"]]])) == 2
    assert (grids.predict("abbbab").answers == grids.predict([["a", "b", "b"], ["b", "a", "b"]]).answers).all()


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([EASY, EASY[:-1]], "input 1: No Sudoku board has 80 cells"),
        ([EASY, "1" * 81], "input 1: the puzzle breaks the rules"),
        (["." * 16], "input 0: it has 16 cells, but the model's puzzles have 81"),
        ([EASY, None], "input 1: it is no text, list or grid"),
        ([EASY, {"puzzles": EASY}], "input 1: it has no field input"),
        ([{"tokens": [11] * 81}], "input 0: token 11 is not in the model's vocabulary, 0 to 10"),
        ([{"tokens": [1] * 80}], "input 0: the model takes 81 tokens"),
        (7, r"no puzzle \(its type is int\)"),
        ([[0.5] * 81], "input 0: a cell is 0.5"),
        ([[12] * 81], "input 0: cell 1 is '12'"),
        ([{"input": EASY, "puzzle": 1}], "input 0: puzzle 1 is none of the 1 that the model knows"),
    ],
)
def test_bad_inputs_are_named(bundled: TrainedModel, given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bundled.predict(given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"augmentations": 0}, "augmentations=0 is too small"),
        ({"augmentations": 5000}, "augmentations=5000 is too large"),
        ({"act_max_steps": 0}, "act_max_steps=0 is too small"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"trajectory": True, "augmentations": 2}, "cannot be combined"),
        ({"trajectory": True, "paths": 2}, "trajectory=True cannot be combined with paths"),
        ({"paths": 0}, "paths=0 is too small"),
        ({"paths": 600, "augmentations": 2}, "paths=600 is too large: give at most 512."),
        ({"paths": 2, "noise": 0}, "noise=0 is out of range"),
        ({"paths": 2, "noise_at": "end"}, "noise_at=end is not a choice; there are: start, steps."),
        ({"paths": 2, "pick": "best"}, "pick=best is not a choice; there are: converged, first, q, vote."),
        ({"pick": "q", "trajectory": True}, "pick=q chooses among answers, of which there is one"),
    ],
)
def test_bad_options_are_named(bundled: TrainedModel, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bundled.predict(EASY, **options)


def test_symmetries_that_a_task_does_not_have(tmp_path: Path) -> None:
    model = tiny(tmp_path, PuzzleForm("maze", 16, 6))
    with pytest.raises(UserError, match="augmentations=9 needs as many symmetries, and the task maze has 8"):
        model.predict("S  ## ##   ## G ", augmentations=9)


def test_nothing_is_answered_with_nothing(small: TrainedModel) -> None:
    out = small.predict([], trajectory=True)
    assert (len(out), out.texts, out.answers.shape) == (0, [], (0, 16))
    assert out.trajectory is not None
    assert out.trajectory.shape == (0, 3, 16)
    assert list(small.predict([], stream=True)) == []


# --- slots where batches keep their size, as on a GPU ---


@pytest.fixture
def recorded(small: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainedModel, list[int]]:
    """The model as on a device that records its steps, and for how many slots it did."""
    slots: list[int] = []

    class Recorded(EarlyHalting):
        def __init__(self, model: Any, count: int, *rest: Any) -> None:
            slots.append(count)
            super().__init__(model, count, *rest)

    monkeypatch.setattr(predictor_module, "is_one_shape", lambda *_: True)
    monkeypatch.setattr(predictor_module, "EarlyHalting", Recorded)
    return TrainedModel(small.model, small.form, small.checkpoint, small.device), slots


def test_as_many_slots_as_puzzles(small: TrainedModel, boards: Any, recorded: tuple[TrainedModel, list[int]]) -> None:
    """One of few numbers, up to what suits the device, each recorded once; the answers are what they were."""
    model, slots = recorded
    expected = small.predict(boards, tokens=True)
    slots.clear()
    for _ in range(3):
        alone = [model.predict(board, tokens=True).texts[0] for board in boards[:3]]
        assert alone == expected.texts[:3]
    assert slots == [1], "no further one for each call"
    for count, of_call in ((2, 2), (3, 4), (4, 4), (7, 8), (9, 16), (20, 16)):
        out = model.predict(boards[:count], tokens=True)
        assert out.texts == expected.texts[:count]
        assert out.steps.tolist() == expected.steps[:count].tolist()
        assert of_call in slots
    assert slots == [1, 2, 4, 8, 16]
    model.predict(boards[:3], tokens=True, augmentations=4)  # 12 sequences at most, however few of them are left
    assert slots == [1, 2, 4, 8, 16]
    model.predict(boards[0], tokens=True, batch_size=5)
    assert slots[-1] == 5, "what is asked for"


def test_all_chunks_of_a_call_have_the_same_slots(
    small: TrainedModel, boards: Any, recorded: tuple[TrainedModel, list[int]]
) -> None:
    model, slots = recorded
    many = np.concatenate([boards, boards, boards, boards])[:65]  # a chunk of four batches, and one board
    expected = small.predict(many, tokens=True).texts
    slots.clear()
    assert model.predict(many, tokens=True).texts == expected
    streamed = model.predict(({"tokens": board} for board in many), stream=True)
    assert [text for chunk in streamed for text in chunk.texts] == expected
    assert slots == [16]
    assert len(list(model.predict(({"tokens": board} for board in boards[:2]), stream=True))) == 1
    assert slots == [16, 2]


def test_what_is_recorded_is_bounded(boards: Any, recorded: tuple[TrainedModel, list[int]]) -> None:
    """What was used longest ago goes, for all together have no more slots than four batches."""
    model, slots = recorded
    for steps in range(1, 25):
        model.predict(boards[0], tokens=True, act_max_steps=steps)
        model.predict(boards[1], tokens=True)
    assert slots.count(1) == 24, "one for each number of steps, of which 3 are the model's"
    slots.clear()
    model.predict(boards[0], tokens=True, act_max_steps=24)
    assert slots == []
    model.predict(boards[0], tokens=True, act_max_steps=1)
    assert slots == [1], "it was dropped"
    for batch_size in (30, 40):
        model.predict(boards, tokens=True, batch_size=batch_size)
        model.predict(boards[0], tokens=True, act_max_steps=1)
    assert slots == [1, 30, 40]
    for steps in (5, 6, 7, 8, 5):
        model.predict(boards, tokens=True, act_max_steps=steps, batch_size=40)
    assert slots == [1, 30, 40, 40, 40, 40, 40], "four of the largest"


def test_paths_have_as_many_slots_as_puzzles(
    small: TrainedModel, boards: Any, recorded: tuple[TrainedModel, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, make = [], predictor_module.make_follower

    def counted(*arguments: Any) -> Any:
        follower = make(*arguments)

        def follow(batch: Batch, path: int) -> Answers:
            sizes.append(len(batch["inputs"]))
            return follower(batch, path)

        return follow

    monkeypatch.setattr(predictor_module, "make_follower", counted)
    options: dict[str, Any] = {"paths": 2, "noise": 2.0, "tokens": True}
    assert recorded[0].predict(boards[:3], **options).texts == small.predict(boards[:3], **options).texts
    assert sizes == [4, 4, 3, 3]


def test_files_have_as_many_slots_as_puzzles(
    tmp_path: Path, boards: Any, recorded: tuple[TrainedModel, list[int]]
) -> None:
    """Where their end is seen in time; a pipe's is not, and its answers are not to depend on how fast it is."""
    model, slots = recorded
    lines = [json.dumps({"tokens": board.tolist()}) + "\n" for board in boards]
    (short := tmp_path / "short.txt").write_text("".join([*lines[:2], "no board\n", lines[2]]))
    (long := tmp_path / "long.txt").write_text("".join(4 * lines[:16] + lines[:3]))
    stdin = os.dup(0)
    given, giving = os.pipe()
    try:
        with short.open() as file:
            os.dup2(file.fileno(), 0)
            assert predict_file(model, STANDARD, str(tmp_path / "out"), PredictOptions()) == Count(4, 1)
        assert slots == [4]
        assert predict_file(model, str(long), str(tmp_path / "out"), PredictOptions()) == Count(67)
        assert slots == [4, 16]
        slots.clear()
        os.write(giving, lines[0].encode())
        os.close(giving)
        os.dup2(given, 0)
        assert predict_file(model, STANDARD, str(tmp_path / "out"), PredictOptions(act_max_steps=2)) == Count(1)
        assert slots == [16]
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(given)


@pytest.mark.parametrize(("compiled", "numbers"), [(False, [1, 2, 4, 8, 16, 32, 64, 128, 200]), (True, [1, 16, 200])])
def test_few_numbers_of_slots(compiled: bool, numbers: list[int]) -> None:
    chosen = [slots_for(count, 200, compiled=compiled) for count in range(1, 300)]
    assert sorted(set(chosen)) == numbers
    assert all(slots >= min(count, 200) for count, slots in enumerate(chosen, start=1))


# --- streams ---


def test_a_stream_gives_the_same_answers(small: TrainedModel, boards: Any) -> None:
    whole = small.predict(boards, tokens=True)
    taken = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for board in boards:
            taken += 1
            yield {"tokens": board}

    chunks = small.predict(counted(), stream=True, batch_size=1)
    first = next(chunks)
    assert taken == len(first) == 4, "no more is read than is answered"
    rest = list(chunks)
    assert np.concatenate([first.answers, *(chunk.answers for chunk in rest)]).tolist() == whole.answers.tolist()
    assert [i for chunk in (first, *rest) for i in chunk.index.tolist()] == list(range(len(boards)))


def test_a_thousand_boards_in_constant_memory(small: TrainedModel) -> None:
    """Python's and numpy's memory at its highest, of 100 boards and of 1,000; PyTorch's is that of the slots."""

    def highest(count: int, *, keep: bool = False) -> int:
        rng, kept, answered = np.random.default_rng(0), [], 0
        gc.collect()
        tracemalloc.start()
        for chunk in small.predict(({"tokens": rng.integers(1, 6, 16)} for _ in range(count)), stream=True):
            answered += len(chunk)
            kept += [chunk] if keep else []
        assert answered == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    def of_a_board(*, keep: bool) -> float:
        highest(100, keep=keep)  # what is made once is there
        return (highest(1000, keep=keep) - highest(100, keep=keep)) / 900

    assert of_a_board(keep=True) > 500, "what a board takes that is kept"
    assert of_a_board(keep=False) < 150, "what Python has not collected yet"


# --- what a model is ---


def test_a_model_says_what_it_is(bundled: TrainedModel) -> None:
    text = repr(bundled)
    for words in (
        "sudoku",
        "9x9 cells",
        "11 tokens",
        "1,344,258",
        "at most 16 ACT steps of 21 updates",
        "float32",
        "cpu",
    ):
        assert words in text
    assert bundled.task.name == "sudoku"
    assert bundled.form == PuzzleForm("sudoku", 81, 11)


def test_a_float32_model_has_the_same_weights(bundled: TrainedModel) -> None:
    other = hrm.from_pretrained("sudoku_small", device="cpu", dtype="bfloat16")
    assert (bundled.dtype, other.dtype) == ("float32", "bfloat16")
    for name, weight in other.model.state_dict().items():
        assert torch.equal(weight.float(), bundled.model.state_dict()[name].float())
    with pytest.raises(UserError, match="dtype=float23 is not a choice; did you mean float32"):
        hrm.from_pretrained("sudoku", dtype="float23")


def test_checkpoints_that_do_not_say_what_their_tokens_mean(tmp_path: Path, trained: Path) -> None:
    """Of the published code, or of early versions: the pack says it, else the sizes."""
    forms = {
        "sudoku": PuzzleForm("sudoku", 81, 11),
        "arc": PuzzleForm("arc", 900, 12),
        "maze": PuzzleForm("maze", 900, 6),
        "small": PuzzleForm("sudoku", 16, 6),
    }
    for name, form in forms.items():
        folder = untrained(tmp_path / name, form)
        (folder / "task.json").unlink()
        config = folder / "all_config.yaml"
        config.write_text(config.read_text().replace("data/none", f"data/{name}-x"))
        assert hrm.from_pretrained(folder, device="cpu").form == form
    folder = untrained(tmp_path / "other", PuzzleForm("tokens", 5, 7))
    (folder / "task.json").unlink()
    with pytest.raises(UserError, match="does not say what the model's tokens mean: give the pack"):
        hrm.from_pretrained(folder, device="cpu")
    with pytest.raises(UserError, match="give the right data_path"):
        hrm.from_pretrained(folder, device="cpu", data_path=str(trained / "pack"))
    (trained_copy := tmp_path / "copy").mkdir()
    for file in (trained / "run").glob("*"):
        if file.is_file() and file.name != "task.json":
            (trained_copy / file.name).write_bytes(file.read_bytes())
    assert hrm.from_pretrained(trained_copy, device="cpu", data_path=str(trained / "pack")).form.task == "sudoku"


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"task": "sudoku"}', '{"task": 3, "seq_len": 16, "vocab_size": 6, "num_puzzle_identifiers": 1}'],
)
def test_damaged_forms_are_told(tmp_path: Path, content: str) -> None:
    folder = untrained(tmp_path / "run", PuzzleForm("sudoku", 16, 6))
    (folder / "task.json").write_text(content)
    with pytest.raises(UserError, match=r"task\.json"):
        hrm.from_pretrained(folder, device="cpu")
