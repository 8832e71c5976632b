"""Options of `hrm serve`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from hrm.config.checks import at_least, at_most, choice
from hrm.config.entry import DEVICES, DTYPES, QUANTIZE
from hrm.config.kernels import KernelsConfig
from hrm.errors import UserError


@dataclass
class ServeConfig:
    """Options of `hrm serve`."""

    # The model: a run folder, a weights file, the URL of one, a hub id such as owner/name, or sudoku, sudoku_small or
    # maze, which come with the package.
    checkpoint: str = MISSING
    # The pack it was trained on, or its URL, where the checkpoint says not what tokens mean.
    data_path: str | None = None
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine's
    port: int = 8000  # 0: any that is free
    slots: int | None = None  # puzzles computed at a time; null: what suits the device
    act_max_steps: int | None = None  # ACT steps at most, where a request does not say; null: as in training
    most_act_steps: int = 256  # that a request may ask for
    most_inputs: int = 256  # in one request
    most_augmentations: int = 64  # of each input
    most_body_bytes: int = 1 << 20  # of a request
    most_waiting: int = 4096  # puzzles that wait for a slot; beyond, requests are refused with status 429
    most_connections: int = 4096  # open at a time; beyond, status 503
    most_trajectory_tokens: int = 1 << 20  # puzzles x ACT steps x tokens of each, where every ACT step is to be shown
    # Where sessions of /infer/L and /infer/H live: local, in this process, or redis://USER:PASSWORD@HOST:PORT/NUMBER.
    memory: str = "local"
    most_sessions: int = 1024  # kept at a time; beyond, those that were not used for longest are forgotten
    most_session_bytes: int = 1 << 30  # of all of them together
    most_updates: int = 256  # of a level, that a request may ask for
    seconds_per_session: float = 3600.0  # that a session is kept after its last use
    # Database in which answers are recorded: sqlite:///FILE, postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or none.
    results: str = "sqlite:///hrm-results.sqlite"
    most_unrecorded_bytes: int = 1 << 26  # of answers kept while that database fails; beyond, they are not recorded
    seconds_per_request: float = 60.0  # for a request to arrive, and then to be answered, else status 408 or 504
    seconds_to_drain: float = 30.0  # for requests at hand to end after SIGTERM or Ctrl-C
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # What to compute in: bfloat16, float32, float16 or float64; auto: as in training, but float32 where a CPU has no
    # instructions for bfloat16.
    dtype: str = "auto"
    # 8 bit for the matmuls. int8: integers, on CPUs and NVIDIA GPUs; fp8: e4m3, on NVIDIA GPUs from Ada and Hopper on.
    # It changes answers: `hrm quantize` says how many.
    quantize: str = "none"
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available

    def __post_init__(self) -> None:
        choice("device", self.device, DEVICES)
        choice("dtype", self.dtype, DTYPES)
        choice("quantize", self.quantize, QUANTIZE)
        at_least("port", self.port, 0)
        at_most("port", self.port, 65535)
        for name in ("slots", "act_max_steps"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1)
        for name in (
            "most_act_steps",
            "most_inputs",
            "most_augmentations",
            "most_body_bytes",
            "most_waiting",
            "most_connections",
            "most_trajectory_tokens",
            "most_sessions",
            "most_session_bytes",
            "most_updates",
            "most_unrecorded_bytes",
        ):
            at_least(name, getattr(self, name), 1)
        if self.act_max_steps is not None:
            at_most("act_max_steps", self.act_max_steps, self.most_act_steps)
        if self.memory != "local" and not self.memory.startswith(("redis://", "rediss://", "unix://")):
            raise UserError("memory is neither local nor redis://USER:PASSWORD@HOST:PORT/NUMBER: give one of them.")
        at_least("seconds_per_session", self.seconds_per_session, 0.001)
        at_least("seconds_per_request", self.seconds_per_request, 0.001)
        at_least("seconds_to_drain", self.seconds_to_drain, 0)
