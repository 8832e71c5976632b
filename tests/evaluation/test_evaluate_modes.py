"""`evaluate.py` with early halting, ensembles and reports, against loops written here."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hrm.reading import sha256_of
from hrm.results import open_store
from tests.helpers.entry_points import CPU, TRAINED_EXAMPLES, evaluated, run_script
from tests.helpers.evaluation import answers_to_images, load_model, raw_split, run_ranks
from tests.helpers.models import fresh_states

pytestmark = pytest.mark.slow


@torch.no_grad()
def answer_alone(run: Path, tokens: np.ndarray, margin: float, max_steps: int) -> tuple[np.ndarray, int]:
    """One board until q_halt > q_continue + margin, or the last step: the answer and the steps it took."""
    inner = load_model(run).model.inner
    batch = {"inputs": torch.from_numpy(tokens)[None], "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)}
    state = fresh_states(inner, batch)
    steps = 0
    while steps < max_steps:
        steps += 1
        state = inner.recur(state, inner.prepare(batch))
        q_halt, q_continue = inner.q_values(state)
        if q_halt > q_continue + margin:
            break
    return inner.logits(state)[0].argmax(-1).numpy(), steps


@pytest.mark.parametrize(
    ("early", "max_steps", "batch_size"), [(1, 5, 1), (1, 2, 7), (30, 2, 1), (30, 5, 7), (59, 5, 7), (59, 2, 7)]
)
def test_early_halting(early: int, max_steps: int, batch_size: int, trained: Path) -> None:
    """With a margin that so many boards reach at the first step; batches of 7 leave the last slots empty."""
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    model = load_model(run).model.inner
    batch = {"inputs": torch.from_numpy(inputs), "puzzle_identifiers": torch.zeros(len(inputs), dtype=torch.int32)}
    with torch.no_grad():
        state = model.recur(fresh_states(model, batch), model.prepare(batch))
        q_halt, q_continue = model.q_values(state)
    advantage = (q_halt - q_continue).sort(descending=True).values
    margin = float(advantage[early - 1 : early + 1].mean())  # between two boards, so that rounding decides nothing
    alone = [answer_alone(run, board, margin, max_steps) for board in inputs]
    metrics, out = evaluated(
        f"checkpoint={run}",
        f"global_batch_size={batch_size}",
        "act=halt",
        f"act_margin={margin}",
        f"act_max_steps={max_steps}",
    )
    assert "as many steps as q_halt asks for" in out
    assert metrics["count"] == TRAINED_EXAMPLES
    assert metrics["steps"] == pytest.approx(np.mean([steps for _, steps in alone]), abs=1e-4)
    right = np.array([answer == label for (answer, _), label in zip(alone, labels, strict=True)])
    assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert metrics["exact_accuracy"] == pytest.approx(right.all(1).mean(), abs=1e-4)


def test_both_modes_are_printed(trained: Path) -> None:
    _, out = evaluated(f"checkpoint={trained / 'run'}", "act=both", "act_margin=1e9")
    full, early = out.split("as many steps as q_halt asks for")
    for name in ("exact_accuracy", "accuracy", "steps", "q_halt_accuracy"):
        line = next(line for line in full.splitlines() if f"all/{name} " in line)
        assert line.split()[-1] in early, name  # nobody may halt, so nothing differs
    assert out.count("puzzles/s") == 2


def test_ensemble(trained: Path) -> None:
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    single, _ = evaluated(f"checkpoint={run}")
    metrics, out = evaluated(f"checkpoint={run}", f"ensemble.checkpoints=[{run}]", "ensemble.augmentations=3")
    assert "vote of 6 answers, checkpoints: 2, augmentations of each puzzle: 3" in out
    assert metrics["count"] == TRAINED_EXAMPLES
    for name in ("accuracy", "exact_accuracy"):
        assert metrics[f"{name}/of_1"] == metrics[f"{name}/of_2"] == single[name]
    # Both checkpoints are one and the same, so the vote of all is that of three images.
    model = load_model(run)
    expected = [[tuple(answer.tolist()) for answer in answers_to_images(model, board, 3)] for board in inputs]
    clear = [len(set(said)) < 3 for said in expected]  # else the q values decide
    assert any(clear)
    exact = [max(said, key=said.count) == tuple(label) for said, label in zip(expected, labels.tolist(), strict=True)]
    unclear = TRAINED_EXAMPLES - sum(clear)
    at_least = sum(right for right, sure in zip(exact, clear, strict=True) if sure)
    found = round(metrics["exact_accuracy/of_6"] * TRAINED_EXAMPLES)
    assert at_least <= found <= at_least + unclear


def test_rules_decide_before_votes_do(trained: Path) -> None:
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    plain, _ = evaluated(f"checkpoint={run}", "ensemble.augmentations=6")
    checked, out = evaluated(f"checkpoint={run}", "ensemble.augmentations=6", "ensemble.check=true")
    assert "augmentations of each puzzle: 6, rules checked" in out
    assert checked["exact_accuracy/of_1"] == plain["exact_accuracy/of_1"]
    # Each puzzle has one solution only, so a single right answer among the six is enough.
    model = load_model(run)
    solved = sum(
        any((answer == label).all() for answer in answers_to_images(model, board, 6))
        for board, label in zip(inputs, labels, strict=True)
    )
    assert round(checked["exact_accuracy/of_6"] * TRAINED_EXAMPLES) == solved
    assert checked["exact_accuracy/of_6"] > plain["exact_accuracy/of_6"]


def test_paths(trained: Path) -> None:
    """The first of them is the model as it is, the others do not depend on the batch, and every way is in the table."""
    run = trained / "run"
    single, _ = evaluated(f"checkpoint={run}")
    asked = [f"checkpoint={run}", "ensemble.paths=3", "ensemble.noise=2", "ensemble.noise_on=all"]
    metrics, out = evaluated(*asked, "ensemble.pick=q", "global_batch_size=60")
    assert "highest q_halt of 3 answers, checkpoints: 1, augmentations of each puzzle: 1, paths: 3, " in out
    assert [metrics[f"{name}/of_1"] for name in ("accuracy", "exact_accuracy")] == [
        single[name] for name in ("accuracy", "exact_accuracy")
    ]
    table = [line.split() for line in out.split("ACT steps for each puzzle:\n")[1].splitlines()[:4]]
    assert table[0] == ["answers", "ACT", "steps", "vote", "q", "converged", "any", "first", "ACT", "steps"]
    assert [row[:2] for row in table[1:]] == [["1", "2.0"], ["2", "4.0"], ["3", "6.0"]]
    assert float(table[3][3].rstrip("%")) == pytest.approx(100 * metrics["exact_accuracy/of_3"], abs=0.01)
    assert len({tuple(row[2:6]) for row in table[1:]}) > 1, "paths differ"
    assert all(float(row[5].rstrip("%")) >= max(float(cell.rstrip("%")) for cell in row[2:5]) for row in table[1:])
    assert all(float(row[-1]) <= float(row[1]) for row in table[1:])
    for pick, batch_size in (("converged", 7), ("first", 60)):
        again, other = evaluated(*asked, f"ensemble.pick={pick}", f"global_batch_size={batch_size}")
        assert [line.split() for line in other.split("ACT steps for each puzzle:\n")[1].splitlines()[:4]] == table
        column = 4 if pick == "converged" else 6
        assert float(table[3][column].rstrip("%")) == pytest.approx(100 * again["exact_accuracy/of_3"], abs=0.01)


@pytest.fixture
def described(trained: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, list[str]]]:
    """A run, the pack of `trained` with ratings and sources stored in it, and what these say of each test puzzle.

    The last two puzzles are made equal, and say different things; the one before has no label.
    """
    pack = shutil.copytree(trained / "pack", tmp_path / "described")
    inputs, labels = (np.load(pack / "test" / f"all__{name}.npy") for name in ("inputs", "labels"))
    inputs[-1], labels[-1], labels[-3] = inputs[-2], labels[-2], 0
    said = {
        "difficulty rating": [str(rating) for rating in np.random.default_rng(0).integers(1, 6, len(inputs))],
        "source": ["some where"] * 5 + ["elsewhere"] * (len(inputs) - 6) + ["nearby"],
    }
    ratings, sources = np.array(said["difficulty rating"]).astype(int), np.array(said["source"])
    for name, array in {"inputs": inputs, "labels": labels, "ratings": ratings, "sources": sources}.items():
        np.save(pack / "test" / f"all__{name}.npy", array)
    return trained / "run", pack, said


def counted_by_hand(pack: Path, answers: np.ndarray, said: dict[str, list[str]]) -> dict[str, list[str]]:
    """The lines that `evaluate.py` should print under each heading, in order, blanks between words set to one."""
    labels = np.load(pack / "test" / "all__labels.npy")
    tables = {}
    for name, values in said.items():
        exact: dict[str, list[bool]] = {}
        for value, answer, label in zip(values, answers, labels, strict=True):
            if label.any():
                exact.setdefault(value, []).append(bool((answer == label).all()))
        ordered = sorted(exact, key=lambda value: value if name != "source" else -len(exact[value]))
        tables[name] = [f"{v} {100 * sum(exact[v]) / len(exact[v]):.2f} % of {len(exact[v])}" for v in ordered]
    return tables


def printed_tables(out: str) -> dict[str, list[str]]:
    tables: dict[str, list[str]] = {}
    rows: list[str] | None = None
    for line in out.splitlines():
        if match := re.fullmatch("  Exact answers by (.*):", line):
            rows = tables.setdefault(match[1], [])
        elif not line.startswith("    "):
            rows = None  # other tables follow
        elif rows is not None:
            rows.append(" ".join(line.split()))
    return tables


@pytest.mark.slow
@pytest.mark.parametrize("margin", [-1e9, 1e9])
def test_accuracy_by_rating_and_source(
    margin: float, described: tuple[Path, Path, dict[str, list[str]]], tmp_path: Path
) -> None:
    run, pack, said = described
    options = [f"checkpoint={run}", f"data_path={pack}", "global_batch_size=7"]
    inputs = np.load(pack / "test" / "all__inputs.npy").astype(np.int32)
    full = np.stack([answer_alone(run, board, np.inf, 2)[0] for board in inputs])
    early = np.stack([answer_alone(run, board, margin, 2)[0] for board in inputs])
    _, out = evaluated(*options, "act=both", f"act_margin={margin}", f"report={tmp_path}")
    parts = out.split("as many steps as q_halt asks for")
    assert [printed_tables(part) for part in parts] == [counted_by_hand(pack, each, said) for each in (full, early)]
    assert '"bySource":{"name":"source","bars":[{"label":"elsewhere"' in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_votes_and_ranks_are_counted_by_rating_and_source(described: tuple[Path, Path, dict[str, list[str]]]) -> None:
    run, pack, said = described
    options = [f"checkpoint={run}", f"data_path={pack}", "global_batch_size=8"]
    inputs = np.load(pack / "test" / "all__inputs.npy").astype(np.int32)
    expected = counted_by_hand(pack, np.stack([answer_alone(run, board, np.inf, 2)[0] for board in inputs]), said)
    _, voted = evaluated(*options, f"ensemble.checkpoints=[{run}]")  # which says the same twice
    assert printed_tables(voted) == expected
    out = run_ranks(2, *options)
    assert [printed_tables(each) for each in out] == [expected, {}]


def test_packs_that_tell_nothing_get_no_table(trained: Path) -> None:
    _, out = evaluated(f"checkpoint={trained / 'run'}")
    assert "Exact answers by" not in out


def test_a_list_of_ratings_cut_short(described: tuple[Path, Path, dict[str, list[str]]]) -> None:
    run, pack, _ = described
    np.save(file := pack / "test" / "all__ratings.npy", np.arange(59))
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={run}", f"data_path={pack}")
    assert outcome.status == 2
    assert f"{file} has shape (59,) of int64, but its set has 60 examples" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["act=early"], "act=early is not a choice; there are: auto, both, full, halt."),
        (
            ["act=halt", "save_outputs=[logits]"],
            "save_outputs= needs every step of every puzzle: take act=full or act=both.",
        ),
        (["act_max_steps=0"], "act_max_steps=0 is too small: give at least 1."),
        (["ensemble.augmentations=0"], "ensemble.augmentations=0 is too small: give at least 1."),
        (["ensemble.augmentations=2", "act=halt"], "ensemble.* cannot be used with act=: leave one of them out."),
        (["ensemble.checkpoints=[nowhere/x]"], "nowhere/x"),
        (["puzzle=1...............", "show=1"], "puzzle= cannot be used with show=: leave one of them out."),
        (["puzzle=1...............", "act=both"], "puzzle= cannot be used with act=: leave one of them out."),
    ],
)
def test_impossible_modes(options: list[str], said: str, trained: Path) -> None:
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={trained / 'run'}", *options)
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_rules_need_a_task_that_has_some(trained: Path, tmp_path: Path) -> None:
    pack = shutil.copytree(trained / "pack", tmp_path / "pack")
    (pack / "provenance.json").write_text('{"task": "tokens"}')
    options = [f"checkpoint={trained / 'run'}", f"data_path={pack}", "ensemble.check=true"]
    outcome = run_script("evaluate.py", *CPU, *options)
    assert outcome.status == 2
    assert (
        f"error: ensemble.check=true needs a task with known rules, and {pack} holds tokens, which has none"
        in outcome.err
    )


def test_report(trained: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    metrics, out = evaluated(f"checkpoint={trained / 'run'}", f"report={tmp_path / 'report'}", f"results={url}")
    (recorded,) = open_store(url).evaluations()[0].artifacts
    page_file = tmp_path / "report" / "report.html"
    assert (recorded.kind, recorded.place, recorded.hash) == ("report", str(page_file), sha256_of(page_file))
    single, _ = evaluated(f"checkpoint={trained / 'run'}")
    assert metrics == single
    assert f"Wrote {tmp_path / 'report' / 'report.html'}, and GIFs beside it." in out
    assert (tmp_path / "report" / "wrong.gif").read_bytes().startswith(b"GIF89a")
    page = page_file.read_text()
    assert "<title>Sudoku, 4 × 4</title>" in page
    assert f"on {trained / 'pack' / 'test'}" in page
