"""What several test files share: the smallest model that has every part, and data for it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before PyTorch imports tqdm: on slow machines bars appear among lines

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.kernels.registry import EXPERIMENTAL, backend_names
from tests.helpers.entry_points import TINY_RUN, TRAINED_EXAMPLES, make_pack, train

hypothesis.settings.register_profile("patient", deadline=None)  # on busy machines a case may wait for its turn
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of experimental backends are slow ones: none is a default, and Triton's interpreter takes long."""
    experimental = set(backend_names(EXPERIMENTAL))
    for item in items:
        values = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if experimental & {value for value in values if isinstance(value, str)}:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal() -> None:
    """As a shell at a terminal leaves them: started by nohup or in the background, tests would have some ignored."""
    for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
        number = getattr(signal, name, None)  # there is no SIGHUP on Windows
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models here are so small that threads would only wait for one another, on a busy machine for very long."""
    torch.set_num_threads(1)


@pytest.fixture
def need_gib() -> Iterator[Callable[[float], None]]:
    """A function that takes so much of the GPU's memory for the test, which is skipped where less is free.

    Taken, not looked at: other processes may share the GPU.
    """

    def need(wanted: float) -> None:
        try:
            torch.empty(int(wanted * 2**30), dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            pytest.skip(f"it needs {wanted:g} GiB of the GPU's memory, and less is free")

    yield need
    torch.cuda.empty_cache()


@pytest.fixture
def tiny_arch() -> dict[str, Any]:
    """Fields of `config/arch/hrm_v1.yaml`; a test overrides those it is about."""
    return {
        "H_layers": 1,
        "L_layers": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "halt_max_steps": 4,
        "halt_exploration_prob": 0.0,
        "forward_dtype": "float32",
    }


@pytest.fixture
def random_batch() -> Callable[..., Batch]:
    """A function that draws a batch; about one label in five is ignored."""

    def draw(
        batch_size: int = 3, seq_len: int = 5, vocab_size: int = 7, num_puzzle_identifiers: int = 4, seed: int = 0
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def integers(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, dtype=torch.int32)

        ignored = integers(5, batch_size, seq_len) == 0
        return {
            "inputs": integers(vocab_size, batch_size, seq_len),
            "labels": integers(vocab_size, batch_size, seq_len).masked_fill(ignored, IGNORE_LABEL_ID),
            "puzzle_identifiers": integers(num_puzzle_identifiers, batch_size),
        }

    return draw


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pack` (4x4 boards with one blank) and `run`, which solves some of them and not others."""
    root = tmp_path_factory.mktemp("trained")
    make_pack(root / "pack", train_size=60, test_size=TRAINED_EXAMPLES, givens=15)
    train(
        *TINY_RUN,
        f"data_path={root / 'pack'}",
        f"checkpoint_path={root / 'run'}",
        "global_batch_size=12",
        "epochs=16",
        "eval_interval=8",
        "lr=3e-3",
        "lr_warmup_steps=10",
    )
    return root
