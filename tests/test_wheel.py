"""The package as users install it: a wheel, built from the source distribution, in an environment of its own.

Its dependencies are those of the environment that runs the tests, which a line in a .pth file lends to the fresh one;
the project's own folder is not on its path.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.entry_points import CPU, ROOT, TINY_RUN
from tests.helpers.readme import python_block

pytestmark = pytest.mark.slow

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def run(command: list[str | Path], cwd: Path) -> str:
    """What a command prints; it must succeed."""
    names = {name for name in os.environ if name.startswith(("HYDRA_", "PYTHON"))}
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel or a source distribution of the project in `source`."""
    target.mkdir()
    script = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    run([sys.executable, "-c", script, target], source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("build")
    project = root / "project"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("hrm", "config"):
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    with tarfile.open(build("sdist", project, root / "sdist")) as archive:
        archive.extractall(root, filter="data")
    (unpacked,) = root.glob("hrm_torch-*")
    return build("wheel", unpacked, root / "wheel")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([programs / "python", "-c", where], folder).strip())
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installers: list[list[str | Path]] = [
        [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-index", "--no-deps", wheel],
        ["uv", "pip", "install", "--python", programs / "python", "--offline", "--no-deps", wheel],
    ]
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
    run(installers[0 if has_pip else 1], folder)
    return programs


def test_contents(wheel: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    yaml_files = {Path("hrm/_config", file.relative_to(ROOT / "config")) for file in (ROOT / "config").rglob("*.yaml")}
    sources = {file.relative_to(ROOT) for file in (ROOT / "hrm").rglob("*.py")}
    assert files >= yaml_files | sources | {Path("hrm/py.typed")}
    assert {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")} == {"hrm"}


def test_from_nothing_to_a_solved_board(environment: Path, tmp_path: Path) -> None:
    """The first commands that one types, in an empty folder."""
    hrm = environment / "hrm"
    assert "train" in run([hrm, "--help"], tmp_path)
    assert "hrm-torch" in run([hrm, "--version"], tmp_path)
    assert "sudoku_4x4" in run([hrm, "data", "list"], tmp_path)
    assert "experiment=sudoku_demo" in run([hrm, "train", "--help"], tmp_path)

    small = [option for option in TINY_RUN if not option.startswith("arch=")]
    small.append("data.build='sudoku --generate 2x2 --train-size 12 --test-size 5'")
    said = run([hrm, "train", *small, "checkpoint_path=runs/demo"], tmp_path)
    assert "experiment=sudoku_demo" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    assert "all/count" in run([hrm, "evaluate", "checkpoint=runs/demo", *CPU], tmp_path)

    solved = run([hrm, "evaluate", "checkpoint=sudoku", f"puzzle={PUZZLE}", "device=cpu"], tmp_path)
    assert [character for character in solved if character in "123456789"][:81] == list(SOLUTION)


def test_yaml_files_of_ones_own(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "my/experiment").mkdir(parents=True)
    (tmp_path / "my/experiment/mine.yaml").write_text("# @package _global_\nlr: 0.5\n")
    page = run([environment / "hrm", "train", "--config-dir", "my", "experiment=mine", "--help"], tmp_path)
    assert "experiment: maze_speedrun, mine, sudoku_demo" in page
    assert "lr=0.5 " in page


def test_python(environment: Path, tmp_path: Path) -> None:
    script = python_block("build_model")
    check = "assert outputs['logits'].shape == (2, 81, 11)\nprint(hrm.__file__)"
    file = run([environment / "python", "-c", f"{script}\n{check}"], tmp_path).strip()
    assert Path(file).is_relative_to(environment.parent), "the wheel's, not the checkout's"


def test_errors_that_name_an_extra_name_the_distribution(environment: Path, tmp_path: Path) -> None:
    check = "from hrm.config.paths import install_hint; print(install_hint('report'))"
    assert run([environment / "python", "-c", check], tmp_path) == "pip install 'hrm-torch[report]'\n"
    assert run([sys.executable, "-c", check], ROOT) == "pip install -e '.[report]'\n"
