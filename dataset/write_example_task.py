"""Writes examples of a task of tokens as lines of JSON; `--help` lists the options.

The work is done by hrm/data/builders/example_tasks.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on the path

from hrm.data.builders.example_tasks import main

if __name__ == "__main__":
    sys.exit(main())
