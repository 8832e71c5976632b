"""The command lines: whatever is wrong ends in one sentence and status 2, and what users know to type works."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hrm.config import DataConfig, PretrainConfig
from hrm.config.compose import run
from hrm.data.builders.missing import ensure_pack, how_to_build
from hrm.data.pack import PackMetadata, PackSet, write_split
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig
from tests.helpers.entry_points import ROOT, TINY_RUN, Outcome, make_pack, run_script, train
from tests.helpers.ranks import PATIENCE

# --- bad input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A command line, run in the folder of `stock`, and what its one sentence must contain."""

    name: str
    argv: str  # split at spaces
    says: tuple[str, ...]


# Each of these is added to a run of one second that would succeed.
def stages(*of_curriculum: str) -> str:
    return f"curriculum=[{','.join('{' + stage + '}' for stage in of_curriculum)}]"


BAD_TRAINING = [
    # options
    Bad("misspelt option", "globl_batch_size=4", ("globl_batch_size", "global_batch_size?")),
    Bad("misspelt nested option", "arch.hiden_size=64", ("arch.hiden_size", "arch.hidden_size")),
    Bad("misspelt group", "experimnt=sudoku_demo", ("experimnt", "mean experiment?")),
    Bad("option without its group", "hidden_size=64", ("hidden_size", "arch.hidden_size?")),
    Bad("added unknown option", "+foo=1", ("no option foo",)),
    Bad("forced unknown option", "++arch.foo=1", ("no option arch.foo",)),
    Bad("option without value", "lr", ("'lr'", "option=value")),
    Bad("a recipe without its group", "sudoku_demo", ("'sudoku_demo'", "mean experiment=sudoku_demo?")),
    Bad("a dash and a value apart", "--lr 1e-3", ("--lr 1e-3", "lr=1e-3.")),
    Bad("a dash and no value", "--lr", ("--lr", "lr=...")),
    Bad("spaces around the equals sign", "lr = 1e-3", ("'lr = 1e-3'", "write lr=1e-3.")),
    Bad("a space after the equals sign", "lr= 1e-3", ("'lr= 1e-3'", "write lr=1e-3.")),
    Bad("a space before the equals sign", "lr =1e-3", ("'lr =1e-3'", "write lr=1e-3.")),
    Bad("another name for the rate", "learning_rate=1e-3", ("learning_rate", "mean lr?")),
    Bad("another name for the batch", "batch_size=4", ("batch_size", "mean global_batch_size?")),
    Bad("no folder of configs", "--config-dir nowhere experiment=mine", ("--config-dir nowhere", "not a folder")),
    Bad("two equals signs", "lr==1", ("'lr==1'", "option=value")),
    Bad("several values", "lr=1e-4,1e-5", ("lr=1e-4,1e-5",)),
    # values of the wrong type
    Bad("text for a number", "lr=abc", ("lr=abc",)),
    Bad("fraction for an integer", "epochs=1.5", ("epochs=1.5",)),
    Bad("truth value for an integer", "epochs=true", ("epochs=true",)),
    Bad("text for a truth value", "checkpoint_every_eval=maybe", ("checkpoint_every_eval=maybe",)),
    Bad("empty value", "lr=", ("lr=",)),
    Bad("null for a needed value", "device=null", ("device=null",)),
    Bad("one name for a list", "eval_save_outputs=logits", ("eval_save_outputs=logits", "[logits]")),
    Bad(
        "value for a group of options",
        "arch.loss=softmax_cross_entropy",
        ("arch.loss=softmax_cross_entropy", "arch.loss."),
    ),
    # choices
    Bad("unknown arch", "arch=hrm_v7", ("arch=hrm_v7", "hrm_v1")),
    Bad("unknown kernels", "kernels=fast", ("kernels=fast", "naive")),
    Bad("unknown data", "data=sudoku_4x5", ("data=sudoku_4x5", "sudoku_4x4")),
    Bad("unknown optim", "optim=adam", ("optim=adam", "adamw")),
    Bad("unknown experiment", "experiment=sudoku", ("experiment=sudoku", "sudoku_demo")),
    Bad("no group", "arch=null", ("arch=null",)),
    Bad("unknown loss", "arch.loss.loss_type=mse", ("loss_type=mse", "softmax_cross_entropy")),
    Bad("unknown positions", "arch.pos_encodings=sin", ("pos_encodings=sin", "rope")),
    Bad("unknown dtype", "arch.forward_dtype=int8", ("forward_dtype=int8", "bfloat16")),
    Bad("unknown architecture name", "arch.name=trm@TRM", ("arch.name=trm@TRM", "HierarchicalReasoningModel_ACTV1")),
    Bad("unknown backend", "kernels.backend=fast", ("kernels.backend=fast", "naive")),
    Bad("unknown optimizer", "optim.name=sgd", ("optim.name=sgd", "adamw")),
    Bad("unknown W&B mode", "wandb=on", ("wandb=on", "online")),
    Bad("unknown device", "device=tpu", ("device=tpu", "cpu")),
    Bad("unknown output", "eval_save_outputs=[logitz]", ("eval_save_outputs=logitz", "logits")),
    # impossible values
    Bad("heads that do not divide", "arch.num_heads=7", ("num_heads=7", "hidden_size=32")),
    Bad("odd heads with rope", "arch.hidden_size=30 arch.pos_encodings=rope", ("rope", "15")),
    Bad("heads of 2 on a grid", "arch.num_heads=16 arch.pos_encodings=rope_2d", ("rope_2d", "multiple of 4")),
    Bad("no layers", "arch.L_layers=0", ("arch.L_layers=0", "at least 1")),
    Bad("no ACT steps", "arch.halt_max_steps=0", ("arch.halt_max_steps=0", "at least 1")),
    Bad("impossible probability", "arch.halt_exploration_prob=1.5", ("halt_exploration_prob=1.5", "0 to 1")),
    Bad("expansion that is no number", "arch.expansion=nan", ("arch.expansion=nan",)),
    Bad("infinite expansion", "arch.expansion=inf", ("arch.expansion=inf",)),
    Bad("epochs no multiple", "epochs=2 eval_interval=3", ("epochs=2", "eval_interval=3")),
    Bad("negative batch", "global_batch_size=-4", ("global_batch_size=-4", "at least 1")),
    Bad("negative rate", "lr=-1", ("lr=-1", "at least 0")),
    Bad("rate that is no number", "lr=nan", ("lr=nan", "at least 0")),
    Bad("beta of one", "beta1=1", ("beta1=1", "below 1")),
    Bad("negative workers", "num_workers=-1", ("num_workers=-1", "at least 0")),
    Bad("negative seed", "seed=-1", ("seed=-1", "at least 0")),
    Bad("seed beyond 64 bits", "seed=99999999999999999999", ("seed=99999999999999999999",)),
    Bad("gradients through no update", "arch.gradient=7", ("arch.gradient=7", "2 to the 6", "one_step")),
    Bad("misspelt extent of the gradient", "arch.gradient=one_steps", ("arch.gradient=one_steps", "one_step?")),
    Bad("steps in training", "arch.train_max_steps=0", ("arch.train_max_steps=0", "at least 1")),
    Bad("another architecture's name", "arch=trm arch.name=transformer", ("arch.name=transformer", "trm@")),
    Bad("stages in no order", stages("until:3,H_cycles:1,L_cycles:2", "until:3,H_cycles:2,L_cycles:2"), ("3, 3",)),
    Bad("empty stage", stages("until:0,H_cycles:1,L_cycles:2"), ("curriculum", "until=0", "at least 1")),
    Bad("endless stage", stages("H_cycles:1,L_cycles:2"), ("curriculum", "until")),
    Bad("stage without ACT steps", stages("until:3,halt_max_steps:0"), ("curriculum", "max_steps=0", "at least 1")),
    Bad(
        "stage without the updates of the gradient",
        f"arch.gradient=3 {stages('until:3,H_cycles:1,L_cycles:1')}",
        ("curriculum", "until step 3", "arch.gradient=3", "the 2 updates"),
    ),
    Bad("stage of another width", stages("until:3,hidden_size:64"), ("curriculum", "hidden_size", "H_cycles")),
    Bad("stage that is no mapping", "curriculum=[5]", ("curriculum", "until")),
    Bad("stage of no number", stages("until:3,H_cycles:two"), ("curriculum", "until step 3", "H_cycles")),
    Bad("unknown variable", "run_name=${oc.env:HRM_NOT_SET}", ("run_name", "HRM_NOT_SET")),
    # data and files
    Bad("no data there", "data_path=nowhere", ("data_path=nowhere", "does not exist", "data=arc_1 or")),
    Bad("data is a file", "data_path=pack/identifiers.json", ("pack/identifiers.json",)),
    Bad("no pack there", "data_path=run", ("run/train/dataset.json", "data_path")),
    Bad("pack without test split", "data_path=half", ("half/test/dataset.json", "train")),
    Bad("torn pack", "data_path=torn", ("torn/train/all__inputs.npy", "again")),
    Bad("token out of range", "data_path=tokens", ("tokens/train/all__inputs.npy", "99", "row 3, column 5")),
    Bad("splits that disagree", "data_path=mixed", ("mixed", "seq_len", "16", "36")),
    Bad("batch larger than the data", "global_batch_size=13", ("global_batch_size=13", "12 examples")),
    Bad("run folder is a file", "checkpoint_path=pack/identifiers.json", ("checkpoint_path", "pack/identifiers.json")),
]

