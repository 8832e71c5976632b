"""Runs that start from the weights of another, and weights that are left untrained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hrm.checkpoint.finding import read_tensors
from hrm.checkpoint.weights import PUZZLE_TABLE, read_weights
from hrm.data.builders import arc as build_arc_dataset
from tests.helpers.entry_points import TINY_RUN, Outcome, evaluated, make_pack, run_script
from tests.helpers.training import write_identified_pack

pytestmark = pytest.mark.slow

STEPS = 6  # of TINY_RUN on `write_identified_pack`
HEADS = ["arch.pos_encodings=rope"]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `few` and `many` of packs with 3 and 5 identifiers, `long`, and a run on the first in `run`."""
    root = tmp_path_factory.mktemp("packs")
    write_identified_pack(root / "few", puzzles=3)
    write_identified_pack(root / "many", puzzles=5)
    write_identified_pack(root / "long", puzzles=3, seq_len=25)
    assert run(root, "few", "run", *HEADS).status == 0
    return root


def run(root: Path, pack: str, folder: str, *options: str) -> Outcome:
    return run_script(
        "pretrain.py",
        *TINY_RUN,
        "global_batch_size=4",
        f"data_path={root / pack}",
        f"checkpoint_path={root / folder}",
        "puzzle_emb_lr=1",
        "lr_warmup_steps=1",
        *options,
    )


