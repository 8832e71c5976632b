"""Options in YAML files by their old names: Hydra reads the files, and this translates what it read."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from hrm.config.renamed import schemas_below, with_new_names


class _YamlFiles(FileConfigSource):
    """Hydra's source of YAML files. What it loads is what is merged, so that the order in which values win stays."""

    schemas: Sequence[type] = ()  # of whole configurations

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        if isinstance(result.config, DictConfig):
            group = config_path.rpartition("/")[0]
            schemas, prefix = self.schemas, ""
            if group and result.header.get("package") != "_global_":
                schemas, prefix = list(schemas_below(schemas, group)), f"{group}."
            content = OmegaConf.to_container(result.config)
            if (translated := with_new_names(content, schemas, prefix)) != content:
                result.config = OmegaConf.create(translated)
        return result


def read_old_names(schemas: Sequence[type]) -> None:
    """From now on, let Hydra read YAML files in which options of `schemas` have old names."""
    Plugins.instance()  # which fills the registry, once
    # A class made here goes along with its schemas to processes that a launcher starts. Hydra takes no class of another
    # name than its own there.
    source = type(FileConfigSource.__name__, (_YamlFiles,), {"schemas": tuple(schemas)})
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = source