BAD_EVALUATION = [
    # the checkpoint
    Bad("no checkpoint given", "show=1", ("checkpoint=",)),
    Bad("a checkpoint without its option", "checkpoints/demo", ("mean checkpoint=checkpoints/demo?",)),
    Bad("a dash before the checkpoint", "--checkpoint run", ("--checkpoint run", "checkpoint=run.")),
    Bad("no checkpoint there", "checkpoint=nowhere", ("checkpoint=nowhere", "hub id")),
    Bad("no weights in the folder", "checkpoint=pack", ("pack", "step_<n>", "checkpoint")),
    Bad("torn weights", "checkpoint=weights_torn", ("weights_torn/step_6", "torn")),
    Bad("empty weights", "checkpoint=weights_empty", ("weights_empty/step_6", "torn")),
    Bad("config as weights", "checkpoint=run/all_config.yaml", ("run/all_config.yaml", "no checkpoint")),
    Bad("weights that run code", "checkpoint=weights_code", ("weights_code/step_6", "not loaded")),
    Bad("weights at an unknown place", "checkpoint=weights_nested", ("weights_nested/step_6", "state_dict")),
    Bad(
        "other tensors",
        "checkpoint=weights_strange puzzle=1...............",
        ("weights_strange/step_6", "embed_tokens"),
    ),
    Bad("weights of another shape", "checkpoint=wider", ("wider/step_6", "H_init", "(32,)", "(64,)")),
    Bad("weights of fewer layers", "checkpoint=deeper", ("deeper/step_6", "H_level.layers.1", "all_config.yaml")),
    Bad("no config", "checkpoint=config_missing", ("config_missing/all_config.yaml", "missing")),
    Bad("config without arch", "checkpoint=config_no_arch", ("config_no_arch/all_config.yaml", "arch")),
    Bad("config that is no YAML", "checkpoint=config_torn", ("config_torn/all_config.yaml", "YAML")),
    Bad("config that runs code", "checkpoint=config_code", ("config_code/all_config.yaml",)),
    Bad("config of another model", "checkpoint=config_other", ("trm@TRM", "HierarchicalReasoningModel_ACTV1")),
    Bad("config with an unknown field", "checkpoint=config_field", ("config_field/all_config.yaml", "loops")),
    Bad("config with a mistyped batch", "checkpoint=config_batch", ("global_batch_size", "many")),
    # the data
    Bad("no data there", "checkpoint=run data_path=nowhere", ("nowhere", "data_path")),
    Bad(
        "data of another kind",
        "checkpoint=run data_path=pack6x6",
        ("vocabulary of 6 tokens", "has 8, 36 to a puzzle", "data_path="),
    ),
    # options
    Bad("unknown output", "checkpoint=run save_outputs=[logitz]", ("save_outputs=logitz", "logits")),
    Bad(
        "outputs into a file", "checkpoint=run save_outputs=[logits] output_dir=pack/identifiers.json", ("output_dir",)
    ),
    Bad("negative number of boards", "checkpoint=run show=-1", ("show=-1", "at least 0")),
    Bad("no batch", "checkpoint=run global_batch_size=0", ("global_batch_size=0", "at least 1")),
    Bad("misspelt option", "checkpoint=run puzle=1", ("puzle", "did you mean puzzle")),
    Bad("an option of training", "checkpoint=run lr=1", ("no option lr",)),
    # puzzles
    Bad("puzzle of no board's size", "checkpoint=run puzzle=123", ("3 cells", "16, 36 or 81")),
    Bad("empty puzzle", "checkpoint=run puzzle=", ("0 cells", "16, 36 or 81")),
    Bad("puzzle with a letter", "checkpoint=run puzzle=12x.............", ("Character 3", "'x'", "1 to 4")),
    Bad("puzzle with too high a digit", "checkpoint=run puzzle=...5............", ("Character 4", "'5'", "1 to 4")),
    Bad("puzzle with a quote", "checkpoint=run puzzle=12'.............", ("Character 3", '"\'"')),
    Bad("puzzle that contradicts itself", "checkpoint=run puzzle=..2....2........", ("the 2 in row 1, column 3",)),
    Bad("puzzle of another size", f"checkpoint=run puzzle={'.' * 81}", ("81 cells", "run/step_6")),
]