def weights_of(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return read_weights(folder / f"step_{step}")


def started_from(packs: Path, pack: str, folder: str, *options: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a run that trains nothing but starts from `run`, and what it printed."""
    still = ["lr=0", "weight_decay=0", "puzzle_emb_lr=0", "puzzle_emb_weight_decay=0"]
    outcome = run(packs, pack, folder, *HEADS, f"init_from={packs / 'run'}", *options, *still)
    assert outcome.status == 0, outcome.err
    return weights_of(packs / folder), outcome.out


@pytest.mark.parametrize(
    ("pack", "options", "table", "line"),
    [
        ("few", [], "kept", "Puzzle table: its 4 rows kept."),
        ("many", [], "mean", "Puzzle table: 6 rows, each the mean of the 4 there."),
        ("few", ["init_puzzle_emb=mean"], "mean", "Puzzle table: 4 rows, each the mean of the 4 there."),
        ("many", ["init_puzzle_emb=new"], "zeros", "Puzzle table: 6 rows of zeros in place of the 4 there."),
        ("long", ["init_puzzle_emb=keep"], "kept", "its 4 rows kept, although its rows stood for other identifiers."),
    ],
)
def test_what_is_taken(packs: Path, pack: str, options: list[str], table: str, line: str) -> None:
    had = weights_of(packs / "run")
    now, out = started_from(packs, pack, f"{pack}-{table}", *options)
    assert line in out
    assert "All options of arch are as it had them." in out
    rows = len(now[PUZZLE_TABLE])
    wanted = {
        "kept": had[PUZZLE_TABLE],
        "mean": had[PUZZLE_TABLE].mean(0).expand(rows, -1),
        "zeros": torch.zeros(rows, had[PUZZLE_TABLE].shape[1]),
    }
    assert had[PUZZLE_TABLE].abs().sum() > 0
    torch.testing.assert_close(now[PUZZLE_TABLE], wanted[table], rtol=0, atol=0)
    assert now.keys() == had.keys()
    for name in had.keys() - {PUZZLE_TABLE}:
        assert torch.equal(now[name], had[name]), name


def test_what_is_not_taken_is_told(packs: Path) -> None:
    _, out = started_from(packs, "few", "learned", "arch.pos_encodings=rope+learned", "arch.halt_max_steps=3")
    assert "Not in the file, so as a fresh model has them: embed_pos.embedding_weight." in out
    assert "halt_max_steps=3 (it had 2), pos_encodings=rope+learned (it had rope)" in out


@pytest.mark.parametrize(
    ("pack", "options", "sentence"),
    [
        ("few", ["arch.hidden_size=64"], "give the architecture that it was trained with"),
        ("few", ["arch.L_layers=2"], "this model has L_level.layers.1.mlp.down_proj.weight, which the file does not"),
        ("many", ["init_puzzle_emb=keep"], "init_puzzle_emb=keep needs a pack with as many puzzle identifiers"),
        ("few", ["init_from=nowhere"], "init_from=nowhere does not exist"),
        ("few", ["init_puzzle_emb=median"], "init_puzzle_emb=median is not a choice"),
        ("few", ["freeze=H_levle"], "freeze=H_levle names no weights; did you mean H_level"),
        ("few", ["freeze=trunk,puzzle_emb"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be(packs: Path, pack: str, options: list[str], sentence: str) -> None:
    outcome = run(packs, pack, "refused", *HEADS, f"init_from={packs / 'run'}", *options)
    assert outcome.status == 2
    assert sentence in outcome.err
    assert not (packs / "refused" / "all_config.yaml").exists()


def test_learned_positions_are_of_one_length(packs: Path) -> None:
    assert run(packs, "few", "learned-run").status == 0
    outcome = run(packs, "long", "refused", f"init_from={packs / 'learned-run'}")
    assert outcome.status == 2
    assert "positions are learned" in outcome.err


def test_another_vocabulary(packs: Path, tmp_path: Path) -> None:
    write_identified_pack(tmp_path / "wide", puzzles=3, vocab_size=9)
    outcome = run(tmp_path, "wide", "refused", f"init_from={packs / 'run'}")
    assert outcome.status == 2
    assert "has a vocabulary of 6 tokens, but" in outcome.err


def test_optimizers_are_fresh_and_weights_alone_will_do(packs: Path, tmp_path: Path) -> None:
    file = tmp_path / "step_6"
    file.write_bytes((packs / "run" / "step_6").read_bytes())
    outcome = run(packs, "few", "alone", *HEADS, f"init_from={file}")
    assert outcome.status == 0, outcome.err
    assert "No all_config.yaml lies beside it" in outcome.out
    assert "for 6 steps of 4 puzzles" in outcome.out


def test_a_frozen_trunk_stays_and_the_table_learns(packs: Path) -> None:
    outcome = run(packs, "few", "frozen", *HEADS, f"init_from={packs / 'run'}", "freeze=trunk", "grad_clip=1")
    assert outcome.status == 0, outcome.err
    count = len(weights_of(packs / "run").keys() - {"model.inner.H_init", "model.inner.L_init", PUZZLE_TABLE})
    assert f"Frozen: {count} weights of" in outcome.out
    had, now = weights_of(packs / "run"), weights_of(packs / "frozen")
    changed = {name for name in had if not torch.equal(had[name], now[name])}
    assert changed == {PUZZLE_TABLE}


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        ("L_level", ["L_level."]),
        ("*.mlp.*,lm_head", ["L_level.layers.0.mlp.", "H_level.layers.0.mlp.", "lm_head."]),
        ("puzzle_emb", ["puzzle_emb."]),
    ],
)
def test_names_that_are_frozen(packs: Path, patterns: str, prefixes: list[str]) -> None:
    folder = f"frozen-{prefixes[0]}"
    outcome = run(packs, "few", folder, *HEADS, f"init_from={packs / 'run'}", f"freeze={patterns}")
    assert outcome.status == 0, outcome.err
    had, now = weights_of(packs / "run"), weights_of(packs / folder)
    state = read_tensors(packs / folder / "state_6")
    for name in had:
        kept = name.removeprefix("model.inner.").startswith((*prefixes, "H_init", "L_init"))
        assert torch.equal(had[name], now[name]) is kept, name
        has_moments = not kept and name != PUZZLE_TABLE
        assert (f"moments.exp_avg.{name}" in state) is has_moments, name


@pytest.mark.parametrize("freeze", ["trunk", "L_level,lm_head"])
def test_a_stopped_run_goes_on_without_the_weights_it_came_from(packs: Path, tmp_path: Path, freeze: str) -> None:
    """The same bits as the run that was not stopped, the weights it came from gone."""
    init = tmp_path / "init"
    init.mkdir()
    for name in ("step_6", "all_config.yaml"):
        (init / name).write_bytes((packs / "run" / name).read_bytes())
    options = [*HEADS, f"init_from={init}", f"freeze={freeze}", "epochs=4", "eval_interval=2", "ema_decay=0.9"]
    assert run(packs, "few", f"whole-{freeze}", *options).status == 0
    assert run(packs, "few", f"half-{freeze}", *options).status == 0
    (packs / f"half-{freeze}" / "state_12").rename(tmp_path / "state_12")
    (init / "step_6").unlink()
    outcome = run(packs, "few", f"half-{freeze}", *options, "resume=auto")
    assert outcome.status == 0, outcome.err
    assert "Going on from" in outcome.out
    whole, half = (weights_of(packs / f"{kind}-{freeze}", 12) for kind in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_other_weights_cannot_be_frozen_halfway(packs: Path) -> None:
    options = [*HEADS, "epochs=4", "eval_interval=2"]
    assert run(packs, "few", "thawed", *options).status == 0
    outcome = run(packs, "few", "thawed", *options, "resume=auto", "freeze=trunk")
    assert outcome.status == 2
    assert "cannot go on with freeze=trunk" in outcome.err


def test_another_task(tmp_path: Path) -> None:
    make_pack(tmp_path / "sudoku")
    assert run(tmp_path, "sudoku", "run").status == 0
    write_identified_pack(tmp_path / "other", puzzles=3)
    (tmp_path / "other" / "provenance.json").write_text('{"task": "tokens"}')
    outcome = run(tmp_path, "other", "refused", f"init_from={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "was trained on the task sudoku, but" in outcome.err


def test_unseen_puzzles_are_scored_by_the_mean_of_the_table(packs: Path) -> None:
    options = [f"checkpoint={packs / 'run'}", f"data_path={packs / 'many'}"]
    outcome = run_script("evaluate.py", "device=cpu", *options)
    assert outcome.status == 2
    assert "add puzzle_emb=mean" in outcome.err
    _, out = evaluated(*options, "puzzle_emb=mean")
    assert "Every puzzle has the mean of the puzzle table's rows" in out


def test_puzzle_emb_is_what_the_model_has(packs: Path) -> None:
    """A run whose table was set so, evaluated as it is, has the same metrics."""
    for how, init in (("mean", "mean"), ("zero", "new")):
        started_from(packs, "few", f"set-{how}", f"init_puzzle_emb={init}")
        set_so, _ = evaluated(f"checkpoint={packs / f'set-{how}'}")
        asked, _ = evaluated(f"checkpoint={packs / 'run'}", f"puzzle_emb={how}")
        assert asked == set_so
        assert asked != evaluated(f"checkpoint={packs / 'run'}")[0]


def write_arc_tasks(folder: Path, names: str, rng: np.random.Generator) -> None:
    """Tasks that exchange the colours 1 and 2: the first in `training`, the others in `evaluation`."""
    for index, name in enumerate(names):
        pairs = [{"input": (grid := rng.integers(1, 3, (3, 3))).tolist(), "output": (3 - grid).tolist()} for _ in "abc"]
        split = folder / ("training" if index == 0 else "evaluation")
        split.mkdir(parents=True, exist_ok=True)
        (split / f"{name * 4}0001.json").write_text(json.dumps({"train": pairs[:2], "test": pairs[2:]}))


def test_adapting_to_arc_tasks_that_were_not_trained_on(tmp_path: Path) -> None:
    """Train, build a pack of unseen tasks, train the table on their demonstration pairs, and let the votes answer."""
    rng = np.random.default_rng(0)
    for pack, names in (("seen", "abc"), ("unseen", "abde")):
        write_arc_tasks(tmp_path / f"{pack}-tasks", names, rng)
        argv = ["--dataset-dirs", str(tmp_path / f"{pack}-tasks"), "--num-aug", "2", "--workers", "1"]
        assert build_arc_dataset.main([*argv, "--output-dir", str(tmp_path / pack)]) == 0
    options = ["arch.pos_encodings=rope", "epochs=4", "eval_interval=4"]
    outcome = run(tmp_path, "seen", "run", *options)
    assert outcome.status == 0, outcome.err
    outcome = run(tmp_path, "unseen", "adapted", *options, f"init_from={tmp_path / 'run'}", "freeze=trunk")
    assert outcome.status == 0, outcome.err
    assert "each the mean of the" in outcome.out
    adapted = next(step for step in (tmp_path / "adapted").glob("step_*") if "." not in step.name)
    table = read_weights(adapted)[PUZZLE_TABLE]
    assert len(table.unique(dim=0)) > 2  # rows have gone ways of their own
    metrics, out = evaluated(f"checkpoint={tmp_path / 'adapted'}")
    assert metrics["count"] > 0
    assert "submission.json" in out
    submission = json.loads((tmp_path / "adapted" / "submission.json").read_text())
    assert sorted(submission) == ["bbbb0001", "dddd0001", "eeee0001"]
    assert all(set(attempts) == {"attempt_1", "attempt_2"} for (attempts,) in submission.values())
