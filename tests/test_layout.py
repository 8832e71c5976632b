"""The tests' own order: they mirror the package, and what several share lies in tests/helpers."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules that a file imports, by their full names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_only_helpers_are_imported(file: Path) -> None:
    """A test file that another one imports could not be moved, split or run without it."""
    tests = {path.stem for path in FILES if path.name.startswith("test_") or path.stem == "conftest"}
    wrong = {name for name in imported(file) if tests & set(name.split("."))}
    assert not wrong, "what several test files share belongs into tests/helpers"


def test_folders_are_those_of_what_is_tested() -> None:
    """Parts of the package, and folders beside it."""
    places = [*(TESTS.parent / "hrm").iterdir(), *TESTS.parent.iterdir()]
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")}
    assert folders <= {folder.name for folder in places if folder.is_dir()}