class Exploit:
    """Unpickled without care, it leaves a file."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, ("code_was_run",)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound pack, a sound run, and whatever the tables above need broken."""
    root = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # so that configs and sentences have short, relative paths
        make_pack(Path("pack"))
        make_pack(Path("pack6x6"), box="2x3", train_size=4, test_size=4)
        _write_sorting_pack(Path("sorting"))
        train(*TINY_RUN, "data_path=pack", "checkpoint_path=run")
        train(*TINY_RUN, "data_path=sorting", "checkpoint_path=sorter")

        shutil.copytree("pack/train", "half/train")
        shutil.copytree("pack", "torn")
        _cut(Path("torn/train/all__inputs.npy"))
        shutil.copytree("pack", "tokens")
        tokens = np.load("tokens/train/all__inputs.npy")
        tokens[3, 5] = 99
        np.save("tokens/train/all__inputs.npy", tokens)
        shutil.copytree("pack/train", "mixed/train")
        shutil.copytree("pack6x6/test", "mixed/test")

        _cut(_copy_of_run("weights_torn") / "step_6")
        (_copy_of_run("weights_empty") / "step_6").write_bytes(b"")
        torch.save({"weight": Exploit()}, _copy_of_run("weights_code") / "step_6")
        (_copy_of_run("weights_pickle") / "step_6").write_bytes(pickle.dumps(Exploit()))
        weights = torch.load("run/step_6", weights_only=True)
        torch.save({"net": weights, "step": 6}, _copy_of_run("weights_nested") / "step_6")
        torch.save({"weight": torch.zeros(2)}, _copy_of_run("weights_strange") / "step_6")
        (_copy_of_run("config_missing") / "all_config.yaml").unlink()
        (_copy_of_run("config_torn") / "all_config.yaml").write_text("arch: {name: [")
        (_copy_of_run("config_code") / "all_config.yaml").write_text(
            "arch: !!python/object/apply:os.mkdir [code_was_run]\n"
        )
        _edit_config("wider", lambda config: config["arch"].update(hidden_size=64))
        _edit_config("deeper", lambda config: config["arch"].update(H_layers=2))
        _edit_config("config_no_arch", lambda config: config.pop("arch"))
        _edit_config("config_other", lambda config: config["arch"].update(name="trm@TRM"))
        _edit_config("config_field", lambda config: config["arch"].update(loops=3))
        _edit_config("config_batch", lambda config: config.update(global_batch_size="many"))
    return root


