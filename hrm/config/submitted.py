"""Runs of a sweep as jobs of a scheduler: what Hydra's submitit launcher needs around them.

`python pretrain.py -m hydra/launcher=submitit_slurm lr=1e-4,3e-4` submits a job for each run; submitit_local starts
them as processes of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from hydra.core.hydra_config import HydraConfig

from hrm.config.paths import install_hint
from hrm.errors import UserError

GROUP = "hydra/launcher"
_LAUNCHERS = ("submitit_local", "submitit_slurm")
_OF_THIS_PROCESS = ".BasicLauncher"


def launches_jobs(overrides: Iterable[str], *, is_sweep: bool) -> bool:
    """Whether a command line has a sweep run as jobs; prepares for that.

    Raises:
        UserError: it is not installed, or there is no sweep to launch.
    """
    for override in overrides:
        name, _, launcher = override.lstrip("+").partition("=")
        if name != GROUP or launcher not in _LAUNCHERS:
            continue
        if not is_sweep:
            raise UserError(f"{name}={launcher} launches the runs of a sweep: add -m, also for a single run.")
        try:
            import hydra_plugins.hydra_submitit_launcher  # noqa: F401
        except ImportError as error:
            raise UserError(f"{name}={launcher} needs a plugin of Hydra: {install_hint('submitit')}.") from error
        # Sent before a job's time is up. A run saves at this one; at submitit's own choice it would end at once.
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        return True
    return False


def is_job() -> bool:
    """Whether this process does a run of a sweep for another one, which waits for it."""
    return not str(HydraConfig.get().launcher._target_).endswith(_OF_THIS_PROCESS)


def join_tasks() -> None:
    """Let the tasks of one job, on one or several nodes, meet as the processes of `torchrun` do."""
    if "SUBMITIT_EXECUTOR" not in os.environ or "LOCAL_RANK" in os.environ:
        return
    from submitit.helpers import TorchDistributedEnvironment

    if (environment := TorchDistributedEnvironment()).world_size > 1:
        environment.export(set_cuda_visible_devices=False)  # a run takes the GPU of its local rank
