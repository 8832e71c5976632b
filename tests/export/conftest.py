"""What several files here share: an exported folder."""

from pathlib import Path

import pytest

from tests.helpers.exporting import HRM, export, loaded, pack_of_answers, run_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hrm export parts=all` wrote, in `out`, of the run `model`, compared on `pack`."""
    folder = tmp_path_factory.mktemp("exported")
    pack = pack_of_answers(folder / "pack", loaded(run_folder(folder / "model", HRM)))
    export(f"checkpoint={folder / 'model'}", f"output={folder / 'out'}", f"data_path={pack}", "parts=all", "puzzles=10")
    return folder
