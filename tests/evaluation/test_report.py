"""The report: what it records is what the model said, what it totals is what happened, what it embeds reads back."""

import base64
import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence

import hrm
from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.data.builders import custom as build_custom_dataset
from hrm.data.columns import read_column
from hrm.data.pack import PackMetadata, PackSet, open_pack, write_identifiers, write_split
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.evaluation.breakdown import Rating, by_source
from hrm.evaluation.report.gif import write_gif, write_gifs
from hrm.evaluation.report.page import write_report
from hrm.evaluation.report.recorder import Recorder, Recording, check_vocabulary, kinds, score
from hrm.evaluation.report.writer import ReportWriter
from hrm.evaluation.runner import StepOutputs, record_act_steps, run_act_steps
from hrm.models import ACTLossHead
from hrm.tasks import all_tasks, task_of
from hrm.tasks.arc import TASK, ArcTask, Augmentation, Pair
from hrm.tasks.arc_votes import ArcEvaluator, demonstrations
from hrm.tasks.base import PuzzleSize, View
from hrm.tasks.maze import FREE, PATH
from hrm.tasks.sudoku import BoxShape
from tests.helpers.entry_points import make_pack
from tests.helpers.recordings import (
    ARC_NAMES,
    ARC_PAIRS,
    ARC_VIEW,
    TOOLS,
    Tokens,
    arc,
    as_batch,
    corner,
    maze,
    maze_view,
    sudoku,
    sudoku_view,
    tokens_view,
    tool_names,
)

# --- recording ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_arch: dict[str, Any]) -> ACTLossHead:
    built: ACTLossHead = hrm.build_model(tiny_arch, batch_size=3, seq_len=5, vocab_size=7, num_puzzle_identifiers=4)
    generator = torch.Generator().manual_seed(0)
    built.load_state_dict(built.state_dict() | {"model.inner.q_head.weight": torch.randn(2, 32, generator=generator)})
    return built.eval()


def test_record_is_what_the_model_says_after_each_step(model: ACTLossHead, random_batch: Callable[..., Batch]) -> None:
    batch = random_batch()
    metrics, outputs, steps = record_act_steps(model, batch, ["logits"])
    carry, said = model.initial_carry(batch), []
    for _ in range(4):
        carry, _, _, now, _ = model(
            carry=carry, batch=batch, return_keys=["logits", "q_halt_logits", "q_continue_logits"]
        )
        said.append(now)
    assert steps.answers.dtype == torch.uint8
    for step, now in enumerate(said):
        assert torch.equal(steps.answers[step].long(), now["logits"].argmax(-1))
        assert torch.equal(steps.q_halt[step], now["q_halt_logits"])
        assert torch.equal(steps.q_continue[step], now["q_continue_logits"])
    assert len({tuple(q.tolist()) for q in steps.q_halt}) == 4  # the steps differ, so their order was tested
    expected_metrics, expected_outputs = run_act_steps(model, batch, ["logits"])
    assert metrics == expected_metrics
    assert outputs.keys() == {"logits"}
    assert torch.equal(outputs["logits"], expected_outputs["logits"])


def test_a_vocabulary_must_fit_a_byte() -> None:
    check_vocabulary(255)
    with pytest.raises(UserError, match="256"):
        check_vocabulary(256)


