"""What pyproject.toml cannot say: the YAML files of config/ travel in the wheel, as hrm/_config."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIG = Path("config")


class BuildWithConfig(build_py):
    """Copies config/ into the package that is built; an editable install finds it where it is."""

    def _yaml_files(self) -> dict[str, Path]:
        files = sorted(CONFIG.rglob("*.yaml"))
        return {str(Path(self.build_lib, "hrm", "_config", file.relative_to(CONFIG))): file for file in files}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for target, file in self._yaml_files().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(str(file), target)

    def get_source_files(self) -> list[str]:  # of which an sdist consists
        return [*super().get_source_files(), *map(str, sorted(CONFIG.rglob("*.yaml")))]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self._yaml_files())]

    def get_output_mapping(self) -> dict[str, str]:
        return super().get_output_mapping() | {target: str(file) for target, file in self._yaml_files().items()}


setup(cmdclass={"build_py": BuildWithConfig})
