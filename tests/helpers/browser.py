"""Pages in headless Chromium, which prints a page after a script of ours has used it: no driver is needed.

Tests are skipped where there is no Chromium (Debian and Ubuntu: `apt-get install chromium`).
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--enable-logging=stderr",  # what scripts write to the console, uncaught errors among it
    "--dump-dom",
]
_REFUSED = "the server responded with a status of 422"  # is noted whatever the page makes of it

needs_chromium = pytest.mark.skipif(_CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def seen_by(folder: Path, address: str, *flags: str) -> dict[str, Any]:
    """What a page's script left in its element #seen, as JSON; fails if the browser's console says anything.

    Args:
        folder: for the browser's profile.
    """
    command = [str(_CHROMIUM), *_FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in result.stderr.splitlines() if "CONSOLE" in line and _REFUSED not in line]
    assert not complaints, "\n".join(complaints)
    text = re.search(r'<script type="application/json" id="seen">(.*?)</script>', result.stdout, re.S)
    assert text is not None
    assert text[1], "the page's script did not come to its end"
    seen: dict[str, Any] = json.loads(text[1])
    return seen
