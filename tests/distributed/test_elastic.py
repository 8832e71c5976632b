"""torchrun starts a run again whose process was killed, and it goes on where it was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry_points import ROOT, TINY_MODEL, make_pack
from tests.helpers.ranks import PATIENCE, wait_for

STEPS = 600


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack", train_size=12, test_size=4)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain.py"), *TINY_MODEL, "kernels=naive", "device=cpu", "wandb=disabled", "resume=auto"]
    command += ["global_batch_size=4", f"epochs={STEPS // 3}", "eval_interval=null", "log_interval=1"]
    command += [f"data_path={tmp_path / 'pack'}", f"checkpoint_path={run}", "checkpoint_interval=0.01"]
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    with log.open("w") as output:
        job = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_for(lambda: any(run.glob("state_*")), job)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert job.wait(PATIENCE) == 0, log.read_text()
    finally:
        job.kill()
    said = log.read_text()
    went_on_from = re.search(r"Going on from .*state_(\d+)", said)
    assert went_on_from, said
    assert 0 < int(went_on_from[1]) < STEPS
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/lr" in record]
    assert steps == list(range(1, STEPS + 1))
