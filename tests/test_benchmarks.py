"""The benchmarks run, write what they measured, and the loss curves tell equal from different."""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hrm
from benchmarks import (
    compare,
    cpu,
    ensembles,
    evaluate,
    kernels,
    latency,
    loop,
    loss_curves,
    plot,
    quantized,
    run_curves,
    scaling,
    serve,
    suite,
    train_step,
)
from benchmarks.clients import Load, saturate
from benchmarks.common import BASELINE, Shape, batches, run_command
from hrm.batch import Batch
from hrm.config import PretrainConfig
from hrm.config.compose import compose
from hrm.data.pack import Pack, PackMetadata, PackSet
from hrm.errors import EXIT_USER_ERROR, UserError
from hrm.evaluation.early_halting import EarlyHalting
from hrm.evaluation.report.plots import Metric, figure_of, run_panel
from hrm.service.engine import Engine
from hrm.tasks.form import Puzzle, PuzzleForm
from tests.helpers.benchmarks import TINY, rows_of
from tests.helpers.entry_points import evaluated, make_pack
from tests.helpers.inference import untrained, untrained_halting_apart
from tests.helpers.ranks import environment, on_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("module", [train_step, evaluate, latency], ids=lambda module: module.__name__)
def test_presets_side_by_side(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.common.BASELINE", "naive")  # compiling takes longer than all the rest
    arguments = ["--presets", "naive,triton", "--shapes", "2x16,3x25", "--repeats", "2", "--device", "cpu"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module.main([*arguments, "--output-dir", str(tmp_path), *TINY])
    rows = rows_of(tmp_path)
    assert [(row["kernels"], row["batch"], row["S"]) for row in rows] == [
        ("naive", 2, 16),
        ("triton", 2, 16),
        ("naive", 3, 25),
        ("triton", 3, 25),
    ]
    for naive, triton in (rows[:2], rows[2:]):
        assert naive["ms"] > 0
        assert naive["x naive"] == 1
        assert "ms" not in triton
        assert "needs an NVIDIA GPU" in triton["cannot run"]


def test_values_of_an_option_side_by_side(tmp_path: Path) -> None:
    arguments = ["--presets", "naive", "--shapes", "2x16", "--repeats", "2", "--output-dir", str(tmp_path)]
    train_step.main([*arguments, "--each", "kernels.recompute=none,block,blocks", *TINY])
    rows = rows_of(tmp_path)
    assert [row["kernels.recompute"] for row in rows] == ["none", "block", "blocks"]
    assert all(row["ms"] > 0 for row in rows[:2])
    assert "kernels.recompute=blocks is not a choice" in rows[2]["cannot run"]


def test_on_a_cpu_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkout of the published code; with another program that computes."""
    monkeypatch.setitem(cpu._MODELS, "tiny", TINY)
    arguments = ["--ways", "published;ours", "--sizes", "tiny@2x16", "--threads", "1", "--busy", "0,1"]
    arguments += ["--repeats", "1", "--seconds", "0"]
    cpu.main([*arguments, "--output-dir", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["busy"], row["work"], row["way"]) for row in rows] == [
        (busy, work, "ours") for busy in (0, 1) for work in ("train", "evaluate")
    ]
    assert all(row["ms"] > 0 and row["threads"] == 1 and "by_core" in row["kernels"] for row in rows)


def test_on_a_cpu_a_process_that_ends_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu._MODELS, "wrong", ["arch=hrm_small", "arch.num_heads=3"])
    with pytest.raises(UserError, match="'ours' ended"):
        cpu.main(["--ways", "ours", "--sizes", "wrong@2x16", "--output-dir", str(tmp_path)])


BOARDS = PuzzleForm("sudoku", 16, 6)


def test_services_under_load(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack")
    folder = untrained(tmp_path / "run", BOARDS)
    service = [str(tmp_path / "pack"), "--checkpoint", str(folder), "--boards", "5", "--device", "cpu"]
    load = ["--services", "refilled", "--clients", "3", "--shares", "0.5,1", "--seconds", "0.3"]
    load += ["--inputs", "1,2", "--results", f"none,sqlite:///{tmp_path}/results.sqlite"]
    serve.main([*service, *load, "--output-dir", str(tmp_path / "load"), "--picture", str(tmp_path / "load.svg")])
    (file,) = (tmp_path / "load").glob("*-serve.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["slots"] for row in rows] == ["refilled"] * 8
    assert [row["results"] for row in rows] == ["none"] * 4 + ["sqlite"] * 4
    assert [row["asked/s"] == "saturated" for row in rows] == [True, True, False, False] * 2
    assert [row["puzzles a request"] for row in rows] == [1, 2, 1, 1] * 2
    for row in rows:
        assert row["errors"] == 0
        assert 0 < row["p50 ms"] <= row["p95 ms"] <= row["p99 ms"]
        assert row.get("unlike predict", 0) == 0
    assert [row["answered"] for row in rows if "of offline" in row] == [5] * 4
    assert (tmp_path / "load.svg").stat().st_size > 1000

    serve.main([*service, "--abuse", "24", "--output-dir", str(tmp_path / "abuse")])
    (file,) = (tmp_path / "abuse").glob("*-serve-abuse.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["requests"] for row in rows] == [0, 24, 24, 24]
    assert all((row["boards after it"], row["unlike predict"], row["errors"]) == (5, 0, 0) for row in rows)
    for end in ("no puzzle: 422 2", "too long: 413 2", "slow body: 408 2", "slow head: closed 2", "gone: left 2"):
        assert end in rows[-1]["ended in"]


def test_a_static_batch_ends_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards = np.random.default_rng(0).integers(1, 6, (20, 16))
    folder = untrained_halting_apart(tmp_path, BOARDS, boards, halt_max_steps=5)
    engine = serve.SERVICES["static batches"](hrm.from_pretrained(folder, device="cpu"), 4)
    at_work: list[set[int]] = [set()]
    advance = Engine._advance

    def noted(self: Engine) -> None:
        at_work.append({id(job) for job in self._jobs.values()})
        advance(self)

    monkeypatch.setattr(Engine, "_advance", noted)
    futures = [engine.submit(Puzzle(board)) for board in boards]
    engine.close()
    assert all(future.done() for future in futures)
    assert all(now <= before or not now & before for before, now in pairwise(at_work))
    assert any(now < before for before, now in pairwise(at_work)), "some halt before others"


def test_clients_in_several_processes_ask_for_every_puzzle_once() -> None:
    asked: list[list[int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                rows = [each["tokens"] for each in json.loads(await reader.readexactly(length))["inputs"]]
                asked.extend(rows)
                body = json.dumps({"texts": [str(row[0]) for row in rows]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    async def load() -> Load:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await asyncio.to_thread(saturate, server.sockets[0].getsockname(), boards, 4, 3, processes=2)

    boards = np.arange(11)[:, None].repeat(16, 1)
    whole = asyncio.run(load())
    assert sorted(asked) == boards.tolist()
    assert whole.texts == {number: str(number) for number in range(11)}
    assert (whole.answered, len(whole.ms), whole.errors) == (11, 4, {})


def test_the_rate_without_a_service_is_that_of_all_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards = np.random.default_rng(0).integers(1, 6, (20, 16))
    answered: list[int] = []
    answer_pool = EarlyHalting.answer_pool

    def noted(self: EarlyHalting, puzzles: Batch) -> object:
        answered.append(len(puzzles["inputs"]))
        return answer_pool(self, puzzles)

    monkeypatch.setattr(EarlyHalting, "answer_pool", noted)
    assert serve._offline(hrm.from_pretrained(untrained(tmp_path, BOARDS), device="cpu"), boards, 4) > 0
    assert answered == [4, 20]


def test_batches_last_as_long_as_asked_for(tmp_path: Path) -> None:
    _, stream = batches(None, Shape(5, 4), tmp_path, 1500)
    assert sum(1 for _ in stream) >= 1500


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"kernels": name, "S": 81, "batch": 8, "ms": ms, f"x {BASELINE}": 4 / ms}
        for name, ms in (("a", 2.0), ("b", 4.0))
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"about": {"device": "here", "torch": "2"}, "rows": [*rows, {"kernels": "c"}]}))
    plot.main([str(results), str(tmp_path / "picture.svg")])
    picture = (tmp_path / "picture.svg").read_text()
    assert all(label in picture for label in ("2 ms", "4 ms", "81 tokens, batch 8"))


@pytest.mark.slow
def test_loss_curves_pass_what_is_equal_and_stop_at_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--presets", "naive", "--shape", "4x16", "--steps", "100", "--seeds", "2", "--device", "cpu"]
    arguments += ["--output-dir", str(tmp_path / "out"), "lr=1e-2", "lr_warmup_steps=1", *TINY]
    loss_curves.main(arguments)
    reference, same = rows_of(tmp_path / "out")
    assert same["distance"] == 0 < reference["distance"]
    assert same["within the spread"] == "yes"

    true_course = loss_curves.course
    calls = []

    def off_at_last(*of: Any) -> loss_curves.Course:
        calls.append(of)
        found = true_course(*of)
        return found._replace(loss=found.loss * (1.5 if len(calls) == 3 else 1))

    monkeypatch.setattr(loss_curves, "course", off_at_last)
    with pytest.raises(SystemExit) as stopped:
        loss_curves.main(arguments)
    assert stopped.value.code == 1
    assert rows_of(tmp_path / "out")[1]["within the spread"] == "NO"


def test_loss_curves_against_another_preset_without_a_verdict(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    made, runs = loss_curves.make_train_step, []

    def spied(*of: Any) -> Any:
        step, seen = made(*of), []
        runs.append(seen)

        def spy(batch: Batch) -> dict[str, torch.Tensor]:
            metrics = step(batch)
            seen.append({name: float(value) for name, value in metrics.items()})
            return metrics

        return spy

    monkeypatch.setattr(loss_curves, "make_train_step", spied)
    arguments = ["--data", str(trained / "pack"), "--reference", "fp8", "--presets", "naive", "--seeds", "1"]
    arguments += ["--steps", "40", "--window", "2", "--shape", "12x16", "--device", "cpu"]
    arguments += ["--picture", str(tmp_path / "made" / "curves.svg"), "--output-dir", str(tmp_path)]
    loss_curves.main([*arguments, "lr=3e-3", "lr_warmup_steps=5", *TINY, "arch.halt_exploration_prob=0"])
    reference, other = rows_of(tmp_path)
    assert (reference["kernels"], other["kernels"]) == ("fp8", "naive")
    assert reference["distance"] is None
    assert "within the spread" not in other

    (file,) = tmp_path.glob("*.json")
    curves = json.loads(file.read_text())["curves"]
    for name, seen in zip(("fp8", "naive"), runs, strict=True):
        for index, loss in enumerate(curves["loss"][name]):
            window = seen[2 * index : 2 * index + 2]
            assert loss == pytest.approx(sum(step["lm_loss"] for step in window) / 24)
            count = sum(step["count"] for step in window)
            share = sum(step["exact_accuracy"] for step in window) / count if count else None
            assert curves["exact_accuracy"][name][index] == (None if share is None else pytest.approx(share))
    pairs = zip(curves["loss"]["fp8"], curves["loss"]["naive"], strict=True)
    assert other["distance"] == pytest.approx(max(abs(a - b) / a for a, b in pairs))
    assert other["distance"] > 0
    assert any(curves["exact_accuracy"]["naive"])
    picture = (tmp_path / "made" / "curves.svg").read_text()
    assert f"naive, at most {100 * other['distance']:.2g} % away" in picture


@pytest.mark.parametrize(
    ("wrong", "named"), [(["--window", "7", "--steps", "20"], "--steps 20"), (["--seeds", "0"], "--seeds 0")]
)
def test_loss_curves_say_what_does_not_fit(wrong: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        loss_curves.main(wrong)


def test_curves_of_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [
        {"step": 1, "puzzles_per_second": 0.5, "train/lm_loss": 2.0},
        {"step": 4, "puzzles_per_second": 2.0, "train/exact_accuracy": 0.25, "train/steps": 3.0},
        {"step": 4, "all/exact_accuracy": 0.5, "all/q_halt_accuracy": 0.9},
        {"step": 4, "ema/all/exact_accuracy": 0.75},
        {"step": 7, "puzzles_per_second": 4.0, "train/exact_accuracy": 0.5, "train/steps": 2.0},
    ]
    # 1 step of 60 puzzles at 0.5 a second, 3 at 2, an evaluation, 3 at 4.
    timed = run_curves.with_minutes(records, batch_size=60)
    assert [record["minutes"] for record in timed] == [2, 3.5, 3.5, 3.5, 4.25]
    panel = run_panel(Metric("right", "percent", "exact_accuracy"), {"one": timed, "two": []}, "minutes")
    assert {curve.label: (curve.x, curve.y) for curve in panel.curves} == {
        "one, train": ((3.5, 4.25), (0.25, 0.5)),
        "one, test": ((3.5,), (0.5,)),
        "one, test, averaged weights": ((3.5,), (0.75,)),
    }

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"step": 8, "tra')  # killed while it wrote
        (tmp_path / name / "all_config.yaml").write_text("global_batch_size: 60\n")
    folders, picture = [str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "picture.svg"
    for against, label in (("step", "training step"), ("minutes", "minutes of training")):
        run_curves.main([*folders, "--picture", str(picture), "--against", against])
        assert all(text in picture.read_text() for text in ("two, test, averaged weights", "q_halt right (%)", label))
    with pytest.raises(UserError, match=r"nowhere.metrics\.jsonl is missing"):
        run_curves.main([str(tmp_path / "nowhere"), "--picture", str(picture)])
    with pytest.raises(SystemExit):
        run_curves.main([*folders, "--picture", "picture.doc"])


@pytest.mark.parametrize("runs", [1, 2, 9])
def test_legends_cover_nothing_else(runs: int) -> None:
    """Of few lines they lie in their panel, of more beside all panels; and always on the picture."""
    records = [{"step": step, "all/steps": 2.0, "train/steps": step, "ema/all/steps": 1.0} for step in (1, 2)]
    named = {f"checkpoints/sweep/a_run_with_a_long_name_{number}": records for number in range(runs)}
    named = named if runs > 1 else {"": records}
    panels = [run_panel(Metric("ACT steps", "linear", "steps"), named, "step")] * 4
    figure = figure_of(panels, "step", columns=2)
    figure.canvas.draw()
    inside = [(axes.get_legend(), axes) for axes in figure.axes if axes.get_legend()]
    assert len(inside) == (4 if runs == 1 else 0)
    for legend, axes in inside:
        extent = legend.get_window_extent()
        assert axes.bbox.x0 <= extent.x0 <= extent.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= extent.y0 <= extent.y1 <= axes.bbox.y1
    assert len(figure.legends) == (0 if runs == 1 else 1)
    for legend in figure.legends:
        extent = legend.get_window_extent()
        assert len(legend.get_texts()) == 3 * runs, "each label once"
        assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= extent.y0
        assert not any(extent.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert min(axes.bbox.height for axes in figure.axes) > 150, "room for the curves"


def test_ensembles_vote_as_evaluate_does(trained: Path, tmp_path: Path) -> None:
    run, early = str(trained / "run"), str(trained / "run" / "step_40")
    arguments = ["--augmentations", "1,2,4", "--batch-size", "25", "--kernels", "naive", "--device", "cpu"]
    ensembles.main([run, early, *arguments, "--output-dir", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    alone, _ = evaluated(f"checkpoint={run}", "ensemble.augmentations=4")
    both, _ = evaluated(f"checkpoint={run}", "ensemble.augmentations=4", f"ensemble.checkpoints=[{early}]")
    expected = [(1, n, 2 * n, alone[f"exact_accuracy/of_{n}"]) for n in (1, 2, 4)]
    expected += [(2, n, 4 * n, both[f"exact_accuracy/of_{2 * n}"]) for n in (1, 4)]
    found = [(row["checkpoints"], row["augmentations"], row["ACT steps"], round(row["vote"], 4)) for row in rows]
    assert found == expected
    assert len({row["vote"] for row in rows}) > 2
    assert all(row["seconds"] > 0 for row in rows)
    checked, _ = evaluated(f"checkpoint={run}", "ensemble.augmentations=4", "ensemble.check=true")
    assert round(rows[2]["vote, rules checked"], 4) == checked["exact_accuracy/of_4"]
    longer = tmp_path / "longer"
    ensembles.main([run, *arguments, "--act-max-steps", "5", "--output-dir", str(longer)])
    (file,) = longer.glob("*.json")
    five, _ = evaluated(f"checkpoint={run}", "act_max_steps=5")
    first = json.loads(file.read_text())["rows"][0]
    assert (first["ACT steps"], round(first["vote"], 4)) == (5, five["exact_accuracy"])


def test_paths_of_ensembles_are_those_of_evaluate(trained: Path, tmp_path: Path) -> None:
    run, picture = str(trained / "run"), tmp_path / "ensembles.svg"
    arguments = ["--augmentations", "1,2", "--paths", "1,3", "--noise", "start:2,steps:2", "--together", "2x3"]
    arguments += ["--noise-on", "all", "--batch-size", "60", "--kernels", "naive", "--device", "cpu"]
    ensembles.main([run, *arguments, "--picture", str(picture), "--output-dir", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    rows = {(row["augmentations"], row["noise"], row["paths"]): row for row in json.loads(file.read_text())["rows"]}
    assert [*rows][:2] == [(1, "none", 1), (2, "none", 1)]
    assert [*rows][2:] == [(1, noise, 3) for noise in ("start:2", "steps:2")] + [
        (2, noise, 3) for noise in ("start:2", "steps:2")
    ]
    for augmentations, noise_at in ((1, "steps"), (2, "start")):
        options = ["ensemble.paths=3", "ensemble.noise=2", "ensemble.noise_on=all", f"ensemble.noise_at={noise_at}"]
        options += [f"ensemble.augmentations={augmentations}", "global_batch_size=60"]
        row = rows[augmentations, f"{noise_at}:2", 3]
        found, _ = evaluated(f"checkpoint={run}", *options, "ensemble.pick=converged")
        assert round(row["converged"], 4) == found[f"exact_accuracy/of_{3 * augmentations}"]
    curves = picture.read_text()
    assert all(f"<!-- {way} -->" in curves or f">{way}<" in curves for way in ("vote", "converged", "first", "any"))


def test_comparison_at_equal_minutes(tmp_path: Path) -> None:
    """Each gets as many steps as fill the time, and a command given again goes on."""
    make_pack(tmp_path / "pack", train_size=32, test_size=16)
    toy = ["arch.hidden_size=32", "arch.num_heads=2", "global_batch_size=16", "dtype=float32", "kernels=naive"]
    arguments = ["--task", "sudoku", "--data", str(tmp_path / "pack"), "--device", "cpu", "--minutes", "0.002"]
    arguments += ["--output-dir", str(tmp_path), "--picture", str(tmp_path / "p.svg"), *toy]
    compare.main([*arguments, "--models", "no-inner-loop", "--seeds", "0"])
    compare.main([*arguments, "--models", "transformer,no-inner-loop", "--seeds", "0"])
    runs = [json.loads(line) for line in (tmp_path / "compare-sudoku.jsonl").read_text().splitlines()]
    assert [run["model"] for run in runs] == ["no-inner-loop", "transformer"]
    for run in runs:
        assert run["steps"] == pytest.approx(0.002 * 60_000 / run["ms a step"], abs=2.01)  # whole epochs of two steps
    (table,) = tmp_path.glob("*-compare-sudoku.json")
    assert [row["model"] for row in json.loads(table.read_text())["rows"]] == ["transformer", "no-inner-loop"]
    compare.main([*arguments, "--models", "transformer,no-inner-loop", "--seeds", "0,1", "--stop-after", "0.01"])
    assert len((tmp_path / "compare-sudoku.jsonl").read_text().splitlines()) == 2, "none would be over by then"
    compare.main([*arguments, "--models", "transformer", "--seeds", "0,1"])
    first, again = (json.loads(line) for line in (tmp_path / "compare-sudoku.jsonl").read_text().splitlines()[1:])
    assert [again[name] for name in ("seed", "steps", "ms a step")] == [1, first["steps"], first["ms a step"]]
    with pytest.raises(UserError, match="--models trm is not a choice; there are trm-mixer"):
        compare.main([*arguments, "--models", "trm"])


@pytest.mark.slow
@pytest.mark.parametrize("name", compare.MODELS)
def test_models_that_are_compared(name: str) -> None:
    for task in compare.EXPERIMENTS:
        config = compose(PretrainConfig, "pretrain", compare.recipe(task, compare.MODELS[name]))
        assert config.arch.gate == "sigmoid_rms"
        assert config.optim.name == "muon"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--noise", "0.3"], "--noise 0.3 cannot be read: write when and how much, such as steps:0.3."),
        (["--noise", "end:1"], "ensemble.noise_at=end is not a choice"),
        (["--paths", "0,2"], "--paths 0,2 is too small: give 1 or more."),
        (["--augmentations", "few"], "--augmentations few cannot be read: give whole numbers."),
        (["--together", "4"], "--together 4 cannot be read: write augmentations x paths, such as 4x4."),
    ],
)
def test_arguments_of_ensembles(wrong: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ensembles.main(["sudoku", *wrong])


def test_puzzles_of_ensembles_are_spread_out() -> None:
    # Puzzles of 1, 3 and 2 examples, named 5, 6 and 7.
    tokens = np.arange(12).reshape(6, 2)
    examples = PackSet(tokens, tokens + 20, np.array([5, 6, 7]), np.array([0, 1, 4, 6]), np.array([0, 3]))
    pack = Pack(Path(), "test", PackMetadata(0, 0, 0, 50, 2, 8, 1, 2.0, ("all",)), {"all": examples})
    few = ensembles.spread_out(pack, 3).sets["all"]
    assert few.inputs.tolist() == tokens[[0, 2, 5]].tolist()
    assert few.labels.tolist() == (tokens[[0, 2, 5]] + 20).tolist()
    assert few.puzzle_identifiers.tolist() == [5, 6, 7]
    assert ensembles.spread_out(pack, 100).sets["all"].puzzle_identifiers.tolist() == [5, 6, 6, 6, 7, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_loss_curves_of_all_presets(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack", box="3x3", train_size=500, test_size=5)
    loss_curves.main(["--data", str(tmp_path / "pack"), "--shape", "64x81", "--output-dir", str(tmp_path), "lr=1e-4"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_kernels_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU, not cpu"):
        kernels.main(["--output-dir", str(tmp_path)])


def test_a_loop_is_timed(tmp_path: Path) -> None:
    arguments = ["--presets", "naive", "--shapes", "4x16", "--repeats", "3", "--output-dir", str(tmp_path)]
    loop.main([*arguments, *TINY])
    (row,) = rows_of(tmp_path)
    assert row["puzzles/s"] == pytest.approx(4000 / row["ms"])


TWO_LAYERS = [*TINY, "arch.H_layers=2", "arch.L_layers=2"]


def test_ways_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ways = ["--ways", "naive,CUDA graph,unrolled,heads over GPUs", "--shape", "4x16", "--repeats", "1"]
    suite.main([*ways, "--out", str(tmp_path), "--picture", str(tmp_path / "ways.svg"), "--device", "cpu", *TWO_LAYERS])
    naive, *others = rows_of(tmp_path)
    assert naive["x naive"] == 1
    assert naive["tokens/s"] == pytest.approx(1000 * 4 * 17 / naive["ms"])
    assert naive["MB"] > 1
    wanted = ["needs an NVIDIA GPU", "Triton needs an NVIDIA GPU", "it is for several processes"]
    assert all(part in row["cannot run"] for part, row in zip(wanted, others, strict=True))
    (file,) = tmp_path.glob("*.json")
    plot.main([str(file), str(tmp_path / "again.svg")])
    assert (tmp_path / "again.svg").read_text().count("naive") == (tmp_path / "ways.svg").read_text().count("naive") > 0


def run_suite(rank: int, port: int, folder: Path) -> None:
    os.environ |= environment(rank, 2, port)
    ways = "naive,heads over GPUs,pipeline over GPUs,FSDP over GPUs,batch over GPUs"
    arguments = ["--ways", ways, "--shape", "4x16", "--repeats", "1", "--out", str(folder)]
    suite.main([*arguments, "--device", "cpu", *TWO_LAYERS])


@pytest.mark.multiprocess
def test_ways_of_two_processes(tmp_path: Path) -> None:
    on_ranks(2, run_suite, tmp_path)
    rows = rows_of(tmp_path)
    assert [row["processes"] for row in rows] == [1, 2, 2, 2, 2]
    assert all(row["ms"] > 0 for row in rows), rows
    options = [row.get("options") for row in rows]
    pipeline = "parallel.pipeline=2 parallel.micro_batches=4"
    assert options == [None, "parallel.tensor=2", pipeline, "parallel.fsdp=true", None]
    memory = {row["way"]: row["MB"] for row in rows}
    assert memory["heads over GPUs"] < memory["naive"], "each holds half of the blocks' weights"


SCALED = ["--shapes", "4x16", "--repeats", "2", "--kernels", "naive", "--device", "cpu"]


def measure_scaling(rank: int, port: int, file: Path) -> None:
    os.environ |= environment(rank, 2, port)
    scaling.main([*SCALED, "--measure", str(file), *TINY])


@pytest.mark.multiprocess
def test_scaling_is_measured_and_predicted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    scaling.main([*SCALED, "--measure", str(tmp_path / "one.json"), *TINY])
    on_ranks(2, measure_scaling, tmp_path / "two.json")
    files = ["--measured", str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    capfd.readouterr()
    picture = tmp_path / "scaling.svg"
    scaling.main([*SCALED, *files, "--out", str(tmp_path / "both"), "--picture", str(picture), *TINY])
    (both,) = (tmp_path / "both").glob("*.json")
    content = json.loads(both.read_text())
    steps = [(step["processes"], step["seq_len"], step["batch"]) for step in content["measured"]["steps"]]
    assert steps == [(1, 16, 4), (1, 16, 2), (1, 16, 1), (2, 16, 4), (2, 16, 2)]
    assert all(exchange["ms"] > 0 for exchange in content["measured"]["exchanges"])
    assert content["machine"]["bytes_per_ms"] > 0
    held, _, same_share, same_batch, wide, run = content["predicted"].values()
    assert len(held) == len(steps)
    assert [row["GPUs"] for row in same_share] == [2**power for power in range(11)]
    assert [row["GPUs"] for row in same_batch] == [1, 2, 4, 8]
    assert wide[-1]["ms"] > same_share[-1]["ms"]
    assert wide[0]["GiB of weights"] == pytest.approx(18 / (16 / 1024 + 2) * wide[-1]["GiB of weights"])
    assert run[0]["GPU-hours"] == run[0]["hours"] > run[0]["of them evaluation"] > 0
    table = capfd.readouterr().out
    assert table.strip() in both.with_suffix(".md").read_text()
    assert "M weights under FSDP" in picture.read_text()

    def launched(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        count = int(command[command.index("--nproc-per-node") + 1]) if "torch.distributed.run" in command else 1
        file = tmp_path / {1: "one.json", 2: "two.json"}[count]
        shutil.copy(file, command[command.index("--measure") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", launched)
    scaling.main([*SCALED, "--processes", "1,2", "--out", str(tmp_path / "launched"), *TINY])
    (again,) = (tmp_path / "launched").glob("*.json")
    assert json.loads(again.read_text())["predicted"] == content["predicted"]


def test_the_network_is_as_measured_over_hosts_or_as_assumed() -> None:
    options = argparse.Namespace(network=50.0, network_latency=0.02, gpus_on_host=8)
    within = [{"processes": 2, "hosts": 1, "size": size, "ms": 0.01 + size / 3e8} for size in (4.0, 1e8)]
    between = [{"processes": 16, "hosts": 2, "size": 1e8, "ms": 1.0}]
    measured = {"exchanges": within, "models": [], "steps": []}
    alone, _ = scaling.fit(measured, options)
    assert (alone.latency_ms, alone.bytes_per_ms, alone.network_bytes_per_ms) == pytest.approx((0.01, 3e8, 5e7))
    over_hosts, _ = scaling.fit(measured | {"exchanges": within + between}, options)
    assert over_hosts.network_bytes_per_ms == pytest.approx(2 * 15 / 16 * 1e8 / 8)
    assert over_hosts.all_reduce_ms(16, 1e8) == pytest.approx(1.0 + 0.01 * 3 + 0.02)


def test_scaling_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--processes 2 leaves out 1"):
        scaling.main(["--processes", "2"])
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"about": {}, "models": [], "steps": [], "exchanges": []}))
    with pytest.raises(UserError, match=r"--shapes 4x16 has a length that was not measured"):
        scaling.main(["--measured", str(file), "--shapes", "4x16"])


def test_a_mistake_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: train_step.main(["--published", str(tmp_path)]))
    assert stopped.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no checkout of the published code")


def test_quantized_models_are_measured(tmp_path: Path) -> None:
    """A row for each precision, from a file that holds int8; rows of an earlier table stay or are replaced."""
    form = PuzzleForm("sudoku", seq_len=16, vocab_size=6)
    run = str(untrained(tmp_path / "run", form))
    arguments = ["--checkpoints", run, "--puzzles", "6", "--device", "cpu", "--output-dir", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        quantized.main([*arguments, "--precisions", "float32,int8,fp8"])
        (file,) = tmp_path.glob("*-quantized.json")
        quantized.main([*arguments, "--precisions", "int8", "--add", str(file)])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["float32", "fp8", "int8"]
    plain, refused, rounded = rows
    assert plain["answered as by the first, %"] == 100
    assert rounded["MB"] < 0.5 * plain["MB"]
    assert "int8 in all" in rounded["computed"]
    assert refused["computed"].startswith("quantize=fp8 cannot run")
    assert all(row["ms, one puzzle"] > 0 for row in (plain, rounded))
