"""A checkout of the published code (github.com/sapientinc/HRM), where HRM_CHECKOUT names one."""

import os
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("HRM_CHECKOUT", "")
needs_checkout = pytest.mark.skipif(not Path(CHECKOUT, "puzzle_dataset.py").is_file(), reason="HRM_CHECKOUT is not set")
