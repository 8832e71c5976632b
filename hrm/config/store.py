"""The schemas, under the names that the YAML files' defaults lists use."""

from hydra.core.config_store import ConfigStore

from hrm.config.arch import HRMConfig
from hrm.config.evaluation import EvaluateConfig
from hrm.config.training import PretrainConfig


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that the YAML files' defaults lists use."""
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(group="schema/arch", name="hrm_v1", node=HRMConfig)
