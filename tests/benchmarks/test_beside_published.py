"""Benchmarks that put the published code beside ours, or a trained model's kernels beside the definition."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    answering,
    ensembles,
    evaluate,
    gradients,
    latency,
    learning,
    loop,
    published,
    published_side,
    train_step,
)
from benchmarks.common import Shape, batches
from hrm.data.pack import open_pack, write_split
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig
from hrm.models.transformer import TransformerConfig
from hrm.optim import AdamATan2
from tests.helpers.benchmarks import TINY, rows_of
from tests.helpers.checkout import CHECKOUT, needs_checkout
from tests.helpers.entry_points import evaluated, make_pack

pytestmark = pytest.mark.slow


def test_gradients_of_a_trained_model_by_the_definition_are_those_of_float32(trained: Path, tmp_path: Path) -> None:
    arguments = [str(trained / "run"), "--data", str(trained / "pack"), "--batch-size", "12", "--device", "cpu"]
    arguments += ["--output-dir", str(tmp_path), "--steps", "1,5"]
    gradients.main([*arguments, "--presets", "naive,triton"])
    *reference, first, fifth, cannot = rows_of(tmp_path)
    assert [(row["kernels"], row["step"]) for row in reference] == [("float32", 1), ("float32", 5)]
    assert first["gradients"] == fifth["gradients"] == fifth["q"] == fifth["target"] == fifth["other decisions"] == 0
    assert "needs an NVIDIA GPU" in cannot["cannot run"]

    gradients.main([*arguments, "--presets", "naive,fp8", "--dtype", "bfloat16"])
    rows = {(row["kernels"], row["step"]): row for row in rows_of(tmp_path)}
    assert 0 < rows["naive", 5]["gradients"] < rows["fp8", 5]["gradients"]
    assert rows["naive", 5]["x naive"] == 1
    assert rows["fp8", 5]["x naive"] == pytest.approx(rows["fp8", 5]["gradients"] / rows["naive", 5]["gradients"])
    (file,) = tmp_path.glob("*.json")
    naive, fp8 = json.loads(file.read_text())["groups"]
    assert {"embed_tokens", "H_level qkv_proj", "L_level down_proj", "lm_head", "q_head", "puzzle_emb"} < naive.keys()
    assert naive["L_level qkv_proj"] < fp8["L_level qkv_proj"]
    for steps, problem in (("0,1", "is too small"), ("1,", "is no list of numbers")):
        with pytest.raises(UserError, match=f"--steps {steps} {problem}"):
            gradients.main([*arguments, "--steps", steps])
    with pytest.raises(UserError, match="--presets trito is not a choice; did you mean triton"):
        gradients.main([*arguments, "--presets", "naive,trito"])


def test_differences_of_gradients() -> None:
    one = torch.tensor(1.0)
    step: dict[str, Any] = dict.fromkeys(("loss", "lm_loss", "q_continue_loss"), one)
    step |= {name: torch.zeros(4) for name in ("q_halt_logits", "q_continue_logits", "target_q_continue")}
    step |= {"logits": torch.ones(4, 2), "halted": torch.tensor([True, False, False, False])}
    step["exact"] = torch.tensor([True, True, True, False])
    reference = step | {"gradients": {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0])}}
    other = step | {
        "gradients": {"b": torch.tensor([4.0]), "a": torch.tensor([3.0, 0.0])},
        "lm_loss": 1.5 * one,
        "q_halt_logits": torch.full((4,), 2.0),
        "target_q_continue": torch.tensor([0.0, 0.0, 0.0, -1.0]),
        "halted": torch.tensor([True, True, False, False]),
        "exact": torch.tensor([False, True, True, True]),
    }
    found = gradients.differences(other, reference)
    expected = {"loss": 0, "lm loss": 50, "q_continue loss": 0, "logits": 0, "q": 2**0.5, "target": 0.25}
    expected |= {"halted": 0.5, "other decisions": 0.25, "exact": 0.75, "other answers": 0.5}
    expected |= {"gradients": 8 / 5, "norm / norm": 1, "signs": 0.5}
    assert found == pytest.approx(expected)
    with pytest.raises(UserError, match="only one of the two has a gradient of b"):
        gradients.differences(other | {"gradients": {"a": torch.zeros(2)}}, reference)


def test_answering_is_what_evaluate_does(trained: Path, tmp_path: Path) -> None:
    run, pack = str(trained / "run"), str(trained / "pack")
    arguments = [run, "--data", pack, "--presets", "naive", "--batch-size", "12", "--device", "cpu"]
    answering.main([*arguments, "--output-dir", str(tmp_path)])
    full, halting = rows_of(tmp_path)
    for row, act in ((full, "full"), (halting, "halt")):
        expected, _ = evaluated(f"checkpoint={run}", f"data_path={pack}", f"act={act}")
        assert row["puzzles/s"] > 0
        assert row["exact, %"] == pytest.approx(100 * expected["exact_accuracy"], abs=0.01)
        assert row["steps a puzzle"] == pytest.approx(expected["steps"], abs=1e-4)
    assert halting["steps a puzzle"] < full["steps a puzzle"]
    with pytest.raises(UserError, match="--puzzles 0 is too small"):
        answering.main([*arguments, "--puzzles", "0"])
    random = str(batches(None, Shape(1, 20), tmp_path, 1)[0].path)
    with pytest.raises(UserError, match="trained with"):
        answering.main([*arguments, "--data", random])


@needs_checkout
def test_the_published_code_on_a_trained_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, targets of q_continue and halting of both codes are alike, and so are their answers."""
    monkeypatch.setenv("DISABLE_COMPILE", "1")
    arguments = [str(trained / "run"), "--data", str(trained / "pack"), "--batch-size", "12", "--device", "cpu"]
    arguments += ["--presets", "naive", "--published", CHECKOUT]
    gradients.main([*arguments, "--steps", "1,3,5", "--output-dir", str(tmp_path / "gradients")])
    rows = [row for row in rows_of(tmp_path / "gradients") if row["kernels"] == "published, eager"]
    assert len(rows) == 3
    for row in rows:
        assert "stand-ins" in row
        assert row["gradients"] < 1e-4
        assert row["q"] < 1e-4
        assert row["target"] < 1e-5
        assert row["other decisions"] == 0
    pack = open_pack(trained / "pack", "test")
    sets = {"few": ensembles.spread_out(pack, 5).sets["all"], "many": pack.sets["all"]}
    two_sets = Path(shutil.copytree(trained / "pack", tmp_path / "two_sets"))
    shutil.rmtree(two_sets / "test")
    total = pack.metadata.total_groups + 5
    write_split(two_sets / "test", replace(pack.metadata, sets=tuple(sets), total_groups=total), sets)
    arguments += ["--data", str(two_sets), "--puzzles", "20"]
    answering.main([*arguments, "--output-dir", str(tmp_path / "answering")])
    ours, _, theirs = rows_of(tmp_path / "answering")
    for name in ("exact, %", "cells, %", "q_halt right, %", "steps a puzzle"):
        assert theirs[name] == pytest.approx(ours[name], abs=0.01)
    assert ours["x published"] == pytest.approx(ours["puzzles/s"] / theirs["puzzles/s"])