def _write_sorting_pack(folder: Path) -> None:
    """Eight digits to be sorted, with the vocabulary of a 4x4 Sudoku."""
    for split in ("train", "test"):
        digits = np.random.default_rng(0).integers(1, 6, (12, 8), dtype=np.uint8)
        offsets = np.arange(13)
        data = PackSet(digits, np.sort(digits), np.zeros(12, np.int32), offsets, offsets)
        write_split(folder / split, PackMetadata(0, 0, 0, 6, 8, 1, 12, 1.0, ("all",)), {"all": data})


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _copy_of_run(name: str) -> Path:
    return Path(shutil.copytree("run", name))


def _edit_config(name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    file = _copy_of_run(name) / "all_config.yaml"
    config = yaml.safe_load(file.read_text())
    edit(config)
    file.write_text(yaml.safe_dump(config))


def sentence_of(outcome: Outcome) -> str:
    """The one sentence on stderr, checked for its form."""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: "), lines[0]
    assert outcome.status == 2
    sentence = lines[0].removeprefix("error: ")
    assert sentence.endswith((".", "?")), sentence
    assert not re.search(r"[.?!] [A-Z]", sentence), f"not one sentence: {sentence}"
    return sentence


def check_bad(script: str, bad: Bad, options: list[str]) -> None:
    before = sorted(Path().rglob("*"))
    outcome = run_script(script, *options, *bad.argv.split())
    sentence = sentence_of(outcome)
    missing = [words for words in bad.says if words not in sentence]
    assert not missing, f"{missing} not in: {sentence}"
    assert outcome.out == ""
    assert sorted(Path().rglob("*")) == before, "files appeared"


@pytest.mark.parametrize("bad", BAD_TRAINING, ids=lambda bad: bad.name)
def test_bad_training(bad: Bad, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stock)
    check_bad("pretrain.py", bad, [*TINY_RUN, "data_path=pack", "checkpoint_path=never"])


@pytest.mark.parametrize("bad", BAD_EVALUATION, ids=lambda bad: bad.name)
def test_bad_evaluation(bad: Bad, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stock)
    check_bad("evaluate.py", bad, ["kernels=naive", "device=cpu"])


def test_stock_is_sound(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the tables might fail for reasons of their own.
    monkeypatch.chdir(stock)
    for checkpoint in ("run", "run/step_3", "sorter"):
        assert run_script("evaluate.py", f"checkpoint={checkpoint}", "kernels=naive", "device=cpu").status == 0


@pytest.mark.parametrize("script", ["pretrain.py", "evaluate.py"])
def test_absent_gpu(script: str, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"pretrain.py": [*TINY_RUN, "data_path=pack", "checkpoint_path=never"], "evaluate.py": ["checkpoint=run"]}
    sentence = sentence_of(run_script(script, *options[script], "device=cuda"))
    assert "device=cuda" in sentence
    assert "cpu" in sentence


@pytest.mark.parametrize(
    ("data_path", "says"),
    [
        (
            "packs/sudoku-extreme-1k-aug-1000",
            "`hrm data sudoku --subsample-size 1000 --num-aug 1000 --output-dir packs/",
        ),
        ("data/sudoku-extreme-1k-aug-1000", "data=sudoku_extreme_1k, which builds it first."),
        ("data/sudoku-extreme-full", "`hrm data sudoku "),
        ("data/sudoku-mine", "`hrm data sudoku "),
        ("data/maze-30x30-hard-1k", "`hrm data maze --output-dir data/maze-30x30-hard-1k`"),
        ("data/arc-2-aug-100", "`hrm data arc --dataset arc-2 --output-dir data/arc-2-aug-100`"),
        ("data/elsewhere", "`hrm data --help` lists the builders."),
    ],
)
def test_training_says_what_makes_its_pack(
    data_path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        ensure_pack(DataConfig("arc_1", "data/arc-aug-1000", "arc"), data_path)
    assert f"data_path={data_path} does not exist: " in str(told.value)
    assert says in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["sudoku-4x4", "sudoku-mine", "elsewhere"])
def test_evaluation_names_no_option_that_it_lacks(folder: str) -> None:
    assert "data=" in how_to_build(f"data/{folder}")
    assert "data=" not in how_to_build(f"data/{folder}", by_name=False)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        ("sudoko --generate 2x2", "did you mean sudoku?"),
        ("mine/build.py --fast", "there is no script mine/build.py"),
        ("", "names no builder"),
        ("sudoku 'open", "names no builder"),
    ],
)
def test_builders_that_are_not_there(build: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)):
        ensure_pack(DataConfig("mine", "data/mine", build), "data/mine")