def random_steps(count: int, num_steps: int = 5, length: int = 3, seed: int = 0) -> tuple[Batch, StepOutputs]:
    """Answers of which many are right, many change late, and some never halt; one label in four is missing."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((count, length)) < 0.25, IGNORE_LABEL_ID, rng.integers(2, size=(count, length)))
    answers = rng.integers(2, size=(num_steps, count, length)).astype(np.uint8)
    answers[:, ::2] = np.where(rng.random((num_steps, 1, 1)) < 0.5, answers[:, ::2], labels[::2].clip(0)).astype(
        np.uint8
    )
    q = [rng.normal(-0.8, 1, (num_steps, count)).astype(np.float32) for _ in range(2)]
    return as_batch(rng.integers(2, size=(count, length)), labels), StepOutputs(*map(torch.from_numpy, (answers, *q)))


def test_scores_by_their_definition() -> None:
    batch, steps = random_steps(200)
    scores = score(batch, steps, np.arange(200)).scores
    for n in range(200):
        label = batch["labels"][n].tolist()
        places = [i for i, token in enumerate(label) if token != IGNORE_LABEL_ID]
        said = [[answer[n].tolist()[i] for i in places] for answer in steps.answers]
        wanted = [label[i] for i in places]
        settled = next(step for step in range(5, 0, -1) if step == 1 or said[step - 1] != said[step - 2])
        halting = next((t + 1 for t in range(5) if steps.q_halt[t, n] > steps.q_continue[t, n]), 6)
        assert scores.settled[n] == settled
        assert scores.halting_step()[n] == halting
        if places:
            assert scores.exact[:, n].tolist() == [answer == wanted for answer in said]
            shares = [sum(map(int.__eq__, answer, wanted)) / len(places) for answer in said]
            assert scores.right[:, n].tolist() == pytest.approx(shares)
    assert set(scores.settled) == {1, 2, 3, 4, 5}
    assert set(scores.halting_step()) == {1, 2, 3, 4, 5, 6}


def rows_of(batch: Batch, steps: StepOutputs, rows: slice) -> tuple[Batch, StepOutputs]:
    return {name: field[rows] for name, field in batch.items()}, StepOutputs(*(part[:, rows] for part in steps))


def same(one: Recording, other: Recording) -> bool:
    """Whether all arrays of two recordings are equal."""

    def arrays(part: object) -> list[NDArray[Any]]:
        values = vars(part).values()
        return [array for value in values for array in ([value] if isinstance(value, np.ndarray) else arrays(value))]

    return all(np.array_equal(*pair) for pair in zip(arrays(one), arrays(other), strict=True))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_recordings_depend_on_neither_batches_nor_ranks(size: int) -> None:
    batch, steps = random_steps(100)
    whole = Recorder(3)
    whole.add(batch, steps, np.arange(100))
    ranks = [Recorder(3), Recorder(3)]
    for number, start in enumerate(range(0, 100, size)):
        rows = slice(start, min(start + size, 100))
        ranks[number % 2].add(*rows_of(batch, steps, rows), np.arange(rows.start, rows.stop))
    parts = [rank.recording() for rank in ranks]
    assert same(ranks[0].merge(parts), whole.recording())


def test_what_is_shown_is_of_its_kind() -> None:
    batch, steps = random_steps(300)
    recorder = Recorder(5)
    recorder.add(batch, steps, np.arange(300))
    result = recorder.recording()
    labelled = np.flatnonzero((batch["labels"] != IGNORE_LABEL_ID).any(1).numpy())
    assert len(labelled) < 300
    assert np.array_equal(result.scores.index, labelled)
    shown = kinds(result.shown.scores, 5)
    assert {kind: len(columns) for kind, columns in shown.items()} == {"slow": 5, "right": 5, "wrong": 5}
    exact, settled = result.shown.scores.exact[-1], result.shown.scores.settled
    assert exact[shown["right"]].all()
    assert not exact[shown["wrong"]].any()
    assert exact[shown["slow"]].all()
    every = np.sort(result.scores.settled[result.scores.exact[-1]])[-5:]
    assert sorted(settled[shown["slow"]]) == every.tolist()
    for row, index in enumerate(result.shown.scores.index):
        assert np.array_equal(result.shown.answers[:, row], steps.answers[:, index].numpy())
        assert np.array_equal(result.shown.inputs[row], batch["inputs"][index].numpy())
        assert np.array_equal(result.shown.labels[row], batch["labels"][index].numpy())


def test_only_puzzles_that_may_be_are_shown_and_all_are_scored() -> None:
    batch, steps = random_steps(60)
    may_show = np.arange(60) % 3 == 0
    recorder = Recorder(4, may_show)
    recorder.add(batch, steps, np.arange(60))
    result = recorder.recording()
    assert (result.shown.puzzle_identifiers % 3 == 0).all()
    assert len(result.shown.inputs) > 4
    assert len(result.scores.index) == (batch["labels"] != IGNORE_LABEL_ID).any(1).sum()


def test_without_labels_there_is_nothing_to_report(tmp_path: Path) -> None:
    batch, steps = random_steps(4)
    batch["labels"][:] = IGNORE_LABEL_ID
    recorder = Recorder(4)
    recorder.add(batch, steps, np.arange(4))
    with pytest.raises(UserError, match="label"):
        write_report(tmp_path, recorder.recording(), tokens_view(2), title="T")


def test_ranks_without_anything_to_show_do_no_harm() -> None:
    batch, steps = random_steps(20)
    ranks = [Recorder(3), Recorder(3), Recorder(3, np.zeros(20, dtype=np.bool_))]
    ranks[0].add(batch, steps, np.arange(10))
    ranks[1].add(batch, steps, np.arange(0))
    ranks[2].add(*rows_of(batch, steps, slice(10, 20)), np.arange(10, 20))
    merged = ranks[0].merge([rank.recording() for rank in ranks])
    assert same(merged, replace(merged, shown=ranks[0].recording().shown))
    assert len(merged.scores.index) > len(ranks[0].recording().scores.index)


# --- the file -------------------------------------------------------------------------------------------------------


def embedded(file: Path) -> dict[str, Any]:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read_text(), re.S)
    assert text is not None
    content: dict[str, Any] = json.loads(text[1])
    return content


def unpacked(content: dict[str, Any]) -> Tokens:
    """Inputs, labels and answers [M, 2 + T, S], as the page's script reads them."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(content["tokens"])), dtype=np.uint8)
    rows = flat.reshape(len(content["puzzles"]), 2 + content["steps"], content["length"])
    return np.concatenate([rows[:, :2], rows[:, 2:].cumsum(1, dtype=np.uint8)], axis=1)


