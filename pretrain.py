"""Train an HRM: `python pretrain.py [group=choice] [option=value]`; `--help` lists both."""

from hrm.cli import run
from hrm.config import PretrainConfig
from hrm.training.loop import pretrain

if __name__ == "__main__":
    run(PretrainConfig, "pretrain", pretrain)