def test_packs_by_a_script_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[-1]).mkdir(parents=True)")
    ensure_pack(DataConfig("mine", "data/mine", "build.py --fast"), "data/mine")
    assert (tmp_path / "data/mine").is_dir()


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: PretrainConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as exit:
        run(PretrainConfig, "pretrain", interrupted, "python pretrain.py")
    assert exit.value.code == 130
    assert capsys.readouterr().err == ""


# --- real processes --------------------------------------------------------------------------------------------------


def run_process(cwd: Path, script: str, *argv: str) -> Outcome:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYDRA_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "no-hub-cache")}
    command = [sys.executable, str(ROOT / script), *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    sentence = sentence_of(run_process(tmp_path, "pretrain.py", "hidden_size=64"))
    assert sentence == "there is no option hidden_size; did you mean arch.hidden_size?"


def test_hub_out_of_reach(tmp_path: Path) -> None:
    sentence = sentence_of(run_process(tmp_path, "evaluate.py", "checkpoint=sapientinc/HRM-checkpoint-ARC-2"))
    assert "checkpoint=sapientinc/HRM-checkpoint-ARC-2" in sentence
    assert "network" in sentence


def test_pickled_code_is_not_run(stock: Path) -> None:
    sentence = sentence_of(run_process(stock, "evaluate.py", "checkpoint=weights_pickle"))
    assert "weights_pickle/step_6" in sentence
    assert not (stock / "code_was_run").exists()


# --- good input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PretrainConfig]:
    """What `pretrain.py` would train with, for a command line."""

    def composed(*argv: str) -> PretrainConfig:
        configs: list[PretrainConfig] = []
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
        run(PretrainConfig, "pretrain", configs.append, "python pretrain.py")
        assert len(configs) == 1
        return configs[0]

    return composed


def assert_options(config: PretrainConfig, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        found: object = config
        for part in name.split("."):
            found = getattr(found, part)
        assert (name, type(found), found) == (name, type(value), value)


PUBLISHED_DEFAULTS: dict[str, object] = {
    "data_path": "data/arc-aug-1000",
    "global_batch_size": 768,
    "epochs": 100000,
    "eval_interval": 10000,
    "checkpoint_every_eval": True,
    "lr": 1e-4,
    "lr_min_ratio": 1.0,
    "lr_warmup_steps": 2000,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "puzzle_emb_lr": 1e-2,
    "puzzle_emb_weight_decay": 0.1,
    "seed": 0,
    "project_name": None,
    "run_name": None,
    "checkpoint_path": None,
    "eval_save_outputs": [],
    "optim.name": "adam_atan2",
    "arch.name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    "arch.loss.name": "losses@ACTLossHead",
    "arch.loss.loss_type": "stablemax_cross_entropy",
    "arch.halt_exploration_prob": 0.1,
    "arch.halt_max_steps": 16,
    "arch.H_cycles": 2,
    "arch.L_cycles": 2,
    "arch.H_layers": 4,
    "arch.L_layers": 4,
    "arch.hidden_size": 512,
    "arch.num_heads": 8,
    "arch.expansion": 4.0,
    "arch.puzzle_emb_ndim": 512,
    "arch.pos_encodings": "rope",
    "arch.rope_theta": 10000.0,
    "arch.rms_norm_eps": 1e-5,
    "arch.forward_dtype": "bfloat16",
}


def test_published_defaults(compose: Callable[..., PretrainConfig]) -> None:
    config = compose()
    assert isinstance(config.arch, HRMConfig)
    assert_options(config, PUBLISHED_DEFAULTS)


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        (
            "data_path=data/sudoku-extreme-1k-aug-1000 epochs=20000 eval_interval=2000 global_batch_size=384 lr=7e-5 "
            "puzzle_emb_lr=7e-5 weight_decay=1.0 puzzle_emb_weight_decay=1.0",
            {
                "data_path": "data/sudoku-extreme-1k-aug-1000",
                "epochs": 20000,
                "eval_interval": 2000,
                "global_batch_size": 384,
                "lr": 7e-5,
                "puzzle_emb_lr": 7e-5,
                "weight_decay": 1.0,
                "puzzle_emb_weight_decay": 1.0,
            },
        ),
        (
            "data_path=data/sudoku-hard-full epochs=100 eval_interval=10 lr_min_ratio=0.1 global_batch_size=2304 "
            "lr=3e-4 puzzle_emb_lr=3e-4 weight_decay=0.1 puzzle_emb_weight_decay=0.1 "
            "arch.loss.loss_type=softmax_cross_entropy arch.L_cycles=8 arch.halt_max_steps=8 "
            "arch.pos_encodings=learned",
            {
                "data_path": "data/sudoku-hard-full",
                "epochs": 100,
                "eval_interval": 10,
                "lr_min_ratio": 0.1,
                "global_batch_size": 2304,
                "lr": 3e-4,
                "puzzle_emb_lr": 3e-4,
                "weight_decay": 0.1,
                "puzzle_emb_weight_decay": 0.1,
                "arch.loss.loss_type": "softmax_cross_entropy",
                "arch.L_cycles": 8,
                "arch.halt_max_steps": 8,
                "arch.pos_encodings": "learned",
            },
        ),
    ],
    ids=["sudoku 1k", "sudoku full"],
)
def test_published_commands(command: str, changed: dict[str, object], compose: Callable[..., PretrainConfig]) -> None:
    assert_options(compose(*command.split()), PUBLISHED_DEFAULTS | changed)


