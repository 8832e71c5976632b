"""What the README and the pages of docs/ show."""

import re

from tests.helpers.entry_points import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


def python_block(word: str) -> str:
    """The one block of Python in them that has `word`."""
    blocks = (block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (script,) = (block for block in blocks if word in block)
    assert isinstance(script, str)
    return script
