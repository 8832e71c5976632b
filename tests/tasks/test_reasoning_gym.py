"""Packs of Reasoning Gym's puzzles, scored by its own verifiers."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.builders import reasoning_gym as builder
from hrm.data.pack import open_pack
from hrm.errors import UserError
from hrm.tasks import form_of, task_of
from hrm.tasks.form import PuzzleForm
from hrm.tasks.reasoning_gym import Generator, Origin, Verified
from hrm.tasks.text import TextTokens
from hrm.tasks.tokens import read_vocabulary
from tests.helpers.entry_points import CPU, TINY_MODEL, run_script

pytest_gym = pytest.importorskip(
    "reasoning_gym", reason="Reasoning Gym is not installed: pip install --no-deps -r scripts/reasoning-gym.txt"
)

SETTINGS = {
    "n_queens": "n=5 min_remove=2 max_remove=5",
    "rush_hour": "max_moves=3",
    "shortest_path": "max_rows=5 max_cols=5",
}


def run(folder: Path, task: str, *arguments: object) -> Path:
    command = ["--task", task, "--output-dir", folder, "--train-size", 24, "--test-size", 6, *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "check_reproducible", lambda *_: None)  # tested by itself: it takes seconds
        assert builder.main(list(map(str, command))) == 0
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gym")
    return {task: run(folder / task, task, "--set", *settings.split()) for task, settings in SETTINGS.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("task", SETTINGS)
def test_pack(task: str, packs: dict[str, Path]) -> None:
    """Rows are the generator's puzzles, each once, with answers that its verifier accepts."""
    folder = packs[task]
    origin, tokens = Origin.read(folder), TextTokens(read_vocabulary(folder / "vocabulary.json").symbols)
    generator = Generator(task, origin.settings, origin.seed, origin.size)
    seen = []
    for split, count in (("train", 24), ("test", 6)):
        pack = open_pack(folder, split)
        data = pack.sets["all"]
        assert len(data.inputs) == count
        assert task_of(pack).name == "reasoning_gym"
        seen += [row.tobytes() for row in data.inputs]
    assert len(set(seen)) == 30
    form = form_of(pack)
    assert form.template == origin.template
    for number, inputs, labels in zip(origin.test, data.inputs, data.labels, strict=True):
        entry = generator.puzzle(number)
        assert task_of(pack).read_input(entry["question"], form).tolist() == inputs.tolist()
        assert generator.score(tokens.text(labels), entry) == 1
        if entry["answer"] is not None:
            assert tokens.text(labels) == entry["answer"]
    assert json.loads((folder / "provenance.json").read_text())["arguments"]["set"] == SETTINGS[task].split()