def test_every_published_option_can_be_set(compose: Callable[..., PretrainConfig]) -> None:
    changed: dict[str, object] = {
        "data_path": "data/elsewhere",
        "global_batch_size": 32,
        "epochs": 60,
        "eval_interval": 30,
        "checkpoint_every_eval": False,
        "lr": 0.5,
        "lr_min_ratio": 0.25,
        "lr_warmup_steps": 7,
        "beta1": 0.5,
        "beta2": 0.75,
        "weight_decay": 0.0,
        "puzzle_emb_lr": 1.0,
        "puzzle_emb_weight_decay": 2.0,
        "seed": 9,
        "project_name": "project",
        "run_name": "run",
        "checkpoint_path": "runs/run",
        "eval_save_outputs": ["logits", "inputs"],
        "arch.loss.loss_type": "softmax_cross_entropy",
        "arch.halt_exploration_prob": 0.5,
        "arch.halt_max_steps": 8,
        "arch.H_cycles": 3,
        "arch.L_cycles": 5,
        "arch.H_layers": 1,
        "arch.L_layers": 2,
        "arch.hidden_size": 64,
        "arch.num_heads": 2,
        "arch.expansion": 2.5,
        "arch.puzzle_emb_ndim": 100,
        "arch.pos_encodings": "learned",
        "arch.rope_theta": 500.0,
        "arch.rms_norm_eps": 1e-6,
        "arch.forward_dtype": "float32",
    }
    argv = [f"{name}={value}".replace("'", "").replace(" ", "") for name, value in changed.items()]
    assert_options(compose(*argv), changed)


