"""`evaluate.py` with early halting, ensembles and reports, against loops written here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from entry_points import CPU, TRAINED_EXAMPLES, evaluated, fresh_state, run_script
from test_evaluate import load_model, raw_split

from hrm.data.sudoku import BoxShape
from hrm.evaluation.ensemble import sudoku_symmetries


@torch.no_grad()
def answer_alone(run: Path, tokens: np.ndarray, margin: float, max_steps: int) -> tuple[np.ndarray, int]:
    """One board until q_halt > q_continue + margin, or the last step: the answer and the steps it took."""
    inner = load_model(run).model.inner
    batch = {"inputs": torch.from_numpy(tokens)[None], "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)}
    state = fresh_state(inner, batch)
    steps = 0
    while steps < max_steps:
        steps += 1
        state = inner.recur(state, inner.prepare(batch))
        q_halt, q_continue = inner.q_values(state)
        if q_halt > q_continue + margin:
            break
    return inner.logits(state)[0].argmax(-1).numpy(), steps


@pytest.mark.parametrize("max_steps", [2, 5])
@pytest.mark.parametrize("early", [1, 30, 59])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_early_halting(early: int, max_steps: int, batch_size: int, trained: Path) -> None:
    """With a margin that so many boards reach at the first step; batches of 7 leave the last slots empty."""
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    model = load_model(run).model.inner
    batch = {"inputs": torch.from_numpy(inputs), "puzzle_identifiers": torch.zeros(len(inputs), dtype=torch.int32)}
    with torch.no_grad():
        state = model.recur(fresh_state(model, batch), model.prepare(batch))
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
    assert "vote of 6 answers, checkpoints: 2, images of each puzzle: 3" in out
    assert metrics["count"] == TRAINED_EXAMPLES
    for name in ("accuracy", "exact_accuracy"):
        assert metrics[f"{name}/of_1"] == metrics[f"{name}/of_2"] == single[name]
    # Both checkpoints are one and the same, so the vote of all is that of three images.
    expected = []
    for board in inputs:
        said = []
        for symmetry in sudoku_symmetries(BoxShape(2, 2), 3):
            image = symmetry.apply(torch.from_numpy(board)[None])[0].numpy()
            answer, _ = answer_alone(run, image, margin=np.inf, max_steps=2)
            said.append(tuple(symmetry.undo(torch.from_numpy(answer)[None])[0].tolist()))
        expected.append(said)
    clear = [len(set(said)) < 3 for said in expected]  # else the q values decide
    assert any(clear)
    exact = [max(said, key=said.count) == tuple(label) for said, label in zip(expected, labels.tolist(), strict=True)]
    unclear = TRAINED_EXAMPLES - sum(clear)
    at_least = sum(right for right, sure in zip(exact, clear, strict=True) if sure)
    found = round(metrics["exact_accuracy/of_6"] * TRAINED_EXAMPLES)
    assert at_least <= found <= at_least + unclear


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["act=early"], "act=early is not a choice; there are: both, full, halt."),
        (
            ["act=halt", "save_outputs=[logits]"],
            "save_outputs= needs every step of every puzzle: take act=full or act=both.",
        ),
        (["act_max_steps=0"], "act_max_steps=0 is too small: give at least 1."),
        (["ensemble.augmentations=0"], "ensemble.augmentations=0 is too small: give at least 1."),
        (["ensemble.augmentations=2", "act=halt"], "ensemble.* does not go with act=: leave one of them out."),
        (["ensemble.checkpoints=[nowhere/x]"], "nowhere/x"),
    ],
)
def test_impossible_modes(options: list[str], said: str, trained: Path) -> None:
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={trained / 'run'}", *options)
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_report(trained: Path, tmp_path: Path) -> None:
    metrics, out = evaluated(f"checkpoint={trained / 'run'}", f"report={tmp_path / 'report'}")
    single, _ = evaluated(f"checkpoint={trained / 'run'}")
    assert metrics == single
    assert f"Wrote {tmp_path / 'report' / 'report.html'}, and GIFs beside it." in out
    assert (tmp_path / "report" / "wrong.gif").read_bytes().startswith(b"GIF89a")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<title>Sudoku, 4 × 4</title>" in page
    assert f"on {trained / 'pack' / 'test'}" in page
