"""What is written links to what exists, and the site builds without a warning and loads nothing from elsewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hrm.config import PretrainConfig
from hrm.config.compose import compose
from scripts.docs_site import linked_path, links
from tests.helpers.entry_points import ROOT

TEXTS = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "scripts/*.md", "hrm/**/*.md")
    for file in ROOT.glob(pattern)
)


def headings(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as GitHub and the site make them of plain headings."""
    outside_code = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", outside_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", TEXTS)
def test_links_name_what_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in links(text):
        path, fragment = linked_path(target, page), urlsplit(target).fragment
        if path is not None:
            assert (ROOT / path).exists(), f"{page} links to {target}"
        if fragment and not urlsplit(target).scheme and (path is None or path.endswith(".md")):
            assert fragment in headings((ROOT / path).read_text() if path else text), f"{page} links to {target}"


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "docs/options.md"])  # architectures share options
def test_nothing_stands_twice(page: str) -> None:
    paragraphs = [text.strip() for text in (ROOT / page).read_text().split("\n\n")]
    assert not {text for text in paragraphs if len(text) > 200 and paragraphs.count(text) > 1}


def test_links_are_found() -> None:
    """Else the test above could not fail."""
    text = "[a](b.md#c) ![d](e/f.svg)\n```\n[no](no.md)\n```\nand `[no](no.md)`, [g](https://h.org/i)"
    assert links(text) == ["b.md#c", "e/f.svg", "https://h.org/i"]
    assert linked_path("../b.md#c", "docs/a.md") == "b.md"
    assert linked_path("https://h.org/i", "docs/a.md") is None
    assert linked_path("#c", "docs/a.md") is None


def test_published_command_lines_compose() -> None:
    text = (ROOT / "docs/from-published-code.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    options = [command[command.index("pretrain.py") + 1 :] for command in commands if "pretrain.py" in command]
    assert len(options) == 6
    for given in options:
        config = compose(PretrainConfig, "pretrain", given)
        assert config.data_path == next(option for option in given if "data_path" in option).partition("=")[2].strip(
            "[]"
        )


@pytest.mark.slow
def test_the_bundled_model_thinks_as_the_page_shows(tmp_path: Path) -> None:
    text = (ROOT / "docs/how-an-hrm-thinks.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"step (\d): (\d+) cells wrong, q_halt (\d\.\d\d)", shown)
    assert [step for step, _, _ in steps] == list("12345")
    assert int(steps[0][1]) > 10
    assert float(steps[0][2]) < 0.1
    assert steps[-1][1] == "0"
    assert float(steps[-1][2]) > 0.9
    on_page = re.findall(r"^step \d: .*$", text, re.MULTILINE)
    assert len(on_page) == len(steps)


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="?([^"\s>]+)|<link[^>]*\shref="?([^"\s>]+)', page.read_text()
        )
        elsewhere = [target for pair in loaded for target in pair if urlsplit(target).netloc]
        assert not elsewhere, f"{page} loads {elsewhere}"
