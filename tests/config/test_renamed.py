"""Old names of options work wherever options come from, and say what they are called now."""

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hrm.config import KernelsConfig, PretrainConfig, renamed, to_typed
from hrm.config.compose import compose
from hrm.config.renamed import Combined, Dropped, OldNames, Renamed, find_renamed, is_option, with_new_names
from hrm.errors import UserError


@dataclass
class Part:
    RENAMED: ClassVar[OldNames] = {"many": "count"}
    count: int = 1


_LENGTH = Combined("length", lambda given: given.get("minutes", 0) + 60 * given.get("hours", 0))


@dataclass
class Whole:
    RENAMED: ClassVar[OldNames] = {
        "rounds": "epochs",
        "no_stop": Renamed("stop", operator.not_),
        "many": "part.count",
        "hours": _LENGTH,
        "minutes": _LENGTH,
        "judges": Dropped("nobody judges"),
    }
    length: int = 1
    epochs: int = 1
    stop: bool = True
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_told", set())


@pytest.mark.parametrize(
    ("given", "expected", "notes"),
    [
        ({"epochs": 3}, {"epochs": 3}, []),
        ({"rounds": 3}, {"epochs": 3}, ["rounds is called epochs now"]),
        ({"rounds": 3, "epochs": 4}, {"epochs": 4}, ["rounds is called epochs now"]),
        ({"no_stop": True}, {"stop": False}, ["no_stop is called stop now"]),
        ({"many": 7}, {"part": {"count": 7}}, ["many is called part.count now"]),
        ({"part": {"many": 7}}, {"part": {"count": 7}}, ["part.many is called part.count now"]),
        ({"parts": [{"many": 7}, {"count": 8}]}, {"parts": [{"count": 7}, {"count": 8}]}, ["parts.many is called"]),
        ({"hours": 2, "minutes": 5}, {"length": 125}, ["hours is called length", "minutes is called length"]),
        ({"minutes": 5}, {"length": 5}, ["minutes is called length now"]),
        ({"judges": [1], "epochs": 2}, {"epochs": 2}, ["judges is left out: nobody judges"]),
        ({"other": {"rounds": 3}}, {"other": {"rounds": 3}}, []),
    ],
)
def test_mappings(
    given: dict[str, Any], expected: dict[str, Any], notes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_new_names(given, [Whole]) == expected
    told = capsys.readouterr().err.splitlines()
    assert [note in line for note, line in zip(notes, told, strict=True)] == [True] * len(notes)


def test_typed_mappings_take_old_names_and_say_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert to_typed(Whole, {"rounds": 3, "part": {"many": 2}}, "whole") == Whole(epochs=3, part=Part(2))
    assert capsys.readouterr().err.splitlines() == [
        "note: whole.part.many is called whole.part.count now.",
        "note: whole.rounds is called whole.epochs now.",
    ]


def test_a_name_that_another_schema_has_is_left_alone() -> None:
    @dataclass
    class Other:
        rounds: int = 0

    assert with_new_names({"rounds": 3}, [Whole, Other]) == {"rounds": 3}


def test_names_with_dots() -> None:
    assert find_renamed("part.many", [Whole]) == ("part.", "count")
    assert find_renamed("many", [Whole]) == ("", "part.count")
    assert find_renamed("part.count", [Whole]) is None
    assert [is_option(name, [Whole]) for name in ("part.count", "part.many", "epochs", "other.epochs")] == [
        *(True, False, True, False),
    ]


@pytest.fixture
def old_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two options of the real schemas get old names."""
    monkeypatch.setattr(PretrainConfig, "RENAMED", {"rounds": "epochs"}, raising=False)
    names = {"engine": "backend", "eager": Renamed("compile", operator.not_)}
    monkeypatch.setattr(KernelsConfig, "RENAMED", names, raising=False)


@pytest.mark.usefixtures("old_options")
def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(PretrainConfig, "pretrain", ["rounds=20000", "kernels.engine=naive", "kernels.eager=false"])
    assert (config.epochs, config.kernels.backend, config.kernels.compile) == (20000, "naive", True)
    assert capsys.readouterr().err.splitlines() == [
        "note: rounds is called epochs now.",
        "note: kernels.engine is called kernels.backend now.",
        "note: kernels.eager is called kernels.compile now.",
    ]


@pytest.mark.usefixtures("old_options")
def test_yaml_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for group, name, text in (
        ("kernels", "mine", "engine: naive\n"),
        ("experiment", "mine", "# @package _global_\nrounds: 30000\nkernels:\n  eager: false\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    overrides = ["--config-dir", str(tmp_path), "kernels=mine", "experiment=mine"]
    config = compose(PretrainConfig, "pretrain", overrides)
    assert (config.epochs, config.kernels.backend, config.kernels.compile) == (30000, "naive", True)
    assert compose(PretrainConfig, "pretrain", [*overrides, "epochs=10000"]).epochs == 10000
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_command_lines_of_trm(capsys: pytest.CaptureFixture[str]) -> None:
    """As its README has them, for Sudoku; and the other options that it has under another name."""
    given = "arch=trm data_paths=[data/sudoku-extreme-1k-aug-1000] evaluators=[] epochs=50000 eval_interval=5000"
    given += " lr=1e-4 puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.mlp_t=True"
    given += " arch.pos_encodings=none arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=6"
    given += " +run_name=pretrain_mlp_t_sudoku ema=True"
    config = compose(PretrainConfig, "pretrain", [*given.split(), "arch.no_ACT_continue=True"])
    assert config.data_path == "data/sudoku-extreme-1k-aug-1000"
    assert (config.ema_decay, config.arch.q_continue, config.arch.mlp_t) == (0.999, False, True)
    assert config.run_name == "pretrain_mlp_t_sudoku"
    assert capsys.readouterr().err.splitlines() == [
        "note: evaluators is left out: a pack's task brings its evaluators.",
        "note: ema is called ema_decay now.",
        "note: arch.no_ACT_continue is called arch.q_continue now.",
    ]
    assert compose(PretrainConfig, "pretrain", ["ema=False"]).ema_decay is None
    assert compose(PretrainConfig, "pretrain", ["evaluators=[{name:arc@ARC}]"]).arch.q_continue
    assert "evaluators" not in with_new_names({"evaluators": [], "seed": 1}, [PretrainConfig])


def test_an_option_of_another_architecture_does_not_propose_itself() -> None:
    with pytest.raises(UserError, match=r"no option arch\.H_layers") as told:
        compose(PretrainConfig, "pretrain", ["arch=trm", "arch.H_layers=0"])
    assert "mean arch.H_layers" not in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        (["ema_rate=0.9", "ema=True"], "ema_decay", 0.9),
        (["ema=True", "ema_rate=0.9"], "ema_decay", 0.9),
        (["ema=False", "ema_rate=0.9"], "ema_decay", None),
        (["freeze_weights=True"], "freeze", "trunk"),
        (["freeze_weights=False"], "freeze", None),
        (["load_checkpoint=runs/a=b/step_1"], "init_from", "runs/a=b/step_1"),
        (["+project_name=p"], "project_name", "p"),
        (["data_paths=[a,b]", "data_paths_test=[a,b]"], "data_paths", ["a", "b"]),
        (["data_paths=[a,b]", "data_paths_test=[a,b]"], "data_paths_test", []),
        (["data_path=a", "data_paths_test=[a]"], "data_paths_test", []),
        (["min_eval_interval=2"], "min_eval_interval", 2),
    ],
)
def test_options_of_trm(overrides: list[str], name: str, value: object) -> None:
    assert getattr(compose(PretrainConfig, "pretrain", overrides), name) == value


@pytest.mark.parametrize(("given", "q_continue"), [("True", False), ("False", True)])
def test_no_act_continue(given: str, q_continue: bool) -> None:
    overrides = ["arch=trm", f"arch.no_ACT_continue={given}"]
    assert compose(PretrainConfig, "pretrain", overrides).arch.q_continue is q_continue


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data_path=c", "data_paths=[a,b]"], "name different packs"),
        (["data_paths=[a,a]"], "data_paths has a twice"),
        (["+unknown=3"], "there is no option unknown"),
    ],
)
def test_packs_that_cannot_be(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(PretrainConfig, "pretrain", overrides)