def test_the_trajectories_are_in_the_file(tmp_path: Path) -> None:
    result = arc(ARC_PAIRS)
    content = embedded(
        write_report(tmp_path, result, ARC_VIEW, title="ARC", details=[{"name": name} for name in ARC_NAMES])
    )
    rows = unpacked(content)
    shown = result.shown
    assert np.array_equal(rows[:, 0], shown.inputs)
    assert np.array_equal(rows[:, 1], np.where(shown.labels == IGNORE_LABEL_ID, 255, shown.labels))
    assert np.array_equal(rows[:, 2:].transpose(1, 0, 2), shown.answers)
    assert [puzzle["index"] for puzzle in content["puzzles"]] == shown.scores.index.tolist()
    assert [puzzle["name"] for puzzle in content["puzzles"]] == ARC_NAMES
    assert content["puzzles"][0]["inputShape"] == [3, 4]
    assert content["puzzles"][1]["labelShape"] == [9, 9]
    assert content["puzzles"][2]["shapes"] == [[1, 1]] * 8


def test_the_file_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs, labels = rng.integers(12, size=(2, 24, 900)).astype(np.uint8)
    answers = rng.integers(12, size=(16, 24, 900)).astype(np.uint8)  # the worst: nothing to compress but the alphabet
    q = torch.zeros(16, 24)
    recorder = Recorder(24)
    recorder.add(as_batch(inputs, labels), StepOutputs(torch.from_numpy(answers), q, q), np.arange(24))
    file = write_report(tmp_path, recorder.recording(), tokens_view(12, columns=30), title="Noise")
    assert len(embedded(file)["puzzles"]) == 24
    assert file.stat().st_size < 1_000_000
    file = write_report(tmp_path, maze(30, count=24, num_steps=16, per_kind=24), maze_view(30), title="Mazes")
    assert len(embedded(file)["puzzles"]) == 24
    assert file.stat().st_size < 150_000


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    file = write_report(tmp_path, sudoku(BoxShape(2, 2)), sudoku_view(BoxShape(2, 2)), title="Sudoku")
    assert file == tmp_path / "report.html"
    text = file.read_text()
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|\bfetch\(|{{", text)


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    title = "</script><script>alert(1)</script> {{data}}"
    text = write_report(tmp_path, sudoku(BoxShape(2, 2)), sudoku_view(BoxShape(2, 2)), title=title).read_text()
    assert text.count("</script>") == 2
    assert embedded(tmp_path / "report.html")["title"] == title


def test_totals_by_their_definition(tmp_path: Path) -> None:
    batch, steps = random_steps(300)
    recorder = Recorder(2)
    recorder.add(batch, steps, np.arange(300))
    result = recorder.recording()
    scores = result.scores
    rating, sources = Rating("rating", np.arange(300) % 40), np.array(["few", "many", "many"])[np.arange(300) % 3]
    report = write_report(tmp_path, result, tokens_view(2), title="T", rating=rating, sources=sources)
    totals = embedded(report)["totals"]
    count = len(scores.index)
    assert totals["count"] == count
    assert totals["exact"] == pytest.approx([sum(row) / count for row in scores.exact.tolist()], abs=1e-4)
    assert totals["cells"] == pytest.approx([sum(row) / count for row in scores.right.tolist()], abs=1e-4)

    used = [min(int(step), 5) for step in scores.halting_step()]
    right = [bool(scores.exact[step - 1, n]) for n, step in enumerate(used)]
    assert totals["halt"] == pytest.approx({"exact": sum(right) / count, "steps": sum(used) / count}, abs=0.006)
    for bar in totals["byUsed"]:
        step = 6 if bar["label"] == "never" else int(bar["label"])
        at = [n for n in range(count) if scores.halting_step()[n] == step]
        assert (bar["count"], bar["right"]) == (len(at), sum(right[n] for n in at))
    assert sum(bar["count"] for bar in totals["byUsed"]) == count

    bars = totals["byRating"]["bars"]
    assert len(bars) == 8
    assert sum(bar["count"] for bar in bars) == count
    for bar in bars:
        low, high = (int(end) for end in bar["label"].split("–"))
        inside = [n for n, index in enumerate(scores.index) if low <= index % 40 <= high]
        assert (bar["count"], bar["right"]) == (len(inside), int(scores.exact[-1, inside].sum()))
        assert count / 16 < bar["count"] < count / 4

    many, few = totals["bySource"]["bars"]
    for bar, name in ((many, "many"), (few, "few")):
        inside = [n for n, index in enumerate(scores.index) if (index % 3 == 0) == (name == "few")]
        assert bar == {"label": name, "count": len(inside), "right": int(scores.exact[-1, inside].sum())}


def test_the_smallest_of_many_sources_share_a_bar() -> None:
    names = np.array([letter for n, letter in enumerate("abcdefghij") for _ in range(10 - n)] + [""] * 11)
    right = np.random.default_rng(0).random(len(names)) < 0.5
    bars = by_source(names, right)
    groups = {"not named": [""]} | {letter: [letter] for letter in "abcdef"} | {"4 others": list("ghij")}
    assert bars == [
        {"label": label, "count": int(inside.sum()), "right": int((inside & right).sum())}
        for label, members in groups.items()
        for inside in [np.isin(names, members)]
    ]


def test_few_ratings_get_a_bar_each(tmp_path: Path) -> None:
    result = sudoku(BoxShape(2, 2), count=30)
    rating = Rating("rating", np.array([1.5, 2, 7])[np.arange(30) % 3])
    totals = embedded(write_report(tmp_path, result, sudoku_view(BoxShape(2, 2)), title="T", rating=rating))["totals"]
    assert [(bar["label"], bar["count"]) for bar in totals["byRating"]["bars"]] == [("1.5", 10), ("2", 10), ("7", 10)]


def test_a_diverged_model_can_be_looked_at(tmp_path: Path) -> None:
    result = sudoku(BoxShape(2, 2))
    broken = replace(result.shown.scores, q_halt=np.full_like(result.shown.scores.q_halt, np.nan))
    shown = replace(result.shown, scores=broken)
    file = write_report(tmp_path, replace(result, shown=shown), sudoku_view(BoxShape(2, 2)), title="NaN")
    assert embedded(file)["puzzles"][0]["qHalt"] == [0.0] * 8


def test_another_shortest_path_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    open_field = np.full((1, 9), FREE, dtype=np.uint8)
    open_field[0, 0], open_field[0, 8] = 3, 4
    over, under, lost = open_field.copy(), open_field.copy(), open_field.copy()
    over[0, [1, 2, 5]], under[0, [3, 6, 7]], lost[0, [1, 2]] = PATH, PATH, PATH
    for answer, shortest in ((over, True), (under, True), (lost, False)):
        recorder = Recorder(1)
        q = torch.zeros(1, 1)
        recorder.add(as_batch(open_field, over), StepOutputs(torch.from_numpy(answer[None]), q, q), np.arange(1))
        rules = all_tasks()["maze"].rules(PuzzleSize(9, 6))
        file = write_report(tmp_path, recorder.recording(), maze_view(3), title="Maze", rules=rules)
        assert embedded(file)["puzzles"][0].get("keepsRules") == ("a shortest path" if shortest else None)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report=.*file"):
        write_report(tmp_path / "file", sudoku(BoxShape(2, 2)), sudoku_view(BoxShape(2, 2)), title="T")


# --- packs ----------------------------------------------------------------------------------------------------------


def view_of(folder: Path) -> View:
    pack = open_pack(folder, "test")
    return task_of(pack).view(PuzzleSize.of(pack), pack.path)


@pytest.mark.parametrize(("grid", "columns"), [([1, 2, 3, 4] * 4, None), ([[1, 2, 3, 4]] * 4, 4), ([[4, "a"]], 2)])
def test_your_own_data_is_shown_in_its_shape_and_symbols(tmp_path: Path, grid: list[Any], columns: int | None) -> None:
    lines = [json.dumps({"input": grid, "output": grid, "group": str(group)}) for group in range(4)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    argv = ["--train", str(tmp_path / "lines.jsonl"), "--test-fraction", "0.5", "--output-dir", str(tmp_path / "pack")]
    argv += ["--vocab", '[1, 2, 3, 4, "a"]']  # as many tokens and cells as a 4x4 Sudoku, in two of the cases
    assert build_custom_dataset.main(argv) == 0
    names = ["", "1", "2", "3", "4", "a"]
    assert view_of(tmp_path / "pack") == tokens_view(names, columns)
    (tmp_path / "pack" / "provenance.json").unlink()
    assert view_of(tmp_path / "pack") == tokens_view(names)


def write_pack(folder: Path, inputs: NDArray[Any], labels: NDArray[Any], vocab_size: int, names: list[str]) -> None:
    """A test split with one example for each identifier."""
    count = len(inputs)
    offsets = np.arange(count + 1)
    metadata = PackMetadata(0, 0, 0, vocab_size, inputs.shape[1], len(names), count, 1.0, ("all",))
    identifiers = np.arange(len(names) - count, len(names))
    write_split(folder / "test", metadata, {"all": PackSet(inputs, labels, identifiers, offsets, offsets)})
    write_identifiers(folder, names)


def test_ratings_of_mazes_are_path_lengths(tmp_path: Path) -> None:
    shown = maze(7).shown
    write_pack(tmp_path / "maze", shown.inputs, shown.labels, 6, [str(n) for n in range(len(shown.inputs))])
    rating = Rating.of_pack(open_pack(tmp_path / "maze", "test"))
    assert rating is not None
    assert rating.values.tolist() == [int((row == PATH).sum()) + 1 for row in shown.labels]

    arc_inputs = np.concatenate([corner(pair.input) for pair in ARC_PAIRS])
    write_pack(tmp_path / "arc", arc_inputs, arc_inputs, 12, ARC_NAMES)
    assert Rating.of_pack(open_pack(tmp_path / "arc", "test")) is None


def test_ratings_come_with_the_pack_or_from_the_puzzles(tmp_path: Path) -> None:
    make_pack(tmp_path, test_size=5, givens=7)
    pack = open_pack(tmp_path, "test")
    assert Rating.of_pack(pack) is None  # all have as many blanks
    np.save(tmp_path / "test" / "all__ratings.npy", np.array([3, 1, 4, 1, 5]))
    rating = Rating.of_pack(pack)
    assert rating is not None
    assert rating.values.tolist() == [3, 1, 4, 1, 5]
    np.save(tmp_path / "test" / "all__ratings.npy", np.array([3, 1, 4]))
    with pytest.raises(UserError, match=r"all__ratings.npy has shape \(3,\).* 5 examples"):
        Rating.of_pack(pack)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (np.array(["a"] * 4), r"has shape \(4,\) of <U1, but its set has 5 examples; write text, one for each."),
        (np.arange(5), r"is torn or is not a plain .npy file \(it holds int64, not text\); build the pack again."),
        (np.array(["\ud800"] * 5), r"holds values that are not text; build the pack again."),
        (np.full(5, 0x110000, np.uint32).view("U1"), r"holds values that are not text; build the pack again."),
        (np.array(list("abcde"), dtype=object), r"is torn or is not a plain .npy file \(.*\); build the pack again."),
    ],
)
def test_sources_that_do_not_fit(sources: NDArray[Any], said: str, tmp_path: Path) -> None:
    make_pack(tmp_path, test_size=5, givens=7)
    pack = open_pack(tmp_path, "test")
    assert read_column(pack, "sources") is None
    np.save(tmp_path / "test" / "all__sources.npy", np.array(list("abbab")))
    kept = read_column(pack, "sources")
    assert kept is not None
    assert kept.tolist() == list("abbab")
    np.save(tmp_path / "test" / "all__sources.npy", sources)
    with pytest.raises(UserError, match=f"all__sources.npy {said}") as told:
        read_column(pack, "sources")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("ratings", "said"),
    [
        (np.ones(5, "c16"), "holds complex128, not numbers"),
        (np.ones(5, "m8[s]"), r"holds timedelta64\[s\], not numbers"),
        (np.array([1, np.nan, 3, 4, 5]), "holds values that are not numbers"),
        (np.array([1, np.inf, 3, 4, 5]), "holds values that are not numbers"),
        (np.array([1, 2, 3, 4, 2**70], dtype=object), "holds object, not numbers"),
    ],
)
def test_ratings_that_are_no_numbers(ratings: NDArray[Any], said: str, tmp_path: Path) -> None:
    make_pack(tmp_path, test_size=5, givens=7)
    np.save(tmp_path / "test" / "all__ratings.npy", ratings)
    with pytest.raises(UserError, match=f"all__ratings.npy .*{said}.*build the pack again"):
        read_column(open_pack(tmp_path, "test"), "ratings")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"gravity": {"train": []}}', '{"gravity": '])
def test_demonstrations_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    make_pack(tmp_path, test_size=5, givens=7)
    (tmp_path / "test_puzzles.json").write_text(content)
    with pytest.raises(UserError, match=r"test_puzzles.json cannot be read .*: build the pack again"):
        demonstrations(open_pack(tmp_path, "test"))


def test_arc_examples_get_their_tasks_votes_and_demonstrations(tmp_path: Path) -> None:
    turned = Augmentation(1, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))
    names = ["<blank>", "gravity", turned.name("gravity"), "diagonal"]
    (gravity, diagonal, _) = ARC_PAIRS
    pairs = [gravity, Pair(*map(turned.apply, gravity)), diagonal]
    inputs, labels = (np.concatenate([corner(grid) for grid in grids]) for grids in zip(*pairs, strict=True))
    write_pack(tmp_path, inputs, labels, 12, names)
    assert TASK.shown_identifiers(names).tolist() == [True, True, False, True]

    gravity_task = ArcTask("gravity", [diagonal], [gravity], evaluated=True).to_json()
    (tmp_path / "test_puzzles.json").write_text(json.dumps({"gravity": gravity_task}))
    pack = open_pack(tmp_path, "test")
    evaluator = ArcEvaluator(pack)
    writer = ReportWriter(pack, [evaluator])
    batch = as_batch(inputs, np.where(labels == 0, IGNORE_LABEL_ID, labels.astype(np.int32)))
    batch["puzzle_identifiers"] += 1
    answers = labels.copy()
    answers[2, 0] = 9  # a wrong colour
    q = torch.full((1, 3), 2.0)
    evaluator.add("all", {name: field.numpy() for name, field in batch.items()}, answers, q[0].numpy())
    evaluator.summary([evaluator.state()], tmp_path)
    writer.recorder.add(batch, StepOutputs(torch.from_numpy(answers[None]), q, -q), np.arange(3))
    assert writer.recorder.recording().shown.puzzle_identifiers.tolist() == [1, 3]
    report = writer.write(tmp_path, tmp_path / "step_1", World(0, 1, torch.device("cpu")))
    assert report is not None
    content = embedded(report)
    assert [puzzle["name"] for puzzle in content["puzzles"]] == ["gravity", "diagonal"]
    assert [[vote["votes"] for vote in puzzle["votes"]] for puzzle in content["puzzles"]] == [[2], [1]]
    assert [len(puzzle["demonstrations"]) for puzzle in content["puzzles"]] == [1, 0]
    (tmp_path / "test_puzzles.json").unlink()
    assert demonstrations(pack) == {}

    first, second = content["puzzles"]
    assert first["allVotes"] == 2
    assert first["votes"] == [{"grid": ["012", "345"], "votes": 2, "q": pytest.approx(0.8808, abs=1e-4)}]
    assert first["demonstrations"] == [[["1111111"] * 10, ["".join(map(str, row)) for row in diagonal.output.tolist()]]]
    assert second["votes"][0]["grid"][0] == "700000000"


