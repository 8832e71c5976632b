"""Runs and sweeps on many machines: Hydra's submitit launcher with real jobs, and what SkyPilot would run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from hrm.config.submitted import join_tasks
from tests.helpers.entry_points import ROOT, TINY_RUN, make_pack, run_script

SKY = ROOT / "scripts" / "train.sky.yaml"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


# --- submitit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sweep_as_jobs(tmp_path: Path) -> None:
    """Each run is a job; how it did comes back, and so does what is wrong with another one."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    make_pack(tmp_path / "pack")
    options = [*TINY_RUN, "hydra/launcher=submitit_local"]
    options += [f"hydra.sweep.dir={tmp_path}/sweep", f"data_path={tmp_path}/pack", "lr=1e-3,-1"]
    command = [sys.executable, "pretrain.py", "-m", *options, f"checkpoint_path={tmp_path}/lr_${{lr}}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: lr=-1.0 is too small: give at least 0."
    assert "Traceback" not in done.stderr
    head, line = done.stdout.splitlines()
    assert head.split("  ") == ["exactly right", "cells right", "run folder"]
    assert line.split()[-1] == f"{tmp_path}/lr_0.001"


def test_tasks_of_a_job_meet_as_torchrun_has_them_do() -> None:
    pytest.importorskip("submitit")
    job = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_GLOBALID": "1", "LOCAL_LOCALID": "1"}
    with mock.patch.dict(os.environ, {f"SUBMITIT_{name}": value for name, value in job.items()}):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(name, None)
        join_tasks()
        assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "1", "2"]
        assert os.environ["MASTER_ADDR"]
        assert os.environ["MASTER_PORT"]


@pytest.mark.parametrize("flag", [[], ["-m"]])
def test_what_jobs_need_is_told(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher", None)
    outcome = run_script("pretrain.py", *flag, "hydra/launcher=submitit_slurm")
    assert outcome.status == 2
    needs = "hydra/launcher=submitit_slurm needs a plugin of Hydra: pip install -e"
    alone = "hydra/launcher=submitit_slurm launches the runs of a sweep: add -m, also for a single run."
    assert (needs if flag else alone) in outcome.err
    assert len(outcome.err.splitlines()) == 1


# --- SkyPilot --------------------------------------------------------------------------------------------------------

# The fields that its YAML specification has, for those that stand in the file.
FIELDS: dict[str, Any] = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {"accelerators": str, "use_spot": bool, "disk_size": int},
    "envs": dict,
    "file_mounts": dict,
    "setup": str,
    "run": str,
}
MOUNT = {"name": str, "source": str, "store": str, "persistent": bool, "mode": str}
MODES = ("MOUNT", "COPY", "MOUNT_CACHED")


def check_fields(found: dict[str, Any], allowed: dict[str, Any]) -> None:
    for name, value in found.items():
        assert name in allowed, name
        if isinstance(allowed[name], dict):
            check_fields(value, allowed[name])
        else:
            assert isinstance(value, allowed[name]), name


def test_sky_yaml_has_the_fields_of_the_specification() -> None:
    task = yaml.safe_load(SKY.read_text())
    check_fields(task, FIELDS)
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())
    (mount,) = task["file_mounts"].values()
    check_fields(mount, MOUNT)
    assert mount["mode"] in MODES


@pytest.mark.slow
def test_what_sky_runs_trains(tmp_path: Path) -> None:
    """`setup` and `run` on a machine without GPU, in a copy of the project that has an environment."""
    task = yaml.safe_load(SKY.read_text())
    project, runs = tmp_path / "project", tmp_path / "runs"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    for name in ("hrm", "config", "dataset", "pretrain.py", "pyproject.toml"):
        (project / name).symlink_to(ROOT / name)
    environment = project / ".venv"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (environment / "bin" / "activate").write_text(f'export PATH="{python.parent}:$PATH"\n')
    checksum = subprocess.run(["cksum"], input=(ROOT / "pyproject.toml").read_bytes(), capture_output=True)
    (environment / "installed-arc").write_text(f"arc {checksum.stdout.decode()}")
    pack, options = tmp_path / "pack", [*TINY_RUN, f"data_path={tmp_path / 'pack'}"]
    build = "python dataset/build_sudoku_dataset.py --generate 2x2 --train-size 12 --test-size 5 --output-dir"
    given = {name: value or "" for name, value in task["envs"].items()}
    given |= {"RUNS": str(runs), "OPTIONS": " ".join(options), "BUILD": f"{build} {pack}"}
    given |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1\n"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "0"}
    for part in ("setup", "run"):
        script = ["bash", "-c", task[part]]
        done = subprocess.run(script, cwd=project, env=os.environ | ONE_THREAD | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (runs / task["envs"]["RUN"] / "step_6").is_file(), done.stdout