@needs_checkout
@pytest.mark.parametrize("module", [train_step, loop, evaluate, latency], ids=lambda module: module.__name__)
def test_the_published_code_runs_beside_ours(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_COMPILE", "1")
    arguments = ["--presets", "naive", "--shapes", "4x16", "--repeats", "3", "--output-dir", str(tmp_path)]
    module.main([*arguments, "--published", CHECKOUT, *TINY])
    ours, theirs = rows_of(tmp_path)
    assert theirs["kernels"] == "published"
    assert theirs["ms"] > 0
    assert ours["x published"] == pytest.approx(theirs["ms"] / ours["ms"])


@needs_checkout
def test_the_published_code_learns_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_COMPILE", "1")
    make_pack(tmp_path / "pack", train_size=32, test_size=20)
    arguments = ["--published", CHECKOUT, "--data", str(tmp_path / "pack"), "--device", "cpu", "--epochs", "20"]
    arguments += ["--out", str(tmp_path), *TINY, "arch.pos_encodings=rope", "kernels=naive", "global_batch_size=16"]
    arguments += ["lr=1e-3", "lr_warmup_steps=10"]
    learning.main([*arguments, "--seeds", "0", "--codes", "ours", "--keep", str(tmp_path / "kept")])
    assert list((tmp_path / "kept" / "seed-0").glob("step_40*"))
    learning.main([*arguments, "--seeds", "0"])
    (file,) = tmp_path.glob("*-learning.json")
    rows = {row["code"]: row for row in json.loads(file.read_text())["rows"]}
    assert [row["steps"] for row in rows.values()] == [40, 40]
    assert rows["ours"]["loss"] == pytest.approx(rows["published"]["loss"], rel=0.1)
    assert len((tmp_path / "learning.jsonl").read_text().splitlines()) == 2


def test_what_a_difference_of_learning_is_worth() -> None:
    def run(code: str, exact: float, solves: float) -> dict[str, Any]:
        curve = [{"step": 50, "lm_loss": 9.0, "exact_accuracy": solves}, {"step": 100, "lm_loss": 1.0}]
        return {"code": code, "steps": 100, "curve": curve, "test": {"exact_accuracy": exact, "accuracy": 0.5}}

    runs = [run("published", 0.4, 0.02), run("published", 0.3, 0.0), run("ours", 0.1, 0.0), run("ours", 0.2, 0.0)]
    assert [learning.measures(one)["solves from step"] for one in runs] == [50, 101, 101, 101]
    assert {learning.measures(one)["loss"] for one in runs} == {1.0}
    found = learning.chances(runs)
    assert found["exact, %"] == "2 of 6 divisions"  # the codes' own, and its mirror image
    assert found["cells, %"] == "6 of 6 divisions"
    assert learning.chances(runs[:2]) == {}


def test_what_the_published_code_cannot_do(tmp_path: Path) -> None:
    arch = HRMConfig(hidden_size=64, pos_encodings="learned")
    assert published.published_arch(arch)["puzzle_emb_ndim"] == 64
    with pytest.raises(UserError, match=r"the published code has no arch\.gradient=last_cycle: leave it out"):
        published.published_arch(replace(arch, gradient="last_cycle"))
    with pytest.raises(UserError, match=r"the published code has no arch=transformer"):
        published.published_arch(TransformerConfig())
    with pytest.raises(UserError, match=r"is no checkout of the published code: it has no pretrain\.py"):
        published.Published(tmp_path)


def test_stand_ins_compute_what_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 4))] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = AdamATan2(ours, **settings), published_side.AdamATan2(theirs, **settings)
    for _ in range(3):
        ours[0].grad = theirs[0].grad = torch.randn(3, 4, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0])
    q, k, v = torch.randn(3, 2, 5, 4, 8, generator=generator)
    mixed = torch.einsum("bqnd,bknd->bnqk", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(published_side.flash_attn_func(q, k, v), torch.einsum("bnqk,bknd->bqnd", mixed, v))
