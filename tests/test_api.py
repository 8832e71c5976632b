"""Training and evaluation as functions: the options and the figures of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hrm
from hrm.api import overrides
from hrm.config import PretrainConfig
from hrm.config.compose import compose
from hrm.errors import UserError
from hrm.training.loop import pretrain
from tests.helpers.entry_points import ROOT, TINY_RUN, evaluated, make_pack


def test_import_is_light() -> None:
    check = "import hrm, sys; assert 'torch' not in sys.modules and 'predict' not in vars(hrm); print(dir(hrm))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in hrm.__all__)


def test_train_and_evaluate(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack")
    options = dict(option.split("=") for option in TINY_RUN)
    run = tmp_path / "it's a run"
    made = hrm.train(options, data_path=str(tmp_path / "pack"), checkpoint_path=str(run))
    assert made["checkpoint_path"] == str(run)
    assert made["step"] == 6
    found = hrm.evaluate({"checkpoint": str(run), "kernels": "naive", "device": "cpu"})
    assert found["all/exact_accuracy"] == pytest.approx(made["all/exact_accuracy"])
    assert found["all/count"] == 5
    assert found["puzzles_per_second"] > 0
    printed, _ = evaluated(f"checkpoint={run}")
    for name, value in printed.items():
        assert found[f"all/{name}"] == pytest.approx(value, abs=1e-4)
    both = hrm.evaluate(checkpoint=str(run), kernels="naive", device="cpu", act="both")
    assert both["halt/all/count"] == both["all/count"] == 5
    voted = hrm.evaluate(checkpoint=str(run), kernels="naive", device="cpu", ensemble={"augmentations": 2})
    assert "all/exact_accuracy/of_2" in voted
    assert len(hrm.from_pretrained(made["checkpoint_path"], device="cpu").predict(["." * 16] * 3)) == 3


def test_options_are_written_as_on_a_command_line() -> None:
    options = {
        "experiment": "sudoku_demo",
        "arch": {"hidden_size": 64, "halt_max_steps": 3},
        "optim.name": "muon",
        "curriculum": [{"until": 5, "halt_max_steps": 2}],
        "ema_decay": None,
        "stagger": True,
        "lr": 1e-5,
        "run_name": "it's 'a' \\name\\ = ${x",
        "eval_save_outputs": ["logits"],
    }
    config = compose(PretrainConfig, "pretrain", overrides({**options, "run_name": "it's 'a' \\name\\"}))
    assert config.arch.hidden_size == 64
    assert config.arch.halt_max_steps == 3
    assert config.curriculum == [{"until": 5, "halt_max_steps": 2}]
    assert (config.ema_decay, config.stagger, config.lr) == (None, True, 1e-5)
    assert config.run_name == "it's 'a' \\name\\"
    assert config.eval_save_outputs == ["logits"]


def test_bad_options_are_told() -> None:
    with pytest.raises(UserError, match=r"arch\.hiden_size.*did you mean"):
        hrm.train({"arch": {"hiden_size": 3}})
    with pytest.raises(UserError, match="checkpoint must be given"):
        hrm.evaluate()
    with pytest.raises(UserError, match="puzzle is not for evaluate"):
        hrm.evaluate(checkpoint="sudoku", puzzle="1")


# --- the dtype on a CPU without bfloat16 ---


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device: False)


@pytest.fixture
def new_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device: device.type == "cpu")


def run(tmp_path: Path, *more: str) -> str:
    """A run's own word on its dtype."""
    options = [
        *TINY_RUN,
        "arch.forward_dtype=bfloat16",
        f"data_path={tmp_path / 'pack'}",
        f"checkpoint_path={tmp_path / 'run'}",
        *more,
    ]
    pretrain(compose(PretrainConfig, "pretrain", options))
    arch = yaml.safe_load((tmp_path / "run/all_config.yaml").read_text())["arch"]
    assert isinstance(arch["forward_dtype"], str)
    return arch["forward_dtype"]


def test_training_without_bfloat16(tmp_path: Path, old_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(tmp_path / "pack")
    assert run(tmp_path) == "float32"
    assert "float32 (this CPU has no instructions for bfloat16)" in capsys.readouterr().out
    assert run(tmp_path, "dtype=bfloat16") == "bfloat16"
    assert "no instructions" not in capsys.readouterr().out


def test_a_run_goes_on_in_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it goes on, unless another one is asked for."""
    make_pack(tmp_path / "pack")
    for first, second in ((False, True), (True, False)):
        monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device, has=first: has)
        made = run(tmp_path, "epochs=1")
        monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device, has=second: has)
        assert run(tmp_path, "epochs=2", "resume=auto", "resume_changed=true") == made
        with pytest.raises(UserError, match=r"arch\.forward_dtype=float64"):
            run(tmp_path, "epochs=2", "resume=auto", "dtype=float64")


def test_evaluation_without_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pack(tmp_path / "pack")
    monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device: True)
    assert run(tmp_path) == "bfloat16"
    monkeypatch.setattr("hrm.kernels.dtypes.has_bf16_matmul", lambda device: False)
    _, out = evaluated(f"checkpoint={tmp_path / 'run'}")
    assert "float32 (this CPU has no instructions for bfloat16)" in out
    _, out = evaluated(f"checkpoint={tmp_path / 'run'}", "dtype=bfloat16")
    assert "no instructions" not in out
    assert hrm.from_pretrained("sudoku", device="cpu").dtype == "float32"
    assert "no instructions for bfloat16" in repr(hrm.from_pretrained("sudoku", device="cpu"))


def test_evaluation_with_bfloat16(new_cpu: None) -> None:
    assert hrm.from_pretrained("sudoku", device="cpu").dtype == "bfloat16"
