"""The Slurm script starts a run on all nodes, has it saved when its time is up, and puts it into the queue again.

Slurm is played by a few lines of shell; torchrun, its rendezvous between two "nodes" and pretrain.py are real.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.entry_points import CPU, ROOT, TINY_MODEL, make_pack
from tests.helpers.ranks import PATIENCE, wait_for

SCRIPT = ROOT / "scripts" / "train.slurm"
JOB = str(os.getpid())  # the rendezvous' port is made of it: not the same for two tests at a time

COMMANDS = {
    "srun": """
        while [ "${1#-}" != "$1" ]; do shift; done
        for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & nodes="$nodes $!"; done
        echo $nodes > "$FAKE_SLURM/nodes"
        for node in $nodes; do wait $node || status=$?; done
        exit ${status-0}""",
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$FAKE_SLURM/nodes")',
    "scontrol": """
        case $1 in
            show) [ "$*" = "show hostnames nodes[1-2]" ] && echo localhost && echo another ;;
            requeue) echo "$2" >> "$FAKE_SLURM/requeued" ;;
        esac""",
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no Slurm, no SIGUSR1")


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start the script as Slurm would; what it says goes to the file `log`, ids of requeued jobs to `requeued`."""
    jobs: list[subprocess.Popen[bytes]] = []
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, lines in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{lines}\n")
        (commands / name).chmod(0o755)

    def start(num_nodes: int, python: str, *options: str) -> "subprocess.Popen[bytes]":
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        environment |= {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHON": python, "OMP_NUM_THREADS": "1"}
        environment |= {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_JOB_NUM_NODES": str(num_nodes)}
        environment |= {"SLURM_CPUS_PER_TASK": "1", "FAKE_SLURM": str(tmp_path)}
        command = ["bash", str(SCRIPT), *options]
        with (tmp_path / "log").open("w") as log:
            jobs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)  # not SIGKILL, which torchrun could not pass on


@pytest.mark.slow
@pytest.mark.multiprocess
def test_goes_on_after_its_time_is_up(tmp_path: Path, submit: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    make_pack(tmp_path / "pack", train_size=12, test_size=4)
    run, log, requeued = tmp_path / "run", tmp_path / "log", tmp_path / "requeued"
    options = [*TINY_MODEL, *CPU, "wandb=disabled", "global_batch_size=4", "epochs=100000", "eval_interval=null"]
    options += ["log_interval=1", f"data_path={tmp_path / 'pack'}", f"checkpoint_path={run}"]
    metrics = run / "metrics.jsonl"
    job = submit(2, sys.executable, *options)
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE) != 0, log.read_text()
    assert requeued.read_text() == f"{JOB}\n", log.read_text()
    (step,) = (int(path.name.removeprefix("state_")) for path in run.glob("state_*"))
    assert "on 2 x cpu" in log.read_text()
    assert f"Stopped by a signal after step {step}" in log.read_text()

    again = submit(1, sys.executable, *options, f"epochs={step // 3 + 2}", "resume_changed=true")
    assert again.wait(PATIENCE) == 0, log.read_text()
    assert f"Going on from {run}/state_{step}" in log.read_text()
    steps = [record["step"] for record in map(json.loads, metrics.read_text().splitlines()) if "train/lr" in record]
    assert steps == list(range(1, 3 * (step // 3 + 2) + 1))
    assert requeued.read_text() == f"{JOB}\n"  # once


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_failure_is_not_requeued(tmp_path: Path, submit: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    assert submit(1, "false").wait(PATIENCE) == 1
    assert not (tmp_path / "requeued").exists()


def test_slurm_reads_the_options() -> None:
    """They stand before the first command, or Slurm passes over them; B: brings the signal to the shell."""
    head, _, rest = SCRIPT.read_text().partition("\nset ")
    assert "\n#SBATCH" not in rest
    options = re.findall(r"^#SBATCH (--\S+)$", head, re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= set(options)
    shutdown = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", rest)
    assert shutdown
    assert int(shutdown[1]) < 120