def test_same_seed_same_bytes(packs: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS["n_queens"].split()
    again, other = (run(tmp_path / str(seed), "n_queens", "--set", *settings, "--seed", seed) for seed in (42, 43))
    assert contents(again) == contents(packs["n_queens"])
    assert contents(other)["train/all__inputs.npy"] != contents(again)["train/all__inputs.npy"]


def verified(folder: Path, answers: Any) -> str:
    """What the evaluator says of answers to the test puzzles, half of them seen by another process."""
    pack = open_pack(folder, "test")
    data = pack.sets["all"]
    evaluators = [Verified(pack), Verified(pack)]
    for evaluator, rows in zip(evaluators, (slice(None, 3), slice(3, None)), strict=True):
        puzzles = {"inputs": data.inputs[rows], "labels": data.labels[rows]}
        evaluator.add("all", puzzles, answers[rows], np.zeros(3))
    return evaluators[0].summary([evaluator.state() for evaluator in evaluators], folder)


@pytest.mark.parametrize("task", SETTINGS)
def test_labels_are_accepted_and_others_are_not(task: str, packs: dict[str, Path]) -> None:
    labels = open_pack(packs[task], "test").sets["all"].labels
    line = f"answers are accepted by Reasoning Gym's verifier of {task}; mean score"
    assert verified(packs[task], labels) == f"  all: 100.00 % of 6 {line} 1.000."
    wrong = np.roll(labels, 1, axis=0)
    (share,) = re.findall(r"all: (\S+) % of 6 ", verified(packs[task], np.where(np.arange(6)[:, None] < 3, labels, 0)))
    assert share == "50.00"
    assert "100.00 %" not in verified(packs[task], wrong)


def test_other_right_answers_than_the_label_are_accepted(packs: dict[str, Path]) -> None:
    """Every board of five queens that keeps what is given."""
    folder = packs["n_queens"]
    labels = open_pack(folder, "test").sets["all"].labels
    origin, tokens = Origin.read(folder), TextTokens(read_vocabulary(folder / "vocabulary.json").symbols)
    generator = Generator("n_queens", origin.settings, origin.seed, origin.size)
    answers = labels.copy()
    for row, number in enumerate(origin.test):
        puzzle = generator.puzzle(number)["metadata"]["puzzle"]
        for places in itertools.permutations(range(5)):
            is_right = all(abs(places[i] - places[j]) != j - i for i, j in itertools.combinations(range(5), 2))
            keeps = all(column == places[line] for line, column in np.argwhere(np.array(puzzle) == "Q"))
            text = "\n".join(" ".join("Q" if column == place else "_" for column in range(5)) for place in places)
            if is_right and keeps and tokens.answer(text) != labels[row][labels[row] > 0].tolist():
                answers[row, : len(text)] = tokens.answer(text)[:-1]
    differ = (answers != labels).any(1)
    assert differ.sum() > 0
    assert verified(folder, answers).startswith("  all: 100.00 % of 6 answers are accepted")


def test_answers_of_other_symbols_are_not_evaluated(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier of n_queens would evaluate them as Python."""
    folder = packs["n_queens"]
    asked = []
    monkeypatch.setattr(Generator, "score", lambda self, answer, entry: asked.append(answer) or 0.0)
    labels = open_pack(folder, "test").sets["all"].labels.copy()
    symbols = read_vocabulary(folder / "vocabulary.json").symbols
    labels[:2, 0] = symbols.index("2") + 1
    assert "0.00 % of 6 answers" in verified(folder, labels)
    assert len(asked) == 4
    assert set().union(*map(set, asked)) == set("_Q \n")


def test_without_the_extra_and_with_another_version(
    packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = open_pack(packs["n_queens"], "test").sets["all"].labels
    other = tmp_path / "other"
    for name, content in contents(packs["n_queens"]).items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(content)
    origin = json.loads((other / "reasoning_gym.json").read_text())
    (other / "reasoning_gym.json").write_text(json.dumps(origin | {"seed": 1000}))
    assert re.fullmatch(
        r"  all: \d answers were not verified: the version that is installed generates other puzzles than \S+, .*",
        verified(other, labels).splitlines()[-1],
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    told = verified(packs["n_queens"], labels)
    assert told.startswith("  all: 6 answers were not verified: Reasoning Gym is not installed (")
    for change in ({"test": [-1]}, {"size": 10**9}, {"template": [1]}, {"settings": []}):
        (other / "reasoning_gym.json").write_text(json.dumps(origin | change))
        with pytest.raises(UserError, match=r"reasoning_gym\.json cannot be read"):
            Origin.read(other)
    (other / "reasoning_gym.json").write_text(json.dumps(origin))
    (other / "vocabulary.json").write_text('[null, "a"]')
    with pytest.raises(UserError, match=r"vocabulary\.json names 2 tokens, but the pack has \d+"):
        Verified(open_pack(other, "test"))


# What makes no pack.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--task n_queen", "Reasoning Gym has no generator n_queen; did you mean n_queens?"),
        (
            "--task n_queens --set size=6",
            "size is how many puzzles n_queens has: leave it out of its settings, the settin",
        ),
        ("--task n_queens --set m=6", "n_queens has no setting m; it has the settings n, min_remove, max_remove."),
        (
            "--task n_queens --set n=3",
            "n_queens does not work with n=3 (n must be between 4 and 12); it has the settings",
        ),
        ("--task n_queens --set n", "--set n is no setting; write name=value"),
        (
            "--task countdown",
            "countdown makes no pack: its verifier evaluates answers as Python, and their symbols can",
        ),
        ("--task boxnet", "boxnet makes no pack: it gives no answers, only verifies them"),
        ("--task gcd --max-symbols 6", "gcd makes no pack: it has "),
        ("--task n_queens --max-length 60", "its answers have more than the 60 characters of --max-length"),
        ("--task shortest_path --max-length 30", "characters or more, and --max-length is 30"),
        ("--task coin_flip --set max_trials=3", "different questions that fit, and 30 are wanted: lower --train-size"),
        (
            "--task arc_1d --max-length 250",
            "that were drawn have no more characters than --max-length, 250: raise that, or",
        ),
        ("--list --set a=1", "--set does not apply to --list; leave it out"),
        ("--list --task gcd", "Give one of --task and --list"),
        ("", "Give one of --task and --list"),
    ],
)
def test_refusals(
    arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "check_reproducible", lambda *_: None)
    sizes = (
        []
        if "--list" in arguments
        else ["--train-size", "24", "--test-size", "6", "--output-dir", str(tmp_path / "pack")]
    )
    assert builder.main([*arguments.split(), *sizes]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()


@pytest.mark.slow
def test_generators_with_random_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order of sets, and by a generator that all share."""
    jobs = [
        builder.Job(name, {}, 1, 40, list(range(20)))
        for name in ("n_queens", "polynomial_multiplication", "list_functions")
    ]
    found = builder.texts_elsewhere(jobs)
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] != found[1][1] or found[0][1] != found[2][1], "sets have an order of their own in each process"
    for number, job in enumerate(jobs):
        there = [[process[number]] for process in found]
        monkeypatch.setattr(builder, "texts_elsewhere", lambda _, there=there: there)
        if job.name == "n_queens":
            builder.check_reproducible(job, Generator(*job[:4]))
        else:
            with pytest.raises(builder.Misfit, match="it generates other puzzles each time"):
                builder.check_reproducible(job, Generator(*job[:4]))


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = pytest_gym.factory.DATASETS
    chosen = {name: known[name] for name in ("gcd", "countdown", "n_queens")}
    monkeypatch.setattr(pytest_gym.factory, "DATASETS", chosen)
    assert builder.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^n_queens +12\d +127 +\d+$", out, re.MULTILINE)
    assert re.search(r"^gcd +\d+ +\d +\d+$", out, re.MULTILINE)
    assert "These make none:\ncountdown                   its verifier evaluates answers as Python" in out


# From the shell.


@pytest.mark.slow
@pytest.mark.parametrize("task", SETTINGS)
def test_toy_path(task: str, packs: dict[str, Path], tmp_path: Path) -> None:
    """Train, evaluate with the verifier's share beside the exact match, and answer a question."""
    train = ["epochs=2", "eval_interval=2", "global_batch_size=12", "lr=1e-3", "lr_warmup_steps=1", "wandb=disabled"]
    outcome = run_script(
        "pretrain.py", *TINY_MODEL, *CPU, *train, f"data_path={packs[task]}", f"checkpoint_path={tmp_path / 'run'}"
    )
    assert outcome.status == 0, outcome.err
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    assert re.search(r"all/exact_accuracy +0\.\d{4}", outcome.out)
    assert re.search(
        rf"all: \d+\.\d\d % of 6 answers are accepted by Reasoning Gym's verifier of {task}; ", outcome.out
    )
    origin = Origin.read(packs[task])
    question = Generator(task, origin.settings, origin.seed, origin.size).puzzle(origin.test[0])["question"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"question": question}) + "\n" + json.dumps({"question": "?"}) + "\n")
    outcome = run_script(
        "evaluate.py",
        *CPU,
        f"checkpoint={tmp_path / 'run'}",
        f"input={tmp_path / 'in.jsonl'}",
        f"output={tmp_path / 'out.jsonl'}",
    )
    answer, refused = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert isinstance(answer["answer"], str)
    assert "error" in refused
    form = json.loads((tmp_path / "run" / "task.json").read_text())
    assert PuzzleForm.from_json(form, "task.json").template == origin.template
