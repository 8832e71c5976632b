"""Several packs in one run: batches from all of them, and identifiers of each with rows of their own."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hrm.checkpoint.weights import PUZZLE_TABLE, Checkpoint, read_weights
from hrm.data.identity import identifiers_hash
from hrm.data.joined import join_test, join_train
from hrm.data.loader import EvalLoader, TrainLoader
from hrm.data.pack import Pack, open_pack
from hrm.errors import UserError
from hrm.evaluation.loading import trained_pack
from tests.helpers.entry_points import CPU, TINY_RUN, Outcome, run_script
from tests.helpers.training import write_identified_pack


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joined")
    write_identified_pack(root / "few", puzzles=3)
    write_identified_pack(root / "many", puzzles=5)
    write_identified_pack(root / "long", puzzles=3, seq_len=25)
    write_identified_pack(root / "unknown", puzzles=2)
    return root


def opened(root: Path, split: str, *names: str) -> list[Pack]:
    return [open_pack(root / name, split) for name in names]


def test_a_single_pack_stays_as_it_is(root: Path) -> None:
    (train,), (test,) = opened(root, "train", "few"), opened(root, "test", "few")
    assert join_train([train]) is train
    assert join_test([test], [train]) is test


@pytest.mark.parametrize("pickled", [False, True])
def test_an_epoch_has_every_puzzle_of_every_pack_once_in_one_order(root: Path, pickled: bool) -> None:
    few, many = opened(root, "train", "few", "many")
    pack = join_train([few, many])
    if pickled:
        pack = pickle.loads(pickle.dumps(pack))
    assert pack.metadata.num_puzzle_identifiers == 4 + 6
    assert (pack.metadata.total_groups, pack.metadata.mean_puzzle_examples) == (24, 1.0)
    (batch,) = TrainLoader(pack, 24, seed=0).iterate(0)
    expected = {
        (identifier + first, *inputs)
        for part, first in ((few, 0), (many, 4))
        for identifier, inputs in zip(
            part.sets["all"].puzzle_identifiers, part.sets["all"].inputs.tolist(), strict=True
        )
    }
    rows = zip(batch["puzzle_identifiers"].tolist(), batch["inputs"].tolist(), strict=True)
    assert {(identifier, *inputs) for identifier, inputs in rows} == expected
    of_few = (batch["puzzle_identifiers"][:12] < 4).sum()  # in the first half
    assert 0 < of_few < 12


def test_examples_are_of_their_puzzles(root: Path, tmp_path: Path) -> None:
    """Rows are read where they lie, in any order, across packs."""
    parts = opened(root, "train", "few", "many")
    data = join_train(parts).sets["all"]
    whole = np.concatenate([part.sets["all"].inputs for part in parts])
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(data.inputs[order], whole[order])
    np.testing.assert_array_equal(data.inputs[5:20:3], whole[5:20:3])
    np.testing.assert_array_equal(data.puzzle_indices, np.arange(25))


def test_sets_are_evaluated_each_by_itself(root: Path) -> None:
    trained, tests = opened(root, "train", "few", "many"), opened(root, "test", "many", "few")
    pack = join_test(tests, trained)
    seen = {name: batch["puzzle_identifiers"].tolist() for name, batch, _ in EvalLoader(pack, 12)}
    assert list(seen) == ["many/all", "few/all"]
    assert min(seen["many/all"]) == 5
    assert max(seen["many/all"]) == 9
    assert max(seen["few/all"]) == 3


def test_of_packs_with_equal_identifiers_each_keeps_its_own(root: Path, tmp_path: Path) -> None:
    """Those of Sudoku, for instance, have a single one, which every pack calls the same."""
    for name in ("one", "other"):
        write_identified_pack(tmp_path / name, puzzles=3)
    pack = join_test(opened(tmp_path, "test", "one", "other"), opened(tmp_path, "train", "one", "other"))
    seen = {name: batch["puzzle_identifiers"].tolist() for name, batch, _ in EvalLoader(pack, 12)}
    assert max(seen["one/all"]) == 3
    assert min(seen["other/all"]) == 5


def test_a_run_tells_packs_with_equal_identifiers_apart(root: Path) -> None:
    (pack,) = opened(root, "test", "few")
    entry = {"num_puzzle_identifiers": 4, "identifiers": identifiers_hash(pack.path)}
    urls = {"s3://team/one": 0, "s3://team/other": 4}
    listed = [{**entry, "path": url, "first_identifier": first} for url, first in urls.items()]
    checkpoint = Checkpoint(root / "step_1", {"packs": listed})
    for url, first in {**urls, "moved": 0}.items():
        found = trained_pack(checkpoint, pack, url)
        assert found is not None
        assert found.rows == slice(first, first + 4)


def test_what_cannot_be_joined(root: Path) -> None:
    with pytest.raises(UserError, match=r"has seq_len 16, but .*long has 25: one run takes packs of one vocabulary"):
        join_train(opened(root, "train", "few", "long"))
    with pytest.raises(UserError, match="has puzzle identifiers that no pack trained on has"):
        join_test(opened(root, "test", "unknown"), opened(root, "train", "few", "many"))


@pytest.mark.parametrize("examples", [1, 5, 8, 12, 100])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_choice_of_examples_to_evaluate(root: Path, examples: int, ranks: int) -> None:
    pack = open_pack(root / "few", "test")

    def read(seed: int) -> list[list[int]]:
        loaders = [EvalLoader(pack, 4, rank, ranks, examples=examples, seed=seed) for rank in range(ranks)]
        rows: list[list[int]] = []
        for parts in zip(*loaders, strict=True):
            inputs = torch.cat([batch["inputs"] for _, batch, _ in parts])
            rows += inputs[: parts[0][2]].tolist()
        return rows

    rows = read(seed=0)
    all_rows = pack.sets["all"].inputs.tolist()
    assert len(rows) == min(examples, 12)
    assert [all_rows.index(row) for row in rows] == sorted(all_rows.index(row) for row in rows)
    assert rows == read(seed=0)
    if 1 < examples < 12:
        assert any(rows != read(seed) for seed in (1, 2, 3))


def run(root: Path, folder: str, *options: str) -> Outcome:
    paths = f"data_paths=[{root / 'few'},{root / 'many'}]"
    common = [*TINY_RUN, "global_batch_size=6", "epochs=4", "eval_interval=1", "lr_warmup_steps=1", "puzzle_emb_lr=1"]
    return run_script("pretrain.py", *common, paths, f"checkpoint_path={root / folder}", *options)


def test_a_run_on_two_packs_and_its_evaluation(root: Path) -> None:
    outcome = run(root, "run")
    assert outcome.status == 0, outcome.err
    assert "for 16 steps of 6 puzzles" in outcome.out
    table = read_weights(root / "run" / "step_16")[PUZZLE_TABLE]
    assert [bool(row.any()) for row in table] == [False, *[True] * 3, False, *[True] * 5]
    records = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for record in records for name, value in record.items()}

    both = run_script("evaluate.py", *CPU, f"checkpoint={root / 'run'}", "dtype=float32")
    assert both.status == 0, both.err
    assert both.out.count("all steps for every puzzle") == 2
    assert "warning" not in both.err
    for name in ("few", "many"):
        one = run_script("evaluate.py", *CPU, f"checkpoint={root / 'run'}", f"data_path={root / name}")
        assert one.status == 0, one.err
        assert f"all/lm_loss {last[f'{name}/all/lm_loss']:.4f}" in " ".join(one.out.split())
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={root / 'run'}", f"data_path={root / 'unknown'}")
    assert outcome.status == 2
    assert "add puzzle_emb=mean" in outcome.err


def test_a_run_on_two_packs_goes_on(root: Path) -> None:
    assert run(root, "whole").status == 0
    assert run(root, "half").status == 0
    (root / "half" / "state_16").rename(root / "state_16")
    outcome = run(root, "half", "resume=auto", "num_workers=1")
    assert outcome.status == 0, outcome.err
    assert "Going on from" in outcome.out
    whole, half = (read_weights(root / name / "step_16") for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    outcome = run_script(
        "pretrain.py",
        *TINY_RUN,
        "global_batch_size=6",
        "epochs=4",
        "lr_warmup_steps=1",
        "puzzle_emb_lr=1",
        f"data_path={root / 'few'}",
        f"checkpoint_path={root / 'half'}",
        "resume=auto",
    )
    assert outcome.status == 2
    assert "cannot go on with" in outcome.err


def test_evaluation_begins_later_and_is_of_a_few(root: Path) -> None:
    outcome = run(root, "late", "min_eval_interval=2", "eval_examples=5", f"data_paths_test=[{root / 'many'}]")
    assert outcome.status == 0, outcome.err
    records = [json.loads(line) for line in (root / "late" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "all/count" in record]
    assert [(record["step"], record["all/count"]) for record in evaluations] == [(12, 5), (16, 5)]
    assert not (root / "late" / "step_4").exists()
    assert (root / "late" / "step_12").exists()


def test_a_config_of_trm_says_where_its_data_are(root: Path) -> None:
    """`data_paths` in place of `data_path`, as its runs leave it."""
    assert run(root, "trm", f"data_paths=[{root / 'few'}]").status == 0
    file = root / "trm" / "all_config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("data_path", "  name: few"))]
    file.write_text("\n".join([*lines, f"data_paths: ['{root / 'few'}']", "data_paths_test: []", ""]))
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={root / 'trm'}")
    assert outcome.status == 0, outcome.err
    assert "all/exact_accuracy" in outcome.out
