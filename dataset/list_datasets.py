"""Lists the data sets that `data=` can name; `--help` lists the options.

The work is done by hrm/data/builders/listing.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on the path

from hrm.data.builders.listing import main

if __name__ == "__main__":
    sys.exit(main())
