"""`evaluate.py` on a small trained model: its numbers against a loop written here, and all that it prints and saves."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from torch import Tensor

from hrm.batch import IGNORE_LABEL_ID
from hrm.checkpoint.weights import find_checkpoint, read_weights
from hrm.config import SAVEABLE_OUTPUTS
from hrm.data.identity import pack_identity
from hrm.data.loader import EvalLoader
from hrm.data.pack import open_pack
from hrm.distributed.world import World
from hrm.evaluation import paths
from hrm.evaluation.runner import evaluate
from hrm.models import ACTLossHead
from hrm.reading import sha256_of
from hrm.results import open_store
from tests.helpers.entry_points import (
    CPU,
    TINY_RUN,
    TRAINED_EXAMPLES,
    evaluated,
    make_pack,
    printed_metrics,
    run_script,
    train,
)
from tests.helpers.evaluation import answers_to_images, load_model, raw_split, run_ranks, think_alone

ALONE = World(0, 1, torch.device("cpu"))


def saved_by(folder: Path, step: int, rank: int = 0) -> dict[str, Tensor]:
    saved = torch.load(folder / f"step_{step}_all_preds.{rank}", weights_only=True)
    assert isinstance(saved, dict)
    return saved


# --- metrics ---------------------------------------------------------------------------------------------------------


def reference_metrics(model: ACTLossHead, pack: Path) -> dict[str, float]:
    """Spec section 3, board by board in numpy, but for the loss of the rows that fill the last batch: it has none."""
    sums = dict.fromkeys(("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss"), 0.0)
    inputs, labels = raw_split(pack)
    for board, answer in zip(inputs, labels, strict=True):
        logits, q_halt = think_alone(model, board)
        right = logits.argmax(-1) == answer
        exact = bool(right.all())
        s = np.where(logits >= 0, logits + 1, 1 / (1 - np.minimum(logits, 0)))
        probabilities = (s / s.sum(-1, keepdims=True))[np.arange(len(answer)), answer]
        sums["accuracy"] += right.mean()
        sums["exact_accuracy"] += exact
        sums["q_halt_accuracy"] += (q_halt >= 0) == exact
        sums["steps"] += model.halt_max_steps
        sums["lm_loss"] -= np.log(probabilities).mean()
        sums["q_halt_loss"] += math.log1p(math.exp(-q_halt if exact else q_halt))
    return {"count": len(inputs)} | {name: value / len(inputs) for name, value in sums.items()}


@pytest.mark.parametrize("batch_size", [12, 7, 1, 100])
def test_metrics_agree_with_a_plain_loop(batch_size: int, trained: Path) -> None:
    model = load_model(trained / "run")
    metrics, _ = evaluate(model, EvalLoader(open_pack(trained / "pack", "test"), batch_size), ALONE)
    expected = reference_metrics(model, trained / "pack")
    assert metrics["all"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["exact_accuracy"] < 1, "the model should solve some boards and not others"


def test_ignored_labels_count_in_nothing(trained: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(trained / "pack", tmp_path / "pack"))
    labels = np.load(pack / "test" / "all__labels.npy")
    inputs = np.load(pack / "test" / "all__inputs.npy")
    labels[inputs > 1] = 0  # only the blank cell is asked for
    labels[:5] = 0  # and nothing of these boards
    np.save(pack / "test" / "all__labels.npy", labels)
    model = load_model(trained / "run")
    metrics, _ = evaluate(model, EvalLoader(open_pack(pack, "test"), 12), ALONE)
    thoughts = [think_alone(model, board.astype(np.int64)) for board in inputs[5:]]
    exact = (np.stack([logits.argmax(-1) for logits, _ in thoughts]) == labels[5:])[inputs[5:] == 1]
    losses = [
        math.log1p(math.exp(-q_halt if right else q_halt)) for (_, q_halt), right in zip(thoughts, exact, strict=True)
    ]
    assert metrics["all"]["count"] == TRAINED_EXAMPLES - 5
    assert metrics["all"]["q_halt_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["all"]["accuracy"] == pytest.approx(exact.mean())
    assert metrics["all"]["exact_accuracy"] == pytest.approx(exact.mean())


def test_the_table_shows_the_metrics(trained: Path) -> None:
    metrics, out = evaluated(f"checkpoint={trained / 'run'}")
    expected = reference_metrics(load_model(trained / "run"), trained / "pack")
    assert metrics == pytest.approx(expected, abs=5.1e-5)
    assert f"{trained / 'run' / 'step_80'} on {trained / 'pack'}/test" in out


def test_training_logged_the_same_metrics(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    tests = [record for record in records if "all/accuracy" in record]
    assert [record["step"] for record in tests] == [40, 80]
    for record in tests:
        metrics, _ = evaluated(f"checkpoint={trained / 'run'}/step_{record['step']}")
        assert metrics == pytest.approx({name: record[f"all/{name}"] for name in metrics}, abs=5.1e-5)


def test_evaluation_leaves_the_model_as_it_was(trained: Path) -> None:
    model = load_model(trained / "run")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = EvalLoader(open_pack(trained / "pack", "test"), 12)
    for training in (True, False):
        model.train(training)
        evaluate(model, loader, ALONE)
        assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights_name", ["checkpoint", "step_123"])
def test_the_published_layout_gives_the_same_numbers(weights_name: str, trained: Path, tmp_path: Path) -> None:
    # Written from scratch: only the weights and the numbers of the architecture come from the run.
    arch = yaml.safe_load((trained / "run" / "all_config.yaml").read_text())["arch"]
    fields = ["halt_exploration_prob", "halt_max_steps", "H_cycles", "L_cycles", "H_layers", "L_layers", "hidden_size"]
    fields += ["num_heads", "expansion", "puzzle_emb_ndim", "pos_encodings", "forward_dtype"]
    config = {
        "arch": {
            "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
            "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
            **{name: arch[name] for name in fields},
        },
        "data_path": str(trained / "pack"),
        "global_batch_size": 12,
        "epochs": 16,
        "lr": 3e-3,
        "checkpoint_path": "checkpoints/Sudoku ACT-torch/run",
        "eval_save_outputs": [],
    }
    weights = read_weights(trained / "run" / "step_80")
    (tmp_path / "all_config.yaml").write_text(yaml.safe_dump(config))
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, tmp_path / weights_name)
    metrics, _ = evaluated(f"checkpoint={tmp_path}")
    assert metrics == evaluated(f"checkpoint={trained / 'run'}")[0]


def test_data_that_moved(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    config = yaml.safe_load((run / "all_config.yaml").read_text())
    (run / "all_config.yaml").write_text(yaml.safe_dump(config | {"data_path": str(tmp_path / "gone")}))
    assert run_script("evaluate.py", *CPU, f"checkpoint={run}").status == 2
    moved = shutil.copytree(trained / "pack", tmp_path / "a new = (place)")
    metrics, _ = evaluated(f"checkpoint={run}", f"data_path={moved}")
    assert metrics == evaluated(f"checkpoint={trained / 'run'}")[0]


def test_a_shorter_run_in_the_same_folder_is_not_mistaken_for_the_earlier(trained: Path, tmp_path: Path) -> None:
    options = [
        *TINY_RUN,
        f"data_path={trained / 'pack'}",
        f"checkpoint_path={tmp_path / 'run'}",
        "global_batch_size=12",
    ]
    train(*options, "epochs=2")
    train(*options, "epochs=1", "arch.hidden_size=16")
    checkpoint = find_checkpoint(str(tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (checkpoint.step, checkpoint.config["arch"]["hidden_size"]) == (records[-1]["step"], 16)
    evaluated(f"checkpoint={tmp_path / 'run'}")


# --- saved outputs ---------------------------------------------------------------------------------------------------

SHAPES = {
    "inputs": (TRAINED_EXAMPLES, 16),
    "labels": (TRAINED_EXAMPLES, 16),
    "puzzle_identifiers": (TRAINED_EXAMPLES,),
    "logits": (TRAINED_EXAMPLES, 16, 6),
    "q_halt_logits": (TRAINED_EXAMPLES,),
    "q_continue_logits": (TRAINED_EXAMPLES,),
}


def assert_right_outputs(saved: dict[str, Tensor], trained: Path) -> None:
    """All outputs of all examples, in the order of the pack."""
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == SHAPES
    inputs, labels = raw_split(trained / "pack")
    assert saved["inputs"].tolist() == inputs.tolist()
    assert saved["labels"].tolist() == labels.tolist()
    assert not saved["puzzle_identifiers"].any()
    model = load_model(trained / "run")
    alone = [think_alone(model, board) for board in inputs]
    np.testing.assert_allclose(saved["logits"].double(), np.stack([logits for logits, _ in alone]), atol=1e-4)
    np.testing.assert_allclose(saved["q_halt_logits"].double(), [q_halt for _, q_halt in alone], atol=1e-4)


@pytest.mark.parametrize("batch_size", [12, 7, 100])
def test_saved_outputs_are_the_real_examples_in_order(batch_size: int, trained: Path, tmp_path: Path) -> None:
    assert set(SHAPES) == set(SAVEABLE_OUTPUTS)
    evaluated(
        f"checkpoint={trained / 'run'}",
        f"global_batch_size={batch_size}",
        f"save_outputs=[{','.join(SHAPES)}]",
        f"output_dir={tmp_path / 'new' / 'out'}",
    )
    assert [file.name for file in (tmp_path / "new" / "out").iterdir()] == ["step_80_all_preds.0"]
    assert_right_outputs(saved_by(tmp_path / "new" / "out", 80), trained)


def test_outputs_go_beside_the_weights_and_hold_what_was_asked(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    before = {file.name for file in run.iterdir()}
    _, out = evaluated(f"checkpoint={run / 'step_40'}", "save_outputs=[q_halt_logits,inputs,inputs]")
    assert {file.name for file in run.iterdir()} - before == {"step_40_all_preds.0"}
    saved = saved_by(run, 40)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "q_halt_logits": (TRAINED_EXAMPLES,),
        "inputs": (TRAINED_EXAMPLES, 16),
    }
    assert str(run / "step_40_all_preds.0") in out
    assert find_checkpoint(str(run)).step == 80  # the outputs are not taken for weights


def test_training_saves_the_same_outputs(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*TINY_RUN, f"data_path={trained / 'pack'}", f"checkpoint_path={run}", "global_batch_size=12"]
    train(*options, "eval_save_outputs=[labels,logits,logits]")
    evaluated(f"checkpoint={run}", "save_outputs=[labels,logits]", f"output_dir={tmp_path / 'out'}")
    by_training, by_evaluation = saved_by(run, 10), saved_by(tmp_path / "out", 10)
    assert by_training.keys() == by_evaluation.keys()
    for name, tensor in by_evaluation.items():
        assert by_training[name].shape == tensor.shape
        assert torch.equal(by_training[name], tensor), name
    assert saved_by(run, 5)["labels"].shape == (TRAINED_EXAMPLES, 16)


def test_labels_are_saved_as_the_model_saw_them(trained: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(trained / "pack", tmp_path / "pack"))
    labels = np.load(pack / "test" / "all__labels.npy")
    labels[2, 3] = 0
    np.save(pack / "test" / "all__labels.npy", labels)
    evaluated(f"checkpoint={trained / 'run'}", f"data_path={pack}", "save_outputs=[labels]", f"output_dir={tmp_path}")
    assert (saved_by(tmp_path, 80)["labels"] == IGNORE_LABEL_ID).nonzero().tolist() == [[2, 3]]


# --- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_share_the_work(trained: Path, tmp_path: Path) -> None:
    # Of the last batch, 56 to 63, rank 0 has 56 to 59 and rank 1 nothing but padding.
    batch_size, local = 8, 4
    options = [f"checkpoint={trained / 'run'}", f"global_batch_size={batch_size}"]
    results = f"sqlite:///{tmp_path / 'results.sqlite'}"
    out = run_ranks(2, *options, f"save_outputs=[{','.join(SHAPES)}]", f"output_dir={tmp_path}", f"results={results}")
    (entry,) = open_store(results).evaluations()
    assert {file.place for file in entry.artifacts} == {str(tmp_path / f"step_80_all_preds.{rank}") for rank in (0, 1)}
    assert (entry.versions["processes"], "Recorded as" in out[1]) == ("2", False)
    assert printed_metrics(out[0]) == pytest.approx(evaluated(*options)[0], abs=1.01e-4)
    assert "all/" not in out[1], "one table is enough"
    assert {file.name for file in tmp_path.glob("step*")} == {"step_80_all_preds.0", "step_80_all_preds.1"}
    parts = [saved_by(tmp_path, 80, rank) for rank in (0, 1)]
    assert [len(part["inputs"]) for part in parts] == [32, 28]
    whole = {
        name: torch.cat([part[name][i : i + local] for i in range(0, 32, local) for part in parts]) for name in SHAPES
    }
    assert_right_outputs(whole, trained)


def test_results_are_recorded(trained: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'results.sqlite'}"
    options = ["act=both", "save_outputs=[logits]", f"output_dir={tmp_path}", f"results={url}"]
    metrics, out = evaluated(f"checkpoint={trained / 'run'}", *options)
    evaluated(f"checkpoint={trained / 'run' / 'step_40'}", f"results={url}", "act_max_steps=2", "act_margin=-inf")
    entry, other = open_store(url).evaluations()
    assert f"Recorded as {entry.id} in results={url}." in out
    assert (entry.checkpoint, entry.pack) == (str(trained / "run" / "step_80"), str(trained / "pack"))
    assert entry.weights_hash == sha256_of(trained / "run" / "step_80")
    assert entry.pack_hash == pack_identity(open_pack(trained / "pack", "test")).arrays == other.pack_hash
    assert {f"all/{name}" for name in metrics} < set(entry.metrics)
    assert {"all/lm_loss", "halt/puzzles_per_second"} < set(entry.metrics)
    assert entry.metrics["halt/all/exact_accuracy"] == pytest.approx(metrics["exact_accuracy"], abs=5.1e-5)
    assert entry.options["act"] == "both"
    assert {"hrm", "PyTorch", "kernels"} < set(entry.versions)
    (written,) = entry.artifacts
    file = tmp_path / "step_80_all_preds.0"
    assert (written.kind, written.place, written.hash) == ("predictions", str(file), sha256_of(file))
    assert (other.checkpoint, other.artifacts) == (str(trained / "run" / "step_40"), [])
    assert (other.options["act_max_steps"], other.options["act_margin"]) == (2, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["results=sqlite:///nowhere/file"], "results=sqlite:///nowhere/file cannot be used"),
        (["results=file"], "results=file is not a URL"),
        (["results=sqlite:///file", f"puzzle={'1' * 16}"], "puzzle= cannot be used with results="),
        (["results=sqlite:///file", "input=-"], "input= cannot be used with results="),
    ],
)
def test_results_that_cannot_be_recorded_are_told_first(options: list[str], words: str, trained: Path) -> None:
    outcome = run_script("evaluate.py", f"checkpoint={trained / 'run'}", *options)
    assert (outcome.status, outcome.out) == (2, "")
    assert words in outcome.err


# --- boards ----------------------------------------------------------------------------------------------------------


def printed_boards(out: str) -> list[list[list[str]]]:
    """The cells, three characters each, of the boards in `out`, by rows."""
    boards: list[list[list[str]]] = []
    for line in out.splitlines():
        if line.startswith("┌"):
            boards.append([])
        elif line.startswith("│"):
            cells = line.replace("│", "")
            boards[-1].append([cells[start : start + 3] for start in range(0, len(cells), 3)])
    return boards


def digits(cells: list[list[str]]) -> list[int]:
    return [int(cell[1].replace(".", "0")) for row in cells for cell in row]


def is_png(file: Path) -> bool:
    content = file.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND" and len(content) > 5000


def solved_first(trained: Path, folder: Path) -> Path:
    """The pack with the test boards that the model solves before the others."""
    pack = Path(shutil.copytree(trained / "pack", folder))
    inputs, labels = raw_split(pack)
    model = load_model(trained / "run")
    solved = [
        bool((think_alone(model, board)[0].argmax(-1) == answer).all())
        for board, answer in zip(inputs, labels, strict=True)
    ]
    order = np.argsort(np.logical_not(solved), kind="stable")
    np.save(pack / "test" / "all__inputs.npy", inputs[order])
    np.save(pack / "test" / "all__labels.npy", labels[order])
    return pack


def test_show_prints_and_draws(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, pack = tmp_path / "new", solved_first(trained, tmp_path / "pack")
    options = [f"checkpoint={trained / 'run'}", f"data_path={pack}"]
    metrics, out = evaluated(*options, "show=3", f"output_dir={folder}", "save_outputs=[q_halt_logits]")
    assert metrics == evaluated(*options)[0]
    assert {file.name for file in folder.iterdir()} == {"boards.png", "curves.png", "step_80_all_preds.0"}
    assert all(is_png(file) for file in folder.glob("*.png"))
    assert saved_by(folder, 80).keys() == {"q_halt_logits"}

    shown = [int(index) for index in re.findall(r"^test puzzle (\d+)$", out, re.MULTILINE)]
    boards = printed_boards(out)
    assert len(boards) == len(set(shown)) == 3
    inputs, labels = raw_split(pack)
    model = load_model(trained / "run")
    outcomes = re.findall(r"^(?:(\d+) of 16 cells are wrong|(Solved).*)\.$", out, re.MULTILINE)
    for index, cells, (wrong, solved) in zip(shown, boards, outcomes, strict=True):
        answer = think_alone(model, inputs[index])[0].argmax(-1)
        assert digits(cells) == np.maximum(answer - 1, 0).tolist()
        marks = [cell[0] for row in cells for cell in row]
        given = inputs[index] > 1
        assert marks == np.where(answer != labels[index], "[", np.where(given, " ", "·")).tolist()
        assert int(wrong or 0) == marks.count("[")
        assert bool(solved) is ("[" not in marks)
    assert [bool(solved) for _, solved in (outcomes[0], outcomes[-1])] == [False, True], "one of each, unsolved first"


def test_show_stops_at_the_last_board(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pack = tmp_path / "pack"
    make_pack(pack, test_size=2)
    _, out = evaluated(f"checkpoint={trained / 'run'}", "show=5", f"data_path={pack}", f"output_dir={tmp_path}")
    assert len(printed_boards(out)) == 2


def test_show_without_a_log_draws_boards_only(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    evaluated(f"checkpoint={run}", "show=1")
    assert is_png(run / "boards.png")
    assert not (run / "curves.png").exists()


@pytest.mark.parametrize(
    "cut",
    [lambda text: text[:-30], lambda text: text.splitlines(keepends=True)[0], lambda text: ""],
    ids=["killed while writing", "first record only", "empty"],
)
@pytest.mark.filterwarnings("error")  # on the terminal, a warning is an ugly line
def test_show_copes_with_the_log_of_a_run_cut_short(cut: Callable[[str], str], trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    log = run / "metrics.jsonl"
    log.write_text(cut(log.read_text()))
    evaluated(f"checkpoint={run}", "show=1")
    assert is_png(run / "boards.png")


def typed(tokens: npt.NDArray[np.int64]) -> str:
    return "".join(".1234"[token - 1] for token in tokens)


@pytest.mark.parametrize("solvable", [True, False])
def test_solve_one_board(solvable: bool, trained: Path) -> None:
    model = load_model(trained / "run")
    for tokens, labels in zip(*raw_split(trained / "pack"), strict=True):
        answer = think_alone(model, tokens)[0].argmax(-1)
        if (answer == labels).all() == solvable:
            break
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={trained / 'run'}", f"puzzle={typed(tokens)}")
    assert (outcome.status, outcome.err) == (0, "")
    (cells,) = printed_boards(outcome.out)
    assert digits(cells) == np.maximum(answer - 1, 0).tolist()
    wrong = int((answer != labels).sum())
    assert outcome.out.count("[") - 1 == wrong  # one is the legend's
    last_line = "Solved: this is the only solution." if solvable else f"{wrong} of 16 cells are wrong."
    assert outcome.out.splitlines()[-1] == last_line


@pytest.mark.parametrize("board", ["123....4........", "1.....2.....3..4", "12....13........"])
def test_a_board_without_solution_is_said_to_have_none(board: str, trained: Path) -> None:
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={trained / 'run'}", f"puzzle={board}")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1].split(". It took")[0].rstrip(".").endswith("The puzzle has no solution")


def test_images_of_one_board_are_tried_until_one_is_solved(trained: Path) -> None:
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    model, asked = load_model(run), []
    for tokens, label in zip(inputs, labels, strict=True):
        right = [bool((answer == label).all()) for answer in answers_to_images(model, tokens, 6)]
        asked.append(right.index(True) + 1 if any(right) else 0)
    for wanted in (1, max(asked), 0):
        command = ("evaluate.py", *CPU, f"checkpoint={run}", f"puzzle={typed(inputs[asked.index(wanted)])}")
        outcome = run_script(*command, "ensemble.augmentations=6", "act=full")
        assert (outcome.status, outcome.err) == (0, "")
        last_line = outcome.out.splitlines()[-1]
        assert last_line.startswith("Solved: this is the only solution.") is (wanted > 0)
        assert last_line.endswith(f" It took {wanted or 6} of 6 answers.") is (wanted != 1)


def test_solving_ends_where_the_model_halts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (inputs, labels) = trained / "run", raw_split(trained / "pack")
    taken, follow = [], paths.follow

    def counted(*arguments: Any) -> paths.Answers:
        answers = follow(*arguments)
        taken.append(int(answers.act_steps))
        return answers

    monkeypatch.setattr(paths, "follow", counted)
    model = load_model(run)
    solved = next(
        tokens
        for tokens, label in zip(inputs, labels, strict=True)
        if (think_alone(model, tokens)[0].argmax(-1) == label).all()
    )
    command = ("evaluate.py", *CPU, f"checkpoint={run}", f"puzzle={typed(solved)}", "act_max_steps=5")
    early = run_script(*command, "act_margin=-100")
    assert (early.status, early.out.splitlines()[-1]) == (0, "Solved: this is the only solution.")
    assert taken.pop() <= model.halt_max_steps < 5, "the answer is right by then"
    for option in ("act=full", "act_margin=100"):
        assert run_script(*command, option).status == 0
    assert taken == [5, 5]


def test_solving_needs_no_data(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    config = yaml.safe_load((run / "all_config.yaml").read_text())
    (run / "all_config.yaml").write_text(yaml.safe_dump({"arch": config["arch"]}))
    puzzle = typed(raw_split(trained / "pack")[0][0])
    outcomes = [
        run_script("evaluate.py", *CPU, f"checkpoint={folder}", f"puzzle={puzzle}") for folder in (run, trained / "run")
    ]
    assert outcomes[0] == outcomes[1]


def test_a_board_of_several_solutions_is_judged_by_the_rules(trained: Path) -> None:
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={trained / 'run'}", f"puzzle={'.' * 16}")
    assert outcome.status == 0
    answer = digits(printed_boards(outcome.out)[0])
    rows = [answer[start : start + 4] for start in range(0, 16, 4)]
    units = rows + [list(column) for column in zip(*rows, strict=True)]
    units += [[rows[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    obeys = all(sorted(unit) == [1, 2, 3, 4] for unit in units)
    assert outcome.out.splitlines()[-1].startswith("Solved: this is one of several") is obeys
