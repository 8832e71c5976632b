"""Every option there is, with its type and default: the schemas that Hydra checks each command line against.

The YAML files in `config/` choose values; what can be set at all, and what it means, stands here, a file for each
group. OmegaConf rejects unknown names and wrong types; the `__post_init__` methods reject values that no combination
could use.
"""

from hrm.config.checks import neighbours
from hrm.config.data import DataConfig
from hrm.config.entry import DEVICES, SAVEABLE_OUTPUTS
from hrm.config.evaluation import EnsembleConfig, EvaluateConfig
from hrm.config.export import ExportConfig
from hrm.config.kernels import KernelsConfig, kernels_config
from hrm.config.optim import OPTIMIZERS, OptimConfig
from hrm.config.parallel import ParallelConfig
from hrm.config.paths import CONFIG_DIR, PROJECT_DIR
from hrm.config.quantize import QuantizeConfig
from hrm.config.service import ServeConfig
from hrm.config.store import register_schemas
from hrm.config.training import PretrainConfig
from hrm.config.typed import option_names, to_typed

__all__ = [
    "CONFIG_DIR",
    "DEVICES",
    "OPTIMIZERS",
    "PROJECT_DIR",
    "SAVEABLE_OUTPUTS",
    "DataConfig",
    "EnsembleConfig",
    "EvaluateConfig",
    "ExportConfig",
    "KernelsConfig",
    "OptimConfig",
    "ParallelConfig",
    "PretrainConfig",
    "QuantizeConfig",
    "ServeConfig",
    "kernels_config",
    "neighbours",
    "option_names",
    "register_schemas",
    "to_typed",
]
