"""What `results=` of an evaluation records: its metrics, what they are of, and the files that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hrm.checkpoint.states import environment_info
from hrm.checkpoint.weights import Checkpoint
from hrm.config import EvaluateConfig
from hrm.data.identity import pack_identity
from hrm.data.pack import Pack
from hrm.distributed.world import World
from hrm.errors import UserError
from hrm.reading import sha256_of
from hrm.results import open_store
from hrm.results.records import Artifact, Evaluation

if TYPE_CHECKING:
    from hrm.results.store import Store

# Options that change no metric, and those that other columns have.
_NOT_RECORDED = (
    *("checkpoint", "data_path", "input", "num_workers", "output", "output_dir", "puzzle", "report", "results"),
    *("save_outputs", "show"),
)


@contextmanager
def store_of(config: EvaluateConfig, world: World) -> Iterator[Store | None]:
    """A context with the store in which the main process records; checked first, for it is used at the end.

    Raises:
        UserError: it cannot be used.
    """
    if config.results is None or not world.is_main:
        yield None
        return
    with closing(open_store(config.results)) as store:
        store.check_writable()
        yield store


def artifact(kind: str, file: Path) -> Artifact:
    """A file that an evaluation wrote."""
    return Artifact(kind, str(file.resolve()), sha256_of(file))


def record(
    store: Store,
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    data_path: str,
    pack: Pack,
    metrics: Mapping[str, float],
    artifacts: Sequence[Artifact],
    kernels: str,
    world: World,
) -> Evaluation:
    """Record an evaluation.

    Args:
        data_path: as it was given: the path of the pack, or its URL.
        kernels: `hrm.kernels.describe` of the model's.

    Raises:
        UserError: it cannot be recorded.
    """
    evaluation = Evaluation(
        checkpoint=_shown(config.checkpoint, checkpoint.weights_file),
        weights_hash=sha256_of(checkpoint.weights_file),
        pack=_shown(data_path, pack.path),
        pack_hash=pack_identity(pack).arrays,
        options={name: value for name, value in asdict(config).items() if name not in _NOT_RECORDED},
        metrics=metrics,
        versions=environment_info(kernels, world),
        artifacts=artifacts,
    )
    try:
        store.add_evaluation(evaluation)
    except UserError as error:
        raise UserError(f"the metrics above are not recorded: {error}") from error
    return evaluation


def _shown(given: str, found: Path) -> str:
    """The path of what was found, unless it lies in a cache: then what was given, such as its URL."""
    return str(found.resolve()) if Path(given).exists() else given
