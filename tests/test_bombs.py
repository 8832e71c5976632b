"""Small files and options that ask for terabytes or hours end in a sentence within seconds."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hrm.errors import UserError
from hrm.evaluation.picking import standing_in_vote
from hrm.models import build_model
from hrm.models.size_guard import _control_group_bytes, at_most, claim, memory_bytes
from tests.helpers.entry_points import CPU, TINY_RUN, make_pack, run_script

pytestmark = pytest.mark.slow

SECONDS = 60  # of CPU time; what these ask for would take hours, or more memory than there is


@pytest.fixture(autouse=True)
def in_seconds() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def set_in_config(**options: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / "run/all_config.yaml"
        config = yaml.safe_load(file.read_text())
        for name, value in options.items():
            section = config["arch"] if name in config["arch"] or name.startswith("arch_") else config
            section[name.removeprefix("arch_")] = value
        file.write_text(yaml.safe_dump(config))

    return change


def set_in_pack(**fields: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root / "pack/test/dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "a wide model": (set_in_config(hidden_size=1_000_000), "too large for the memory or for the file"),
        "a wide puzzle vector": (
            set_in_config(puzzle_emb_ndim=10**12),
            "arch.puzzle_emb_ndim=10",
        ),
        "a fairly wide one": (set_in_config(puzzle_emb_ndim=300_000), "the architecture|too large"),
        "a wide MLP": (set_in_config(expansion=1e9), "too large for the memory or for the file"),
        "a wider one": (set_in_config(expansion=1e308), "arch.expansion=1e+308 is too large"),
        "a name that is none": (set_in_config(name=[1]), "arch.name=[1] is not a choice"),
        "a path of many letters": (set_in_config(data_path="y/" * 3000), "does not exist"),
        "a long prefix": (set_in_config(puzzle_emb_len=10**9), "arch.puzzle_emb_len=1000000000 is too large"),
        "many slow cycles": (set_in_config(H_cycles=10**9), "arch.H_cycles=1000000000 is too large"),
        "many fast cycles": (set_in_config(L_cycles=10**9), "arch.L_cycles=1000000000 is too large"),
        "many of both": (set_in_config(H_cycles=9000, L_cycles=9000), "updates in an ACT step"),
        "many layers": (set_in_config(L_layers=10**8), "arch.L_layers=100000000 is too large"),
        "many ACT steps": (set_in_config(halt_max_steps=10**9), "arch.halt_max_steps=1000000000 is too large"),
        "many tokens": (set_in_pack(vocab_size=10**12), "vocab_size 1000000000000, more than"),
        "fewer, still many": (set_in_pack(vocab_size=2 * 10**9), "trained on puzzles with a vocabulary of 6 tokens"),
        "many puzzles": (set_in_pack(num_puzzle_identifiers=10**12), "num_puzzle_identifiers 1000000000000, more than"),
        "fewer puzzles": (set_in_pack(num_puzzle_identifiers=2 * 10**9), "trained on a pack with 1 puzzle identifiers"),
    }.values(),
)
def test_files_that_ask_for_too_much(change: Callable[[Path], None], words: str, trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy"))
    change(root)
    own = yaml.safe_load((root / "run/all_config.yaml").read_text())["data_path"]
    options = [] if own.startswith("y/") else [f"data_path={root / 'pack'}"]
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={root / 'run'}", *options)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert any(word in line for word in words.split("|")), line


@pytest.mark.parametrize("size", [10**9, 10**15])
def test_a_batch_is_not_larger_than_the_split(size: int, trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy"))
    set_in_config(global_batch_size=size)(root)
    for options in ([], [f"global_batch_size={size}"]):
        outcome = run_script("evaluate.py", *CPU, f"checkpoint={root / 'run'}", f"data_path={root / 'pack'}", *options)
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("evaluate.py", "ensemble.augmentations=1000000000"),
        ("evaluate.py", "num_workers=1000000000"),
        ("evaluate.py", "act_max_steps=1000000000"),
        ("pretrain.py", "num_workers=1000000000"),
        ("pretrain.py", "global_batch_size=1000000000"),
        ("pretrain.py", "arch.H_cycles=1000000000"),
        ("pretrain.py", "arch.hidden_size=10000000"),
    ],
)
def test_options_that_ask_for_too_much(script: str, option: str, trained: Path, tmp_path: Path) -> None:
    common = [*CPU, f"checkpoint={trained / 'run'}"]
    if script == "pretrain.py":
        make_pack(tmp_path / "pack")
        common = [*TINY_RUN, f"data_path={tmp_path / 'pack'}", f"checkpoint_path={tmp_path / 'run'}"]
    outcome = run_script(script, *common, option)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_weights_are_counted_before_they_are_made() -> None:
    with at_most(1000):
        claim((10, 50))
        claim((500,))
        with pytest.raises(UserError, match=r"shape \(1,\)"):
            claim((1,))
    claim((10**15,))  # nobody counts
    with at_most(1000), at_most(), pytest.raises(UserError, match="too large"):
        claim((1001,))
    arch = {"hidden_size": 64, "num_heads": 2, "expansion": memory_bytes() / 1e3}
    with pytest.raises(UserError, match="too large for the memory"):
        build_model(arch, batch_size=1, seq_len=4, vocab_size=3, num_puzzle_identifiers=1)


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("0::/job/step", {"memory.max": "max", "job/memory.max": "5000", "job/step/memory.max": "7000"}, 5000),
        ("0::/", {"memory.max": "6000"}, 6000),
        ("0::/of/the/host", {"memory.max": "4000"}, 4000),
        ("3:cpu:/x\n2:cpuacct,memory:/job", {"memory/job/memory.limit_in_bytes": "3000"}, 3000),
        ("odd", {"memory.max": "1"}, 1 << 62),
        ("0::/", {"memory.max": "max"}, 1 << 62),
    ],
)
def test_control_groups_bound_the_memory(groups: str, limits: dict[str, str], least: int, tmp_path: Path) -> None:
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": v for n, v in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert _control_group_bytes(tmp_path) == least
    assert _control_group_bytes(tmp_path / "nothing") == 1 << 62


def test_ulimit_bounds_the_memory() -> None:
    code = "from hrm.models.size_guard import memory_bytes; print(memory_bytes())"
    command = ["bash", "-c", f"ulimit -v 6000000 && exec {sys.executable} -c '{code}'"]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) <= 6_000_000 * 1024


def test_a_vote_of_many_takes_memory_for_their_answers_only() -> None:
    answers = torch.randint(2, (200, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    best = standing_in_vote(answers, torch.zeros(200, 3)).argmax(0)
    chosen = answers[best, torch.arange(3)]
    for puzzle in range(3):
        rows, counts = torch.unique(answers[:, puzzle], dim=0, return_counts=True)
        assert counts[(rows == chosen[puzzle]).all(1)].item() == counts.max()