def test_puzzle_vector_follows_the_width(compose: Callable[..., PretrainConfig]) -> None:
    assert compose("arch.hidden_size=256").arch.puzzle_emb_ndim == 256


def test_the_command_line_wins_over_an_experiment(compose: Callable[..., PretrainConfig]) -> None:
    recipe = compose("experiment=sudoku_extreme_1k")
    assert_options(
        recipe, {"data.name": "sudoku_extreme_1k", "data_path": "data/sudoku-extreme-1k-aug-1000", "lr": 7e-5}
    )
    changed = {"data_path": "my/pack", "lr": 0.5, "arch.hidden_size": 128}
    assert_options(compose("lr=0.5", "arch=hrm_small", "data_path=my/pack", "experiment=sudoku_extreme_1k"), changed)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("checkpoint_path=runs/a b=(c), [d] {e} #1 %", "runs/a b=(c), [d] {e} #1 %"),
        ("checkpoint_path=C:\\runs\\", "C:\\runs\\"),
        ("checkpoint_path=a\\'b", "a\\'b"),
        ("checkpoint_path=~/runs*?", "~/runs*?"),
        ("checkpoint_path=laufe/süß-数独", "laufe/süß-数独"),
        ("checkpoint_path='quoted (by habit)'", "quoted (by habit)"),
        ("checkpoint_path=runs/${seed}", "runs/0"),
        ("run_name=it's", "it's"),
        ("run_name=0530", "0530"),
        ("run_name=1e5", "1e5"),
        ("run_name=true", "true"),
        ("run_name=a,b", "a,b"),
        ("run_name=key:value", "key:value"),
        ("run_name=null", None),
    ],
)
def test_names_and_paths_are_taken_to_the_letter(
    argument: str, value: str | None, compose: Callable[..., PretrainConfig]
) -> None:
    assert_options(compose(argument), {argument.partition("=")[0]: value})


