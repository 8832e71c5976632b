"""YAML files of one's own, in a folder given by Hydra's `--config-dir`."""

from pathlib import Path

import pytest

from hrm.config import PretrainConfig
from hrm.config.compose import compose
from hrm.errors import UserError
from tests.helpers.entry_points import run_script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe, an architecture and a file with a slip."""
    files = {
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /arch: wide\nlr: 0.5\n",
        "arch/wide": "defaults:\n  - hrm_v1\n  - _self_\nhidden_size: 1024\n",
        "experiment/slip": "# @package _global_\nlr_warmup: 3\n",
        "experiment/text": "# @package _global_\nlr: fast\n",
    }
    for name, text in files.items():
        (tmp_path / name).with_suffix(".yaml").parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("flag", ["--config-dir", "-cd"])
def test_recipes_and_architectures_of_ones_own(flag: str, folder: Path) -> None:
    config = compose(PretrainConfig, "pretrain", [flag, str(folder), "experiment=mine"])
    assert (config.lr, config.arch.hidden_size, config.arch.puzzle_emb_ndim) == (0.5, 1024, 1024)


def test_help_lists_them(folder: Path) -> None:
    outcome = run_script("pretrain.py", f"--config-dir={folder}", "experiment=mine", "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert "experiment: maze_speedrun, mine, slip, sudoku_demo" in outcome.out
    assert "lr=0.5 " in outcome.out
    assert "arch.hidden_size=1024" in outcome.out


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("hrm", "hrm_v1"), ("transformers_baseline", "transformer"), ("trm_singlez", "trm"), ("trm_hier6", "trm")],
)
def test_architectures_of_trm_name_the_nearest_one(theirs: str, ours: str) -> None:
    with pytest.raises(UserError) as error:
        compose(PretrainConfig, "pretrain", [f"arch={theirs}"])
    assert str(error.value) == f"arch={theirs}, as other code has it, is not here; the nearest is arch={ours}."
    with pytest.raises(UserError, match="arch=trm_ is not a choice"):
        compose(PretrainConfig, "pretrain", ["arch=trm_"])


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        ("slip", "experiment/slip.yaml sets lr_warmup, which is no option; did you mean lr_warmup_steps?"),
        ("text", "experiment/text.yaml cannot be used: "),
        ("mein", "experiment=mein is not a choice; did you mean mine?"),
    ],
)
def test_slips_are_named(experiment: str, says: str, folder: Path) -> None:
    argv = ["--config-dir", str(folder), f"experiment={experiment}"]
    with pytest.raises(UserError) as error:
        compose(PretrainConfig, "pretrain", argv)
    assert str(error.value).startswith(says)
    outcome = run_script("pretrain.py", *argv)
    assert (outcome.status, outcome.err) == (2, f"error: {error.value}\n")