# --- GIFs -----------------------------------------------------------------------------------------------------------


def frames(file: Path) -> list[Image.Image]:
    with Image.open(file) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def near(color: tuple[int, ...], wanted: str) -> bool:
    """Whether a colour of a palette stands for the wanted one."""
    channels = [int(wanted[start : start + 2], 16) for start in (1, 3, 5)]
    return max(abs(one - other) for one, other in zip(color, channels, strict=True)) < 24


def test_a_gif_has_a_frame_for_each_step(tmp_path: Path) -> None:
    result, view = sudoku(BoxShape(3, 3)), sudoku_view(BoxShape(3, 3))
    write_gif(tmp_path / "a.gif", result.shown, 0, view, seconds=0.5)
    with Image.open(tmp_path / "a.gif") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.info["loop"] == 0
    assert durations == [500] * 7 + [2000]
    assert (tmp_path / "a.gif").stat().st_size < 200_000


def test_a_gif_shows_the_answer_of_each_step(tmp_path: Path) -> None:
    pair = ARC_PAIRS[0]  # the answer has 2x3 cells of 128 pixels, 16 from the top left
    result = arc([pair])
    write_gif(tmp_path / "a.gif", result.shown, 0, ARC_VIEW)
    colors = [
        "#000000",
        "#0074D9",
        "#FF4136",
        "#2ECC40",
        "#FFDC00",
        "#AAAAAA",
        "#F012BE",
        "#FF851B",
        "#7FDBFF",
        "#870C25",
    ]
    for step, frame in enumerate(frames(tmp_path / "a.gif")):
        for cell in range(6):
            row, column = divmod(cell, 3)
            token = result.shown.answers[step, 0, 30 * row + column]
            # Away from the marks in the middle and in the corner.
            place = (16 + 128 * column + 20, 16 + 128 * row + 100)
            assert near(frame.getpixel(place), colors[token - 2]), (step, cell)


