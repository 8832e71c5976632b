"""What the README shows."""

import re

from tests.helpers.entry_points import ROOT

README = (ROOT / "README.md").read_text()


def python_block(word: str) -> str:
    """The one block of Python in it that has `word`."""
    (script,) = (script for script in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in script)
    assert isinstance(script, str)
    return script
