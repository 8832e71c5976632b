"""Builds a pack of puzzles of Reasoning Gym; `--help` lists the options.

The work is done by hrm/data/builders/reasoning_gym.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on the path

from hrm.data.builders.reasoning_gym import main

if __name__ == "__main__":
    sys.exit(main())