def test_a_gif_of_a_maze_follows_the_path(tmp_path: Path) -> None:
    result = maze(8)
    shown = result.shown
    row = int(result.shown.scores.exact[-1].argmax())
    assert shown.scores.exact[-1, row]
    write_gif(tmp_path / "a.gif", shown, row, maze_view(8))
    last = frames(tmp_path / "a.gif")[-1]
    for place, token in np.ndenumerate(shown.labels[row].reshape(8, 8)):
        middle = (16 + 48 * place[1] + 24, 16 + 48 * place[0] + 24)
        wanted = {1: "#454543", 2: "#ffffff", 5: "#0a5fb4"}.get(int(token))
        # A free cell may just have changed.
        assert (
            wanted is None
            or near(last.getpixel(middle), wanted)
            or (token == 2 and near(last.getpixel(middle), "#dcebfa"))
        )


def test_there_is_a_gif_of_each_kind(tmp_path: Path) -> None:
    result = sudoku(BoxShape(2, 2))
    written = write_gifs(tmp_path, result.shown, sudoku_view(BoxShape(2, 2)))
    chosen = {kind: columns[0] for kind, columns in kinds(result.shown.scores, 1).items()}
    assert [file.name for file in written] == [f"{kind}.gif" for kind in chosen]
    for kind, row in chosen.items():
        write_gif(tmp_path / "again.gif", result.shown, row, sudoku_view(BoxShape(2, 2)))
        assert (tmp_path / "again.gif").read_bytes() == (tmp_path / f"{kind}.gif").read_bytes()


def test_gifs_of_anything_else(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", tool_names().shown, 0, tokens_view(TOOLS))
    assert len(frames(tmp_path / "a.gif")) == 4


def test_without_pillow_the_extra_is_named(tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"PIL": None, "PIL.Image": None}),
        pytest.raises(UserError, match=r"GIFs need Pillow: .*\[report\]"),
    ):
        write_gif(tmp_path / "a.gif", tool_names().shown, 0, tokens_view(TOOLS))
