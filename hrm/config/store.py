"""The schemas, under the names that the YAML files' defaults lists use."""

import importlib

from hydra.core.config_store import ConfigStore

from hrm.config.evaluation import EvaluateConfig
from hrm.config.export import ExportConfig
from hrm.config.quantize import QuantizeConfig
from hrm.config.service import ServeConfig
from hrm.config.training import PretrainConfig

SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "quantize": QuantizeConfig,
}
"""Of each entry point, by the name of its YAML file."""

# Packages above this one with schemas of their own, which they put into Hydra's store when they are imported.
_WITH_SCHEMAS = ("hrm.models",)


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that the YAML files' defaults lists use."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    for package in _WITH_SCHEMAS:
        importlib.import_module(package)
