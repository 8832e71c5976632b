"""What docs/python.md shows works as it stands there, and passes a type checker of the user's."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.entry_points import ROOT

PAGE = (ROOT / "docs/python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

SCRIPT = """
import hrm
from collections.abc import Iterator

model = hrm.from_pretrained("sudoku", device="cpu")
out = model.predict("." * 81, augmentations=2)
text: str = out.texts[0]
first: int = int(out.answers[0, 0])
chunks: Iterator[hrm.Predictions] = model.predict(iter([text]), stream=True)
metrics: dict[str, float] = hrm.evaluate({"checkpoint": "sudoku"})
made = hrm.train({"experiment": "sudoku_demo"})
reveal_type(model)
reveal_type(out.q_halt)
try:
    model.predict("1")
except hrm.UserError as error:
    print(error)
"""
MISTAKES = """
import hrm

model = hrm.from_pretrained("sudoku", dvice="cpu")
model.predict("." * 81, augmentation=2)
model.predict("." * 81).text
"""


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    """All blocks of Python, one after the other, as one reads them."""
    assert len(BLOCKS) == 7
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(BLOCKS)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(re.findall(r"# (\d{81})", PAGE)[0])
    assert {file.name for file in (tmp_path / "my-model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "task.json",
        "README.md",
    }


@pytest.mark.slow
def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    """Against the package as it is installed: outside of the project, without its settings, by py.typed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "hrm").symlink_to(ROOT / "hrm")

    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    files = ["script.py", "mistakes.py"]
    argv = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", *files]
    env = {"PATH": "", "MYPYPATH": str(site), "PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}"}
    said = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert (ROOT / "hrm/py.typed").is_file()
    assert 'Revealed type is "hrm.inference.model.TrainedModel"' in said
    assert "float64" in said, "arrays have their types"
    wrong = set(re.findall(r"^(\S+):(\d+): error:", said, re.MULTILINE))
    assert wrong == {("mistakes.py", "4"), ("mistakes.py", "5"), ("mistakes.py", "6")}, said
