"""Train an HRM: `python pretrain.py [group=choice] [option=value]`; `--help` lists both."""

from hrm.config import PretrainConfig
from hrm.config.compose import run
from hrm.training.loop import pretrain
from hrm.training.sweep import sweep_table

if __name__ == "__main__":
    run(PretrainConfig, "pretrain", pretrain, program="python pretrain.py", sweep_table=sweep_table)