@pytest.mark.parametrize("puzzle", ["0130000000000000", "...1 ..2. .3.. 4...", "1...\n..2.\n.3..\n...4\n"])
def test_puzzles_are_taken_to_the_letter(puzzle: str, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stock)
    outcome = run_script("evaluate.py", "checkpoint=run", "device=cpu", f"puzzle={puzzle}")
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("script", "groups", "examples"),
    [
        (
            "pretrain.py",
            ["arch", "data", "experiment", "kernels", "optim"],
            ["python pretrain.py experiment=sudoku_demo", "torchrun", "global_batch_size=768 "],
        ),
        (
            "evaluate.py",
            ["kernels"],
            ["python evaluate.py checkpoint=", "puzzle=", "show=3", "save_outputs=[] "],
        ),
    ],
    ids=["pretrain", "evaluate"],
)
def test_help_lists_the_groups_and_shows_examples(
    script: str, groups: list[str], examples: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    outcome = run_script(script, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    lists = outcome.out.partition("== Groups")[2].partition("\n\n")[0].replace("\n    ", " ")  # long ones are wrapped
    listed = re.findall(r"^(\w+): (.*)$", lists, re.MULTILINE)
    choices = {group: sorted(file.stem for file in (ROOT / "config" / group).glob("*.yaml")) for group in groups}
    assert {group: sorted(names.split(", ")) for group, names in listed} == choices
    for example in examples:
        assert example in outcome.out


@pytest.mark.parametrize("builder", ["sudoku", "dataset/build_sudoku_dataset.py"])
def test_a_missing_pack_is_built_first(builder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build = f"{builder} --generate 2x2 --train-size 12 --test-size 5"
    train(*TINY_RUN, "data=sudoku_4x4", f"data.build='{build}'", "checkpoint_path=run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    assert (tmp_path / "data/sudoku-4x4/test/dataset.json").is_file()


def test_training_leaves_only_its_run_folder(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(*TINY_RUN, f"data_path={stock / 'pack'}", "project_name=a project", "run_name=it's 1 = (one)")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    folder = "checkpoints/a project/it's 1 = (one)"
    weights = {f"step_{step}{suffix}" for step in (3, 6) for suffix in ("", ".safetensors")}
    parts = ("SHA256SUMS", "state.json", "shard-00001-model-00001-of-00001.safetensors")
    states = {f"state_{step}/{part}" for step in (3, 6) for part in parts}
    about = {"all_config.yaml", "task.json", "metrics.jsonl"}
    assert files == {f"{folder}/{name}" for name in {*about, *weights, *states}}
